"""Which sample comes when: a pure function of (seed, step), so that resuming needs one integer.

Epoch after epoch of permutations is one endless stream; step s takes the places [s * B, (s + 1) * B).
What is left over of an epoch is carried into the next batch, so every batch is whole on any number of
processes, and every sample comes exactly once an epoch.
"""

import numpy as np


class Order:
    """The global batches of a run over `num_samples` samples."""

    def __init__(self, num_samples: int, batch_size: int, seed: int):
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"an order needs samples and a batch size, got {num_samples} and {batch_size}")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self._kept: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples) of the global batch `step`: int64 [batch_size] each."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, places = np.divmod(places, self.num_samples)
        samples = np.empty_like(places)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            samples[here] = self.permutation(epoch)[places[here]]
        self._kept = {e: p for e, p in self._kept.items() if e >= epochs[-1]}
        return epochs, samples

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of the samples in `epoch`: int64 [num_samples].

        Sorting raw Philox words, and not Generator.permutation: only the raw stream is promised to
        stay the same in later NumPy versions.
        """
        if epoch not in self._kept:
            words = philox(self.seed, epoch).random_raw(self.num_samples)
            self._kept[epoch] = np.argsort(words, kind="stable")
        return self._kept[epoch]


def philox(seed: int, epoch: int, sample: int = -1) -> np.random.Philox:
    """The random stream of an epoch's order, or of one sample's augmentation."""
    return np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, sample + 1], np.uint64))
