"""The target encoder: fused EMA of the context encoder, with the drift ||theta - theta_bar|| in the same pass."""

from torch import Tensor

from fused_ema import FusedEMA
from jepa_fast.model.jepa import JEPA


class TargetEMA:
    """theta_bar <- beta theta_bar + (1 - beta) theta (equation 1), once after every optimizer step."""

    def __init__(self, jepa: JEPA):
        self.fused = FusedEMA(jepa.context_encoder, target=jepa.target_encoder)

    def update(self, decay: float, gate: Tensor) -> None:
        """One update; where `gate` (bool, on the device) is False the target stays bit-identical. No synchronisation."""
        self.fused.update(decay, gate=gate)
