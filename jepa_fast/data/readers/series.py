"""Time series from the files people have: UCR .tsv, .ts, .pt, .npy, .csv. Out: float32 [n, C, L] and labels."""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jepa_fast.bounded import read_bytes, read_text
from jepa_fast.data.readers import series_table, torch_file
from jepa_fast.data.readers.series_table import ENCODING, GAPS
from jepa_fast.data.sample import BadSample, Counts, nothing
from jepa_fast.errors import UsageError

SUFFIXES = (".tsv", ".ts", ".pt", ".npy", ".csv", ".txt")
TABLES = (".tsv", ".csv", ".txt")
SAVED = "torch.save({'samples': x, 'labels': y}, file)"


@dataclass(frozen=True)
class SeriesFile:
    samples: np.ndarray  # float32 [n, C, L]
    labels: np.ndarray | None  # str [n], as the file writes them; '' of a series without one
    keys: list[str] | None = None  # where each lies, if not all in one file
    unread: dict[int, BadSample] = field(default_factory=dict)  # why a series could not be read; it stands there as NaN
    notes: tuple[str, ...] = ()  # what a user should know of it
    column: str | None = None  # of a table: where its label is


def find(path: str) -> tuple[Path, Path | None]:
    """(training file, test file or None) of a file, or of a folder that holds one training file.

    X_TRAIN.tsv goes with X_TEST.tsv, train.pt with test.pt.
    """
    given = Path(path)
    if given.is_dir():
        files = (f for f in given.iterdir() if f.suffix.lower() in SUFFIXES and not f.stem.endswith("_labels"))
        training = sorted(f for f in files if re.search("train", f.name, re.I))
        if len(training) != 1:
            held = "no file" if not training else f"{len(training)} files"
            raise UsageError(
                f"--data.path {path} holds {held} of series with 'train' in the name ({', '.join(SUFFIXES)}); give the training file itself"
            )
        given = training[0]
    if not given.is_file():
        raise UsageError(f"--data.path {path} does not exist; give a file of series ({', '.join(SUFFIXES)})")
    before, found, after = _rpartition(given.name, "train")
    if found:
        partner = f"{before}test{after}".lower()
        beside = sorted(f for f in given.parent.iterdir() if f.name.lower() == partner and f.is_file())
        if beside:
            same = [f for f in beside if f.name == before + ("TEST" if found.isupper() else "test") + after]
            return given, (same or beside)[0]
    return given, None


def _rpartition(name: str, part: str) -> tuple[str, str, str]:
    """str.rpartition in any case."""
    at = name.lower().rfind(part)
    return (name[:at], name[at : at + len(part)], name[at + len(part) :]) if at >= 0 else ("", "", name)


def load_all(files: dict[str, Path], label: str = "auto") -> dict[str, SeriesFile]:
    """{name: series}, the training file first: the others have their label where it has its own."""
    held: dict[str, SeriesFile] = {}
    for name, file in files.items():
        first = next(iter(held.values()), None)
        held[name] = load(file, label, first.column if first is not None else None)
    return held


