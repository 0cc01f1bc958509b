"""One sample, a source of samples, and what is wrong with a bad one. Everything that reads or loads data speaks of these."""

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np

TRUSTED = 200  # samples after which a share of bad ones means something
Box = tuple[int, int, int, int]  # top, left, height, width


class BadSample(Exception):
    """A sample that cannot be read or decoded: replaced, counted, reported. `kind` is the reason in one word."""

    def __init__(self, message: str, kind: str = "unreadable"):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Bad:
    """A sample that was left out."""

    key: str  # where it lies
    kind: str  # the reason in one word: empty, undecodable, too_large, not_finite, other_shape, shard_missing, ...
    reason: str  # in one sentence


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
class Encoded:
    """A JPEG that is decoded later, with others, and the box of it that is wanted."""

    data: bytes
    box: Box


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


def nothing(indices: np.ndarray) -> None:
    """The `prepare` of what lies in memory."""
