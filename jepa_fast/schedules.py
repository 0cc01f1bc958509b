"""Learning rate, weight decay, EMA decay and masking ratio: pure functions of the step.

Step t counts optimizer steps already made; nothing here has state, so a resumed run needs none.
"""

import math
from dataclasses import replace

from jepa_fast.config import EMA, Masks, Optim


def learning_rate(config: Optim, step: int, steps: int, warmup: int) -> float:
    """Linear from start_lr to lr over `warmup` steps, then cosine to final_lr at `steps` (or constant)."""
    if step < warmup:
        return config.start_lr + (config.lr - config.start_lr) * step / warmup
    if config.lr_schedule == "constant":
        return config.lr
    return _cosine(config.lr, config.final_lr, (step - warmup) / max(1, steps - warmup))


def weight_decay(config: Optim, step: int, steps: int) -> float:
    """Cosine from weight_decay to final_weight_decay (or constant)."""
    if config.wd_schedule == "constant":
        return config.weight_decay
    return _cosine(config.weight_decay, config.final_weight_decay, step / steps)


def ema_decay(config: EMA, step: int, steps: int) -> float:
    """Beta of equation 1 for the update after optimizer step `step`, from decay to final_decay, up or down.

    Linear in the step as facebookresearch/ijepa, or along a cosine (or constant). `power`: timm's and Karras' warm-up, up to
    decay. `escape`: decay; what it was before the teacher was released is for TargetEMA to say.
    """
    if config.schedule == "power":
        return min(config.decay, 1 - (1 + step / config.gamma) ** -config.power)
    if config.schedule == "escape":
        return config.decay
    return _between(config.schedule, config.decay, config.final_decay, step / (config.scale * steps))


def masks(config: Masks, step: int, steps: int) -> Masks:
    """The masks of step `step`: `ratio` and `target_scale` on their way to `final_ratio` and `final_target_scale`."""
    if config.schedule == "constant":
        return config
    ratio, low, high = (
        _between(config.schedule, start, end, step / steps)
        for start, end in zip(
            (config.ratio, *config.target_scale), (config.final_ratio, *config.final_target_scale), strict=True
        )
    )
    return replace(config, ratio=ratio, target_scale=(low, high))


def _between(schedule: str, start: float, end: float, progress: float) -> float:
    if schedule == "constant":
        return start
    progress = min(1.0, progress)
    return _cosine(start, end, progress) if schedule == "cosine" else start + (end - start) * progress


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
