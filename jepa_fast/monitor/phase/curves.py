"""One curve of a log, smoothed causally. In: records. Out: levels, each as known at the step of its record.

A level is the median over the last tenth of the steps so far, which at 10 or at 100 steps a record covers the same
time, and on which a spike leaves no trace.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush, heappushpop
from numbers import Real
from typing import Any, NamedTuple

WINDOW = 0.1  # of the steps so far: the time a level is the median of


@dataclass(frozen=True)
class Event:
    """Something that was decided about a run. The last five are None but for `collapse_phase` (docs/metrics.md)."""

    kind: str  # one of those in docs/metrics.md
    step: int  # when it happened
    called_at: int  # step of the record that decided it
    confidence: float  # 0 to 1; of `collapse_suspected` and `escape_suspected` the probability of it
    evidence: tuple[str, ...]  # sentences with the numbers
    end: int | None = None  # first useful step after the phase; None while it lasts
    length: int | None = None  # steps up to `end`, or so far
    share: float | None = None  # `length` over the steps of the run so far
    depth: float | None = None  # how far the better encoder's probe fell below the untrained encoder's, 0 if never
    loss_factor: float | None = None  # first loss over the lowest up to the end of the phase

    def entry(self) -> dict[str, Any]:
        """A line of events.jsonl, without `kind` and `step`."""
        said: dict[str, Any] = {"called_at": self.called_at, "confidence": self.confidence}
        if self.kind == PHASE:
            said |= {name: getattr(self, name) for name in ("end", "length", "share", "depth", "loss_factor")}
        return said | {"evidence": list(self.evidence)}


PHASE = "collapse_phase"


def number(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if value is None or (type(value) is not float and (not isinstance(value, Real) or isinstance(value, bool))):
        return None
    try:
        value = float(value)
    except OverflowError:  # JSON has integers of any length
        return None
    return value if math.isfinite(value) else None


def positive(value: Any) -> float | None:
    """`value` as a positive float that logs and ratios can take, or None."""
    value = number(value)
    return value if value is not None and 1e-300 < value < 1e300 else None


def series(records: Iterable[dict[str, Any]], key: str) -> Iterator[tuple[int, float]]:
    """(step, value) of the records that have a positive value, at rising steps."""
    last = -math.inf
    for record in records:
        step, value = number(record.get("step")), positive(record.get(key))
        if step is not None and step > last and value is not None:
            last = step
            yield int(step), value


class Level(NamedTuple):
    """A curve as known at step `called`."""

    step: int  # middle of the window
    log: float  # median of the log values in it
    sigma: float  # standard deviation of one log value about the curve, as far as known
    num_scatter: int  # records that sigma is estimated from
    share: float  # standard deviation of `log`, in sigmas
    called: int


def levels(series: Iterable[tuple[int, float]]) -> Iterator[Level]:
    smoother = Smoother()
    for step, value in series:
        yield smoother.add(step, value)


class Smoother:
    """Takes a positive curve point by point, in logs, so that units do not matter; returns its level after each."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.window: deque[tuple[int, float]] = deque()
        self.ordered: list[float] = []  # the window's log values
        self.scatter = Median()  # of |x_i - mean of its neighbours|: the median, as bends make some large
        self.recent: deque[float] = deque(maxlen=3)

    def add(self, step: int, value: float) -> Level:
        x = math.log(value)
        self.first = step if self.first is None else self.first
        self.window.append((step, x))
        insort(self.ordered, x)
        while self.window[0][0] < step - WINDOW * (step - self.first):
            del self.ordered[bisect_left(self.ordered, self.window.popleft()[1])]
        self.recent.append(x)
        if len(self.recent) == 3:
            self.scatter.add(abs(self.recent[1] - (self.recent[0] + self.recent[2]) / 2))
        # 1.48: median |x| to standard deviation; 1.5: variance of that difference; 1.25: of a median, to that of a mean
        sigma = 1.48 * self.scatter.value / math.sqrt(1.5) if self.scatter.count else math.inf
        share = 1.25 / math.sqrt(len(self.window)) if len(self.window) > 2 else 1.0
        middle = self.window[len(self.window) // 2][0]
        return Level(middle, _middle(self.ordered), sigma, self.scatter.count, share, step)


class Median:
    """The median of all numbers so far. Two heaps, the lower half negated: a log of 1e5 records costs seconds, no minutes."""

    def __init__(self) -> None:
        self.lower: list[float] = []
        self.upper: list[float] = []

    def add(self, value: float) -> None:
        heappush(self.upper, -heappushpop(self.lower, -value))
        if len(self.upper) > len(self.lower):
            heappush(self.lower, -heappop(self.upper))

    @property
    def count(self) -> int:
        return len(self.lower) + len(self.upper)

    @property
    def value(self) -> float:
        """Raises IndexError of no numbers."""
        return -self.lower[0] if self.count % 2 else (self.upper[0] - self.lower[0]) / 2


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def noise(one: Level, other: Level, now: Level) -> float:
    """Standard deviation of a difference of levels, by what is known now."""
    return now.sigma * math.hypot(one.share, other.share)


def margin(one: Level, other: Level, now: Level, sigmas: float) -> float:
    """What the levels must differ by. Few records make a poor estimate of the scatter, and so a wider margin."""
    return sigmas * (1 + 1 / now.num_scatter) * noise(one, other, now) if now.num_scatter else math.inf


def confidence(change: float, noise: float, num: int) -> float:
    """(1 - 1 / (1 + k^2)) * (n + 1) / (n + 2): the chance that a change is no accident of noise.

    k is the change in standard deviations of its noise; the first factor is Cantelli's bound, which holds for noise of
    any shape. n is the number of records that carry the change; the second factor is Laplace's rule of succession, so
    that a call on two records stays modest.
    """
    k = min(change / noise, 1e9) if noise > 0 else 1e9
    return round((1 - 1 / (1 + k * k)) * (num + 1) / (num + 2), 3)
