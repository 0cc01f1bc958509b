"""Sources: samples by number, as arrays of the training size. What they are read from is the reader's business."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jepa_fast.config import Data
from jepa_fast.data import images
from jepa_fast.data.shards import BadSample
from jepa_fast.errors import UsageError


class Source(Protocol):
    """Samples by number."""

    @property
    def labels(self) -> np.ndarray | None:
        """Class numbers int64 [n], 0 to num_classes - 1."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int, rng: np.random.Generator | None) -> np.ndarray:
        """Sample `index`: uint8 [C, H, W] or float32 [C, L]; augmented with `rng`, as for evaluation without.

        Raises BadSample.
        """
        ...

    def key(self, index: int) -> str:
        """Where the sample lies, for people."""
        ...


@dataclass(frozen=True)
class ImageSource:
    """Pixels or encoded images, brought to the training size: uint8 [C, size, size]."""

    read: Callable[[int], bytes | np.ndarray]
    key: Callable[[int], str]
    count: int
    labels: np.ndarray | None
    data: Data

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, rng: np.random.Generator | None) -> np.ndarray:
        raw, size = self.read(index), self.data.image_size
        pixels = raw if isinstance(raw, np.ndarray) else images.decode(raw, self.data.channels)
        if not self.data.random_crop:
            return images.planar(images.whole(pixels, size))
        if rng is None:
            shorter = round(size * 256 / 224) if min(pixels.shape[:2]) > size else size
            return images.planar(images.center_crop(pixels, size, shorter))
        return images.planar(images.random_resized_crop(pixels, size, self.data.crop_scale, rng))


@dataclass(frozen=True)
class SeriesSource:
    """Series, z-normalised: float32 [C, L]."""

    read: Callable[[int], np.ndarray]
    key: Callable[[int], str]
    count: int
    labels: np.ndarray | None

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, rng: np.random.Generator | None) -> np.ndarray:
        return self.read(index)


class Subset:
    """Some samples of another source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.labels = None if source.labels is None else source.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, rng: np.random.Generator | None) -> np.ndarray:
        return self.source.load(int(self.indices[index]), rng)

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))


def fixed_draw(source: Source, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs [n, ...], their numbers int64 [n]): `count` samples, or all there are; the same in every run.

    Not augmented; unreadable ones are left out.
    """
    inputs: list[np.ndarray] = []
    numbers: list[int] = []
    for index in np.random.default_rng(0).permutation(len(source)):
        if len(inputs) == count:
            break
        try:
            inputs.append(source.load(int(index), None))
            numbers.append(int(index))
        except BadSample:
            continue
    if not inputs:
        raise UsageError(f"not one of the {len(source)} samples can be read, {source.key(0)} among them; mend the data")
    return np.stack(inputs), np.array(numbers)
