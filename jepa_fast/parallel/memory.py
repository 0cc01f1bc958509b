"""What fits: bytes of every mode, worked out without a device, and the choice that follows."""

import dataclasses
import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from jepa_fast.config import Config, Parallel, replace
from jepa_fast.flops import EMA_BYTES, STATE_BYTES, activation_bytes
from jepa_fast.inputs import find
from jepa_fast.masks.ladder import ladder
from jepa_fast.model.jepa import JEPA
from jepa_fast.parallel.world import World, check_split

GB = 1e9
USABLE = 0.85  # of a device's memory; the rest for the allocator, communication buffers and the kernels' workspaces
ASSUMED = 80 * GB  # of a device, where there is none to ask


@dataclass(frozen=True)
class Layout:
    """How the work is shared out."""

    mode: str  # single, ddp, fsdp, hsdp
    shards: int  # processes that one copy of the model is cut over
    reason: str = ""

    @property
    def sharded(self) -> bool:
        return self.mode in ("fsdp", "hsdp")


@dataclass(frozen=True)
class Need:
    """Bytes on one device; `traffic` is what one process sends in a step."""

    state: float  # weights, gradients, moments, target encoder
    gathered: float  # weights of other processes' shards, while they are needed
    activations: float
    traffic: float

    @property
    def total(self) -> float:
        return self.state + self.gathered + self.activations


def choose(config: Config, world: World) -> Layout:
    """The mode of `parallel.mode`; for `auto` the one with the least communication that fits, and why."""
    return _choose(config, world.size, world.local_size, _capacity(world))


def _choose(config: Config, size: int, local_size: int, capacity: float) -> Layout:
    asked, over = config.parallel.mode, _copy_size(config, size, local_size)
    if asked == "hsdp":
        return Layout("hsdp", over, "as asked")
    if asked != "auto":
        return Layout(asked, size if asked == "fsdp" else 1, "as asked")
    room = USABLE * capacity
    whole = need(config, "ddp", size, 1).total
    if size == 1:
        return Layout("single", 1, "one process" + _advice(config, size, whole, room))
    if whole <= room:
        return Layout(
            "ddp", 1, f"everything fits on every device: {whole / GB:.1f} of {room / GB:.1f} GB; least communication"
        )
    said = f"ddp needs {whole / GB:.1f} of {room / GB:.1f} GB"
    if over < size and need(config, "hsdp", size, over).total <= room:
        return Layout("hsdp", over, f"{said}; a copy for each {over} devices fits")
    return Layout("fsdp", size, said + _advice(config, size, need(config, "fsdp", size, size).total, room))


def _copy_size(config: Config, size: int, local_size: int) -> int:
    """Processes that hsdp cuts one copy over: as asked, or those of one machine; all, if machines differ."""
    return config.parallel.shards or (local_size if 1 < local_size < size and size % local_size == 0 else size)


def _advice(config: Config, size: int, needed: float, room: float) -> str:
    """What to do if the mode that needs least does not fit either: the largest micro batch that does."""
    if needed <= room:
        return ""
    share = config.train.batch_size // size
    for mode, cut in (("ddp", 1), ("fsdp", size)):
        all_at_once = need(config, mode, size, cut)
        left = room - all_at_once.state - all_at_once.gathered
        fitting = [m for m in range(1, share) if share % m == 0 and _activations(config, m) <= left]
        if fitting:
            name = f", with which {mode} fits" if size > 1 else ""
            return f"; even so {needed / GB:.1f} of {room / GB:.1f} GB: give --parallel.micro_batch {fitting[-1]}{name}"
    return f"; even so {needed / GB:.1f} of {room / GB:.1f} GB: too much for so few devices"


def _capacity(world: World) -> float:
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world.local_size


