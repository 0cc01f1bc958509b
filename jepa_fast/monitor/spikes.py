"""A loss that stands out from those before it."""

import math
import statistics
from typing import Any

RECORDS, SIGMAS, RATIO = 20, 8.0, 1.5  # the level is the median of so many records; what stands out from it


def loss_spike(records: list[dict[str, Any]], highest: float) -> dict[str, float] | None:
    """{'loss', 'level', 'sigmas'} if `highest`, the largest loss of a step since the last record, is a spike, else None.

    The scatter is the median distance of the last 20 losses from their median.
    """
    recent = [r["loss"] for r in records[-RECORDS:] if isinstance(r.get("loss"), float) and math.isfinite(r["loss"])]
    if len(recent) < RECORDS:
        return None
    level = statistics.median(recent)
    scatter = 1.48 * statistics.median(abs(x - level) for x in recent) + 1e-12 * abs(level)
    sigmas = (highest - level) / scatter if scatter else math.inf
    return {"loss": highest, "level": level, "sigmas": sigmas} if sigmas > SIGMAS and highest > RATIO * level else None
