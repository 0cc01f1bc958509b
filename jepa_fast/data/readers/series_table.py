"""Tables with one series a line: UCR's .tsv and .txt, and .csv as pandas and spreadsheets write them. In: a file. Out: values, labels.

In UCR's files the label comes first. In a .csv the header says which column it is. Without a header the columns decide: class
labels repeat, measured values hardly ever do. If that is not clear, the user has to set `--data.label`.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa_fast.bounded import read_text
from jepa_fast.errors import UsageError

ENCODING = "utf-8-sig"  # with the mark that spreadsheets put first, or without
GAPS = ("", "?")  # how files write a value that is missing
LABELS = ("label", "labels", "class", "classes", "target", "targets", "category", "y", "cls", "class_label",
          "classlabel")  # fmt: skip
INDEXES = ("", "index", "unnamed: 0")  # headers of the column that pandas puts first
FEW = 8  # columns or lines from which a row of numbers in order is no accident
AUTO, NONE = "auto", "none"


class Table(NamedTuple):
    values: list[np.ndarray]  # float64 [L] of each line
    labels: list[str] | None  # as the file writes them
    column: str  # where the label was: its header, or a number from 0 on, or `none`; the test file takes it from there
    notes: tuple[str, ...] = ()


def read(file: Path, label: str = AUTO, like: str | None = None) -> Table:
    """label: `auto`, `none`, `first`, `last`, the name of a column, or its number from 0 on. Raises UsageError with file and line.

    like: the `column` of the training file that this test file goes with. A test file that lacks it has no labels.
    """
    cells, numbers = _cells(file)
    if not cells:
        return Table([], [], AUTO)
    header = _header(cells)
    if header is not None:
        cells, numbers = cells[1:], numbers[1:]
    first = 1 if _is_index(header, cells) else 0
    width = len(header or cells[0]) if header or cells else 0
    notes: list[str] = []
    if like is not None and like != AUTO:
        column = None if like == NONE else _place(header, like, first, width)
        if column is None and like != NONE:
            notes = [f"{file.name} has no column {like}, so no labels"]
    else:
        column, notes = _column(file, header, cells, label, first)
    dropped = {column} | ({0} if first else set())
    if dropped == {0}:
        kept = [row[1:] for row in cells]
    else:
        kept = [[cell for i, cell in enumerate(row) if i not in dropped] for row in cells]
    values = [_numbers(row, file, number) for row, number in zip(kept, numbers, strict=True)]
    labels = None if column is None else [row[column] if column < len(row) else "" for row in cells]
    if labels is not None and _is_target(labels):
        different = len(set(labels))
        notes.append(
            f"{file.name}: the labels are {different} different numbers: a regression target, so no probes; --data.label none if these are values"
        )
        labels = None
    said = NONE if column is None else header[column] if header else str(column)
    return Table(values, labels, said, tuple(notes))


def _cells(file: Path) -> tuple[list[list[str]], list[int]]:
    """The cells of each line that is not empty, and the lines' numbers."""
    lines = [(n, line) for n, line in enumerate(read_text(file, ENCODING).splitlines(), start=1) if line.strip()]
    if file.suffix.lower() == ".csv":
        rows = [next(csv.reader([line])) if '"' in line else line.split(",") for _, line in lines]
        name = "comma"
        if lines and max(map(len, rows)) == 1 and ";" in lines[0][1]:
            rows, name = [line.split(";") for _, line in lines], "semicolon"
    elif file.suffix.lower() == ".txt":
        rows, name = [line.split(",") if "," in line else line.split() for _, line in lines], "comma or blank"
    else:
        rows, name = [line.split("\t") for _, line in lines], "tab"
    for (number, _), row in zip(lines, rows, strict=True):
        if len(row) < 2:
            raise UsageError(f"{file}, line {number}: no {name} in it; a {file.suffix} has the label, then the values")
    tidy = [[cell.strip() for cell in row] if " " in line else row for (_, line), row in zip(lines, rows, strict=True)]
    return tidy, [number for number, _ in lines]


