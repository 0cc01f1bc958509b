"""The update in plain torch, one tensor at a time: what every kernel is tested and timed against.

Slow and obvious. Any device that has float64; synchronises nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_reference(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    weight: Tensor,
    layers: Sequence[int],
    num_layers: int,
    gate: Tensor | None = None,
    copies: Sequence[Tensor] = (),
    measure: bool = True,
) -> Tensor:
    """theta_bar += weight * (theta - theta_bar) in place, in float32 (float64 where one of the two is); returns sums of
    squares, float64 [3, num_layers].

    weight: 0-dim float64, 1 - decay. layers: layer of each tensor. gate: 0-dim bool; False leaves targets and copies
    bit-identical, by selection. copies: receive the stored average, rounded to their dtype (none, or one per target).
    measure: False leaves the sums 0.
    Rows: ||theta - theta_bar||^2 of the stored values, ||theta||^2, number of non-finite values of theta.
    """
    stats = torch.zeros(3, num_layers, dtype=torch.float64, device=weight.device)
    closed = gate is not None and gate.device.type == "cpu" and not gate  # the host knows: nothing is written at all
    from_target = weight < 0.5  # the nearer end is the base: weights 0 and 1 are exact, equal operands never move
    factor = torch.where(from_target, weight, weight - 1.0)
    for i, (target, source, layer) in enumerate(zip(targets, sources, layers, strict=True)):
        wide = torch.promote_types(torch.promote_types(target.dtype, source.dtype), torch.float32)
        theta, before, step = source.to(wide), target.to(wide), factor.to(wide)
        base = torch.where(from_target, before, theta)
        stays = (theta == before) | (step == 0)  # signed zeros and infinities too
        after = torch.where(stays, base, torch.addcmul(base, step, theta - before)).to(target.dtype)
        if gate is not None:
            after = torch.where(gate, after, target)
        if not closed:
            target.copy_(after)
        if copies and not closed:
            copies[i].copy_(target if gate is None else torch.where(gate, target.to(copies[i].dtype), copies[i]))
        if not measure:
            continue
        stats[0, layer] += (theta - target.to(wide)).double().square().sum()
        stats[1, layer] += theta.double().square().sum()
        stats[2, layer] += (~torch.isfinite(theta)).sum()
    return stats
