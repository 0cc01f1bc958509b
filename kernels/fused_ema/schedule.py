"""Decay over time, and the adaptor for torch.optim.swa_utils.AveragedModel."""

from collections.abc import Callable, Sequence

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
    return lambda num_updates: min(decay, 1.0 - (1.0 + num_updates / gamma) ** -power)


def multi_avg_fn(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """For AveragedModel(model, multi_avg_fn=...): the fused pass in place of foreach lerp; mixed dtypes allowed."""
    check_decay(decay)

    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int) -> None:
        ema_update_(averaged, current, decay)

    return average
