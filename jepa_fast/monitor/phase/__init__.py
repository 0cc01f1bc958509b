"""Which phase a run is in: records of metrics.jsonl in, events and assessments out. Needs no model, so any log will do.

Three kinds of statement, never mixed: facts about the shape of the loss (`shapes`), facts about the features, from probes
(`facts`), and estimates of them where there are no labels (`estimate`, with a probability). `assess` gives the state after
every record, `detect` the events.

Everything is causal: what is said at step s follows from the records up to s, and nothing takes it back.
"""

import math
from collections.abc import Iterable
from typing import Any

from jepa_fast.monitor.phase.assessment import Assessment, Assessor, assess
from jepa_fast.monitor.phase.curves import PHASE, Event, Level, levels, number, series
from jepa_fast.monitor.phase.facts import ASSUMED_TESTS, Look, latest, look_of, probe_margin
from jepa_fast.monitor.phase.shapes import LossShape

__all__ = [
    "ASSUMED_TESTS", "PHASE", "Assessment", "Detector", "Event", "Level", "Look", "assess", "detect", "latest", "levels", "look_of",
    "number", "probe_margin", "series",
]  # fmt: skip


def detect(records: Iterable[dict[str, Any]]) -> list[Event]:
    """All events of a run so far, in the order they were called. Records need `step`; any other key may be missing.

    A collapse phase is one event, as it stands at the last record: with its end or without, and its share of the run so far.
    """
    detector = Detector()
    events = [event for record in records for event in detector.add(record)]
    ends = {event.step: event for event in (*events, *detector.phase_so_far()) if event.kind == PHASE}
    kept = [event for event in events if event.kind != PHASE]
    return sorted([*kept, *ends.values()], key=lambda event: (event.called_at, event.step, event.kind))


class Detector:
    """The same while a run goes on: takes one record after the other, and returns what each has decided."""

    def __init__(self) -> None:
        self.assessor, self.shape = Assessor(), LossShape()
        self.assessment: Assessment | None = None  # at the last record

    def add(self, record: dict[str, Any]) -> list[Event]:
        """Events called at this record. One without a step, or with one that was seen before, is passed over.

        A collapse phase is called twice, when it begins and when it ends, with the same `step`.
        """
        assessment = self.assessor.add(record)
        if assessment is None:
            return []
        self.assessment = assessment
        called = [*self.shape.add(assessment.step, record), *self.assessor.events]
        return sorted(called, key=lambda event: (event.step, event.kind))

    @property
    def skill(self) -> tuple[float | None, float]:
        """The predictor's skill now, over the last tenth of the steps: (mean, its standard error)."""
        return self.assessor.estimator.skill.mean, self.assessor.estimator.skill.error

    def fields(self) -> dict[str, Any]:
        """What the last record says of the phase: `phase/state`, probabilities, the skill's mean and its standard error."""
        now = self.assessment
        if now is None:
            return {}
        said: dict[str, Any] = {"phase/state": now.state}
        known = {"context": now.useful_context, "target": now.useful_target}
        said |= {f"phase/useful/{name}": p for name, p in known.items() if p is not None}
        mean, error = self.skill
        if mean is not None:
            said |= {"skill/smooth": mean} | ({"skill/error": error} if math.isfinite(error) else {})
        return said

    def phase_so_far(self) -> list[Event]:
        """The collapse phase as it stands now, one event; or nothing."""
        return self.assessor.facts.so_far(int(self.assessor.last)) if self.assessment else []
