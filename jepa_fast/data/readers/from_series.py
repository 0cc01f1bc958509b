"""Series as sources: one file with a test file beside it, a folder of files with one series each, shards."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from jepa_fast import cores
from jepa_fast.config import Data
from jepa_fast.data.opened import Opened, digest
from jepa_fast.data.readers import image_folder, series, series_folder, series_gaps, ucr
from jepa_fast.data.readers.series import SeriesFile, SeriesSource, Statistics
from jepa_fast.data.sample import BadSample, Source
from jepa_fast.data.shards.reader import Shards
from jepa_fast.errors import UsageError

AT_A_TIME = 256  # series a thread takes at once


def open_files(path: str, data: Data) -> Opened:
    """The files of series at `path`. Raises UsageError."""
    folder = Path(path)
    if (
        not ucr.named(path)
        and folder.is_dir()
        and not series_folder.is_folder_of_series(folder)
        and not any(f.endswith(series.SUFFIXES) for f in os.listdir(path))
    ):
        images = (
            f"; for images: python -m jepa_fast.train images --data.path {path}"
            if image_folder.images_under(folder)
            else "; put them there"
        )
        raise UsageError(
            f"--data.path {path} holds no file of series ({', '.join(series.SUFFIXES)}) and no .tar{images}"
        )
    return open_series(path, data)


def open_series(path: str, data: Data) -> Opened:
    """The series that `path` means, normalised as data.series_norm says. Raises UsageError."""
    held = _read(path, data.label)
    channels = {name: part.samples.shape[1] for name, part in held.items()}
    if len(set(channels.values())) > 1:
        raise UsageError(
            f"{' and '.join(channels)} hold series of {' and '.join(map(str, channels.values()))} channels; make them equal"
        )
    notes = [note for part in held.values() for note in part.notes]
    held, done = series_gaps.regular(held, data.gaps, data.lengths, data.max_bad_share)
    notes += done
    named = [part.labels for part in held.values() if part.labels is not None]
    classes = np.unique(np.concatenate(named)) if len(named) == len(held) else None
    classes = None if classes is None else classes[classes != ""]
    train = series.statistics(next(iter(held.values())).samples) if data.series_norm == "train" else None
    sources: list[Source] = []
    contents: dict[str, str] = {}
    for name, part in held.items():
        samples = np.ascontiguousarray(series.normalise(part.samples, data.series_norm, train), dtype=np.float32)
        labels = None
        if classes is not None and part.labels is not None:
            labels = np.where(part.labels == "", -1, np.searchsorted(classes, part.labels)).astype(np.int64)
        read, key = partial(_one, samples, part.unread), partial(_key, name, part.keys)
        sources.append(SeriesSource(read, key, len(samples), labels))
        held_digest = digest(np.ascontiguousarray(part.samples).tobytes(), b"" if labels is None else labels.tobytes())
        contents[name] = f"{len(samples)} series {held_digest}"
    flat = sum(int((part.samples.std((1, 2)) == 0).sum()) for part in held.values())
    if flat:
        notes.append(f"{flat} series are constant: they hold nothing to predict")
    return Opened(sources[0], sources[1] if len(sources) > 1 else None, contents, notes=notes)


def _read(path: str, label: str) -> dict[str, SeriesFile]:
    """{name: series}, the training part first."""
    if Path(path).is_dir() and series_folder.is_folder_of_series(Path(path)):
        return series_folder.load(Path(path))
    if ucr.named(path):
        pair = ucr.find(path)
        files = [pair.train, pair.test]
    else:
        files = [file for file in series.find(path) if file is not None]
    return series.load_all({file.name: file for file in files}, label)


def _one(samples: np.ndarray, unread: dict[int, BadSample], index: int) -> np.ndarray:
    if index in unread:
        raise BadSample(str(unread[index]), unread[index].kind)
    return samples[index]


def _key(name: str, keys: list[str] | None, index: int) -> str:
    return keys[index] if keys else f"{name}: series {index} from 0"


# ---- in shards ------------------------------------------------------------------------------------


def of_shards(first: Shards, data: Data) -> Callable[[Shards, np.ndarray | None], Source]:
    """How series in shards become a source, given their labels; shape and statistics are those of `first`."""
    shape = common_shape(first)
    train = _statistics(first, shape) if data.series_norm == "train" else None

    def source(held: Shards, labels: np.ndarray | None) -> Source:
        read = partial(_read_series, held, data, shape or common_shape(held), train)
        return SeriesSource(read, held.key, len(held), labels, held.prepare)

    return source


def refuse_stream(data: Data) -> None:
    if data.series_norm == "train":
        raise UsageError(
            "--data.series_norm train needs shards on this machine; copy them first: python -m jepa_fast.shards"
        )


def _read_series(held: Shards, data: Data, shape: tuple[int, ...], train: Statistics | None, sample: int) -> np.ndarray:
    return series.normalise(series.array(held.read(sample), shape)[None], data.series_norm, train)[0]


def _statistics(held: Shards, shape: tuple[int, ...]) -> Statistics:
    """Mean and standard deviation of the series that can be used, each read once (Chan, Golub, LeVeque 1979)."""

    def moments(start: int) -> tuple[int, np.ndarray, np.ndarray]:
        usable: list[np.ndarray] = []
        for sample in range(start, min(start + AT_A_TIME, len(held))):
            with suppress(BadSample):
                values = series.array(held.read(sample), shape)
                usable += [values] if np.isfinite(values).all() else []
        if not usable:
            return 0, np.zeros(1), np.zeros(1)
        mean, std = series.statistics(np.stack(usable))
        return len(usable), mean, std**2

    count, mean, variance = 0, np.zeros(1), np.zeros(1)
    with ThreadPoolExecutor(cores.usable()) as pool:
        for more, its_mean, its_variance in pool.map(moments, range(0, len(held), AT_A_TIME)):
            if more:
                share = more / (count + more)
                apart = its_mean - mean
                variance = variance + share * (its_variance - variance + (1 - share) * apart**2)
                mean, count = mean + share * apart, count + more
    return mean, np.sqrt(variance)


def common_shape(held: Shards) -> tuple[int, ...]:
    """The shape [C, L] of a series that has as many bytes as most; () if the first of them cannot be read."""
    _, inverse, counts = np.unique(
        np.concatenate([part.rows["length"] for part in held.indexes]), return_inverse=True, return_counts=True
    )
    for sample in np.flatnonzero(inverse == counts.argmax())[:100].tolist():
        with suppress(BadSample):
            return series.array(held.read(sample)).shape
    return ()
