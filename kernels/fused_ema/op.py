"""`ema_update_`: EMA of a list of tensors with per-layer distances, one pass over memory.

theta_bar <- theta_bar + (1 - decay) (theta - theta_bar), and from the same operands ||theta - theta_bar||^2,
||theta||^2 and the count of non-finite values, per layer. 12 bytes a parameter in float32: the traffic of the
update alone.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from fused_ema.backends import available_backends, choose_backend, make_plan
from fused_ema.check import (
    check_decay,
    check_gate,
    check_layers,
    check_overlap,
    check_pairs,
    check_placements,
    check_stored,
    label,
)
from fused_ema.plan import Plan, PlanCache

_PLAIN = {Tensor, Parameter}
_plans = PlanCache(capacity=64)


class LayerStats(NamedTuple):
    """Per layer, float64 [L], on the targets' device: reading them on the host is the only synchronisation."""

    distance_sq: Tensor  # ||theta - theta_bar||^2 of the values as stored after the update
    source_sq: Tensor  # ||theta||^2
    nonfinite: Tensor  # number of NaN or infinite values of theta


def ema_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    decay: float | Tensor,
    layers: Sequence[int] | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
    copies: Sequence[Tensor] | None = None,
    stats: bool = True,
    names: Sequence[str] | None = None,
) -> LayerStats:
    """Move `targets` towards `sources` in place, in float32 arithmetic, and measure the squared distance left.

    targets, sources: equally long lists, pairwise of the same shape and device; float32, bfloat16 or float16, each in
    its own dtype; float64 too, in its own arithmetic and by plain torch. DTensors by their local shards (the sums are
    then those of the shards).
    decay: a float in [0, 1], or a 0-dim float64 tensor on the device, which may change under a CUDA graph and is
    range-checked on the CPU only.
    layers: a layer number for each tensor, from 0; default one layer each.
    gate: 0-dim bool tensor on the device; False leaves every target bit-identical (distances are still measured).
    backend: "auto", "triton", "cpp" or "torch"; `available_backends()` says what there is.
    copies: one tensor for each target, any of those dtypes, that receives the stored average in the same pass.
    stats: False measures nothing: the result is NaN. Where memory is the limit that saves no time.
    names: what errors call the tensors; default their place in the lists.
    Raises ValueError or TypeError, naming the tensor, before anything is written. No host synchronisation.
    """
    return _run_pass(targets, sources, decay, layers, gate, backend, copies, stats, names, writes=True)


def ema_distances(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    layers: Sequence[int] | None = None,
    backend: str = "auto",
    names: Sequence[str] | None = None,
) -> LayerStats:
    """What `ema_update_` would measure, without an update: no value changes, and autograd sees no write."""
    return _run_pass(targets, sources, 1.0, layers, None, backend, None, True, names, writes=False)


def _run_pass(
    targets: Iterable[Tensor],
    sources: Iterable[Tensor],
    decay: float | Tensor,
    layers: Sequence[int] | None,
    gate: Tensor | None,
    backend: str,
    copies: Iterable[Tensor] | None,
    stats: bool,
    names: Sequence[str] | None,
    writes: bool,
) -> LayerStats:
    targets, sources = locals_of(targets, sources, "target", "source", names)
    copied = locals_of(copies, targets, "copy", "target", names)[0] if copies is not None else []
    if layers is None:
        layers = range(len(targets))
    else:
        check_layers(layers, len(targets))
    numbers = [int(layer) for layer in layers]
    num_layers = max(numbers, default=-1) + 1
    device = targets[0].device if targets else torch.device("cpu")
    weight = _weight(decay, device)
    if not writes:
        gate = torch.zeros((), dtype=torch.bool, device=device)
    elif gate is not None:
        check_gate(gate)
        if gate.device != device:
            raise ValueError(f"gate is on {gate.device}, the targets on {device}")
    arguments = (targets, sources, copied, weight, gate, numbers, num_layers, backend, stats)
    with torch.no_grad():
        if _traced(targets):
            check_pairs(targets, sources, copied, names)  # here: one meta tensor would make the operator a fake one
            sums = torch.ops.fused_ema.update_(*arguments)
        else:
            sums = _run(*arguments, names)
            if writes:  # as the operator does: autograd sees that its saved tensors changed
                increment_version([*targets, *copied])
    return LayerStats(*sums.unbind(0))


