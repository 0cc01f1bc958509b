"""Image folders: train/ and val/ (or test/) of class folders, class folders, or just images."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from jepa_fast.bounded import read_bytes, shown
from jepa_fast.config import Data
from jepa_fast.data.opened import Parts, digest
from jepa_fast.data.readers import series
from jepa_fast.data.readers.images import ImageSource
from jepa_fast.data.sample import BadSample, Source
from jepa_fast.data.shards.samples import PAYLOADS
from jepa_fast.errors import UsageError

SUFFIXES = tuple(f".{name}" for name in PAYLOADS if name != "npy")


def open_folder(root: Path, data: Data) -> Parts:
    """The images under `root`. Raises UsageError if there is none."""
    splits = find(root)
    if not splits["train"][1]:
        inside = sorted(p.name for p in root.iterdir())
        found = next((f for f in inside if f.endswith(series.SUFFIXES)), "")
        hint = (
            f"; for a file of series: python -m jepa_fast.train series --data.path {root / found}"
            if found
            else "; put images or shards there"
        )
        raise UsageError(f"--data.path {root} holds no image ({', '.join(SUFFIXES)}) and no .tar{hint}")
    (train_root, train_files), (test_root, test_files) = splits["train"], splits["test"]
    classes = classes_of(train_root, train_files)
    train = _source(train_files, train_root, classes, root, data)
    test = _source(test_files, test_root, classes, root, data) if test_files else None
    held: dict[str, str] = {}
    for split_root, files in splits.values():
        held |= contents(root, split_root, files)
    return Parts(train, test, held)


def find(root: Path) -> dict[str, tuple[Path, list[Path]]]:
    """{'train', 'test'}: (folder of the split, its images in order, possibly none)."""
    train = root / "train" if (root / "train").is_dir() else root
    names = ("val", "valid", "validation", "test")
    test = next((root / n for n in names if (root / n).is_dir() and train != root), None)
    return {"train": (train, images_under(train)), "test": (test or root, images_under(test) if test else [])}


def images_under(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


def class_of(file: Path, root: Path) -> str:
    """The first folder under `root`, or '' for an image that lies in `root` itself."""
    inside = file.relative_to(root).parts
    return inside[0] if len(inside) > 1 else ""


def classes_of(root: Path, files: list[Path]) -> list[str]:
    """The class folders, in order; none where there is but one, or where images lie beside them."""
    named = {class_of(f, root) for f in files}
    return sorted(named) if len(named) > 1 and "" not in named else []


def _source(files: list[Path], split_root: Path, classes: list[str], root: Path, data: Data) -> Source:
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number.get(class_of(f, split_root), -1) for f in files], dtype=np.int64) if classes else None
    return ImageSource(partial(_read, files), lambda i: shown(files[i].relative_to(root)), len(files), labels, data)


def _read(files: Sequence[Path], index: int) -> bytes:
    try:
        return read_bytes(files[index])
    except FileNotFoundError:
        raise BadSample("is no longer there", "missing") from None
    except OSError as error:
        raise BadSample(f"cannot be read ({error.strerror})", "unreadable") from None


def contents(root: Path, split_root: Path, files: list[Path]) -> dict[str, str]:
    """Names and sizes of the files, by class folder."""
    by_folder: dict[str, list[str]] = {}
    for file in files:
        folder = shown((split_root / class_of(file, split_root)).relative_to(root))
        by_folder.setdefault(folder, []).append(f"{file.relative_to(split_root)} {_size(file)}")
    return {
        folder: f"{len(names)} files {digest(os.fsencode(chr(10).join(names)))}" for folder, names in by_folder.items()
    }


def _size(file: Path) -> int:
    """Bytes; -1 of a link that leads nowhere."""
    try:
        return file.stat().st_size
    except OSError:
        return -1
