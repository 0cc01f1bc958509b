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
from fused_ema.check import check_decay, check_gate, check_layers, check_materialised, check_pairs
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
) -> LayerStats:
    """Move `targets` towards `sources` in place, in float32 arithmetic, and measure the squared distance left.

    targets, sources: equally long lists, pairwise of the same shape and device; float32, bfloat16 or float16,
    each in its own dtype; DTensors by their local shards (the sums are then those of the shards).
    decay: a float in [0, 1], or a 0-dim float64 tensor on the device (not range-checked; may change under a CUDA graph).
    layers: a layer number for each tensor, from 0; default one layer each.
    gate: 0-dim bool tensor on the device; False leaves every target bit-identical (distances are still measured).
    backend: "auto", "triton", "cpp" or "torch"; `available_backends()` says what there is.
    copies: one tensor for each target, any float dtype, that receives the stored average in the same pass.
    stats: False measures nothing: the result is NaN. Where memory is the limit that saves no time.
    Raises ValueError or TypeError, naming the tensor, before anything is written. No host synchronisation.
    """
    targets, sources = locals_of(targets, "target"), locals_of(sources, "source")
    copied = locals_of(copies if copies is not None else (), "copy")
    if len(targets) != len(sources):
        raise ValueError(f"{len(targets)} targets but {len(sources)} sources; they must pair up")
    if copied and len(copied) != len(targets):
        raise ValueError(f"{len(targets)} targets but {len(copied)} copies; give one for each target, or none")
    if layers is None:
        numbers_ = list(range(len(targets)))
    else:
        check_layers(layers, len(targets))
        numbers_ = [int(layer) for layer in layers]
    device = targets[0].device if targets else torch.device("cpu")
    weight = _weight(decay, device)
    if gate is not None:
        check_gate(gate, device)
    num_layers = max(numbers_) + 1 if numbers_ else 0
    arguments = (targets, sources, copied, weight, gate, numbers_, num_layers, backend, stats)
    with torch.no_grad():
        if _traced(targets):
            check_materialised(targets, sources, copied)
            sums = torch.ops.fused_ema.update_(*arguments)
        else:
            sums = _run(*arguments)
            increment_version([*targets, *copied])  # as the operator does: autograd sees that its saved tensors changed
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
) -> Tensor:
    """Returns float64 [3, num_layers]. Addresses are known here, so this is where pairs are checked and planned."""
    chosen = choose_backend(backend, weight.device)

    def build() -> Plan:
        check_materialised(targets, sources, copies)
        check_pairs(targets, sources, copies)
        return make_plan(chosen, targets, sources, copies, layers, num_layers)

    plan = _plans.get(chosen, targets, sources, copies, layers, build)
    sums = plan.run(targets, sources, copies, weight, gate, measure)
    return sums if measure else weight.new_full((3, num_layers), math.nan)


_update = torch.library.custom_op("fused_ema::update_", _run, mutates_args=("targets", "copies"))


@_update.register_fake
def _(targets, sources, copies, weight, gate, layers, num_layers, backend, measure) -> Tensor:
    return weight.new_empty(3, num_layers, dtype=torch.float64)


def local(tensor: Tensor) -> Tensor:
    """A DTensor's shard, the live storage and not a copy; any other tensor itself."""
    if type(tensor) in _PLAIN or not hasattr(tensor, "to_local"):
        return tensor
    return tensor.to_local() if torch.compiler.is_compiling() else tensor._local_tensor  # type: ignore[attr-defined]


def locals_of(tensors: Iterable[Tensor], role: str = "tensor") -> list[Tensor]:
    tensors = list(tensors)
    if _PLAIN.issuperset(map(type, tensors)):
        return tensors
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{role} {i} is a {type(tensor).__name__}, not a tensor")
    return [local(t) for t in tensors]


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
        return 1.0 - decay
    check_decay(decay)
    return torch.full((), 1.0 - float(decay), dtype=torch.float64, device=device)


__all__ = ["LayerStats", "available_backends", "ema_update_", "local"]
