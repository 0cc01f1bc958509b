"""The probability that an encoder's features beat the untrained encoder's, from signals that need no labels.

A logistic model on a few scale-free signals. Its numbers are in `weights.json`; `experiments/phase/fit.py` fits them on
real runs and writes that file, README.md there says how well it does on data sets that the fit never saw. What a log
lacks decides which of several models is used (`TIERS`); a log with a loss alone gets none.
"""

import json
import math
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jepa_fast.monitor.phase.curves import number, positive

Record = dict[str, Any]
WINDOW, FEWEST = 0.1, 6  # share of the steps so far, and records, that a signal of single batches is averaged over
ENCODERS = ("context", "target")
# Each tier: the signals that it needs. The first whose signals are all there is used.
TIERS: dict[str, tuple[str, ...]] = {
    "readout": ("skill", "readout", "rankme"),
    "spectrum": ("skill", "rankme"),
    "skill": ("skill",),
}


class Estimate(NamedTuple):
    context: float | None
    target: float | None
    looked: bool  # whether this record has news of the features (or, without looks, of the predictor)
    facts: tuple[str, ...]  # of the predictor and the targets
    reasons: tuple[str, ...]  # of the probabilities

    @property
    def better(self) -> float | None:
        return max((p for p in (self.context, self.target) if p is not None), default=None)

    @property
    def said(self) -> tuple[str, ...]:
        return self.reasons + self.facts


class Smoothed:
    """The mean of a signal over the last tenth of the steps, at least six records, and its standard error."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.held: deque[tuple[int, float]] = deque()

    def add(self, step: int, value: float) -> None:
        self.first = step if self.first is None else self.first
        self.held.append((step, value))
        while len(self.held) > FEWEST and self.held[0][0] < step - WINDOW * (step - self.first):
            self.held.popleft()

    @property
    def mean(self) -> float | None:
        return sum(v for _, v in self.held) / len(self.held) if self.held else None

    @property
    def error(self) -> float:
        """Of the mean: from differences of neighbours, so that a trend is not taken for noise. inf of one value."""
        values = [v for _, v in self.held]
        if len(values) < 2:
            return math.inf
        variance = sum((b - a) ** 2 for a, b in zip(values, values[1:], strict=False)) / (2 * (len(values) - 1))
        return math.sqrt(variance / len(values))
