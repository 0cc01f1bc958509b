"""Which phase a run is in: records of metrics.jsonl in, events out. Needs no model, so any project's log will do.

Three kinds of statement, never mixed: facts about the shape of one curve (`shapes`), what probes say of the features
(`features`), and, where there are no labels, what the other signals say of them (`suspicion`, with a confidence).

Everything is causal: an event called at step s is decided by the records up to s, and nothing takes it back.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from jepa_fast.monitor.phase.curves import Event, Level, levels, number, series
from jepa_fast.monitor.phase.features import PROBE_MARGIN, Features
from jepa_fast.monitor.phase.gauges import Signals
from jepa_fast.monitor.phase.shapes import Drops, Valleys, valley_event
from jepa_fast.monitor.phase.suspicion import Suspicions

__all__ = ["PROBE_MARGIN", "Detector", "Event", "Level", "detect", "levels", "number", "series"]

VALLEYS = {"loss": "loss_minimum", "discrepancy/visible": "discrepancy_valley", "spread": "variance_escape"}


def detect(records: Iterable[dict[str, Any]]) -> list[Event]:
    """All events of a run so far, in the order they were called. Records need `step`; every other key may be missing."""
    detector = Detector()
    return [event for record in records for event in detector.add(record)]


class Detector:
    """The same while a run goes on: takes one record after the other, and returns what each has decided."""

    def __init__(self) -> None:
        self.last = -math.inf
        self.signals, self.features, self.suspicions = Signals(), Features(), Suspicions()
        self.valleys = {key: Valleys() for key in VALLEYS}
        self.drops = {key: Drops(key) for key in ("loss", "spread")}

    def add(self, record: dict[str, Any]) -> list[Event]:
        """Events called at this record. One without a step, or with one that was seen before, is passed over."""
        step = number(record.get("step")) if isinstance(record, Mapping) else None
        if step is None or step <= self.last:
            return []
        self.last = step
        levels, minimum = self.signals.add(int(step), record), None
        called: list[Event | None] = []
        for key, valleys in self.valleys.items():
            valley = valleys.add(levels[key]) if key in levels else None
            if valley:
                called.append(valley_event(VALLEYS[key], key, valley))
                minimum = valley if key == "loss" else minimum
            if key in self.drops and key in levels:
                called.append(self.drops[key].add(levels[key]))
                self.drops[key].armed |= valley is not None
        called += [self.features.add(int(step), record), self.suspicions.add(int(step), record, levels, minimum)]
        return sorted((event for event in called if event), key=lambda event: (event.step, event.kind))
