"""What suspicions rest on: readings of the signals in ratios to the run's own past, so that units do not matter.

In: records. Out: after each, by name, how far a signal has moved and how sure that is. A signal that the records lack has
no reading, and says neither yes nor no.

Two quantities carry most of it. *Variation*: how much the target encoder's features differ between inputs. In the
collapse phase the loss falls because the targets lose that, and not because the predictor gains skill. It is seen in
the instance spread, in the loss of the best constant (loss / (1 - skill)), in the standard deviation of normalised
features, in RankMe of uncentred features, and, from afar, in the fall of the discrepancy from its peak.
*Share*: which part of the targets' energy varies between inputs at all. Features that start rich may lose half their
variation and stay useful.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jepa_fast.monitor.phase.curves import Level, Smoother, number

Record = dict[str, Any]
SIGMAS = 3.0  # of noise that a change must exceed to count at all


class Reading(NamedTuple):
    fall: float  # log ratio of the start to now, less SIGMAS standard deviations of its noise
    rise: float  # log ratio of now to the lowest since, likewise
    start: float
    lowest: float
    now: float


class Gauge:
    """One positive signal: how far it has fallen from its start (or its peak), and risen from its lowest."""

    def __init__(self, value: Callable[[Record], float | None], power: float = 1.0, from_peak: bool = False):
        self.value, self.power, self.from_peak = value, power, from_peak  # variation goes as the signal to this power
        self.smooth = Smoother()
        self.start: Level | None = None
        self.lowest: Level | None = None
        self.reading: Reading | None = None

    def add(self, step: int, record: Record) -> None:
        value = self.value(record)
        if value is None or not 1e-300 < value < 1e300:
            return
        now = self.smooth.add(step, math.log(value))
        if self.start is None or self.lowest is None or (self.from_peak and now.log > self.start.log):
            self.start = self.lowest = now
        elif now.log < self.lowest.log:
            self.lowest = now
        if now.num_scatter:
            fall = self._sure(self.start.log - now.log, self.start, now)
            rise = self._sure(now.log - self.lowest.log, self.lowest, now)
            self.reading = Reading(fall, rise, *(math.exp(level.log) for level in (self.start, self.lowest, now)))

    def _sure(self, change: float, one: Level, now: Level) -> float:
        noise = now.sigma * math.hypot(one.share, now.share) * (1 + 1 / now.num_scatter)
        return self.power * (change - min(SIGMAS * noise, abs(change)) * math.copysign(1, change))


def _get(key: str) -> Callable[[Record], float | None]:
    return lambda record: number(record.get(key))


def _spread(record: Record) -> float | None:
    spread, gap, relative = (number(record.get(k)) for k in ("spread", "discrepancy/visible", "discrepancy/relative"))
    return gap / relative if spread is None and gap and relative else spread


def _constant_loss(record: Record) -> float | None:
    """Loss of the best constant predictor: the variation of the targets, in units of the loss."""
    loss, skill = number(record.get("loss")), number(record.get("skill"))
    return None if loss is None or skill is None or skill >= 1 else loss / (1 - skill)


class _Share:
    """From the features' norm; else from the first loss, which is about the targets' energy, as the predictor starts near 0."""

    def __init__(self) -> None:
        self.energy: float | None = None

    def __call__(self, record: Record) -> float | None:
        self.energy = number(record.get("loss")) if self.energy is None else self.energy
        spread, norm, constant = _spread(record), number(record.get("norm/target")), _constant_loss(record)
        if spread and norm:
            return (spread / norm) ** 2
        return constant / self.energy if constant and self.energy else None


def gauges() -> dict[str, Gauge]:
    """By name; variation goes as the square root of a squared loss."""
    return {
        "loss": Gauge(_get("loss"), power=0.5),
        "spread": Gauge(_spread),
        "constant loss": Gauge(_constant_loss, power=0.5),
        "feature_std": Gauge(_get("feature_std")),
        "rankme": Gauge(_get("rankme")),
        "rankme/context": Gauge(_get("rankme/context")),
        "participation/context": Gauge(_get("participation/context")),
        "discrepancy/visible": Gauge(_get("discrepancy/visible"), power=0.45, from_peak=True),
        "share": Gauge(_Share()),
    }
