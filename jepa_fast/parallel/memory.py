"""What fits: bytes of every mode, worked out without a device, and the choice that follows."""

import os
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn

from jepa_fast.config import Config, replace
from jepa_fast.data.masks import sample_masks
from jepa_fast.model.jepa import JEPA
from jepa_fast.parallel.world import World, check_split

GB = 1e9
USABLE = 0.85  # of a device's memory; the rest for the allocator, communication buffers and the kernels' workspaces
ASSUMED = 80 * GB  # of a device, where there is none to ask


@dataclass(frozen=True)
class Choice:
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


def choose(config: Config, world: World) -> Choice:
    """The mode of `parallel.mode`; for `auto` the one with the least communication that fits, and why."""
    return _choose(config, world.size, world.local_size, _capacity(world))


def _choose(config: Config, size: int, local_size: int, capacity: float) -> Choice:
    asked = config.parallel.mode
    per_node = config.parallel.shards or (local_size if 1 < local_size < size and size % local_size == 0 else size)
    if asked == "hsdp":
        return Choice("hsdp", per_node, "as asked")
    if asked != "auto":
        return Choice(asked, size if asked == "fsdp" else 1, "as asked")
    if size == 1:
        return Choice("single", 1, "one process")
    room = USABLE * capacity
    whole = need(config, "ddp", size, 1).total
    if whole <= room:
        return Choice(
            "ddp", 1, f"everything fits on every device: {whole / GB:.1f} of {room / GB:.1f} GB; least communication"
        )
    if per_node < size and need(config, "hsdp", size, per_node).total <= room:
        return Choice(
            "hsdp",
            per_node,
            f"ddp needs {whole / GB:.1f} of {room / GB:.1f} GB; a copy for each {per_node} devices fits",
        )
    return Choice("fsdp", size, f"ddp needs {whole / GB:.1f} of {room / GB:.1f} GB")


def _capacity(world: World) -> float:
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world.local_size


def need(config: Config, mode: str, size: int, shards: int) -> Need:
    """Bytes of one process in `mode`: float32 weights, gradients and two moments; the target encoder's weights.

    Activations are an estimate: 34 bytes for each token, block and feature in bf16 (twice in fp32), from the tokens
    that this mask mode draws.
    """
    encoder, predictor = _count(config)
    cut = shards if mode in ("fsdp", "hsdp") else 1
    state = (16 * (encoder + predictor) + 4 * encoder) / cut
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
    """Length and channels of a series, where the data would tell them."""
    fallback = {"data.channels": 1, "data.series_length": 50 * config.model.num_patches}
    open_fields = {name: value for name, value in fallback.items() if not getattr(config.data, name.split(".")[1])}
    return replace(config, open_fields)


def _activations(config: Config, inputs: int) -> float:
    model, drawn = config.model, 64
    samples = np.arange(drawn)
    masks = sample_masks(config.masks, config.grid, config.train.seed, 0, np.zeros_like(samples), samples)
    context = len(masks.context) / drawn
    predicted = masks.num_targets * context + len(masks.targets) / drawn
    each = 34 * (1 if config.train.precision == "bf16" else 2)
    kept = context * model.depth * model.width + predicted * model.predictor_depth * model.predictor_width
    if config.parallel.recompute == "selective":  # the input of each block, and ten features' worth of products in bf16
        kept = kept * 24 / 34
    elif config.parallel.recompute == "full":  # the input of each block, and one block inside
        kept = kept * 4 / 34 + context * model.width + predicted * model.predictor_width
    target = config.num_tokens * model.width * 2  # its features, and one block at a time
    return inputs * (each * kept + each * target / 8)


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
    over = config.parallel.shards or local_size
    rows = [("ddp" if size > 1 else "single", config, "ddp", 1)]
    if size > 1:
        rows += [("fsdp", freed, "fsdp", size), ("fsdp, no reshard", kept, "fsdp", size)]
        rows += [(f"hsdp over {over}", freed, "hsdp", over)]
    for name, variant, mode, cut in rows:
        n = need(variant, mode, size, cut)
        lines.append(
            f"  {name:<17} {n.state / GB:39.2f} {n.gathered / GB:10.2f} {n.activations / GB:24.2f} {n.total / GB:7.2f} {n.traffic / GB:16.2f}"
        )
    choice = _choose(config, size, local_size, capacity)
    lines.append(f"--parallel.mode {config.parallel.mode}: {choice.mode} ({choice.reason})")
    return "\n".join(lines)