def _header(cells: list[list[str]]) -> list[str] | None:
    """The first row, if it is names: no numbers in it, a name for the label, or numbers in order as pandas writes them."""
    first = cells[0]
    rest = [cell for cell in first[1:] if cell not in GAPS]
    if rest and not any(map(_is_number, rest)):
        return first
    named = [i for i, cell in enumerate(first) if cell.lower() in LABELS]
    if len(named) == 1 and len(first) > 2:
        return first
    counted = [cell for cell in first if cell not in GAPS]
    if (
        len(counted) >= FEW
        and len(first) - len(counted) <= 1
        and (_in_order(counted) or _in_order(counted[1:]))
        and len(cells) > 1
    ):
        return first if not _is_number(first[0]) or _in_order(counted) else None
    return None


def _is_index(header: list[str] | None, cells: list[list[str]]) -> bool:
    """Whether the first column counts the lines."""
    if not cells or not _in_order([row[0] for row in cells]):
        return False
    return (header is not None and header[0].lower() in INDEXES) or (header is None and len(cells) >= FEW)


def _column(
    file: Path, header: list[str] | None, cells: list[list[str]], label: str, first: int
) -> tuple[int | None, list[str]]:
    """The column of the label, or None, and what to say of it."""
    width = len(header or cells[0])
    if label == NONE:
        return None, []
    if label != AUTO:
        return _asked(file, header, label, first, width), []
    if header is not None:
        named = [i for i, name in enumerate(header) if name.lower() in LABELS]
        if len(named) == 1:
            return named[0], []
        if named:
            both = " and ".join(header[i] for i in named)
            raise UsageError(f"{file}: its header has {both}: say which is the label, --data.label NAME, or none")
    if file.suffix.lower() != ".csv":
        return 0, []  # as the UCR archive has it
    if not cells or len({len(row) for row in cells}) > 1:
        return first, []
    at = [i for i in (first, width - 1) if _repeats([row[i] for row in cells])]
    if len(at) == 2 and not all(_is_number(row[at[1]]) for row in cells if row[at[1]] not in GAPS):
        at = at[1:]  # words are no values
    if len(at) == 2 and _is_number(cells[0][at[0]]) and len(cells) >= FEW and _whole([row[at[1]] for row in cells]):
        raise UsageError(
            f"{file}: its first and its last column could both be the label: give --data.label first, last or none"
        )
    if at or len(cells) < FEW:
        return at[0] if at else first, []
    return None, [f"{file.name}: no column looks like a label, so no probes; --data.label says which one is"]


def _asked(file: Path, header: list[str] | None, label: str, first: int, width: int) -> int:
    column = _place(header, label, first, width)
    if column is None:
        columns = (
            f"its columns are {', '.join(header[:4])}, ..., {header[-1]}"
            if header
            else f"it has {width} columns and no header"
        )
        raise UsageError(
            f"--data.label {label}: {file} has no such column; {columns[:120]}; give first, last, none, a name or a number"
        )
    return column


def _place(header: list[str] | None, label: str, first: int, width: int) -> int | None:
    if header is not None and label in header:
        return header.index(label)
    if label in ("first", "last"):
        return first if label == "first" else width - 1
    return int(label) if label.isdecimal() and label.isascii() and len(label) < 9 and int(label) < width else None


def _repeats(cells: list[str]) -> bool:
    """Whether these may be classes: words, or whole numbers, each of which comes about twice at least."""
    there = [cell for cell in cells if cell not in GAPS]
    if not there or len(set(there)) > max(1, len(there) / 2):
        return False
    return not any(map(_is_number, there)) or _whole(there)


def _whole(cells: list[str]) -> bool:
    return all(_is_number(cell) and float(cell).is_integer() for cell in cells if cell not in GAPS)


def _is_target(labels: list[str]) -> bool:
    """Whether these are numbers to regress: not whole, and mostly different."""
    there = [label for label in labels if label not in GAPS]
    return len(there) >= FEW and all(map(_is_number, there)) and not _whole(there) and len(set(there)) > len(there) / 2


def _in_order(cells: list[str]) -> bool:
    """0, 1, 2, ... or 1, 2, 3, ..."""
    if not cells or not all(cell.isdecimal() and cell.isascii() and len(cell) < 10 for cell in cells):
        return False
    numbers = [int(cell) for cell in cells]
    return numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _is_number(text: str) -> bool:
    try:
        float(text)
        return True
    except ValueError:
        return False


def _numbers(values: list[str], file: Path, line: int) -> np.ndarray:
    try:
        return np.array([float(v) if v not in GAPS else np.nan for v in values])
    except ValueError as error:
        raise UsageError(f"{file}, line {line}: {error}; a series is numbers only") from None
