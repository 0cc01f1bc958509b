"""The target encoder: fused EMA of the context encoder, with the drift ||theta - theta_bar|| in the same pass."""

from collections.abc import Mapping

from torch import Tensor

from fused_ema import FusedEMA
from jepa_fast import parallel, schedules
from jepa_fast.config import Config
from jepa_fast.model.jepa import JEPA
from jepa_fast.parallel import World


class TargetEMA:
    """theta_bar <- beta theta_bar + (1 - beta) theta (equation 1), once after every optimizer step.

    released: the step from which on a teacher of `--ema.schedule escape` moves; None: it still waits.
    """

    def __init__(self, jepa: JEPA, config: Config):
        self.fused = FusedEMA(jepa.context_encoder, target=jepa.target_encoder)
        self.config = config
        self.released: int | None = None

    @property
    def waits(self) -> bool:
        return self.config.ema.schedule == "escape" and self.released is None

    def decay(self, step: int, steps: int) -> float:
        """Beta for the update after optimizer step `step`: 1 leaves the target as it is, 0 copies the context encoder."""
        if self.config.teacher.kind == "frozen" or self.waits:
            return 1.0
        return 0.0 if self.config.teacher.kind == "none" else schedules.ema_decay(self.config.ema, step, steps)

    def look(self, record: Mapping[str, float], world: World) -> bool:
        """Whether this record releases a teacher that waits: skill above 0 by two standard errors. All processes call it.

        The main process decides; only it has the skill's mean over steps.
        """
        if not self.waits:
            return False
        surely = record.get("skill/smooth", 0.0) - 2 * record.get("skill/error", float("inf")) > 0
        if parallel.same_everywhere(surely, world):
            self.released = int(record["step"])
        return self.released is not None

    def update(self, decay: float, gate: Tensor) -> None:
        """One update; where `gate` (bool, on the device) is False the target stays bit-identical. No synchronisation."""
        self.fused.update(decay, gate=gate)
