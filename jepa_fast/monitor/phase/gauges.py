"""What suspicions rest on: readings of the signals in ratios to the run's own past, so that units do not matter.

In: records. Out: after each, by name, how far a signal has moved and how sure that is. A signal that the records lack has
no reading, and says neither yes nor no.

Two quantities carry most of it. *Variation*: how much the target encoder's features differ between inputs. In the
collapse phase the loss falls because the targets lose that, and not because the predictor gains skill. It is seen in
the instance spread, in the loss of the best constant (loss / (1 - skill)) and in RankMe of uncentred features.
*Share*: which part of the targets' energy varies between inputs at all. Features that start rich may lose half their
variation and stay useful. What a feature varies *with* neither can tell; *content*, where it is measured, can.
"""

import math
from collections import defaultdict, deque
from typing import Any, NamedTuple

from jepa_fast.monitor.phase.curves import Level, Smoother, margin, number, positive

Record = dict[str, Any]
KEYS = ("loss", "spread", "discrepancy/visible", "rankme", "rankme/context", "participation/context")
LOOKS = 2  # at the content that must agree
SIGMAS = 3.0  # of noise that a change must exceed to count at all


class Reading(NamedTuple):
    fall: float  # log ratio of the start to now, less SIGMAS standard deviations of its noise
    rise: float  # log ratio of now to the lowest since, likewise
    start: float
    lowest: float
    now: float
    num_falling: int  # records from the start to the lowest


class Gauge:
    """One positive signal: how far it has fallen from its start, and risen from its lowest."""

    def __init__(self, power: float = 1.0):
        self.power = power  # variation goes as the signal to this
        self.start: Level | None = None
        self.lowest: Level | None = None
        self.now: Level | None = None
        self.num = self.num_falling = 0  # records since the start, and of those up to the lowest

    def add(self, now: Level) -> None:
        if self.start is None or self.lowest is None:
            self.start = self.lowest = now
        elif now.log < self.lowest.log:
            self.lowest, self.num_falling = now, self.num + 1
        self.num, self.now = self.num + 1, now

    @property
    def reading(self) -> Reading | None:
        """None as long as nothing is known of the scatter."""
        if self.start is None or self.lowest is None or self.now is None or not self.now.num_scatter:
            return None
        fall, rise = self._sure(self.start, self.now, self.now), self._sure(self.now, self.lowest, self.now)
        start, lowest, now = (math.exp(level.log) for level in (self.start, self.lowest, self.now))
        return Reading(fall, rise, start, lowest, now, self.num_falling)

    def _sure(self, high: Level, low: Level, now: Level) -> float:
        """What is left of high - low once its noise is taken from it."""
        change = high.log - low.log
        return self.power * math.copysign(max(0.0, abs(change) - margin(high, low, now, SIGMAS)), change)


class Content:
    """What the features tell of the inputs' spectra, mean of both encoders, against the untrained encoder's.

    In correlation, not in ratios, as its noise is about the same at any level: 1 / sqrt(inputs) at the most.
    """

    def __init__(self) -> None:
        self.start: float | None = None
        self.now = 0.0
        self.gaps: deque[float] = deque(maxlen=LOOKS)  # of the last looks, above the start

    def add(self, record: Record) -> bool:
        """Whether the record has a look."""
        held = [v for key in ("content", "content/context") if (v := number(record.get(key))) is not None]
        if not held:
            return False
        self.now = sum(held) / len(held)
        untrained = number(record.get("content/untrained"))
        if self.start is None:
            self.start = self.now if untrained is None else untrained
        else:
            self.gaps.append(self.now - self.start)
        return True

    @property
    def fall(self) -> float:
        """What the last looks agree that it has lost, or gained (below 0); 0 where they do not, or are too few."""
        if len(self.gaps) < LOOKS:
            return 0.0
        return -max(self.gaps) if max(self.gaps) < 0 else -max(0.0, min(self.gaps))


class Signals:
    """The levels of every signal that the records hold or imply, by name: new ones after each record."""

    def __init__(self) -> None:
        self.smoothers: defaultdict[str, Smoother] = defaultdict(Smoother)
        self.energy: float | None = None  # of the targets, in units of the loss

    def add(self, step: int, record: Record) -> dict[str, Level]:
        new = {}
        for name, value in self._values(record).items():
            if value is not None:
                new[name] = self.smoothers[name].add(step, value)
        return new

    def _values(self, record: Record) -> dict[str, float | None]:
        values = {key: positive(record.get(key)) for key in KEYS}
        loss, spread, skill, norm = (
            values["loss"],
            values["spread"],
            number(record.get("skill")),
            positive(record.get("norm/target")),
        )
        relative, gap = positive(record.get("discrepancy/relative")), values["discrepancy/visible"]
        if spread is None and gap and relative:
            spread = values["spread"] = positive(gap / relative)
        # The loss of the best constant predictor is the variation of the targets, in units of the loss.
        constant = loss / (1 - skill) if loss and skill is not None and skill < 1 else None
        constant = values["constant loss"] = positive(constant)
        # The first loss is about the targets' energy, as the predictor starts near 0.
        self.energy = loss if self.energy is None else self.energy
        ratio = spread / norm if spread and norm else None
        values["share"] = positive(
            ratio * ratio if ratio else constant / self.energy if constant and self.energy else None
        )
        # With a skill of 0 or less the loss is no less than the constant's, so that this is no less than the share.
        values["loss share"] = positive(loss / self.energy if loss and self.energy else None)
        return values


def gauges() -> dict[str, Gauge]:
    """By signal. A squared loss goes as the square of the variation."""
    return {
        "loss": Gauge(power=0.5),
        "spread": Gauge(),
        "constant loss": Gauge(power=0.5),
        "rankme": Gauge(),
        "rankme/context": Gauge(),
        "participation/context": Gauge(),
        "share": Gauge(),
        "loss share": Gauge(),
    }