def _run(
    targets: list[Tensor],
    sources: list[Tensor],
    copies: list[Tensor],
    weight: Tensor,
    gate: Tensor | None,
    layers: list[int],
    num_layers: int,
    backend: str,
    measure: bool,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Returns float64 [3, num_layers]. Addresses are known here, so this is where pairs are checked and planned."""
    if weight.device.type == "cpu":
        check_decay(1.0 - weight.item())  # a compiled step may have left a tensor in it
    chosen = choose_backend(backend, weight.device)

    def build() -> Plan:
        check_pairs(targets, sources, copies, names)
        for role, tensors in (("target", targets), ("source", sources), ("copy", copies)):
            for i, tensor in enumerate(tensors):
                check_stored(label(role, i, names), tensor)
        written = [(label("target", i, names), t) for i, t in enumerate(targets)]
        written += [(label("copy", i, names), c) for i, c in enumerate(copies)]
        check_overlap(written, [(label("source", i, names), s) for i, s in enumerate(sources)])
        return make_plan(chosen, targets, sources, copies, layers, num_layers)

    plan = _plans.get(chosen, targets, sources, copies, layers, build)
    sums = plan.run(targets, sources, copies, weight, gate, measure)
    return sums if measure else weight.new_full((3, num_layers), math.nan)


def _operator(
    targets: list[Tensor],
    sources: list[Tensor],
    copies: list[Tensor],
    weight: Tensor,
    gate: Tensor | None,
    layers: list[int],
    num_layers: int,
    backend: str,
    measure: bool,
) -> Tensor:
    return _run(targets, sources, copies, weight, gate, layers, num_layers, backend, measure)


_update = torch.library.custom_op("fused_ema::update_", _operator, mutates_args=("targets", "copies"))


@_update.register_fake
def _(targets, sources, copies, weight, gate, layers, num_layers, backend, measure) -> Tensor:
    return weight.new_empty(3, num_layers, dtype=torch.float64)


def local(tensor: Tensor) -> Tensor:
    """A DTensor's shard, the live storage and not a copy; any other tensor itself."""
    if type(tensor) in _PLAIN:
        return tensor
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a tensor is needed, got {tensor!r}")
    if not hasattr(tensor, "to_local"):
        return tensor
    return tensor.to_local() if torch.compiler.is_compiling() else tensor._local_tensor  # type: ignore[attr-defined]


def shards(tensors: list[Tensor]) -> list[Tensor]:
    """DTensors as their shards."""
    return tensors if _PLAIN.issuperset(map(type, tensors)) else [local(t) for t in tensors]


def locals_of(
    tensors: Iterable[Tensor], others: Iterable[Tensor], role: str, other_role: str, names: Sequence[str] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists that must pair up, DTensors as their shards. Raises ValueError or TypeError if they do not."""
    many = "copies" if role == "copy" else f"{role}s"
    if isinstance(tensors, Tensor) or isinstance(others, Tensor):
        raise TypeError(f"{many} and {other_role}s must be lists of tensors, got a tensor; write [tensor]")
    tensors, others = list(tensors), list(others)
    if names is not None and len(names) != len(tensors):
        raise ValueError(f"{len(names)} names for {len(tensors)} {many}")
    if len(tensors) != len(others):
        raise ValueError(f"{len(tensors)} {many} but {len(others)} {other_role}s; they must pair up")
    if _PLAIN.issuperset(map(type, tensors)) and _PLAIN.issuperset(map(type, others)):
        return tensors, others
    for i, pair in enumerate(zip(tensors, others, strict=True)):
        for which, tensor in zip((role, other_role), pair, strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{label(which, i, names)} is a {type(tensor).__name__}, not a tensor")
        check_placements(label(role, i, names), pair[0], label(other_role, i, names), pair[1])
    return shards(tensors), shards(others)


def _traced(tensors: Sequence[Tensor]) -> bool:
    """Whether somebody looks on and must see an operator (compile, export, fake tensors). Else the kernel is called
    directly: the dispatcher takes 2 microseconds a tensor, which is more than a small model's update."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or not _PLAIN.issuperset(map(type, tensors))
    )


def _weight(decay: float | Tensor, device: torch.device) -> Tensor:
    """1 - decay, formed in float64 (in float32, 1 - .9999 is off by 2e-4), without waiting for the device."""
    if isinstance(decay, Tensor):
        if decay.ndim or decay.dtype != torch.float64:
            raise TypeError(f"a decay tensor must be 0-dim float64, got {decay.dtype} {list(decay.shape)}")
        if decay.device != device:
            raise ValueError(f"the decay tensor is on {decay.device}, the targets on {device}")
        return 1.0 - decay.detach()
    check_decay(decay)
    return torch.full((), 1.0 - float(decay), dtype=torch.float64, device=device)


__all__ = ["LayerStats", "available_backends", "ema_distances", "ema_update_", "local"]