def load(file: Path, label: str = "auto", like: str | None = None) -> SeriesFile:
    """Read a file of series; label and like as `series_table.read` has them. Raises UsageError naming file, line and fix."""
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{file} is not a file of series; known are {', '.join(SUFFIXES)}")
    if suffix not in TABLES and label not in ("auto", "none"):
        raise UsageError(
            f"--data.label {label}: {file} is no table; its format says where labels are; give auto or none"
        )
    notes: tuple[str, ...] = ()
    column = None
    try:
        if suffix in TABLES:
            table = series_table.read(file, label, like)
            samples, notes, column = _stack([_float32(row) for row in table.values], file), table.notes, table.column
            samples = samples[:, None]
            labels = None if table.labels is None else np.array([_tidy(one) for one in table.labels], dtype=str)
        elif suffix == ".ts":
            samples, labels, notes = _read_ts(file)
        else:
            samples, labels = (_read_pt if suffix == ".pt" else _read_npy)(file)
    except UsageError:
        raise
    except Exception as error:  # damaged pickles and arrays raise nearly anything
        raise UsageError(
            f"{file} cannot be read as {file.suffix}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    if samples.size == 0:
        raise UsageError(f"{file} holds no series; put one on every line")
    if labels is not None and len(labels) != len(samples):
        raise UsageError(f"{file} holds {len(samples)} series but {len(labels)} labels")
    return SeriesFile(samples, None if label == "none" else labels, notes=notes, column=column)


Statistics = tuple[np.ndarray, np.ndarray]
"""Mean and standard deviation of each channel, float64 [1, C, 1]."""


def statistics(train: np.ndarray) -> Statistics:
    """Those of the series in float32 [n, C, L] that have no missing value."""
    whole = train[np.isfinite(train).all((1, 2))]
    return whole.mean((0, 2), dtype=np.float64)[None, :, None], whole.std((0, 2), dtype=np.float64)[None, :, None]


def normalise(samples: np.ndarray, how: str, train: Statistics | None = None) -> np.ndarray:
    """z-normalise [n, C, L] `per_series` (each channel by itself), by the statistics of `train`, or (`none`) not at all.

    Series with a missing value stay as they are unusable; the others are not affected.
    """
    if how == "none":
        return samples
    with np.errstate(invalid="ignore"):  # of infinite values: their series are not used
        if how == "train":
            assert train is not None
            mean, std = train
        else:
            mean, std = (f(2, keepdims=True, dtype=np.float64) for f in (samples.mean, samples.std))
        return ((samples - mean) / np.maximum(std, 1e-8)).astype(np.float32)


def array(data: bytes, shape: tuple[int, ...] = ()) -> np.ndarray:
    """float32 [C, L] of a .npy with one series, of `shape` where one is given. Raises BadSample."""
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(values, np.ndarray):
            raise ValueError("it holds several arrays (.npz)")
    except Exception as error:  # a damaged header raises nearly anything, and may ask for any amount of memory
        said = str(error).partition(". ")[0].replace("\n", " ")
        raise BadSample(f"not a readable array ({said or type(error).__name__})", "undecodable") from None
    if values.dtype.kind not in "fiub" or values.ndim not in (1, 2) or not values.size:
        raise BadSample(f"an array of {values.dtype}, shape {values.shape}, and no numbers [C, L]", "undecodable")
    values = _float32(np.atleast_2d(values))
    if values.shape != (shape or values.shape):
        raise BadSample(f"a series of shape {values.shape}, where most are {shape}", "other_shape")
    return values


def _float32(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "fiub":
        raise ValueError(f"it holds {values.dtype}; a series is of real numbers")
    with np.errstate(over="ignore"):  # infinite in float32: a series that cannot be used
        return values.astype(np.float32)


def _read_ts(file: Path) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """The format of timeseriesclassification.com: @ header, then channels between ':', the label last.

    A value may be written with its time, (time,value). A @targetLabel is a number to regress: no class. Also returns notes.
    """
    labelled: bool | None = None  # None: no line says so
    target, begun, rows, labels = False, False, [], []
    for number, line in enumerate(read_text(file, ENCODING).splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith(("#", "%")):
            continue
        if line.startswith("@"):
            if line.lower().startswith(("@classlabel", "@targetlabel")):
                labelled = line.lower().split()[1:2] == ["true"]
                target = labelled and line.lower().startswith("@targetlabel")
            begun = begun or line.lower().startswith("@data")
            continue
        if not begun:
            raise UsageError(f"{file}, line {number}: data before the @data line; is this a .ts file?")
        *channels, last = _without_times(line).split(":")
        if labelled is None:
            labelled = bool(channels) and "," not in last
        if labelled:
            labels.append(_tidy(last))
        else:
            channels.append(last)
        rows.append(_stack([_numbers(c.split(","), file, number) for c in channels], file))
    if target:
        said = f"{file.name}: its @targetLabel is a regression target, so no probes"
        return _stack(rows, file), None, (said,)
    return _stack(rows, file), np.array(labels, dtype=str) if labelled else None, ()


def _without_times(line: str) -> str:
    """(2019-01-01 00:00:00,1.5),(...,2.5):label -> 1.5,2.5:label"""
    return re.sub(r"\(([^()]*),([^(),]*)\)", r"\2", line) if "(" in line else line


def _read_pt(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """A dict of samples [n, L] or [n, C, L] and, possibly, labels [n]."""
    try:
        held = torch_file.load(file)
    except ValueError as error:
        raise UsageError(
            f"{file} cannot be read as .pt: more than tensors and arrays is in it, or it is damaged ({error}); "
            f"save it as {SAVED}, or copy it again"
        ) from None
    if not isinstance(held, dict) or "samples" not in held:
        raise UsageError(f"{file} holds no dict with 'samples' (and 'labels'); save it as {SAVED}")
    samples, labels = held["samples"], held.get("labels")
    if isinstance(samples, (list, tuple)):
        samples = _stack([_float32(_array(one)) for one in samples], file)
    named = None if labels is None else np.array([_tidy(str(label)) for label in _array(labels).ravel().tolist()])
    return _three_axes(_float32(_array(samples)), file), named


def _array(values: Any) -> np.ndarray:
    """Of a tensor too, in whatever precision and with or without a gradient."""
    if isinstance(values, torch.Tensor):
        values = values.detach()
        values = values.float() if values.dtype == torch.bfloat16 else values
    return np.asarray(values)


def _read_npy(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Samples [n, L] or [n, C, L]; labels [n] in <name>_labels.npy beside it, if that is there."""
    beside = file.with_name(file.stem + "_labels.npy")
    labels = np.array([_tidy(str(v)) for v in npy(beside).ravel()]) if beside.is_file() else None
    return _three_axes(_float32(npy(file)), file), labels


def npy(file: Path) -> np.ndarray:
    """The array in a .npy. Raises OSError, ValueError."""
    held = np.load(io.BytesIO(read_bytes(file, 2**40)), allow_pickle=False)
    if not isinstance(held, np.ndarray):
        raise ValueError("it holds several arrays (.npz); save one")
    return held


def _three_axes(samples: np.ndarray, file: Path) -> np.ndarray:
    if samples.ndim not in (2, 3):
        raise UsageError(f"{file} holds samples of shape {samples.shape}; give [n, L] or [n, C, L]")
    return samples if samples.ndim == 3 else samples[:, None]


def _numbers(values: list[str], file: Path, line: int) -> np.ndarray:
    try:
        return _float32(np.array([float(v) if v.strip() not in GAPS else np.nan for v in values]))
    except ValueError as error:
        raise UsageError(f"{file}, line {line}: {error}; a series is numbers only") from None


def _stack(rows: list[np.ndarray], file: Path) -> np.ndarray:
    """Rows [L] or [C, L] as one array; shorter ones end in NaN (`series_gaps` decides what becomes of them)."""
    if not rows:
        return np.empty((0, 1), np.float32)
    for number, row in enumerate(rows, start=1):
        if row.shape[:-1] != rows[0].shape[:-1]:
            raise UsageError(
                f"{file} holds series of different channels: series 1 is {_shape(rows[0])}, series {number} is {_shape(row)}; make them equal"
            )
    stacked = np.full((len(rows), *rows[0].shape[:-1], max(row.shape[-1] for row in rows)), np.nan, np.float32)
    for i, row in enumerate(rows):
        stacked[i, ..., : row.shape[-1]] = row
    return stacked


def _shape(row: np.ndarray) -> str:
    return " x ".join(map(str, row.shape))


def _tidy(label: str) -> str:
    """'1.0', '1' and ' 1' are one class; '', '?' and 'nan' are none: ''."""
    label = label.strip()
    try:
        number = float(label)
    except ValueError:
        return "" if label == "?" else label
    if math.isnan(number):
        return ""
    return str(int(number)) if number.is_integer() else label


@dataclass(frozen=True)
class SeriesSource:
    """Series, normalised: float32 [C, L]."""

    read: Callable[[int], np.ndarray]
    key: Callable[[int], str]
    count: int
    labels: np.ndarray | None
    prepare: Callable[[np.ndarray], None] = nothing
    counts: Counts = field(default_factory=Counts)

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, rng: np.random.Generator | None, out: np.ndarray | None = None) -> np.ndarray:
        values = self.read(index)
        if not np.isfinite(values).all():
            raise BadSample("holds a missing or infinite value", "not_finite")
        self.counts.add(values.nbytes)
        return values
