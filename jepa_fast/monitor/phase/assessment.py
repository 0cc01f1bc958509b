"""Where a run is, after every record: a state, a probability for each encoder, and the reasons. Causal, no labels needed.

Facts and estimates are kept apart. Facts: what the probes say, where there are any (`facts`), that the predictor is no
better than a trivial one, that the targets shrink. Estimates: the probability that an encoder's features beat the
untrained encoder's (`estimate`), which never looks at a probe. The state follows the probes where there are any.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jepa_fast.monitor.phase.curves import Event, number
from jepa_fast.monitor.phase.estimate import Estimate, Estimator
from jepa_fast.monitor.phase.facts import LOOKS, Facts, look_of

Record = dict[str, Any]
State = Literal["warmup", "collapse", "escape", "learning", "degraded", "unknown"]
USEFUL = 0.5  # a probability above: rather useful than not
SURE = 0.8  # a probability from which a useful encoder is taken for granted
LOST = 0.35  # below, after that: no longer, so that a probability near one half does not flicker
SUSPECT = 0.3  # at most, for a suspected collapse


@dataclass(frozen=True)
class Assessment:
    """What can be said at one record, from the records up to it."""

    step: int
    state: State
    useful_context: float | None  # probability that the context encoder's features beat the untrained encoder's now
    useful_target: float | None  # likewise of the target encoder; None where nothing can be said
    reasons: tuple[str, ...]  # short sentences with numbers: facts first, then estimates

    @property
    def useful(self) -> float | None:
        """Of the better encoder."""
        known = [p for p in (self.useful_context, self.useful_target) if p is not None]
        return max(known, default=None)


def assess(records: Iterable[Record]) -> list[Assessment]:
    """One Assessment for each record that has a step above the one before. Records need `step`; any other key may be missing."""
    assessor = Assessor()
    return [one for record in records if (one := assessor.add(record)) is not None]


class Assessor:
    """The same while a run goes on."""

    def __init__(self) -> None:
        self.last = float("-inf")
        self.facts, self.estimator = Facts(), Estimator()
        self.state: State = "unknown"
        self.labelled = False
        self._row: list[tuple[int, float]] = []  # looks whose probability contradicts the state
        self._since: dict[str, tuple[int, float] | None] = {"collapse": None, "escape": None}
        self._suspected, self._escaped = False, False
        self.events: list[Event] = []  # called at the last record

    def add(self, record: Any) -> Assessment | None:
        step = number(record.get("step")) if isinstance(record, Mapping) else None
        if step is None or step <= self.last:
            return None
        self.last, now = step, int(step)
        self.events = self.facts.add(now, record)
        look = look_of(record)
        self.labelled = self.labelled or (look is not None and look.decides)
        estimate = self.estimator.add(now, record)
        self.state = self._by_probes() if self.labelled else self._by_estimate(estimate)
        self.events += self._suspicions(now, estimate)
        return Assessment(now, self.state, estimate.context, estimate.target, estimate.facts + estimate.reasons)

    def _by_probes(self) -> State:
        facts = self.facts
        if facts.useful:
            return "learning"
        if facts.over:
            return "degraded"
        if facts.row:  # the last look was useful, the next decides
            return "escape"
        return "collapse" if facts.loss.at is not None else "warmup"

    def _by_estimate(self, estimate: Estimate) -> State:
        """As `estimate` has it, with some inertia: one look does not change a state for good."""
        p = estimate.better
        if p is None:
            return "warmup" if self.facts.loss.at is None and self.facts.loss.start is not None else "unknown"
        if self.state in ("learning", "degraded"):
            leaves = p < LOST if self.state == "learning" else p >= SURE
            self._count(estimate.looked, leaves, p)
            if len(self._row) >= LOOKS:
                self._row = []
                return "degraded" if self.state == "learning" else "learning"
            return self.state
        self._count(estimate.looked, p >= SURE, p)
        if len(self._row) >= LOOKS:
            self._row = []
            return "learning"
        if p >= (LOST if self.state == "escape" else USEFUL):
            return "escape"
        return "warmup" if self.facts.loss.at is None else "collapse"

    def _count(self, looked: bool, contradicts: bool, p: float) -> None:
        if not contradicts:
            self._row = []
        elif looked:
            self._row.append((int(self.last), p))

    def _suspicions(self, step: int, estimate: Estimate) -> list[Event]:
        """`collapse_suspected`, then `escape_suspected`: once each, when two looks agree."""
        p = estimate.better
        if p is None or not estimate.looked or self.facts.loss.at is None:
            return []
        called = []
        if not self._suspected and not self._escaped:
            self._since["collapse"] = (self._since["collapse"] or (step, p)) if p <= SUSPECT else None
            begun = self._since["collapse"]
            if begun and begun[0] < step:
                self._suspected = True
                called.append(
                    Event("collapse_suspected", max(begun[0], self.facts.loss.at), step, round(1 - p, 3), estimate.said)
                )
        if not self._escaped:
            self._since["escape"] = (self._since["escape"] or (step, p)) if p >= USEFUL else None
            begun = self._since["escape"]
            if begun and begun[0] < step:
                self._escaped = True
                called.append(Event("escape_suspected", begun[0], step, round(p, 3), estimate.said))
        return called
