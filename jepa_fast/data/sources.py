"""Sources: samples by number, as arrays of the training size. What they are read from is the reader's business."""

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jepa_fast.config import Data
from jepa_fast.data import images
from jepa_fast.data.shards import BadSample
from jepa_fast.errors import UsageError


class Counts:
    """What was read and decoded so far; threads add to it."""

    def __init__(self) -> None:
        self.bytes, self.decoded, self.by_pillow = 0, 0, 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int, by_pillow: bool = False) -> None:
        with self._lock:
            self.bytes += num_bytes
            self.decoded += 1
            self.by_pillow += by_pillow


@dataclass(frozen=True)
class Bad:
    """A sample that was left out."""

    key: str  # where it lies
    kind: str  # the reason in one word: empty, undecodable, too_large, not_finite, other_shape, shard_missing, ...
    reason: str  # in one sentence


class Source(Protocol):
    """Samples by number."""

    @property
    def labels(self) -> np.ndarray | None:
        """Class numbers int64 [n], 0 to num_classes - 1; -1 for a sample without one. None: no sample has one."""
        ...

    @property
    def counts(self) -> Counts: ...

    def __len__(self) -> int: ...

    def load(
        self, index: int, rng: np.random.Generator | None, out: np.ndarray | None = None
    ) -> "np.ndarray | Encoded":
        """Sample `index`: uint8 [C, H, W] or float32 [C, L]; augmented with `rng`, as for evaluation without.

        `out`, of that shape, is where it is wanted in the end: a source that can make it there does, and returns `out`.
        Encoded only with `rng`, and if data.decoder asks for it. Raises BadSample.
        """
        ...

    def key(self, index: int) -> str:
        """Where the sample lies, for people."""
        ...

    def prepare(self, indices: np.ndarray) -> None:
        """What is going to be loaded next: a source may begin to read."""
        ...


@dataclass(frozen=True)
class Encoded:
    """A JPEG that is decoded later, with others, and the box of it that is wanted."""

    data: bytes
    box: images.Box


def nothing(indices: np.ndarray) -> None:
    """The `prepare` of what lies in memory."""


@dataclass(frozen=True)
class ImageSource:
    """Pixels or encoded images, brought to the training size: uint8 [C, size, size]."""

    read: Callable[[int], bytes | np.ndarray]
    key: Callable[[int], str]
    count: int
    labels: np.ndarray | None
    data: Data
    prepare: Callable[[np.ndarray], None] = nothing
    counts: Counts = field(default_factory=Counts)

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, rng: np.random.Generator | None, out: np.ndarray | None = None) -> np.ndarray | Encoded:
        raw, size, how = self.read(index), self.data.image_size, self.data.interpolation
        if rng is not None and self.data.decoder == "nvjpeg" and isinstance(raw, bytes):
            shape = images.plain_jpeg(raw)
            if shape is not None:
                self.counts.add(len(raw))
                whole = (0, 0, *shape)
                return Encoded(
                    raw, images.random_box(*shape, self.data.crop_scale, rng) if self.data.random_crop else whole
                )
        by_pillow = False
        if isinstance(raw, np.ndarray):
            pixels = raw if raw.ndim == 3 else raw[:, :, None]
        else:
            pixels, by_pillow = images.decode(raw, self.data.channels, reuse=True)
        self.counts.add(len(raw) if isinstance(raw, bytes) else raw.nbytes, by_pillow)
        if not self.data.random_crop:
            return images.resize(pixels, size, how)
        if rng is None:
            shorter = round(size * 256 / 224) if min(pixels.shape[:2]) > size else size
            return images.center_crop(pixels, size, shorter, how)
        return images.random_resized_crop(pixels, size, self.data.crop_scale, rng, how, out)


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


class Subset:
    """Some samples of another source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.labels = None if source.labels is None else source.labels[indices]

    @property
    def counts(self) -> Counts:
        return self.source.counts

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, rng: np.random.Generator | None, out: np.ndarray | None = None) -> np.ndarray | Encoded:
        return self.source.load(int(self.indices[index]), rng, out)

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def prepare(self, indices: np.ndarray) -> None:
        self.source.prepare(self.indices[indices])


class Lost:
    """Samples that are known to be gone, where they come to light only when their turn has come."""

    labels, prepare = None, staticmethod(nothing)

    def __init__(self, lost: list[tuple[str, str]]):
        self.lost, self.counts = lost, Counts()  # (where, why)

    def __len__(self) -> int:
        return len(self.lost)

    def load(self, index: int, rng: np.random.Generator | None, out: np.ndarray | None = None) -> np.ndarray:
        raise BadSample(self.lost[index][1], "lost")

    def key(self, index: int) -> str:
        return self.lost[index][0]


class Joined:
    """Several sources, numbered one after the other. No labels but those of a single one: class 3 of one is not class 3
    of another."""

    def __init__(self, sources: Sequence[Source], names: Sequence[str]):
        self.sources, self.names = sources, names
        self.labels = sources[0].labels if len(sources) == 1 else None
        self.sizes = [len(s) for s in sources]
        self._starts = np.cumsum([0, *self.sizes]).tolist()

    @property
    def counts(self) -> Counts:
        total = Counts()
        for source in self.sources:
            total.bytes += source.counts.bytes
            total.decoded += source.counts.decoded
            total.by_pillow += source.counts.by_pillow
        return total

    def __len__(self) -> int:
        return self._starts[-1]

    def load(self, index: int, rng: np.random.Generator | None, out: np.ndarray | None = None) -> np.ndarray | Encoded:
        k, place = self._place(index)
        return self.sources[k].load(place, rng, out)

    def key(self, index: int) -> str:
        k, place = self._place(index)
        return f"{self.names[k]}: {self.sources[k].key(place)}".removeprefix(": ")

    def prepare(self, indices: np.ndarray) -> None:
        for k, source in enumerate(self.sources):
            mine = (indices >= self._starts[k]) & (indices < self._starts[k + 1])
            if mine.any():
                source.prepare(indices[mine] - self._starts[k])

    def _place(self, index: int) -> tuple[int, int]:
        k = bisect_right(self._starts, index) - 1
        return k, index - self._starts[k]


def evaluated(source: Source, index: int) -> np.ndarray:
    """A sample as for evaluation. Raises BadSample."""
    values = source.load(index, None)
    assert isinstance(values, np.ndarray)
    return values


def fixed_draw(source: Source, count: int, left_out: list[Bad] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(inputs [n, ...], their numbers int64 [n]): `count` samples, or all there are; the same in every run.

    Not augmented; unreadable ones are left out, and added to `left_out`. Of a stream, from its first shard.
    """
    source = getattr(source, "fixed", source)
    inputs: list[np.ndarray] = []
    numbers: list[int] = []
    for index in np.random.default_rng(0).permutation(len(source)):
        if len(inputs) == count:
            break
        try:
            inputs.append(evaluated(source, int(index)))
            numbers.append(int(index))
        except BadSample as error:
            if left_out is not None:
                left_out.append(Bad(source.key(int(index)), error.kind, str(error)))
    if not inputs:
        raise UsageError(f"not one of the {len(source)} samples can be read, {source.key(0)} among them; mend the data")
    return np.stack(inputs), np.array(numbers)
