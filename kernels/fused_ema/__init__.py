"""fused_ema: exponential moving averages of weights, with exact distances, in one pass over memory."""

from fused_ema.backends import available_backends
from fused_ema.module import FusedEMA
from fused_ema.op import LayerStats, ema_distances, ema_update_
from fused_ema.reference import ema_update_reference
from fused_ema.schedule import multi_avg_fn, warmup

__all__ = [
    "FusedEMA",
    "LayerStats",
    "available_backends",
    "ema_distances",
    "ema_update_",
    "ema_update_reference",
    "multi_avg_fn",
    "warmup",
]
