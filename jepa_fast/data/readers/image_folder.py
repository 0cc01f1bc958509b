"""Images as sources: folders (train/ and val/ of class folders, class folders, or just images), CIFAR batches, shards."""

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from jepa_fast.bounded import read_bytes, shown
from jepa_fast.config import Data
from jepa_fast.data.opened import Opened, digest
from jepa_fast.data.readers import cifar, series, ucr
from jepa_fast.data.readers.images import ImageSource
from jepa_fast.data.sample import BadSample, Source
from jepa_fast.data.shards import samples
from jepa_fast.data.shards.reader import Shards
from jepa_fast.errors import UsageError

PAYLOADS = tuple(name for name in samples.PAYLOADS if name != "npy")
SUFFIXES = tuple(f".{name}" for name in PAYLOADS)


def open_images(path: str, data: Data) -> Opened:
    """The image folder or CIFAR batches at `path`. Raises UsageError."""
    if ucr.named(path):
        raise UsageError(
            f"--data.path {path} names series; give a preset for series: python -m jepa_fast.train series --data.path {path}"
        )
    if os.path.isdir(path):
        batches = cifar.find(Path(path))
        return _open_cifar(batches, data) if batches else open_folder(Path(path), data)
    other = (
        f"; for a file of series: python -m jepa_fast.train series --data.path {path}"
        if path.endswith(series.SUFFIXES)
        else ""
    )
    if path.endswith((".tar.gz", ".tgz")):
        other = "; a compressed tar cannot be read at random: gunzip it"
    raise UsageError(f"--data.path {path} is not a folder of images, shards (.tar) or CIFAR batches{other}")


# What people call their splits, in any case, with - or _ or a blank in it. The first that fits is the one.
SPLITS = {
    "train": ("train", "training", "train_set", "trainset", "training_set", "train_images", "images_train"),
    "test": ("val", "valid", "validation", "dev", "val_set", "validation_set", "val_images", "test", "testing", "test_set", "testset",
             "test_images", "eval", "evaluation"),
}  # fmt: skip
SYSTEM = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information", "__pycache__"}


def open_folder(root: Path, data: Data) -> Opened:
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
    return Opened(train, test, held, notes=notes(root, classes, splits))


def notes(root: Path, classes: list[str], splits: dict[str, tuple[Path, list[Path]]]) -> list[str]:
    """What a user should know of the splits that `find` gave."""
    (train_root, _), (test_root, test_files) = splits["train"], splits["test"]
    return _unused(train_root, test_root, root) + _unknown(classes, test_root, test_files)


def _unused(train_root: Path, test_root: Path, root: Path) -> list[str]:
    """A note of the folders next to the training one that are no split: perhaps `train` was a class."""
    if train_root == root:
        return []
    others = [f.name for f in _folders(train_root.parent) if f not in (train_root, test_root) and images_under(f)]
    if not others:
        return []
    few = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    return [f"{train_root.name} is taken as the training part; {few} next to it is not used"]


def _unknown(classes: list[str], test_root: Path, test_files: list[Path]) -> list[str]:
    """A note of the test classes that training lacks."""
    more = sorted({class_of(file, test_root) for file in test_files} - set(classes) - {""}) if classes else []
    if not more:
        return []
    few = ", ".join(map(repr, more[:3])) + (", ..." if len(more) > 3 else "")
    return [
        f"{test_root.name} has {len(more)} classes that training lacks ({few}): their images take no part in the probe"
    ]


def find(root: Path) -> dict[str, tuple[Path, list[Path]]]:
    """{'train', 'test'}: (folder of the split, its images in order, possibly none). Raises UsageError on a test part alone."""
    place, inside = root, _splits_in(root)
    if not inside and len(below := _folders(root)) == 1 and _splits_in(below[0]):
        place, inside = below[0], _splits_in(below[0])  # as archives unpack: name/name/train
    if "train" in inside:
        test = inside.get("test")
        train = images_under(inside["train"])
        return {"train": (inside["train"], train), "test": (test or place, images_under(test) if test else [])}
    if "test" in inside and all(_plain(folder) in SPLITS["test"] for folder in _folders(place)):
        alone = inside["test"]
        raise UsageError(
            f"--data.path {root} holds {alone.name} and no folder to train on: give {alone}, or put a folder train there"
        )
    return {"train": (root, images_under(root)), "test": (root, [])}


def _splits_in(folder: Path) -> dict[str, Path]:
    """{'train', 'test'}: the folders of `folder` that are called so."""
    named = {_plain(inner): inner for inner in reversed(_folders(folder))}
    found = {split: next((named[n] for n in names if n in named), None) for split, names in SPLITS.items()}
    return {split: inner for split, inner in found.items() if inner is not None}


def _plain(folder: Path) -> str:
    """'Training-Set' -> 'training_set'"""
    return re.sub(r"[-\s]", "_", folder.name.lower())


def _folders(folder: Path) -> list[Path]:
    return sorted(inner for inner in folder.iterdir() if inner.is_dir() and not _passed_over(inner.name))


def _passed_over(name: str) -> bool:
    """Hidden folders and files, and what systems put next to people's data."""
    return name.startswith(".") or name.lower() in SYSTEM


def images_under(folder: Path) -> list[Path]:
    """In order. Links are followed; a folder that was entered already (a loop) is not entered again."""
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        here = Path(place)
        # Folders themselves before links to them, so that a class keeps its own name.
        folders[:] = sorted((f for f in folders if not _passed_over(f)), key=lambda f: ((here / f).is_symlink(), f))
        state = here.stat()
        if (state.st_dev, state.st_ino) in entered:
            folders.clear()
            continue
        entered.add((state.st_dev, state.st_ino))
        found += [here / f for f in files if not f.startswith(".") and os.path.splitext(f)[1].lower() in SUFFIXES]
    return sorted(found)


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


def _open_cifar(folder: Path, data: Data) -> Opened:
    contents, sources = {}, []
    for split, (pixels, labels) in cifar.load(folder).items():
        contents[split] = f"{len(pixels)} images {digest(pixels.tobytes(), labels.tobytes())}"
        if data.channels == 1:
            pixels = np.rint(pixels @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
        sources.append(ImageSource(pixels.__getitem__, partial("{}:{}".format, split), len(pixels), labels, data))
    return Opened(sources[0], sources[1], contents)


def of_shards(first: Shards, data: Data) -> Callable[[Shards, np.ndarray | None], Source]:
    """How encoded images in shards become a source, given their labels."""
    return lambda held, labels: ImageSource(held.read, held.key, len(held), labels, data, held.prepare)
