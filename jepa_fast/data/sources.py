"""Sources: samples by number, as arrays of the training size. What they are read from is the reader's business."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from jepa_fast.data.sample import Bad, BadSample, Counts, Encoded, Source, nothing
from jepa_fast.errors import UsageError


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
        raise UsageError(f"not one of the {len(source)} samples can be read, {source.key(0)} among them; fix the data")
    return np.stack(inputs), np.array(numbers)
