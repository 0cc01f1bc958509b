"""Files that trainers write -> rows of numbers, in the order written. Nothing in a file is ever executed.

In: a path. Out: a Table: what the file is, its rows as {column: number}, and what had to be left out.
"""

import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jepa_fast.bounded import read_bytes
from jepa_fast.diagnose import tfevents
from jepa_fast.errors import UsageError, reading

KNOWN = "CSV, JSON lines, TensorBoard event files, a W&B export, the text that I-JEPA or V-JEPA print, or a run folder"
# columns that say which trainer wrote a CSV; the first that fits
WRITERS = (
    ("I-JEPA's CSV", {"epoch", "itr", "loss", "mask-A", "mask-B"}),
    ("V-JEPA's CSV", {"epoch", "itr", "loss", "loss-jepa", "reg-loss"}),
    ("V-JEPA 2's CSV", {"epoch", "itr", "loss", "iter-time(ms)"}),
    ("W&B history", {"_step", "_runtime"}),
)
BINARY = {b"PK\x03\x04": "a zip archive (a PyTorch checkpoint?)", b"\x80\x02": "a pickle", b"\x80\x04": "a pickle",
          b"\x80\x05": "a pickle", b"\x89HDF": "an HDF5 file", b"\x1f\x8b": "compressed: unpack it first"}  # fmt: skip


@dataclass
class Table:
    kind: str  # what wrote the file, for people
    rows: list[dict[str, float]]
    notes: list[str] = field(default_factory=list)  # what was left out, and other facts about the reading

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for row in self.rows for column in row))


def read(path: Path) -> Table:
    """The table in a log file, a folder of TensorBoard events, or a run folder. Raises UsageError."""
    with reading(path, "a log"):
        return _read_folder(path) if path.is_dir() else _read_file(path)


def _read_file(path: Path) -> Table:
    try:
        data = read_bytes(path)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}); give a log file: {KNOWN}") from None
    for magic, name in BINARY.items():
        if data.startswith(magic):
            other = "; weights go to --checkpoints" if "zip" in name or "pickle" in name else ""
            raise UsageError(f"{path} is {name}, not a log, and was not opened{other}; a log is {KNOWN}")
    if tfevents.looks_like(data):
        return tfevents_table([path])
    text = data.replace(b"\0", b"").decode("utf-8-sig", errors="replace")
    if not text.strip():
        raise UsageError(f"{path} is empty; give a log with a column of losses")
    if text.lstrip()[0] in "{[" and (table := _read_json(text)) and table.rows:
        return table
    if re.search(r"loss: \d|avg\. loss \d", text) and (table := _read_text(text)).rows:
        return table
    table = _read_csv(text)
    if not table.rows and len(text.strip().splitlines()) == 1 and _delimiter(text) in text:
        raise UsageError(f"{path} has a header and no rows; give a log that some steps were written to")
    if not table.rows:
        raise UsageError(f"{path} is no log that can be read; known are {KNOWN}")
    return table


def _read_folder(folder: Path) -> Table:
    if (folder / "metrics.jsonl").is_file():
        return read(folder / "metrics.jsonl")
    events = sorted(folder.rglob("events.out.tfevents.*"))
    folders = sorted({str(file.parent) for file in events})
    if len(folders) > 1:
        raise UsageError(
            f"{folder} holds TensorBoard events of {len(folders)} runs; give one of {', '.join(folders[:5])}"
        )
    if events:
        return tfevents_table(events)
    raise UsageError(f"{folder} holds no metrics.jsonl and no TensorBoard events; give a log file: {KNOWN}")


def tfevents_table(files: list[Path]) -> Table:
    """Scalars of the event files of one run, those of the file begun first first."""
    rows: list[dict[str, float]] = []
    notes = []
    for file in sorted(files, key=lambda f: (tfevents.began(f), f.name)):
        scalars, whole = tfevents.scalars(file)
        rows += [{"step": step, tag: value} for step, tag, value in scalars]
        if not whole:
            notes.append(f"{file.name} ends in the middle of an entry: read up to there")
    if not rows:
        raise UsageError(f"{files[0]} holds no scalars; give the event file of a run that logs its loss")
    return Table("TensorBoard events", rows, notes)


