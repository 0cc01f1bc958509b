"""Several data sets in one run, mixed by weight: as stateless and as exact as the order of one set.

Places of the stream are dealt out in rounds. The share of each set in the first n rounds is its weight, rounded; which
places of a round go to which set is a permutation drawn from (seed, round). Every set is gone through epoch by epoch in
its own order, each of its samples once in each of its epochs.
"""

import numpy as np

from jepa_fast.data.loading.order import Order
from jepa_fast.data.random import philox, shuffled

ROUND = 4096
LEAST = 0.001  # smallest share of a set: below, a round might hold none of it


class Mixture:
    """The global batches of a run over sets of `counts` samples, numbered one set after the other."""

    def __init__(self, counts: list[int], weights: tuple[float, ...], batch_size: int, seed: int, window: int = 0):
        shares = np.array(weights, dtype=np.float64) / sum(weights)
        if len(weights) != len(counts) or not (shares >= LEAST).all():
            raise ValueError(
                f"{len(counts)} sets need as many weights, each at least {LEAST:g} of their sum; got {weights}"
            )
        self.batch_size, self.seed = batch_size, seed
        self._until = np.concatenate([[0.0], np.cumsum(shares)])
        self._until[-1] = 1.0
        # Every set has a seed of its own, or sets of equal size would be shuffled alike.
        self._orders = [Order(count, 1, _seed_of(seed, k), window) for k, count in enumerate(counts)]
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._first = np.cumsum([0, *counts])[:-1]

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples) of the global batch `step`: int64 [batch_size] each; an epoch is that of the sample's set."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        sets, ordinals = self._deal(places)
        epochs, samples = np.empty_like(places), np.empty_like(places)
        for k, order in enumerate(self._orders):
            here = np.flatnonzero(sets == k)
            if len(here):
                epochs[here], drawn = order.samples(ordinals[here])
                samples[here] = drawn + self._first[k]
        return epochs, samples

    def _deal(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(set, how many of the set came before) of ascending places."""
        sets, ordinals = np.empty_like(places), np.empty_like(places)
        turns = range(int(places[0] // ROUND), int(places[-1] // ROUND) + 1)
        for turn in turns:
            if turn not in self._kept:
                self._kept[turn] = self._round(turn)
            here = places // ROUND == turn
            sets[here], ordinals[here] = (column[places[here] % ROUND] for column in self._kept[turn])
        self._kept = {turn: kept for turn, kept in self._kept.items() if turn in turns}
        return sets, ordinals

    def _round(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """(set, how many of the set came before) of the places of a round."""
        before, after = self._dealt(turn), self._dealt(turn + 1)
        sets = np.repeat(np.arange(len(before)), after - before)[shuffled(ROUND, self.seed, turn, part=2**32)]
        ordinals = np.empty(ROUND, np.int64)
        for k, count in enumerate(before.tolist()):
            mine = np.flatnonzero(sets == k)
            ordinals[mine] = count + np.arange(len(mine))
        return sets, ordinals

    def _dealt(self, rounds: int) -> np.ndarray:
        """How many of each set the first rounds hold; together rounds * ROUND."""
        return np.diff(np.rint(self._until * (rounds * ROUND))).astype(np.int64)


def _seed_of(seed: int, k: int) -> int:
    return int(philox(seed, k, part=2**33).random_raw())
