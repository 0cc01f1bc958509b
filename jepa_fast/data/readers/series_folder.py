"""A folder with one series a file: .npy ([L] or [C, L]) or .csv (a line a moment, a column a channel).

Class folders give the labels; train/ and test/ (or val/) the split. A file that cannot be read, or holds another shape
than most, is a bad sample among good ones.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from jepa_fast.bounded import read_bytes, read_text
from jepa_fast.data.readers.series import ENCODING, SeriesFile, array
from jepa_fast.data.sample import BadSample
from jepa_fast.errors import UsageError

SUFFIXES = (".npy", ".csv")
SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


def is_folder_of_series(root: Path) -> bool:
    """Whether every file is a series: several .npy or .csv that lie in class folders or are not named as a split."""
    files = _files(root)
    whole = [f for f in files if f.parent == root and "train" in f.name.lower()]
    return len(files) > 1 and not whole


def load(root: Path) -> dict[str, SeriesFile]:
    """{split: series}, the training part first. Raises UsageError naming the file that does not fit."""
    train = next((root / n for n in SPLITS["train"] if (root / n).is_dir()), root)
    test = next((root / n for n in SPLITS["test"] if (root / n).is_dir() and train != root), None)
    parts = {"train": _part(train)}
    if test is not None:
        parts["test"] = _part(test)
    return parts


def _files(root: Path) -> list[Path]:
    return sorted(
        f
        for f in root.rglob("*")
        if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and not f.stem.endswith("_labels")
    )


def _part(root: Path) -> SeriesFile:
    files = _files(root)
    if not files:
        raise UsageError(f"{root} holds no series ({', '.join(SUFFIXES)}); put one into every file")
    held = [_one(file) for file in files]
    shapes = Counter(one.shape for one in held if isinstance(one, np.ndarray))
    if not shapes:
        raise UsageError(f"not one of the {len(files)} series of {root} can be read; {files[0]}: {held[0]}; fix them")
    shape = shapes.most_common(1)[0][0]
    rows, unread = np.full((len(files), *shape), np.nan, np.float32), {}
    for i, one in enumerate(held):
        if isinstance(one, BadSample):
            unread[i] = one
        elif one.shape != shape:
            unread[i] = BadSample(f"holds {_shape(one.shape)}, where most hold {_shape(shape)}", "other_shape")
        else:
            rows[i] = one
    classes = [f.relative_to(root).parts[0] if len(f.relative_to(root).parts) > 1 else "" for f in files]
    labels = np.array(classes, dtype=str) if len(set(classes)) > 1 and "" not in classes else None
    return SeriesFile(rows, labels, [str(f.relative_to(root)) for f in files], unread)


def _one(file: Path) -> np.ndarray | BadSample:
    """float32 [C, L], or why there is none."""
    try:
        values = array(read_bytes(file)) if file.suffix.lower() == ".npy" else _csv(file).T
    except BadSample as error:
        return error
    except OSError as error:
        return BadSample(f"cannot be read ({error.strerror})", "unreadable")
    except ValueError as error:
        return BadSample(f"cannot be read ({str(error).splitlines()[0]})", "undecodable")
    return values if values.size else BadSample("holds no values", "undecodable")


def _csv(file: Path) -> np.ndarray:
    """[L, C]; a first line that is no numbers is a header."""
    lines = [line for line in read_text(file, ENCODING).splitlines() if line.strip()]
    trouble = ValueError("no numbers in it")
    for rows in filter(None, (lines, lines[1:])):
        try:
            return np.loadtxt(rows, delimiter=",", dtype=np.float32, ndmin=2, comments=None)
        except ValueError as error:
            trouble = error
    raise trouble


def _shape(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} channels of {shape[1]} values"