# ---- CSV ------------------------------------------------------------------------------------------


def _read_csv(text: str) -> Table:
    """Header lines may stand anywhere: a restarted trainer appends another one."""
    lines = _cells(text)
    lines = [[cell.strip() for cell in line] for line in lines if any(cell.strip() for cell in line)]
    header: list[str] = []
    rows, broken = [], 0
    for line in lines:
        values = [number(cell) for cell in line]
        if all(value is None for value in values) and len(line) > (len(header) > 0):
            header = [name or f"column {i}" for i, name in enumerate(line, 1)]
        elif not header or len(line) != len(header):
            broken += 1
        elif row := {name: v for name, v in zip(header, values, strict=True) if v is not None}:
            rows.append(row)
    columns = {name for row in rows for name in row}
    kind = next((kind for kind, its in WRITERS if its <= columns), "CSV")
    if kind == "CSV" and any(name.endswith("__MIN") for name in columns):
        kind = "W&B chart"
    notes = [f"{broken} line(s) cut short or without a header were left out"] if broken else []
    return Table(kind, rows, notes)


def _cells(text: str) -> list[list[str]]:
    """The cells of each line. A quote that is never closed would swallow the rest: such a table is read without quoting."""
    delimiter = _delimiter(text)
    try:
        return list(csv.reader(io.StringIO(text), delimiter=delimiter, strict=True))
    except csv.Error:
        return [line.split(delimiter) for line in text.splitlines()]


def _delimiter(text: str) -> str:
    first = text.lstrip().split("\n", 1)[0]
    return max(",\t;", key=first.count)


def number(cell: Any) -> float | None:
    """A cell as float (nan and inf are numbers here: a log says so when a loss is lost), or None."""
    if isinstance(cell, bool) or not isinstance(cell, (int, float, str)):
        return None
    try:
        return float(cell)
    except (ValueError, OverflowError):
        return None


# ---- JSON -----------------------------------------------------------------------------------------


def _read_json(text: str) -> Table:
    """Records a line; a list of records; or a dict that holds such a list (the `log_history` of trainer_state.json)."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return _read_json_lines(text)
    if isinstance(whole, dict):
        lists = [v for v in whole.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        whole = max(lists, key=len) if lists else [whole]
    return Table("JSON", [_flat(record) for record in whole if isinstance(record, dict)])


def _read_json_lines(text: str) -> Table:
    rows, broken = [], 0
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            rows.append(_flat(record))
        else:
            broken += 1
    notes = [f"{broken} line(s) that are no JSON record were left out"] if broken else []
    ours = any("discrepancy/visible" in row for row in rows)
    return Table("jepa-fast's metrics.jsonl" if ours else "JSON lines", rows, notes)


def _flat(record: dict[str, Any], prefix: str = "", depth: int = 0) -> dict[str, float]:
    """Nested records under names joined by '/'; what lies deeper than anybody nests is left out."""
    row: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            row |= _flat(value, f"{prefix}{key}/", depth + 1) if depth < 8 else {}
        elif (v := number(value)) is not None:
            row[prefix + key] = v
    return row


# ---- text -----------------------------------------------------------------------------------------


def _read_text(text: str) -> Table:
    """What ijepa, jepa and vjepa2 print: 'avg. loss' of each epoch, or the running means inside an epoch."""
    averages = re.findall(r"\bEpoch (\d+)\b|avg\. loss (\d+\.\d+)", text)
    rows: list[dict[str, float]] = []
    epoch = 0
    for begun, average in averages:
        if begun:
            epoch = int(begun)
        else:
            rows.append({"epoch": float(epoch or len(rows) + 1), "loss": float(average)})
    if len(rows) >= 5:
        return Table("printed epoch losses", rows, ["losses are means of an epoch, printed to three decimals"])
    rows = [
        {"epoch": float(e), "itr": float(i), "loss": float(loss)}
        for e, i, loss in re.findall(r"\[(\d+),\s*(\d+)\]\s*loss: (\d+\.\d+|nan|inf)", text)
    ]
    return Table(
        "printed losses", rows, ["losses are running means that begin anew with each epoch, to three decimals"]
    )
