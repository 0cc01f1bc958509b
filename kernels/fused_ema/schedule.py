"""Decay over time, and the adaptor for torch.optim.swa_utils.AveragedModel."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from fused_ema.check import check_decay
from fused_ema.op import ema_update_


def warmup(decay: float, gamma: float = 1.0, power: float = 2 / 3) -> Callable[[int], float]:
    """Decay as a function of the updates made: 1 - (1 + t / gamma)^-power, at most `decay`.

    A young average so follows the weights instead of remembering their initialisation (Karras-style power ramp).
    """
    check_decay(decay)
    if gamma <= 0 or power <= 0:
        raise ValueError(f"gamma {gamma} and power {power} must be above 0")
    return partial(_ramp, float(decay), gamma, power)  # and no closure: it can be pickled


def _ramp(decay: float, gamma: float, power: float, num_updates: int) -> float:
    return min(decay, 1.0 - (1.0 + num_updates / gamma) ** -power)


def multi_avg_fn(
    decay: float | Callable[[int], float],
) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """For AveragedModel(model, multi_avg_fn=...): the fused pass in place of foreach lerp; mixed dtypes allowed.

    decay: a number, or a function of the number of models averaged, read at every update (waits for that number where
    AveragedModel keeps it on a GPU). Integer buffers (`use_buffers=True`) are averaged and cut as torch does.
    """
    if not callable(decay):
        check_decay(decay)

    return partial(_average, decay)


def _average(
    decay: float | Callable[[int], float],
    averaged: Sequence[Tensor],
    current: Sequence[Tensor],
    num_averaged: Tensor | int,
) -> None:
    now = decay(int(num_averaged)) if callable(decay) else decay
    pairs = list(zip(averaged, current, strict=True))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    ema_update_([a for a, _ in floating], [c for _, c in floating], now)
    for mean, value in pairs:
        if not mean.is_floating_point():
            mean.copy_(mean * now + value * (1 - now))