def need(config: Config, mode: str, size: int, shards: int) -> Need:
    """Bytes of one process in `mode`: float32 weights, gradients and two moments; the target encoder's weights.

    Activations are an estimate (`flops.activation_bytes`), for the longest batch that the masks are seen to give.
    """
    encoder, predictor = _count(config)
    cut = shards if mode in ("fsdp", "hsdp") else 1
    state = (STATE_BYTES * (encoder + predictor) + EMA_BYTES * encoder) / cut
    width = 2 if config.train.precision == "bf16" else 4
    gathered, traffic = 0.0, 0.0
    if mode == "ddp":
        traffic = 2 * (size - 1) / size * 4 * (encoder + predictor)  # an all-reduce of float32 gradients
    elif cut > 1:
        block = encoder / config.model.depth * width * (1 + config.parallel.prefetch)
        gathered = block if config.parallel.reshard_after_forward else (encoder + predictor) * width + block
        times = 2 if config.parallel.reshard_after_forward else 1  # gathered again for the backward
        reduce = 2 if config.parallel.reduce == "bf16" else 4
        gathers = times * (encoder + predictor) + encoder  # and once for the target encoder
        traffic = (cut - 1) / cut * (gathers * width + (encoder + predictor) * reduce)
        if mode == "hsdp":
            copies = size // cut
            traffic += 2 * (copies - 1) / copies * reduce * (encoder + predictor) / cut
    share = config.train.batch_size // size
    return Need(state, gathered, _activations(config, min(share, config.parallel.micro_batch or share)), traffic)


@cache
def _count(config: Config) -> tuple[int, int]:
    """Parameters of one encoder and of the predictor."""
    with torch.device("meta"):
        jepa = JEPA(_sized(config))

    def count(part: nn.Module) -> int:
        return sum(p.numel() for p in part.parameters())

    return count(jepa.context_encoder), count(jepa.predictor)


def _sized(config: Config) -> Config:
    """With sizes assumed that the data would decide."""
    return replace(config, find(config.data.kind).assumed(config))


def _activations(config: Config, inputs: int) -> float:
    """Of the longest batch that a run is to expect: masks vary, and a run must not end on its longest ones."""
    return activation_bytes(config, inputs, *_longest_batch(dataclasses.replace(config, parallel=Parallel()), inputs))


@cache
def _longest_batch(config: Config, inputs: int) -> tuple[int, int]:
    """Rows of context encoder and predictor: the last rung but that one which holds what no run will draw."""
    rungs = ladder(config, inputs)
    context, predictor = (r[-2:][0] for r in (rungs.context, rungs.predictor))
    return context, predictor


def dry_run(config: Config, size: int) -> str:
    """The arithmetic for `size` processes, 8 to a machine, as text. Touches no device. Raises UsageError as a run would."""
    check_split(config, size)
    local_size = min(8, size)
    cuda = torch.cuda.is_available()
    capacity = float(torch.cuda.get_device_properties(0).total_memory) if cuda else ASSUMED
    encoder, predictor = _count(config)
    share = config.train.batch_size // size
    micro = min(share, config.parallel.micro_batch or share)
    lines = [
        f"{config.preset} on {size} process(es), {local_size} to a machine: global batch {config.train.batch_size}, {share} a process, "
        f"{-(-share // micro)} forward(s) of at most {micro}",
        f"encoder {encoder / 1e6:.1f} M, predictor {predictor / 1e6:.1f} M parameters; {config.train.precision}; "
        f"device memory {capacity / GB:.0f} GB{'' if cuda else ' (assumed)'}, of which {USABLE:.0%} is counted on",
        "GB of one process:  weights, gradients, moments, target   gathered   activations (estimate)   total   sent in a step",
    ]
    kept = replace(config, {"parallel.reshard_after_forward": False})
    freed = replace(config, {"parallel.reshard_after_forward": True})
    over = _copy_size(config, size, local_size)
    rows = [("ddp" if size > 1 else "single", config, "ddp", 1)]
    if size > 1:
        rows += [("fsdp", freed, "fsdp", size), ("fsdp, no reshard", kept, "fsdp", size)]
    if over < size:
        rows += [(f"hsdp over {over}", freed, "hsdp", over)]
    for name, variant, mode, cut in rows:
        n = need(variant, mode, size, cut)
        lines.append(
            f"  {name:<17} {n.state / GB:39.2f} {n.gathered / GB:10.2f} {n.activations / GB:24.2f} {n.total / GB:7.2f} {n.traffic / GB:16.2f}"
        )
    layout = _choose(config, size, local_size, capacity)
    lines.append(f"--parallel.mode {config.parallel.mode}: {layout.mode} ({layout.reason})")
    return "\n".join(lines)
