"""Is the predictor better than a trivial one? The paper's main assumption, made measurable.

Section 4 of the paper assumes that the predictor "can converge to a trivial solution (e.g., an identity or constant
mapping)". Here three trivial predictors get the same targets, at the same tokens, under the same loss:

    constant        the best constant of each position, fitted on the batch's targets (the constant mapping)
    copy            the context feature of the nearest visible token (the identity mapping)
    context_mean    the mean context feature of the input's visible tokens

skill/<name> = 1 - loss / loss of that predictor, and `skill` is the least of them: at or below 0 some trivial predictor
is as good. In: tensors that the training step has. Out: scalars on the device; nothing here synchronises with the host.
On several processes sums are reduced before a ratio is taken, so that all processes get the global batch's numbers.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jepa_fast.model.jepa import token_loss

# Shape legend: B inputs of this process, N tokens of one, Tc context and Tt target tokens of the batch, D width.

Reduce = Callable[[Tensor], Tensor]  # a tensor -> its mean over processes
BISECTIONS = 24  # steps to a median over processes: 1e-7 of the range


def alone(value: Tensor) -> Tensor:
    """The mean over one process."""
    return value


def trivial_skills(
    loss: Tensor, targets: Tensor, context: Tensor, visible: Tensor, hidden: Tensor, weight: Tensor, kind: str,
    grid: tuple[int, ...], *, num_processes: int = 1, mean: Reduce = alone,
    centred: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """`skill`, `skill/constant`, `skill/copy`, `skill/context_mean` and `position_share`: float32 scalars.

    loss: the predictor's on this process's batch. targets [B, N, D]: what the loss compares with, all tokens. context
    [Tc, D]: context features, normalised like the targets. visible int64 [Tc], hidden int64 [Tt]: rows of [B * N] that
    they are of, and that the loss is taken at; weight [Tt] sums to 1. kind: `l2`, `smooth_l1` or `l1`. grid: tokens
    along each axis, for which token is the nearest. B is the same on all processes.

    The constant is fitted on the batch that it is judged on; its loss is corrected by B / (B - 1) of the global batch,
    which is exact for `l2`. With one input in all there is nothing to fit, and `skill/constant` is NaN. centred: the
    targets were centred at each position by the global batch's own mean; then the constant is 0, which nobody had to fit,
    and its loss is taken as it is.
    """
    losses = trivial_losses(
        targets, context, visible, hidden, weight, kind, grid, num_processes=num_processes, mean=mean, centred=centred
    )
    own = mean(loss.detach())
    skills = {name: 1 - own / other for name, other in losses.items()}
    least = torch.stack(list(skills.values())).nan_to_num(nan=math.inf).amin()
    named = {f"skill/{name}": value for name, value in skills.items()}
    return {"skill": least, **named, "position_share": position_share(targets, num_processes, mean)}


def trivial_losses(
    targets: Tensor, context: Tensor, visible: Tensor, hidden: Tensor, weight: Tensor, kind: str, grid: tuple[int, ...],
    *, num_processes: int = 1, mean: Reduce = alone, centred: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """The losses of the three trivial predictors, `constant`, `copy` and `context_mean`: `trivial_skills`'s arguments."""
    b, n, _ = targets.shape
    total = b * num_processes
    wanted = targets.flatten(0, 1)[hidden]  # [Tt, D]

    def judge(prediction: Tensor) -> Tensor:
        return mean(weight @ token_loss(prediction, wanted, kind))

    constant = best_constant(targets, kind, num_processes, mean)  # [N, D]
    correction = 1.0 if centred else total / max(1, total - 1)
    losses = {"constant": judge(constant[hidden % n]) * (correction if total > 1 else math.nan)}
    losses["copy"] = judge(context[nearest_visible(visible, hidden, b, grid)])
    sums = context.new_zeros(b, context.shape[1]).index_add_(0, visible // n, context)
    pooled = sums / (visible // n).bincount(minlength=b).clamp(min=1).unsqueeze(1)
    losses["context_mean"] = judge(pooled[hidden // n])
    return losses


def best_constant(targets: Tensor, kind: str, num_processes: int = 1, mean: Reduce = alone) -> Tensor:
    """The constant of each position with the least loss over the global batch: [B, N, D] -> [N, D]."""
    if kind == "l1":
        return targets.median(0).values if num_processes == 1 else _median(targets, num_processes, mean)
    constant = mean(targets.mean(0))
    if kind == "smooth_l1":
        # Reweighted means converge on the Huber location; three are within 1e-3 on layer-normed features.
        for _ in range(3):
            weight = 1 / (targets - constant).abs().clamp(min=1)
            constant = mean((weight * targets).mean(0)) / mean(weight.mean(0))
    return constant


def _median(targets: Tensor, num_processes: int, mean: Reduce) -> Tensor:
    """A median over processes by bisection: counts are reduced, no features."""
    centre = mean(targets.mean(0))
    reach = mean((targets - centre).abs().amax(0)) * num_processes  # no less than the largest of the processes' maxima
    low, high = centre - reach, centre + reach
    for _ in range(BISECTIONS + 6):
        middle = (low + high) / 2
        below = mean((targets < middle).float().mean(0)) < 0.5
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def nearest_visible(visible: Tensor, hidden: Tensor, num_inputs: int, grid: tuple[int, ...]) -> Tensor:
    """int64 [Tt]: for each hidden row the place in `visible` of the nearest visible token of the same input.

    Euclidean distance on the grid; of equally near ones the first in raster order. Of an input without a visible token:
    place 0.
    """
    n = math.prod(grid)
    axes = torch.meshgrid(*(torch.arange(size, device=visible.device) for size in grid), indexing="ij")
    where = torch.stack([axis.flatten() for axis in axes], dim=1).float()  # [N, axes]
    order = torch.arange(n, device=visible.device) * (1e-3 / n)  # breaks ties
    distance = torch.cdist(where, where).square() + order  # [N, N]
    place = torch.full((num_inputs * n,), -1, dtype=torch.long, device=visible.device)
    place[visible] = torch.arange(len(visible), device=visible.device)
    place = place.view(num_inputs, n)
    found = torch.empty_like(hidden)
    for begin in range(0, len(hidden), 1 << 14):  # in parts: [Tt, N] of a large batch is large
        rows = hidden[begin : begin + (1 << 14)]
        seen = place[rows // n]  # [t, N]
        nearest = distance[rows % n].masked_fill(seen < 0, math.inf).argmin(1)
        found[begin : begin + (1 << 14)] = seen.gather(1, nearest.unsqueeze(1)).squeeze(1).clamp(min=0)
    return found


def likely_grid(num_tokens: int) -> tuple[int, ...]:
    """A square, if that many tokens make one; else a line."""
    side = math.isqrt(num_tokens)
    return (side, side) if side * side == num_tokens and side > 1 else (num_tokens,)


def position_share(targets: Tensor, num_processes: int = 1, mean: Reduce = alone) -> Tensor:
    """Share of the targets' variance that lies between positions, 0 to 1: [B, N, D] of the global batch -> scalar.

    1 where every input looks the same at a position (the positional collapse of CAPI, arXiv 2502.08769). The mean over a
    batch varies by itself; that part (the variance within a position / inputs) is taken off.
    """
    total = targets.shape[0] * num_processes
    at_position = mean(targets.mean(0))  # [N, D]
    within = mean((targets - at_position).square().mean()) * (total / max(1, total - 1))
    between = (at_position - at_position.mean(0)).square().mean()
    between = (between - within / total).clamp(min=0)
    return between / (between + within).clamp(min=torch.finfo(targets.dtype).tiny)
