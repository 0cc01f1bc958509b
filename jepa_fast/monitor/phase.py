"""Which phase a run is in: records of metrics.jsonl in, events out. Needs no model, so any project's log will do.

An event states one fact about one curve. None of them says that a run collapsed or recovered: a low
loss and a small discrepancy are alarms, and only the two probe events speak of features.

Everything is causal: an event called at step s is decided by the records up to s, and nothing takes
it back. Two devices make that robust. A level is the median of the log values over the last tenth of
the steps so far, which at 10 or at 100 steps a record covers the same time. And a change counts only
if it exceeds both a fixed ratio and a multiple of the scatter between neighbouring records.

Confidence is the chance that the change is no accident of noise, not that anything is wrong with the run:
(1 - 1 / (1 + k^2)) * (n + 1) / (n + 2). k is the change in standard deviations of its noise; the first
factor is Cantelli's bound, which holds for noise of any shape. n is the number of records that carry the
change; the second factor is Laplace's rule of succession, so that a call on two records stays modest.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

WINDOW = 0.1  # of the steps so far: the time a level is the median of
FALL, RISE = math.log(1.25), math.log(1.3)  # smallest ratio into a valley, and out of it
SIGMAS = 5.0  # and smallest change in standard deviations of its noise: a minimum of many is an extreme already
PROBE_MARGIN = 0.02  # accuracy that counts as a difference: two standard errors on about 2,000 test samples


@dataclass(frozen=True)
class Event:
    kind: str  # one of those in docs/metrics.md
    step: int  # when it happened
    called_at: int  # step of the record that decided it
    confidence: float  # 0 to 1, see above
    evidence: tuple[str, ...]  # sentences with the numbers


def detect(records: Iterable[dict[str, Any]]) -> list[Event]:
    """All events of a run so far, in the order they were called. Records need `step`; every other key may be missing."""
    records = list(records)
    valleys = {"loss_minimum": "loss", "discrepancy_valley": "discrepancy/visible", "variance_escape": "spread"}
    events = [_event(kind, key, v) for kind, key in valleys.items() for v in _valleys(series(records, key))]
    events += _features(records)
    return sorted(events, key=lambda e: (e.called_at, e.step, e.kind))


def number(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    usable = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def series(records: list[dict[str, Any]], key: str) -> Iterator[tuple[int, float]]:
    """(step, value) of the records that have a positive value (and one that logs and ratios can take), at rising steps."""
    last = -math.inf
    for record in records:
        step, value = number(record.get("step")), number(record.get(key))
        if step is not None and step > last and value is not None and 1e-300 < value < 1e300:
            last = step
            yield int(step), value


# ---- levels ---------------------------------------------------------------------------------------


class Level(NamedTuple):
    """A curve as known at step `called`."""

    step: int  # middle of the window
    log: float  # median of the log values in it
    sigma: float  # standard deviation of one log value about the curve, as far as known
    num_scatter: int  # records that sigma is estimated from
    share: float  # standard deviation of `log`, in sigmas
    called: int


def levels(series: Iterable[tuple[int, float]]) -> Iterator[Level]:
    window: deque[tuple[int, float]] = deque()
    ordered: list[float] = []  # the window's log values
    scatter: list[float] = []  # |x_i - mean of its neighbours|, ordered: its median, as bends make some large
    recent: deque[float] = deque(maxlen=3)
    first = None
    for step, value in series:
        first, x = step if first is None else first, math.log(value)
        window.append((step, x))
        insort(ordered, x)
        recent.append(x)
        while window[0][0] < step - WINDOW * (step - first):
            del ordered[bisect_left(ordered, window.popleft()[1])]
        if len(recent) == 3:
            insort(scatter, abs(recent[1] - (recent[0] + recent[2]) / 2))
        # 1.48: median |x| to standard deviation; 1.5: variance of that difference; 1.25: of a median, to that of a mean
        sigma = 1.48 * _middle(scatter) / math.sqrt(1.5) if scatter else math.inf
        share = 1.25 / math.sqrt(len(window)) if len(window) > 2 else 1.0
        yield Level(window[len(window) // 2][0], _middle(ordered), sigma, len(scatter), share, step)


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


# ---- valleys --------------------------------------------------------------------------------------


class _Valley(NamedTuple):
    high: Level  # before
    low: Level  # the bottom
    now: Level  # when the rise was confirmed
    num_since: int  # records after the bottom


def _noise(low: Level, now: Level) -> float:
    """Standard deviation of a difference of levels, by what is known now."""
    return now.sigma * math.hypot(low.share, now.share)


def _margin(one: Level, other: Level, now: Level) -> float:
    """What the levels must differ by. Few records make a poor estimate of the scatter, and so a wider margin."""
    if not now.num_scatter:
        return math.inf
    return SIGMAS * (1 + 1 / now.num_scatter) * now.sigma * math.hypot(one.share, other.share)


def _valleys(series: Iterable[tuple[int, float]]) -> Iterator[_Valley]:
    """Falls followed by a rise that lasts; after the first only deeper ones, or a wobbling end would tell of many."""
    high: Level | None = None
    low: Level | None = None
    deepest, num_since, num_above = math.inf, 0, 0
    for now in levels(series):
        if high is None or low is None:
            high = low = now
            continue
        if now.log <= low.log:
            low, num_since, num_above = now, 0, 0
            continue
        num_since += 1
        num_above = num_above + 1 if now.log - low.log >= max(RISE, _margin(low, now, now)) else 0
        fallen = high.log - low.log >= max(FALL, _margin(high, low, now))
        if fallen and num_above >= 2 and num_since >= 3:
            if low.log < deepest:
                deepest = low.log
                yield _Valley(high, low, now, num_since)
            high = low = now
        elif now.log >= high.log and not fallen:
            high = low = now
        else:
            continue
        num_since = num_above = 0


def _event(kind: str, key: str, v: _Valley) -> Event:
    """A minimum is dated at the bottom, an escape at the rise."""
    high, low, now = (math.exp(level.log) for level in v[:3])
    noise = _noise(v.low, v.now)
    evidence = (
        f"smoothed {key} {low:.3g} at step {v.low.step}, {now:.3g} at step {v.now.step} ({now / low:.1f}x)",
        f"fell {high / low:.1f}x before, from {high:.3g} at step {v.high.step}",
        f"noise of that ratio {math.expm1(noise):.1%}, {v.num_since} records since the minimum",
    )
    confidence = _confidence(min(v.high.log, v.now.log) - v.low.log, noise, v.num_since)
    step = v.now.step if kind == "variance_escape" else v.low.step
    return Event(kind, step, v.now.called, confidence, evidence)


# ---- probes ---------------------------------------------------------------------------------------


def _features(records: list[dict[str, Any]]) -> Iterator[Event]:
    """The target encoder's probe against the untrained encoder's, in turn below and back above.

    Each is called once a run of records beyond the margin has a total of two margins: one clear record, or two.
    """
    below, total, begun, num, last = False, 0.0, 0, 0, -math.inf
    for record in records:
        step, target, untrained = (number(record.get(k)) for k in ("step", "probe/target", "probe/untrained"))
        if step is None or step <= last or target is None or untrained is None:
            continue
        last = step
        gap = (target - untrained) * (1 if below else -1)
        if gap < PROBE_MARGIN:
            total, num = 0.0, 0
            continue
        begun, total, num = (int(step) if num == 0 else begun), total + gap, num + 1
        if total >= 2 * PROBE_MARGIN:
            kind = "features_recovered" if below else "features_below_untrained"
            confidence = _confidence(total / num, PROBE_MARGIN / 2, num)
            yield Event(kind, begun, int(step), confidence, _probe_evidence(record, target, untrained, num))
            below, total, num = not below, 0.0, 0


def _probe_evidence(record: dict[str, Any], target: float, untrained: float, num: int) -> tuple[str, ...]:
    said = [
        f"target probe {target:.3f} at step {record['step']}, untrained {untrained:.3f} ({target - untrained:+.3f})",
        f"{num} probe record{'s' if num > 1 else ''} in a row beyond the margin of {PROBE_MARGIN}",
    ]
    others = (("context probe", "probe/context"), ("majority class", "probe/majority"))
    said += [f"{name} {v:.3f}" for name, key in others if (v := number(record.get(key))) is not None]
    return tuple(said)


def _confidence(change: float, noise: float, num: int) -> float:
    k_squared = (change / noise) ** 2 if noise > 0 else math.inf
    return round((1 - 1 / (1 + k_squared)) * (num + 1) / (num + 2), 3)
