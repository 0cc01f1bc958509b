"""Learning rate, weight decay and EMA decay: pure functions of the step.

Step t counts optimizer steps already made; nothing here has state, so a resumed run needs none.
"""

import math

from jepa_fast.config import EMA, Optim


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
    """Beta of equation 1 for the update after optimizer step `step`; linear in the step as facebookresearch/ijepa."""
    if config.schedule == "constant":
        return config.decay
    progress = min(1.0, step / (config.scale * steps))
    if config.schedule == "cosine":
        return _cosine(config.decay, config.final_decay, progress)
    return config.decay + (config.final_decay - config.decay) * progress


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
