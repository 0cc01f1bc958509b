"""Which sample comes when: a pure function of (seed, step), so that resuming needs one integer.

Epoch after epoch of permutations is one endless stream; step s takes the places [s * B, (s + 1) * B).
What is left over of an epoch is carried into the next batch, so every batch is whole on any number of
processes, and every sample comes exactly once an epoch.
"""

import numpy as np

from jepa_fast.data.random import shuffled

BLOCKS = -1  # in place of a window: the order of an epoch's blocks
RUNS = 16  # stretches of neighbouring samples that a window of the block shuffle is mixed from


class Order:
    """The global batches of a run over `num_samples` samples.

    window 0: every epoch is one permutation of all samples. Else a block shuffle, for disks that do not like to jump:
    the samples are cut into blocks of window / 16 neighbours, the blocks are shuffled, and every `window` samples of the
    result are shuffled among themselves. A window then reads 16 stretches of the files and nothing else.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, window: int = 0):
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"an order needs samples and a batch size, got {num_samples} and {batch_size}")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.window = window if 0 < window < num_samples else 0
        self._kept: dict[tuple[int, int], np.ndarray] = {}

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples) of the global batch `step`: int64 [batch_size] each."""
        return self.samples(np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64))

    def samples(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples) at ascending places of the endless stream: int64 each."""
        epochs, places = np.divmod(places, self.num_samples)
        size = self.window or self.num_samples
        per_epoch = -(-self.num_samples // size)
        windows = epochs * per_epoch + places // size
        samples = np.empty_like(places)
        needed = [divmod(w, per_epoch) for w in np.unique(windows).tolist()]
        for epoch, window in needed:
            here = windows == epoch * per_epoch + window
            samples[here] = self._order(epoch, window)[places[here] - window * size]
        self._kept = {k: v for k, v in self._kept.items() if k in needed or k == (needed[-1][0], BLOCKS)}
        return epochs, samples

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of the samples in `epoch`: int64 [num_samples]."""
        return self.samples(np.arange(self.num_samples, dtype=np.int64) + epoch * self.num_samples)[1]

    def _order(self, epoch: int, window: int) -> np.ndarray:
        """The samples of a window (of the epoch, where there are no windows) in order."""
        if (epoch, window) not in self._kept:
            self._kept[epoch, window] = (
                self._in_window(epoch, window) if self.window else shuffled(self.num_samples, self.seed, epoch)
            )
        return self._kept[epoch, window]

    def _in_window(self, epoch: int, window: int) -> np.ndarray:
        size = -(-self.window // RUNS)
        if (epoch, BLOCKS) not in self._kept:
            blocks = shuffled(-(-self.num_samples // size), self.seed, epoch)
            ends = np.cumsum(np.minimum(size, self.num_samples - blocks * size))
            self._kept[epoch, BLOCKS] = np.stack([blocks, ends])
        blocks, ends = self._kept[epoch, BLOCKS]
        start, stop = window * self.window, min((window + 1) * self.window, self.num_samples)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        lengths = np.diff(ends[first : last + 1], prepend=ends[first - 1] if first else 0)
        inside = [
            np.arange(b * size, b * size + n)
            for b, n in zip(blocks[first : last + 1].tolist(), lengths.tolist(), strict=True)
        ]
        begun = int(ends[first] - lengths[0])
        samples = np.concatenate(inside)[start - begun : stop - begun]
        return samples[shuffled(stop - start, self.seed, epoch, window + 1)]
