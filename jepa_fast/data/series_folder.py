"""A folder with one series a file: .npy ([L] or [C, L]) or .csv (a line a moment, a column a channel).

Class folders give the labels; train/ and test/ (or val/) the split.
"""

from pathlib import Path

import numpy as np

from jepa_fast.data.series import SeriesFile
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
        if f.suffix in SUFFIXES and not f.name.startswith(".") and not f.stem.endswith("_labels")
    )


def _part(root: Path) -> SeriesFile:
    files = _files(root)
    if not files:
        raise UsageError(f"{root} holds no series ({', '.join(SUFFIXES)}); put one into every file")
    rows = [_one(file) for file in files]
    for file, row in zip(files, rows, strict=True):
        if row.shape != rows[0].shape:
            raise UsageError(
                f"{file} holds {_shape(row)} and {files[0]} {_shape(rows[0])}; make the series equally long, with the same channels"
            )
    classes = [f.relative_to(root).parts[0] if len(f.relative_to(root).parts) > 1 else "" for f in files]
    labels = np.array(classes, dtype=str) if len(set(classes)) > 1 and "" not in classes else None
    return SeriesFile(np.stack(rows), labels, [str(f.relative_to(root)) for f in files])


def _one(file: Path) -> np.ndarray:
    """float32 [C, L]."""
    try:
        if file.suffix == ".npy":
            values = np.load(file, allow_pickle=False).astype(np.float32)
        else:
            values = _csv(file).T
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}; mend it, or take it out") from None
    except Exception as error:  # damaged arrays raise nearly anything
        said = str(error).partition(". ")[0].replace("\n", " ") or type(error).__name__
        raise UsageError(f"{file} cannot be read: {said}; mend it, or take it out") from None
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or not values.size:
        raise UsageError(f"{file} holds an array of shape {values.shape}; one series a file is [L] or [C, L]")
    return values


def _csv(file: Path) -> np.ndarray:
    """[L, C]; a first line that is no numbers is a header."""
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    for skip in (0, 1):
        try:
            return np.loadtxt(lines[skip:], delimiter=",", dtype=np.float32, ndmin=2)
        except ValueError as error:
            trouble = error
    raise UsageError(f"{file} cannot be read: {str(trouble).splitlines()[0]}")


def _shape(values: np.ndarray) -> str:
    return f"{values.shape[0]} channels of {values.shape[1]} values"
