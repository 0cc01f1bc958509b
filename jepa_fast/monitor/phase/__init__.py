"""Which phase a run is in: records of metrics.jsonl in, events out. Needs no model, so any project's log will do.

Three kinds of statement, never mixed: facts about the shape of one curve (`shapes`), what probes say of the features
(`features`), and, where there are no labels, what the other signals say of them (`suspicion`, with a confidence).

Everything is causal: an event called at step s is decided by the records up to s, and nothing takes it back.
"""

from collections.abc import Iterable
from typing import Any

from jepa_fast.monitor.phase.curves import Event, Level, levels, number, series
from jepa_fast.monitor.phase.features import PROBE_MARGIN, feature_events
from jepa_fast.monitor.phase.shapes import shape_events
from jepa_fast.monitor.phase.suspicion import suspicions

__all__ = ["PROBE_MARGIN", "Event", "Level", "detect", "levels", "number", "series"]


def detect(records: Iterable[dict[str, Any]]) -> list[Event]:
    """All events of a run so far, in the order they were called. Records need `step`; every other key may be missing."""
    records = list(records)
    events = [*shape_events(records), *feature_events(records), *suspicions(records)]
    return sorted(events, key=lambda e: (e.called_at, e.step, e.kind))
