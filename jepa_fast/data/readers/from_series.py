"""Files of series as sources: one file with a test file beside it, or a folder of files with one series each."""

from functools import partial
from pathlib import Path

import numpy as np

from jepa_fast.config import Data
from jepa_fast.data.opened import Parts, digest
from jepa_fast.data.readers import series, series_folder, series_gaps, ucr
from jepa_fast.data.readers.series import SeriesFile, SeriesSource
from jepa_fast.data.sample import BadSample, Source
from jepa_fast.errors import UsageError


def open_series(path: str, data: Data) -> Parts:
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
        told = digest(np.ascontiguousarray(part.samples).tobytes(), b"" if labels is None else labels.tobytes())
        contents[name] = f"{len(samples)} series {told}"
    flat = sum(int((part.samples.std((1, 2)) == 0).sum()) for part in held.values())
    if flat:
        notes.append(f"{flat} series are constant: they hold nothing to predict")
    return Parts(sources[0], sources[1] if len(sources) > 1 else None, contents, notes=notes)


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
