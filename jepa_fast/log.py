"""What a run writes and shows: metrics.jsonl, events.jsonl, and a live line on the terminal.

JSONL first: one record a line, flushed when written, so that a killed run loses nothing it logged.
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jepa_fast.bounded import read_bytes
from jepa_fast.errors import UsageError

MACHINE = (
    "time/",
    "data/",
    "memory/",
    "images_per_s",
    "tokens_per_s",
    "flops_per_s",
    "mfu/",
    "recompiles",
    "host_syncs",
)


def repeatable(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records without what measures the machine: what is left repeats bit for bit."""
    return [{key: value for key, value in record.items() if not key.startswith(MACHINE)} for record in records]


class Sink:
    """Where a run's records go, one at a time. `jepa_fast.sinks` has those that --log.* opens."""

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""

    def event(self, event: dict[str, Any]) -> None:
        """A line of events.jsonl."""

    def close(self) -> None:
        """No more will come."""


class JSONL(Sink):
    """metrics.jsonl and events.jsonl of a run folder. On resume, what lies after the checkpoint is cut off."""

    def __init__(self, folder: Path, resume_step: int):
        self.records, self.events = (
            _truncate(folder / name, resume_step) for name in ("metrics.jsonl", "events.jsonl")
        )
        self._metrics, self._events = (
            (folder / name).open("a", encoding="utf-8") for name in ("metrics.jsonl", "events.jsonl")
        )

    def record(self, record: dict[str, Any]) -> None:
        _append(self._metrics, record)

    def event(self, event: dict[str, Any]) -> None:
        _append(self._events, event)

    def close(self) -> None:
        for stream in (self._metrics, self._events):
            with suppress(OSError):  # a full disk has been reported already
                stream.close()


class RunLog:
    """All records and events of a run, kept in memory and handed on to every sink.

    folder: where metrics.jsonl and events.jsonl go, and from where those before `resume_step` are read; None: nowhere.
    """

    def __init__(self, folder: Path | None, resume_step: int, sinks: Iterable[Sink] = ()):
        self.records: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.sinks = list(sinks)
        if folder is not None:
            files = JSONL(folder, resume_step)
            self.records, self.events = list(files.records), list(files.events)
            self.sinks.insert(0, files)

    def record(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        for sink in self.sinks:
            sink.record(record)

    def event(self, kind: str, step: int, **details: Any) -> None:
        self.events.append({"kind": kind, "step": step, **details})
        for sink in self.sinks:
            sink.event(self.events[-1])

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def _append(stream: Any, line: dict[str, Any]) -> None:
    plain = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in line.items()}
    with _one_line(stream.name):
        stream.write(json.dumps(plain) + "\n")
        stream.flush()


@contextmanager
def _one_line(path: Path | str) -> Iterator[None]:
    """An error of the disk becomes a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}; fix that, then --resume: checkpoints are intact"
        ) from None


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file. A last line cut short by a kill is left out; other lines that are no record of a step
    (after a power cut, say) too, and counted in a warning. Raises UsageError if the file cannot be read at all.
    """
    if not path.exists():
        return []
    try:
        lines = read_bytes(path).split(b"\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    records, bad = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and _is_step(record.get("step")):
            records.append(record)
        elif line.strip() and number < len(lines):
            bad.append(number)
    if bad:
        lines_are = f"{len(bad)} lines are" if len(bad) > 1 else "a line is"
        print(f"warning: {path}: {lines_are} no record of a step and left out (line {bad[0]})", file=sys.stderr)
    return records


def _is_step(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**53


LASTING = ("resume", "preempted")  # what happened to the process, and not on the way of the weights


def _truncate(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the records before `step` only (a resumed run writes those from `step` on again)."""
    kept = [r for r in read(path) if r.get("called_at", r.get("step", 0)) < step or r.get("kind") in LASTING]
    beside = path.with_name(f".{path.name}.partial")
    with _one_line(path):
        beside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        beside.rename(path)
    return kept


def _short(value: float | str) -> str:
    """Three digits are enough to watch."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class Progress:
    """One live line on a terminal; a plain line now and then elsewhere. `quiet` says nothing (other ranks)."""

    def __init__(self, steps: int, start: int, quiet: bool, every: int):
        self.steps, self.start, self.quiet, self.every = steps, start, quiet, every
        self.live = sys.stdout.isatty()
        self.values: dict[str, float | str] = {}
        self.began = time.monotonic()
        self.next_line = start

    def show(self, step: int, values: dict[str, float | str]) -> None:
        """`values` by name, in the order to show them; what is not given stays as it was."""
        self.values |= values
        if step == self.start:
            self.began = time.monotonic()  # the first step also warms caches: not a rate to count on
        if self.quiet or not (self.live or step >= self.next_line or step == self.steps):
            return
        self.next_line = step + self.every
        shown = "  ".join(f"{name} {_short(value)}" for name, value in self.values.items())
        line = f"step {step:>{len(str(self.steps))}}/{self.steps}  {shown}  {self._left(step)}"
        if self.live:
            bar = round(16 * step / self.steps)
            print(f"\r\x1b[K[{'█' * bar}{'·' * (16 - bar)}] {line}", end="" if step < self.steps else "\n", flush=True)
        else:
            print(line, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the live one."""
        if not self.quiet:
            print(f"\r\x1b[K{text}" if self.live else text, flush=True)

    def _left(self, step: int) -> str:
        if step == self.start:
            return "left ..."
        seconds = (time.monotonic() - self.began) / (step - self.start) * (self.steps - step)
        return f"left {int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"
