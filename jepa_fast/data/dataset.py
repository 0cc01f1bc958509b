"""What a run trains on and what probes are fitted on, whatever files they lie in.

In: the `data` section of a configuration. Out: a Dataset of Sources.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jepa_fast.config import Config, Data
from jepa_fast.data import cifar, embedded, series, shards
from jepa_fast.data.shards import BadSample, Shards
from jepa_fast.data.sources import ImageSource, SeriesSource, Source, Subset
from jepa_fast.errors import UsageError

HELD_OUT = 5000  # at most, of a set without a test split


@dataclass(frozen=True)
class Dataset:
    train: Source
    probe_train: Source | None  # labelled, or None
    probe_test: Source | None
    num_classes: int
    shape: tuple[int, ...]  # of a sample as loaded
    description: str
    fingerprint: str  # changes when samples, their order or their labels do


def open_dataset(config: Config) -> Dataset:
    """The data that `config` names. Raises UsageError, naming the path and the mend."""
    data = config.data
    if not data.path and not data.embedded:
        raise UsageError(f"preset {config.preset} needs --data.path: {data.hint}")
    path, origin = data.path, f"data of {data.path}"
    if not path:
        folder, origin = embedded.shards_of(data.embedded)
        path = str(folder)
    if "://" in path or path.startswith("pipe:"):
        raise UsageError(f"--data.path {path}: shards must be files on this machine; copy them here first")
    if not os.path.exists(path) and not shards.is_shards(path):
        raise UsageError(
            f"--data.path {path} does not exist" + (f"; put there {data.hint}" if data.hint else "; check the path")
        )
    parts = _open_images(path, data) if data.kind == "images" else _open_series(path, data)
    return _assemble(parts, data, origin)


@dataclass(frozen=True)
class _Parts:
    """What a reader found: training samples, held-out ones if there are any, and a hash of both."""

    train: Source
    test: Source | None
    fingerprint: str
    train_plain: Source | None = None  # the training samples as a probe sees them, where that differs


def _assemble(parts: _Parts, data: Data, origin: str) -> Dataset:
    train, test = parts.train, parts.test
    probe_train = parts.train_plain or train
    labelled = train.labels is not None and (test is None or test.labels is not None)
    split = ""
    if labelled and test is None and len(train) >= 10:
        order = np.random.default_rng(0).permutation(len(train))
        held = min(HELD_OUT, max(1, len(train) // 5))
        test = Subset(probe_train, order[:held])
        train = Subset(train, np.sort(order[held:]))
        probe_train = Subset(probe_train, np.sort(order[held:]))
        split = f", {held} of the labelled samples held out for the probe"
    if not labelled or test is None:
        note = "no labels, so no probes" if not labelled else "too few samples for a probe"
        return Dataset(
            train, None, None, 0, _shape(train), f"{origin}: {len(train)} samples, {note}", parts.fingerprint
        )
    assert train.labels is not None and test.labels is not None
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    said = f"{origin}: {len(train)} training and {len(test)} test samples, {num_classes} classes{split}"
    return Dataset(train, probe_train, test, num_classes, _shape(train), said, parts.fingerprint)


def _shape(source: Source) -> tuple[int, ...]:
    """The shape of the first sample that can be read."""
    trouble = BadSample("there are no samples")
    for index in range(min(100, len(source))):
        try:
            return source.load(index, None).shape
        except BadSample as error:
            trouble = error
    raise UsageError(f"none of the first samples can be read; {source.key(0)}: {trouble}")


# ---- images -------------------------------------------------------------------------------------


def _open_images(path: str, data: Data) -> _Parts:
    if shards.is_shards(path):
        return _open_shards(path, data)
    if os.path.isdir(path):
        batches = cifar.find(Path(path))
        return _open_cifar(batches, data) if batches else _open_folder(Path(path), data)
    raise UsageError(
        f"--data.path {path} is not a folder of images, shards (.tar) or CIFAR batches" + _other_kind(path)
    )


def _other_kind(path: str) -> str:
    if path.endswith(series.SUFFIXES):
        return f"; for a file of series: python -m jepa_fast.train series --data.path {path}"
    return ""


def _open_shards(path: str, data: Data) -> _Parts:
    found = shards.find(path)
    held = [Shards(files) for files in (found["train"], found["test"]) if files]
    for part in held:
        if (part.payload(0) == "npy") != (data.kind == "series"):
            kind = "series" if part.payload(0) == "npy" else "images"
            raise UsageError(
                f"the shards of --data.path {path} hold .{part.payload(0)} samples: use a preset for {kind}, as in python -m jepa_fast.train {kind} --data.path {path}"
            )
    make = _image_source if data.kind == "images" else _series_source
    sources: list[Source] = [make(part, labels, data) for part, labels in zip(held, _labels(held), strict=True)]
    digest = hashlib.sha256("".join(part.fingerprint() for part in held).encode())
    if data.label_filter:
        sources = _filtered(sources, held, data.label_filter)
        digest.update(Path(data.label_filter).read_bytes())
    return _Parts(sources[0], sources[1] if len(sources) > 1 else None, digest.hexdigest())


def _labels(held: list[Shards]) -> list[np.ndarray | None]:
    """Class numbers of each part: those of .cls, else class names numbered over all parts, else None."""
    if all(part.labels is not None for part in held):
        return [part.labels for part in held]
    if any((part.names == "").any() for part in held):
        return [None] * len(held)
    known = np.unique(np.concatenate([part.names for part in held]))
    return [np.searchsorted(known, part.names) for part in held]


def _image_source(held: Shards, labels: np.ndarray | None, data: Data) -> Source:
    return ImageSource(held.read, held.key, len(held), labels, data)


def _filtered(sources: list[Source], held: list[Shards], label_filter: str) -> list[Source]:
    """The samples whose class number or name is listed in the file `label_filter`, classes renumbered from 0."""
    try:
        listed = Path(label_filter).read_text().split()
    except OSError as error:
        raise UsageError(
            f"--data.label_filter {label_filter}: {error.strerror}; give a file with one class a line"
        ) from None
    by_number = all(word.isdigit() for word in listed)
    wanted = np.array(listed, dtype=np.int64 if by_number else str)
    kept: list[Subset] = []
    for source, part in zip(sources, held, strict=True):
        classes = source.labels if by_number else part.names
        kept.append(Subset(source, np.flatnonzero(np.isin(classes if classes is not None else np.array([]), wanted))))
        if not len(kept[-1]):
            raise UsageError(
                f"no sample of {part.files[0].name} ... is of a class listed in --data.label_filter {label_filter}; list class numbers as in .cls, or wnids"
            )
    numbers = [k.labels for k in kept if k.labels is not None]
    if len(numbers) == len(kept):
        present = np.unique(np.concatenate(numbers))
        for subset in kept:
            assert subset.labels is not None
            subset.labels = np.searchsorted(present, subset.labels)
    return list(kept)


def _open_cifar(folder: Path, data: Data) -> _Parts:
    digest, sources = hashlib.sha256(), []
    for split, (pixels, labels) in cifar.load(folder).items():
        digest.update(pixels.tobytes() + labels.tobytes())
        if data.channels == 1:
            pixels = np.rint(pixels @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
        sources.append(ImageSource(pixels.__getitem__, partial("{}:{}".format, split), len(pixels), labels, data))
    return _Parts(sources[0], sources[1], digest.hexdigest())


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


def _open_folder(root: Path, data: Data) -> _Parts:
    """An image folder: train/ and val/ (or test/) of class folders, class folders, or just images."""
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next(
        (root / n for n in ("val", "valid", "validation", "test") if (root / n).is_dir() and train_root != root), None
    )
    train_files = _images_under(train_root)
    if not train_files:
        inside = sorted(p.name for p in root.iterdir())[:3]
        other = next(
            (
                f"; for a file of series: python -m jepa_fast.train series --data.path {root / f}"
                for f in inside
                if f.endswith(series.SUFFIXES)
            ),
            "",
        )
        raise UsageError(
            f"--data.path {root} holds no image ({', '.join(IMAGE_SUFFIXES)}) and no .tar{other or '; put images or shards there'}"
        )
    classes = sorted({c for f in train_files if (c := _class_of(f, train_root))})
    train = _folder_source(train_files, train_root, classes, data)
    test_files = _images_under(test_root) if test_root else []
    test = _folder_source(test_files, test_root, classes, data) if test_root and test_files else None
    names = "\n".join(f"{f.relative_to(root)} {f.stat().st_size}" for f in [*train_files, *test_files])
    return _Parts(train, test, hashlib.sha256(names.encode()).hexdigest())


def _images_under(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith("."))


def _class_of(file: Path, root: Path) -> str:
    """The first folder under `root`, or '' for an image that lies in `root` itself."""
    inside = file.relative_to(root).parts
    return inside[0] if len(inside) > 1 else ""


def _folder_source(files: list[Path], root: Path, classes: list[str], data: Data) -> Source:
    number = {name: i for i, name in enumerate(classes)}
    named = [_class_of(f, root) for f in files]
    labelled = len(classes) > 1 and all(name in number for name in named)
    labels = np.array([number[name] for name in named], dtype=np.int64) if labelled else None
    return ImageSource(partial(_read_file, files), lambda i: str(files[i].relative_to(root)), len(files), labels, data)


def _read_file(files: Sequence[Path], index: int) -> bytes:
    try:
        return files[index].read_bytes()
    except OSError as error:
        raise BadSample(f"cannot be read ({error.strerror})") from None


# ---- series -------------------------------------------------------------------------------------


def _open_series(path: str, data: Data) -> _Parts:
    if shards.is_shards(path):
        return _open_shards(path, data)
    if os.path.isdir(path) and not any(f.endswith(series.SUFFIXES) for f in os.listdir(path)):
        hint = (
            "; for images: python -m jepa_fast.train images --data.path " + path
            if _images_under(Path(path))
            else "; put them there"
        )
        raise UsageError(f"--data.path {path} holds no file of series ({', '.join(series.SUFFIXES)}) and no .tar{hint}")
    train_file, test_file = series.find(path)
    files = {file: series.load(file) for file in (train_file, test_file) if file is not None}
    shapes = {held.samples.shape[1:] for held in files.values()}
    if len(shapes) > 1:
        raise UsageError(
            f"{train_file} and {test_file} hold series of different shapes {sorted(shapes)}; make them equal"
        )
    named = [held.labels for held in files.values() if held.labels is not None]
    classes = np.unique(np.concatenate(named)) if len(named) == len(files) else None
    reference = files[train_file].samples
    digest, sources = hashlib.sha256(), []
    for file, held in files.items():
        samples = np.ascontiguousarray(series.normalise(held.samples, data.series_norm, reference), dtype=np.float32)
        labels = (
            None if classes is None or held.labels is None else np.searchsorted(classes, held.labels).astype(np.int64)
        )
        digest.update(samples.tobytes() + (b"" if labels is None else labels.tobytes()))
        sources.append(
            SeriesSource(samples.__getitem__, partial("{}: series {} from 0".format, file.name), len(samples), labels)
        )
    return _Parts(sources[0], sources[1] if len(sources) > 1 else None, digest.hexdigest())


def _series_source(held: Shards, labels: np.ndarray | None, data: Data) -> Source:
    if data.series_norm == "train":
        raise UsageError("--data.series_norm train is for files of series; shards take per_series or none")

    def read(index: int) -> np.ndarray:
        try:
            samples = np.load(io.BytesIO(held.read(index)), allow_pickle=False).astype(np.float32)
        except (ValueError, EOFError, OSError) as error:
            raise BadSample(f"not a readable array ({error})") from None
        samples = samples if samples.ndim == 2 else samples[None]
        if samples.ndim != 2 or not np.isfinite(samples).all():
            raise BadSample("holds a missing or infinite value, or is not [C, L]")
        return series.normalise(samples[None], data.series_norm, samples)[0]

    return SeriesSource(read, held.key, len(held), labels)
