"""What shards can be made from: an image folder, CIFAR batches, files of series, other shards (remote ones too).

Each reader gives an Inputs: how many samples each split has, and sample i of it as WebDataset's dict. Encoded images are
taken over byte by byte, CIFAR becomes PNG, series become .npy of float32 [C, L], not normalised.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from jepa_fast.bounded import read_bytes
from jepa_fast.data import from_shards
from jepa_fast.data.opened import digest
from jepa_fast.data.readers import cifar, image_folder, series, series_folder, series_gaps, ucr
from jepa_fast.data.readers.series import SeriesFile
from jepa_fast.data.sample import BadSample
from jepa_fast.data.shards import paths, tar
from jepa_fast.data.shards.reader import Shards
from jepa_fast.data.shards.samples import NO_LABEL, split_name, text
from jepa_fast.data.shards.streams import bring
from jepa_fast.errors import UsageError

Sample = Callable[[int], dict]


@dataclass(frozen=True)
class Inputs:
    splits: dict[str, int]  # {split: number of samples}
    sample: dict[str, Sample]  # {split: i -> {'__key__', 'jpg', 'cls', ...}}; raises BadSample
    contents: dict[str, str]  # other samples, other contents
    kind: str  # in words
    classes: list[str] = field(default_factory=list)  # names of the classes, by number
    lost: list[str] = field(default_factory=list)  # what should be there and is not, and why
    notes: list[str] = field(default_factory=list)  # what else a user should know


class SeriesOptions(NamedTuple):
    """As training has them: `--data.label`, `--data.gaps`, `--data.lengths`."""

    label: str = "auto"
    gaps: str = "refuse"
    lengths: str = "refuse"
    max_bad_share: float = 0.01


def open_inputs(source: str, label_filter: str = "", options: SeriesOptions = SeriesOptions()) -> Inputs:  # noqa: B008
    """What `source` holds. options: of series. Raises UsageError."""
    if ucr.named(source):
        return _of_series(source, options)
    entries = paths.entries(source)
    if any(paths.is_remote(entry) for entry in entries) or paths.is_shards(source):
        return _of_shards(source, label_filter)
    if label_filter:
        raise UsageError(f"--label-filter is for shards; {source} holds none: leave the other classes out of it")
    if not os.path.exists(source):
        raise UsageError(f"{source} does not exist; give an image folder, CIFAR batches, a file of series, or shards")
    root = Path(source)
    if not root.is_dir():
        if root.suffix.lower() not in series.SUFFIXES:
            raise UsageError(f"{source} is no file of series ({', '.join(series.SUFFIXES)}), and no folder")
        return _of_series(source, options)
    batches = cifar.find(root)
    if batches is not None:
        return _of_cifar(batches)
    if image_folder.images_under(root):
        return _of_folder(root)
    if series_folder.is_folder_of_series(root) or any(f.suffix.lower() in series.SUFFIXES for f in root.iterdir()):
        return _of_series(source, options)
    raise UsageError(f"{source} holds no images, no CIFAR batches, no series and no .tar; give a folder that does")


def _of_folder(root: Path) -> Inputs:
    found = image_folder.find(root)
    splits = {name: split for name, split in found.items() if split[1]}
    classes = image_folder.classes_of(*splits["train"])
    number = {name: i for i, name in enumerate(classes)}

    def sample_of(split_root: Path, files: list[Path]) -> Sample:
        def sample(i: int) -> dict:
            name = image_folder.class_of(files[i], split_root)
            made: dict = {"__key__": f"{i:08}", files[i].suffix[1:].lower(): _bytes(files[i])}
            about: dict = {"filename": str(files[i].relative_to(split_root))}
            if name in number:
                made["cls"] = about["label"] = number[name]
            return {**made, "json": about}

        return sample

    contents: dict[str, str] = {}
    for split_root, files in splits.values():
        contents |= image_folder.contents(root, split_root, files)
    counts = {name: len(files) for name, (_, files) in splits.items()}
    samples = {name: sample_of(*split) for name, split in splits.items()}
    return Inputs(counts, samples, contents, "an image folder", classes, notes=image_folder.notes(root, classes, found))


def _bytes(file: Path) -> bytes:
    try:
        data = read_bytes(file)
    except OSError as error:
        raise BadSample(f"{file} cannot be read ({error.strerror})") from None
    if not data:
        raise BadSample(f"{file} is empty (0 bytes)", "empty")
    return data


def _of_cifar(folder: Path) -> Inputs:
    held = cifar.load(folder)

    def sample_of(pixels: np.ndarray, labels: np.ndarray) -> Sample:
        return lambda i: {"__key__": f"{i:05}", "png": _png(pixels[i]), "cls": int(labels[i])}

    return Inputs(
        {split: len(labels) for split, (_, labels) in held.items()},
        {split: sample_of(*part) for split, part in held.items()},
        {split: digest(pixels.tobytes(), labels.tobytes()) for split, (pixels, labels) in held.items()},
        "CIFAR batches",
    )


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _of_series(source: str, options: SeriesOptions) -> Inputs:
    root = Path(source)
    if root.is_dir() and series_folder.is_folder_of_series(root):
        held = series_folder.load(root)
    else:
        train, test = (ucr.find(source).train, ucr.find(source).test) if ucr.named(source) else series.find(source)
        beside = train.with_name(train.name.replace("train", "val"))  # FaultDetection has train, val and test.pt
        validation = beside if beside != train and beside.is_file() else None
        files = {"train": train, "test": test, "validation": validation}
        held = series.load_all({name: file for name, file in files.items() if file is not None}, options.label)
    notes = [note for part in held.values() for note in part.notes]
    held, done = series_gaps.regular(held, options.gaps, options.lengths, options.max_bad_share)
    notes += done
    named = [part.labels for part in held.values() if part.labels is not None]
    classes = [c for c in np.unique(np.concatenate(named)).tolist() if c] if len(named) == len(held) else []

    def sample_of(part: SeriesFile) -> Sample:
        def sample(i: int) -> dict:
            if i in part.unread:
                raise BadSample(f"{part.keys[i] if part.keys else i} {part.unread[i]}", part.unread[i].kind)
            if not np.isfinite(part.samples[i]).all():
                raise BadSample(f"series {i} holds a missing or infinite value", "not_finite")
            made = {"__key__": f"{i:06}", "npy": np.ascontiguousarray(part.samples[i], dtype=np.float32)}
            label = "" if part.labels is None or not classes else str(part.labels[i])
            return {**made, "cls": classes.index(label)} if label else made

        return sample

    contents = {
        split: digest(
            np.ascontiguousarray(part.samples).tobytes(),
            repr(part.labels is not None and part.labels.tolist()).encode(),
        )
        for split, part in held.items()
    }
    counts = {split: len(part.samples) for split, part in held.items()}
    return Inputs(
        counts, {split: sample_of(part) for split, part in held.items()}, contents, "series", classes, notes=notes
    )


def _of_shards(source: str, label_filter: str) -> Inputs:
    """Shards again: all members as they are, .cls renumbered where a filter leaves classes out."""
    entries = paths.entries(source)
    if any(map(paths.is_remote, entries)):  # of entries: a file name that a pattern found is no URL
        files = [
            bring(name) if paths.is_remote(entry) else Path(name) for entry in entries for name in paths.expand(entry)
        ]
        found = {"train": paths.Split(files)}
    else:
        found = {name: split for name, split in paths.find(source).items() if split.files}
    held = {name: Shards(split.files, split.lengths) for name, split in found.items()}
    kept = {
        name: from_shards.wanted(part, label_filter) if label_filter else np.arange(len(part))
        for name, part in held.items()
    }
    present: np.ndarray = np.array([], np.int64)
    if label_filter:
        labels = [part.labels[kept[name]] for name, part in held.items() if part.labels is not None]
        present = np.unique(np.concatenate(labels)) if labels else present
        present = present[present != NO_LABEL]
        if not any(map(len, kept.values())):
            raise UsageError(
                f"no sample of {source} is of a class listed in --label-filter {label_filter}; list class numbers as in .cls, or wnids"
            )

    def sample_of(part: Shards, chosen: np.ndarray) -> Sample:
        labels = part.labels

        def sample(i: int) -> dict:
            number = int(chosen[i])
            if not part.length(number):
                raise BadSample(f"{part.key(number)} is empty (0 bytes)", "empty")
            made = _members(part, number)
            if not any(made[name] for name in made if f".{name}".endswith(f".{part.payload(number)}")):
                raise BadSample(f"{part.key(number)} is empty (0 bytes)", "empty")
            if labels is not None and labels[number] != NO_LABEL:
                made = {name: data for name, data in made.items() if not f".{name}".endswith(".cls")}
                made["cls"] = str(np.searchsorted(present, labels[number]) if len(present) else labels[number]).encode()
            return made

        return sample

    contents = {f"{name}/{shard}": what for name, part in held.items() for shard, what in part.parts().items()}
    if label_filter:
        contents["filter"] = digest(Path(label_filter).read_bytes())
    counts = {name: len(chosen) for name, chosen in kept.items() if len(chosen)}
    return Inputs(
        counts,
        {name: sample_of(held[name], kept[name]) for name in counts},
        contents,
        "shards",
        [str(c) for c in present],
        [f"{where}: {why}" for part in held.values() for where, why in part.lost],
    )


def _members(part: Shards, number: int) -> dict:
    """All members of a sample; the key loses what would lead out of a folder. Raises BadSample."""
    key = ""
    made: dict = {}
    try:
        window = tar.InMemory(part.read_members(number))
        for member in tar.members(window):  # the reader that training has: what it passes over is passed over here
            raw, extension = split_name(member.name)
            if extension:
                key = key or text(raw)
                if text(raw) == key:  # others may stand between two samples
                    made.setdefault(text(extension), window.get(member.data, member.size))
    except tar.TarDamage as error:
        raise BadSample(f"its members cannot be read (the shard {error})") from None
    safe = "/".join(piece for piece in key.split("/") if piece not in ("", ".", ".."))
    return {"__key__": safe or f"{number:08}", **made}
