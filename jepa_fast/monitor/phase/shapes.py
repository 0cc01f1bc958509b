"""Events that state one fact about the shape of one curve: minima, escapes, late drops.

A change counts only if it exceeds both a fixed ratio and a multiple of the scatter between neighbouring records.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jepa_fast.monitor.phase.curves import WINDOW, Event, Level, confidence, levels, series

FALL, RISE = math.log(1.25), math.log(1.3)  # smallest ratio into a valley, and out of it
DROP = math.log(1.5)  # smallest sudden fall, within a tenth of the steps so far
SIGMAS = 5.0  # and smallest change in standard deviations of its noise: a minimum of many is an extreme already
VALLEYS = {"loss_minimum": "loss", "discrepancy_valley": "discrepancy/visible", "variance_escape": "spread"}


def shape_events(records: list[dict[str, Any]]) -> list[Event]:
    events = [valley_event(kind, key, v) for kind, key in VALLEYS.items() for v in valleys(series(records, key))]
    escaped = {e.kind: e.called_at for e in reversed(events)}
    for kind, key in (("loss_minimum", "loss"), ("variance_escape", "spread")):
        if kind in escaped:
            events += drops(series(records, key), key, escaped[kind])
    return events


class Valley(NamedTuple):
    high: Level  # before
    low: Level  # the bottom
    now: Level  # when the rise was confirmed
    num_since: int  # records after the bottom


def valleys(series: Iterable[tuple[int, float]]) -> Iterator[Valley]:
    """Falls followed by a rise that lasts; after the first only deeper ones, or a wobbling end would tell of many."""
    high: Level | None = None
    low: Level | None = None
    first = risen = 0
    deepest, num_since, num_above = math.inf, 0, 0
    for now in levels(series):
        if high is None or low is None:
            high = low = now
            first = now.called
            continue
        if now.log <= low.log:
            low, num_since, num_above = now, 0, 0
            continue
        num_since += 1
        num_above = num_above + 1 if now.log - low.log >= max(RISE, _margin(low, now, now)) else 0
        risen = now.called if num_above == 1 else risen
        lasts = num_above >= 2 and now.called - risen >= WINDOW / 2 * (now.called - first)
        fallen = high.log - low.log >= max(FALL, _margin(high, low, now))
        if fallen and lasts and num_since >= 3:
            if low.log < deepest:
                deepest = low.log
                yield Valley(high, low, now, num_since)
            high = low = now
        elif now.log >= high.log and not fallen:
            high = low = now
        else:
            continue
        num_since = num_above = 0


def drops(series: Iterable[tuple[int, float]], key: str, escaped: int) -> Iterator[Event]:
    """Sudden falls after the step `escaped`, that last: by DROP within a tenth of the steps so far."""
    past: deque[Level] = deque()
    before: Level | None = None  # the level that the curve has dropped from
    first, fell, num_below = None, 0, 0
    for now in levels(series):
        first = now.called if first is None else first
        past.append(now)
        while len(past) > 1 and past[1].called <= now.called - WINDOW * (now.called - first):
            past.popleft()
        if now.called <= escaped:
            continue
        if before is None:
            steepest = max(past, key=lambda level: level.log)
            before = steepest if _dropped(steepest, now) else None
            fell, num_below = now.step, 1
        elif not _dropped(before, now):
            before = None
        elif num_below >= 0:
            num_below += 1
            if num_below >= 3:
                yield _drop_event(key, before, now, fell, num_below)
                num_below = -1  # called; the next needs a rise first


def _dropped(before: Level, now: Level) -> bool:
    return before.log - now.log >= max(DROP, _margin(before, now, now))


def _noise(one: Level, other: Level, now: Level) -> float:
    """Standard deviation of a difference of levels, by what is known now."""
    return now.sigma * math.hypot(one.share, other.share)


def _margin(one: Level, other: Level, now: Level) -> float:
    """What the levels must differ by. Few records make a poor estimate of the scatter, and so a wider margin."""
    if not now.num_scatter:
        return math.inf
    return SIGMAS * (1 + 1 / now.num_scatter) * _noise(one, other, now)


def valley_event(kind: str, key: str, v: Valley) -> Event:
    """A minimum is dated at the bottom, an escape at the rise."""
    high, low, now = (math.exp(level.log) for level in v[:3])
    noise = _noise(v.low, v.now, v.now)
    evidence = (
        f"smoothed {key} {low:.3g} at step {v.low.step}, {now:.3g} at step {v.now.step} ({now / low:.1f}x)",
        f"fell {high / low:.1f}x before, from {high:.3g} at step {v.high.step}",
        f"noise of that ratio {math.expm1(noise):.1%}, {v.num_since} records since the minimum",
    )
    sure = confidence(min(v.high.log, v.now.log) - v.low.log, noise, v.num_since)
    return Event(kind, v.now.step if kind == "variance_escape" else v.low.step, v.now.called, sure, evidence)


def _drop_event(key: str, before: Level, now: Level, fell: int, num: int) -> Event:
    high, low, noise = math.exp(before.log), math.exp(now.log), _noise(before, now, now)
    evidence = (
        f"smoothed {key} fell {high / low:.1f}x, from {high:.3g} at step {before.step} to {low:.3g} at step {now.step}",
        f"noise of that ratio {math.expm1(noise):.1%}",
        "after an escape such a fall can be a partial collapse; a drop of the learning rate looks the same",
    )
    return Event("late_drop", fell, now.called, confidence(before.log - now.log, noise, num), evidence)
