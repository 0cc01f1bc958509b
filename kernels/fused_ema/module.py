"""`FusedEMA`: a module and its slow copy, updated and compared in one pass a step."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fused_ema.check import check_decay, check_gate
from fused_ema.frozen import frozen_copy
from fused_ema.op import LayerStats, ema_distances, ema_update_, local
from fused_ema.pairs import (
    Pair,
    built_of,
    check_alike,
    check_apart,
    check_model,
    check_module,
    locals_in,
    pair_modules,
    part,
    part_alike,
    plain_name,
)
from fused_ema.sharding import fsdp_modules, reshard, sum_over_shards
from fused_ema.spectral import SpectralDrift
from fused_ema.staging import Staging

_BLOCK = re.compile(r"^(.*?\.\d+)(?:\.|$)")  # 'blocks.3.attn.qkv.weight' -> 'blocks.3'

MIRROR = ("averaged module", "mirror")  # what errors call the two
Decay = float | Tensor | Callable[[int], float]


class FusedEMA:
    """theta_bar <- decay theta_bar + (1 - decay) theta over all parameters of a module, with ||theta - theta_bar||.

    model: the module that is trained. decay: a number, or a function of the number of updates made, read at every
    update; `update(decay)` overrides it for one call. target: an existing module with the same parameter names (the
    target encoder of JEPA, BYOL's or DINO's teacher); None makes a frozen copy, half precision in float32. Under FSDP2
    shard the target as the model and pass it. Wrappers (torch.compile, DDP, checkpointing) do not count in names.
    buffers: `copy` (BatchNorm statistics and the like as they are), `ema` (floating ones averaged, others copied) or
    `ignore`. Integer parameters are copied.
    mirror: a module of the same names that holds the average too, rounded to its own dtype: filled at once, then written in
    the same pass.
    device: where a copy is kept; "cpu" holds it in (pinned) host memory and stages the weights over.
    Tied parameters are updated once. A submodule that is replaced later is averaged from the next update on.
    Raises ValueError or TypeError, naming the parameter or buffer, where names, shapes, dtypes or shards do not pair up, and
    for what is sparse, nested, complex or on the meta device.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: Decay = 0.999,
        target: nn.Module | None = None,
        buffers: Literal["copy", "ema", "ignore"] = "copy",
        mirror: nn.Module | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
    ):
        if buffers not in ("copy", "ema", "ignore"):
            raise ValueError(f"buffers={buffers!r}; one of copy, ema, ignore")
        if not isinstance(decay, Tensor) and not callable(decay):
            check_decay(decay)
        if target is not None and device is not None:
            raise ValueError("device= is for the copy that FusedEMA makes; move the target itself instead")
        check_model(model, buffers != "ignore")
        self.decay, self.model, self.backend, self.num_updates = decay, model, backend, 0
        reshard(fsdp_modules(model))  # parameters that a forward has left gathered look unsharded
        for role, module in (("target", target), ("mirror", mirror)):
            if module is not None:
                check_module(role, module)
        self.module = frozen_copy(model, device) if target is None else target
        self.stats: LayerStats | None = None
        """Of the last update: one entry per name, on the device. Sums of this rank's shards, under FSDP2."""
        self._buffers, self._mirror_module = buffers, mirror
        self._fsdp = fsdp_modules(model, self.module, *([mirror] if mirror is not None else []))
        reshard(self._fsdp)
        self._pair()
        self._staging = Staging()
        self.spectral = SpectralDrift()
        self._fill_mirror()

    def _pair(self) -> None:
        """Pair the tensors of the modules as they are built now."""
        with_buffers, mirror = self._buffers != "ignore", self._mirror_module
        pairs = pair_modules(self.model, self.module, with_buffers)
        self._averaged, self._copied = part(pairs, self._buffers == "ema")  # parameters first
        self.names = [pair.name for pair in self._averaged if pair.kind == "parameter"]
        self._labels = [str(pair) for pair in self._averaged]
        self._mirror: list[Pair] = []  # averaged module to mirror, for each averaged pair; and for the copied ones
        self._mirrored: list[Pair] = []
        if mirror is not None:
            self._mirror, self._mirrored = part_alike(
                pair_modules(self.module, mirror, with_buffers, MIRROR), self._averaged, self._copied
            )
        check_apart(pairs, self._mirror + self._mirrored)
        self._held: list[Tensor] = []  # what is copied, as last checked
        self._built = built_of([self.model, self.module, *([mirror] if mirror is not None else [])])

    def _ready(self) -> None:
        """Before tensors are looked up: gathered parameters are sharded again, and what was rebuilt since is paired again."""
        reshard(self._fsdp)  # parameters that a forward has left gathered look unsharded
        if not self._built.holds():  # a submodule was replaced, wrapped, added or removed
            self._pair()
            self.stats = None  # of other tensors

    @torch.no_grad()
    def _fill_mirror(self) -> None:
        _copy(self._mirror + self._mirrored)

    @torch.no_grad()
    def update(
        self, decay: float | Tensor | None = None, gate: Tensor | None = None, stats: bool = True
    ) -> LayerStats | None:
        """One update, after the optimizer's step. Returns (and keeps as `stats`) squared distances in the order of `names`.

        gate: 0-dim bool tensor on the device; where it is False the averaged module stays bit-identical.
        stats: False measures nothing and returns None.
        Raises ValueError or TypeError, naming the parameter or buffer, before anything is written. No host
        synchronisation, except where the average is kept in host memory.
        """
        if gate is not None:
            check_gate(gate)
        if decay is None:
            decay = self.decay(self.num_updates) if callable(self.decay) else self.decay
        self._ready()
        self._check_copied()
        targets, sources = self._operands()
        device = targets[0].device if targets else torch.device("cpu")
        measured = ema_update_(
            targets, sources, decay.to(device) if isinstance(decay, Tensor) else decay,
            gate=None if gate is None else gate.to(device), backend=self.backend, stats=stats, names=self._labels,
            copies=locals_in(p.target for p in self._mirror) if self._mirror else None,
        )  # fmt: skip
        _copy(self._copied, gate)
        _copy(self._mirrored)
        self.num_updates += 1
        self.stats = self._of_parameters(measured) if stats else None
        return self.stats

    def _check_copied(self) -> None:
        """Looks at what was replaced since the last update: the rest fitted then and does now."""
        held = [slot.tensor for pair in self._copied + self._mirrored for slot in (pair.source, pair.target)]
        if any(new is not old for new, old in zip_longest(held, self._held)):
            for pair in self._copied:
                check_alike(pair)
            for pair in self._mirrored:
                check_alike(pair, MIRROR)
            self._held = held

    def _operands(self) -> tuple[list[Tensor], list[Tensor]]:
        """(targets, sources) of all that is averaged; sources staged where the average is kept in host memory."""
        try:
            targets, sources = locals_in(p.target for p in self._averaged), locals_in(p.source for p in self._averaged)
        except (KeyError, TypeError):  # one was taken out of its module: which?
            for pair in self._averaged:
                check_alike(pair)
            raise
        return targets, self._staging.on_device_of(targets, sources)

    def _of_parameters(self, stats: LayerStats) -> LayerStats:
        """Without the averaged buffers."""
        return LayerStats(*(values[: len(self.names)] for values in stats))

    @property
    def _parameters(self) -> list[Pair]:
        return self._averaged[: len(self.names)]

    def measure(self) -> LayerStats:
        """The squared distances as the modules are now, without an update; does not change `stats`."""
        self._ready()
        return self._of_parameters(ema_distances(*self._operands(), backend=self.backend, names=self._labels))

    @torch.no_grad()
    def distances(self, group_by: str | Callable[[str], str] | None = None) -> dict[str, float]:
        """{parameter name: ||theta - theta_bar||}, Frobenius, as of the last update (or now, if there was none).

        group_by="block" joins the parameters of one numbered block ('blocks.3'), or else of one module; a function
        gives the group of each name. The one place that synchronises, and all-reduces where parameters are sharded:
        call it on every rank.
        """
        self._ready()
        stats = self.stats if self.stats is not None else self.measure()
        return self._grouped(stats.distance_sq, group_by)

    @torch.no_grad()
    def norms(self, group_by: str | Callable[[str], str] | None = None) -> dict[str, float]:
        """{parameter name: ||theta||}, as `distances`; their ratio is the relative distance."""
        self._ready()
        stats = self.stats if self.stats is not None else self.measure()
        return self._grouped(stats.source_sq, group_by)

    def _grouped(self, values: Tensor, group_by: str | Callable[[str], str] | None) -> dict[str, float]:
        reshard(self._fsdp)  # parameters gathered by a forward without a backward look unsharded
        squares = sum_over_shards(values, [p.source.tensor for p in self._parameters])
        grouped: dict[str, float] = {}
        for name, square in zip(self.names, squares.tolist(), strict=True):
            group = _group(name, group_by)
            grouped[group] = grouped.get(group, 0.0) + square
        return {name: math.sqrt(square) for name, square in grouped.items()}

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, theta, theta_bar) as they are now, in the order of `names`; this rank's shards under FSDP2."""
        self._ready()
        for pair in self._parameters:
            yield pair.name, local(pair.source.tensor), local(pair.target.tensor)

    @torch.no_grad()
    def spectral_distances(self, iterations: int = 1) -> dict[str, float]:
        """{matrix name: largest singular value of theta - theta_bar}, by power iteration from the last call's vector.

        A lower bound that tightens from call to call. Tensors of more dimensions are taken as [first, rest];
        vectors are left out. Synchronises; call it on every rank.
        """
        self._ready()
        matrices = [p for p in self._parameters if p.source.tensor.ndim >= 2]
        return self.spectral([(p.name, p.source.tensor, p.target.tensor) for p in matrices], iterations)

    @contextmanager
    def swap(self) -> Iterator[nn.Module]:
        """Inside, the trained module computes with the averaged weights and buffers; afterwards it has its own again.

        Costs one copy of the model's weights. The average itself is not touched, whatever the model's dtype.
        """
        self._ready()
        pairs = self._averaged + self._copied
        for pair in pairs:
            check_alike(pair)
        with torch.no_grad():
            own = [tensor.clone() for tensor in locals_in(p.source for p in pairs)]
        try:
            with torch.no_grad():
                _write(locals_in(p.source for p in pairs), locals_in(p.target for p in pairs))
            yield self.model
        finally:
            reshard(self._fsdp)
            with torch.no_grad():
                _write(locals_in(p.source for p in pairs), own)

    def state_dict(self) -> dict[str, Any]:
        """The averaged module and the number of updates; nothing of the trained model. Wrappers do not count in names."""
        module = {plain_name(name): value for name, value in self.module.state_dict().items()}
        return {"module": module, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a model that was wrapped otherwise (torch.compile, checkpointing), too.

        Raises KeyError or RuntimeError on a state that does not fit.
        """
        num_updates = int(state["num_updates"])
        own = {plain_name(name): name for name in self.module.state_dict()}
        given = ((plain_name(name), value) for name, value in state["module"].items())
        self.module.load_state_dict({own.get(name, name): value for name, value in given})
        self.num_updates, self.stats = num_updates, None
        self._ready()
        self._fill_mirror()


def _copy(pairs: list[Pair], gate: Tensor | None = None) -> None:
    """Sources into targets; where the gate is False targets keep their bits."""
    new, old = locals_in(p.source for p in pairs), locals_in(p.target for p in pairs)
    if gate is not None:
        new = [torch.where(gate.to(o.device), n.to(o.device, o.dtype), o) for n, o in zip(new, old, strict=True)]
    _write(old, new)


def _write(into: list[Tensor], values: list[Tensor]) -> None:
    if into:  # torch refuses an empty list
        torch._foreach_copy_(into, values)


def _group(name: str, group_by: str | Callable[[str], str] | None) -> str:
    if group_by is None:
        return name
    if callable(group_by):
        return group_by(name)
    if group_by != "block":
        raise ValueError(f"group_by={group_by!r}; give 'block' or a function of the name")
    return block_of(name)


def block_of(name: str) -> str:
    """What group_by="block" files a parameter under: 'blocks.3' of 'blocks.3.attn.qkv.weight', else its module's name."""
    numbered = _BLOCK.match(name)
    return numbered.group(1) if numbered else (name.rpartition(".")[0] or name)
