"""What a report reads: the records and events of a run of any trainer. In: a run folder. Out: records and events.

A log without `phase/state` (another project's, or an older version's) gets its states and events computed here, by the
definition of today.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jepa_fast.log import read
from jepa_fast.monitor import phase

Record = dict[str, Any]


def read_log(folder: Path) -> tuple[list[Record], list[Record]]:
    """(records, events) of a run folder; both empty where it has none. A phase event has `evidence`, others have not."""
    records = _with_step(folder / "metrics.jsonl")
    events = [e for e in _with_step(folder / "events.jsonl") if "kind" in e]
    if _has_states(records) and any("evidence" in e for e in events):
        return records, phase.latest(events)
    records, found = with_phase(records)
    return records, [e for e in events if "evidence" not in e] + found


def with_phase(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """(records that say in which phase they are, phase events as in events.jsonl) of records that need only `step`."""
    said, detector = list(records), phase.Detector()
    if not _has_states(records):
        said = []
        for record in records:
            detector.add(record)
            said.append(record | detector.fields())
    return said, [{"kind": e.kind, "step": e.step, **e.entry()} for e in phase.detect(records)]


def looks(records: Sequence[Record]) -> list[phase.Look]:
    """What the probes say, of every record that has them."""
    return [look for record in records if (look := phase.look_of(record)) is not None]


def cannot_tell(looked: Sequence[phase.Look]) -> bool:
    """Whether even a perfect probe would not be above the untrained encoder's by the margin: one class, few samples."""
    return bool(looked) and not looked[-1].decides


def values(records: Sequence[Record], key: str) -> list[tuple[int, float]]:
    """(step, value) of the records that have one."""
    pairs = ((r["step"], phase.number(r.get(key))) for r in records if phase.number(r.get("step")) is not None)
    return [(int(step), value) for step, value in pairs if value is not None]


def last_of(kind: str, events: Sequence[Record]) -> Record | None:
    return next((e for e in reversed(events) if e["kind"] == kind), None)


def left_out(events: Sequence[Record]) -> str:
    """How many samples could not be used, by reason, in one sentence; '' if there is none."""
    why = Counter(e.get("why", "unreadable") for e in events if e["kind"] == "bad_sample")
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(why.items()))
    return f"samples left out: {why.total()} ({reasons}); events.jsonl names them" if why else ""


def _has_states(records: Sequence[Record]) -> bool:
    return any("phase/state" in record for record in records)


def _with_step(file: Path) -> list[Record]:
    """The lines of a log that say at which step they hold."""
    return [r for r in read(file) if isinstance(r, dict) and phase.number(r.get("step")) is not None]
