"""Events that state one fact about the shape of one curve: minima, late drops.

A change counts only if it exceeds both a fixed ratio and a multiple of the scatter between neighbouring records.
"""

import math
from collections import deque
from typing import Any, NamedTuple

from jepa_fast.monitor.phase.curves import WINDOW, Event, Level, Smoother, confidence, margin, noise, positive

FALL, RISE = math.log(1.25), math.log(1.3)  # smallest ratio into a valley, and out of it
DROP = math.log(1.5)  # smallest sudden fall, within a tenth of the steps so far
SIGMAS = 5.0  # and smallest change in standard deviations of its noise: a minimum of many is an extreme already


class LossShape:
    """`loss_minimum` and, after one, `late_drop`."""

    def __init__(self) -> None:
        self.smoother, self.valleys, self.drops = Smoother(), Valleys(), Drops("loss")

    def add(self, step: int, record: dict[str, Any]) -> list[Event]:
        loss = positive(record.get("loss"))
        if loss is None:
            return []
        level = self.smoother.add(step, loss)
        valley, drop = self.valleys.add(level), self.drops.add(level)
        self.drops.armed |= valley is not None
        minimum = [valley_event("loss_minimum", "loss", valley)] if valley else []
        return minimum + ([drop] if drop else [])


class Valley(NamedTuple):
    high: Level  # before
    low: Level  # the bottom
    now: Level  # when the rise was confirmed
    num_since: int  # records after the bottom


class Valleys:
    """Falls followed by a rise that lasts; after the first only deeper ones, or a wobbling end would tell of many."""

    def __init__(self) -> None:
        self.high: Level | None = None
        self.low: Level | None = None
        self.first = self.risen = 0
        self.num_since = self.num_above = 0
        self.deepest = math.inf

    def add(self, now: Level) -> Valley | None:
        if self.high is None or self.low is None:
            self._begin(now)
            self.first = now.called
            return None
        high, low = self.high, self.low
        if now.log <= low.log:
            self.low, self.num_since, self.num_above = now, 0, 0
            return None
        self.num_since += 1
        self.num_above = self.num_above + 1 if now.log - low.log >= max(RISE, margin(low, now, now, SIGMAS)) else 0
        self.risen = now.called if self.num_above == 1 else self.risen
        lasts = self.num_above >= 2 and now.called - self.risen >= WINDOW / 2 * (now.called - self.first)
        fallen = high.log - low.log >= max(FALL, margin(high, low, now, SIGMAS))
        found = None
        if fallen and lasts and self.num_since >= 3:
            if low.log < self.deepest:
                self.deepest = low.log
                found = Valley(high, low, now, self.num_since)
            self._begin(now)
        elif now.log >= high.log and not fallen:
            self._begin(now)
        return found

    def _begin(self, now: Level) -> None:
        self.high = self.low = now
        self.num_since = self.num_above = 0


def valley_event(kind: str, key: str, v: Valley) -> Event:
    """Dated at the bottom."""
    high, low, now = (math.exp(level.log) for level in v[:3])
    scatter = noise(v.low, v.now, v.now)
    evidence = (
        f"smoothed {key} {low:.3g} at step {v.low.step}, {now:.3g} at step {v.now.step} ({now / low:.1f}x)",
        f"fell {high / low:.1f}x before, from {high:.3g} at step {v.high.step}",
        f"noise of that ratio {math.expm1(scatter):.1%}, {v.num_since} records since the minimum",
    )
    sure = confidence(min(v.high.log, v.now.log) - v.low.log, scatter, v.num_since)
    return Event(kind, v.low.step, v.now.called, sure, evidence)


class Drops:
    """Sudden falls that last: by DROP within a tenth of the steps so far. Counted once `armed`, after a minimum."""

    def __init__(self, key: str) -> None:
        self.key, self.armed = key, False
        self.past: deque[Level] = deque()
        self.peaks: deque[Level] = deque()  # of them those that nothing later exceeds: the first is the highest
        self.first: int | None = None
        self.before: Level | None = None  # the level that the curve has dropped from
        self.fell = self.num_below = 0

    def add(self, now: Level) -> Event | None:
        self.first = now.called if self.first is None else self.first
        self.past.append(now)
        while self.peaks and self.peaks[-1].log < now.log:
            self.peaks.pop()
        self.peaks.append(now)
        while len(self.past) > 1 and self.past[1].called <= now.called - WINDOW * (now.called - self.first):
            if self.past.popleft() is self.peaks[0]:
                self.peaks.popleft()
        if not self.armed:
            return None
        if self.before is None:
            if _dropped(self.peaks[0], now):
                self.before, self.fell, self.num_below = self.peaks[0], now.step, 1
        elif not _dropped(self.before, now):
            self.before = None  # back up: the next may come
        else:
            self.num_below += 1
            if self.num_below == 3:
                return self._event(self.before, now)
        return None

    def _event(self, before: Level, now: Level) -> Event:
        high, low, scatter = math.exp(before.log), math.exp(now.log), noise(before, now, now)
        evidence = (
            f"smoothed {self.key} fell {high / low:.1f}x, from {high:.3g} at step {before.step} to {low:.3g} at step {now.step}",
            f"noise of that ratio {math.expm1(scatter):.1%}",
            "after a minimum and its rise such a fall can be a partial collapse; a drop of the learning rate looks the same",
        )
        sure = confidence(before.log - now.log, scatter, self.num_below)
        return Event("late_drop", self.fell, now.called, sure, evidence)


def _dropped(before: Level, now: Level) -> bool:
    return before.log - now.log >= max(DROP, margin(before, now, now, SIGMAS))
