"""`FusedEMA`: a module and its slow copy, updated and compared in one pass a step."""

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fused_ema.check import check_decay
from fused_ema.op import LayerStats, ema_update_, local
from fused_ema.pairs import Pair, buffer_slots, locals_in, pair_slots, parameter_slots
from fused_ema.sharding import fsdp_modules, reshard, sum_over_shards
from fused_ema.spectral import SpectralDrift
from fused_ema.staging import Staging

_BLOCK = re.compile(r"^(.*?\.\d+)(?:\.|$)")  # 'blocks.3.attn.qkv.weight' -> 'blocks.3'

Decay = float | Tensor | Callable[[int], float]


class FusedEMA:
    """theta_bar <- decay theta_bar + (1 - decay) theta over all parameters of a module, with ||theta - theta_bar||.

    model: the module that is trained. decay: a number, or a function of the number of updates made, read at every
    update; `update(decay)` overrides it for one call. target: an existing module with the same parameter names (the
    target encoder of JEPA, BYOL's or DINO's teacher); None makes a frozen copy, parameters in float32. Under FSDP2
    shard the target as the model and pass it.
    buffers: `copy` (BatchNorm statistics and the like as they are), `ema` (floating ones averaged too) or `ignore`.
    mirror: a module of the same names that holds the average too, rounded to its own dtype: filled at once, then written in
    the same pass.
    device: where a copy is kept; "cpu" holds it in (pinned) host memory and stages the weights over.
    Tied parameters are updated once. Raises ValueError where names, shapes or shards do not pair up.
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
        self.decay, self.model, self.backend, self.num_updates = decay, model, backend, 0
        self.module = _frozen_copy(model, device) if target is None else target
        self.stats: LayerStats | None = None
        """Of the last update: one entry per name, on the device. Sums of this rank's shards, under FSDP2."""
        pairs = pair_slots("parameter", parameter_slots(model), parameter_slots(self.module))
        self._pairs = [p for p in pairs if p.source.tensor.is_floating_point()]
        self.names = [pair.name for pair in self._pairs]
        self._averaged, self._copied = _split_buffers(model, self.module, buffers)
        self._mirror: list[Pair] = []
        if mirror is not None:
            self._mirror = pair_slots("parameter", parameter_slots(self.module), parameter_slots(mirror))
            if [p.name for p in self._mirror] != self.names:
                raise ValueError("the mirror's parameters are tied otherwise than the averaged module's")
        self._mirrored_buffers: list[Pair] = []
        if mirror is not None and buffers != "ignore":
            self._mirrored_buffers = pair_slots("buffer", buffer_slots(self.module), buffer_slots(mirror))
        self._fsdp = fsdp_modules(model, self.module, *([mirror] if mirror is not None else []))
        self._staging = Staging()
        self.spectral = SpectralDrift()
        self._fill_mirror(self._mirror + self._mirrored_buffers)

    @torch.no_grad()
    def _fill_mirror(self, pairs: list[Pair]) -> None:
        if pairs:
            reshard(self._fsdp)
            _copy(locals_in(p.target for p in pairs), locals_in(p.source for p in pairs))

    @torch.no_grad()
    def update(
        self, decay: float | Tensor | None = None, gate: Tensor | None = None, stats: bool = True
    ) -> LayerStats | None:
        """One update, after the optimizer's step. Returns (and keeps as `stats`) squared distances in the order of `names`.

        gate: 0-dim bool tensor on the device; where it is False the averaged module stays bit-identical.
        stats: False measures nothing and returns None.
        No host synchronisation, except where the average is kept in host memory.
        """
        if decay is None:
            decay = self.decay(self.num_updates) if callable(self.decay) else self.decay
        reshard(self._fsdp)
        measured = self._pass(self._pairs, decay, gate, locals_in(p.target for p in self._mirror), stats)
        self.stats = measured if stats else None
        if self._averaged:
            self._pass(self._averaged, decay, gate, [], stats=False)
        for _, source, target in self._copied:
            mine, theirs = local(source.tensor), local(target.tensor)
            new = mine.to(device=theirs.device, dtype=theirs.dtype)
            theirs.copy_(new if gate is None else torch.where(gate.to(theirs.device), new, theirs))
        self._fill_mirror(self._mirrored_buffers)
        self.num_updates += 1
        return self.stats

    def _pass(
        self, pairs: list[Pair], decay: float | Tensor, gate: Tensor | None, copies: list[Tensor], stats: bool = True
    ) -> LayerStats:
        targets = locals_in(p.target for p in pairs)
        sources = self._staging.on_device_of(targets, locals_in(p.source for p in pairs))
        device = targets[0].device if targets else torch.device("cpu")
        gate = gate if gate is None else gate.to(device)
        decay = decay.to(device) if isinstance(decay, Tensor) else decay
        return ema_update_(targets, sources, decay, gate=gate, backend=self.backend, copies=copies, stats=stats)

    def measure(self) -> LayerStats:
        """The squared distances as the modules are now, without an update; does not change `stats`."""
        reshard(self._fsdp)
        targets = locals_in(p.target for p in self._pairs)
        closed = torch.zeros((), dtype=torch.bool, device=targets[0].device if targets else None)
        return self._pass(self._pairs, 1.0, closed, [])

    @torch.no_grad()
    def distances(self, group_by: str | Callable[[str], str] | None = None) -> dict[str, float]:
        """{parameter name: ||theta - theta_bar||}, Frobenius, as of the last update (or now, if there was none).

        group_by="block" joins the parameters of one numbered block ('blocks.3'), or else of one module; a function
        gives the group of each name. The one place that synchronises, and all-reduces where parameters are sharded:
        call it on every rank.
        """
        stats = self.stats if self.stats is not None else self.measure()
        return self._grouped(stats.distance_sq, group_by)

    @torch.no_grad()
    def norms(self, group_by: str | Callable[[str], str] | None = None) -> dict[str, float]:
        """{parameter name: ||theta||}, as `distances`; their ratio is the relative distance."""
        stats = self.stats if self.stats is not None else self.measure()
        return self._grouped(stats.source_sq, group_by)

    def _grouped(self, values: Tensor, group_by: str | Callable[[str], str] | None) -> dict[str, float]:
        reshard(self._fsdp)  # parameters gathered by a forward without a backward look unsharded
        squares = sum_over_shards(values, [p.source.tensor for p in self._pairs])
        grouped: dict[str, float] = {}
        for name, square in zip(self.names, squares.tolist(), strict=True):
            group = _group(name, group_by)
            grouped[group] = grouped.get(group, 0.0) + square
        return {name: math.sqrt(square) for name, square in grouped.items()}

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, theta, theta_bar) as they are now, in the order of `names`; this rank's shards under FSDP2."""
        reshard(self._fsdp)
        for pair in self._pairs:
            yield pair.name, local(pair.source.tensor), local(pair.target.tensor)

    @torch.no_grad()
    def spectral_distances(self, iterations: int = 1) -> dict[str, float]:
        """{matrix name: largest singular value of theta - theta_bar}, by power iteration from the last call's vector.

        A lower bound that tightens from call to call. Tensors of more dimensions are taken as [first, rest];
        vectors are left out. Synchronises; call it on every rank.
        """
        reshard(self._fsdp)
        matrices = [p for p in self._pairs if p.source.tensor.ndim >= 2]
        return self.spectral([(p.name, p.source.tensor, p.target.tensor) for p in matrices], iterations)

    @contextmanager
    def swap(self) -> Iterator[nn.Module]:
        """Inside, the trained module computes with the averaged weights and buffers; afterwards it has its own again.

        Costs one copy of the model's weights. The average itself is not touched, whatever the model's dtype.
        """
        pairs = self._pairs + self._averaged + self._copied
        reshard(self._fsdp)
        with torch.no_grad():
            own = [tensor.clone() for tensor in locals_in(p.source for p in pairs)]
            _copy(locals_in(p.source for p in pairs), locals_in(p.target for p in pairs))
        try:
            yield self.model
        finally:
            reshard(self._fsdp)
            with torch.no_grad():
                _copy(locals_in(p.source for p in pairs), own)

    def state_dict(self) -> dict[str, Any]:
        """The averaged module and the number of updates; nothing of the trained model."""
        return {"module": self.module.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError or RuntimeError on a state that does not fit."""
        num_updates = int(state["num_updates"])
        self.module.load_state_dict(state["module"])
        self.num_updates, self.stats = num_updates, None
        self._fill_mirror(self._mirror + self._mirrored_buffers)


def _copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value)


def _frozen_copy(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    if any(local(p) is not p for p in model.parameters()):
        raise ValueError(
            "the model is sharded: build the averaged module, shard it the same way and pass it as target="
        )
    averaged = copy.deepcopy(model).requires_grad_(False)
    if device is not None:
        averaged = averaged.to(device)
    float32: dict[int, Tensor] = {}  # tied parameters stay tied
    for slot in (*parameter_slots(averaged).values(), *buffer_slots(averaged).values()):
        p = slot.tensor
        if p.is_floating_point() and p.dtype != torch.float32:
            float32.setdefault(id(p), p.detach().float())
            p.data = float32[id(p)]
    if device is not None and torch.device(device).type == "cpu" and torch.cuda.is_available():
        for p in averaged.parameters():
            p.data = p.data.pin_memory()
    return averaged


def _split_buffers(model: nn.Module, target: nn.Module, mode: str) -> tuple[list[Pair], list[Pair]]:
    """(averaged, copied) pairs of buffers."""
    if mode == "ignore":
        return [], []
    mine, theirs = buffer_slots(model), buffer_slots(target)
    pairs = pair_slots("buffer", mine, theirs)
    if mode == "copy":
        return [], pairs
    floating = [p for p in pairs if p.source.tensor.is_floating_point()]
    return floating, [p for p in pairs if not p.source.tensor.is_floating_point()]


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
