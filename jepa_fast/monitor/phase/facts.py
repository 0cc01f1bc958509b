"""The phase as the paper defines it, from probes: facts, where there are labels. In: records. Out: events.

Section 4.1: "the reconstruction objective improves, yet the learned representations perform no better than random
features". Here the first half of the sentence is "the loss has fallen to half of its start", and the second "the better
encoder's probe is not above the untrained encoder's by two standard errors of the difference". An untrained encoder whose
probe is below the majority class has that by chance: features are then compared with the majority class, or any probe at
chance would pass for useful (FordA with seed 1: untrained .498, majority .516).
"""

import math
from collections import deque
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

from jepa_fast.monitor.phase.curves import PHASE, Event, number, positive

Record = dict[str, Any]
HALF = 0.5  # of the first loss
SMOOTH = 3  # records whose median must be there, so that one lucky batch is not enough
LOOKS = 2  # in a row that must agree
ASSUMED_TESTS = 1320  # test samples of a log that does not say how many; FordA's


def probe_margin(reference: float, num_test: float | None) -> float:
    """The accuracy that counts as a difference: two standard errors of the difference of two accuracies near `reference`.

    2 sqrt(2 p (1 - p) / m) with m test samples; p is moved towards one half by two samples of each kind (Agresti and Coull),
    so that an accuracy of 0 or 1 on a few samples is not taken as certain. About .039 on FordA, .7 on four samples.
    """
    m = num_test if num_test and num_test >= 1 else ASSUMED_TESTS
    p = (reference * m + 2) / (m + 4)
    return 2 * math.sqrt(2 * p * (1 - p) / m)


class Look(NamedTuple):
    """What the probes of one record say."""

    step: int
    gaps: dict[str, float]  # encoder -> its accuracy less the reference
    probes: dict[str, float]
    untrained: float
    reference: float  # the untrained encoder's accuracy, or the majority class where that is higher
    margin: float
    num_test: float | None  # test samples; None where the log does not say

    @property
    def decides(self) -> bool:
        """Whether a perfect probe would be useful: not with one class, or on a few test samples."""
        return self.reference + self.margin <= 1

    @property
    def better(self) -> str:
        return max(self.gaps, key=lambda name: self.gaps[name])

    @property
    def useful(self) -> bool:
        return round(self.gaps[self.better] - self.margin, 9) >= 0  # rounded: a margin apart is apart, in binary too


def look_of(record: Record) -> Look | None:
    """None of a record without probes, or with one that failed."""
    untrained = number(record.get("probe/untrained"))
    held = {name: record.get(f"probe/{name}") for name in ("context", "target")}
    probes = {name: p for name, value in held.items() if (p := number(value)) is not None}
    failed = len(probes) < sum(value is not None for value in held.values())
    step = number(record.get("step"))
    if untrained is None or step is None or not probes or failed:
        return None
    reference = max(untrained, number(record.get("probe/majority")) or 0.0)
    gaps = {name: p - reference for name, p in probes.items()}
    num_test = number(record.get("probe/num_test"))
    return Look(int(step), gaps, probes, untrained, reference, probe_margin(reference, num_test), num_test)


class Halved:
    """The first record at which the loss has fallen to half of its start, once the median of three records has."""

    def __init__(self) -> None:
        self.start: float | None = None
        self.at: int | None = None
        self.lowest = math.inf
        self._recent: deque[tuple[int, float]] = deque(maxlen=SMOOTH)

    def add(self, step: int, record: Record) -> None:
        loss = positive(record.get("loss"))
        if loss is None:
            return
        if self.start is None:
            self.start = loss
            return
        self._recent.append((step, loss))
        smooth = median(value for _, value in self._recent)
        self.lowest = min(self.lowest, smooth)
        if self.at is None and smooth <= HALF * self.start:
            self.at = next(when for when, value in self._recent if value <= HALF * self.start)

    @property
    def factor(self) -> float:
        """First loss over the lowest, at least 1."""
        return max(1.0, self.start / self.lowest) if self.start and self.lowest > 0 else 1.0


class Facts:
    """Events from probes: `collapse_phase` when it begins and again when it ends, `useful`, `degraded`."""

    def __init__(self) -> None:
        self.loss = Halved()
        self.useful: bool | None = None  # as two looks in a row had it; None before the first look
        self.begun: int | None = None  # step of the phase
        self.over = False  # the phase, or the chance of one
        self.ended: Event | None = None  # the phase, with its end
        self.worst = 0.0  # the better encoder's probe less the untrained encoder's inside the phase, where below 0
        self.row: list[Look] = []  # looks that contradict `useful`

    def add(self, step: int, record: Record) -> list[Event]:
        self.loss.add(step, record)
        look, called = look_of(record), []
        if look is not None and look.decides:
            called = self._look(look)
        if self.begun is None and not self.over and self.loss.at is not None and self.useful is False and not self.row:
            self.begun = self.loss.at
            called.append(self._phase(step, None))
        return called

    def _look(self, look: Look) -> list[Event]:
        if self.useful is None:
            self.useful = False  # until two looks say otherwise
        if self.begun is not None and not self.over:
            self.worst = min(self.worst, look.probes[look.better] - look.untrained)
        if look.useful == self.useful:
            self.row = []
            return []
        self.row.append(look)
        if len(self.row) < LOOKS:
            return []
        first, self.useful, self.row = self.row[0], look.useful, []
        event = Event(
            "useful" if look.useful else "degraded", first.step, look.step, _sure(first, look), _said(first, look)
        )
        if not look.useful or self.over:
            return [event]
        self.over = True
        if self.begun is None and self.loss.at is not None and self.loss.at < first.step:
            self.begun = self.loss.at  # between the look before and this one
        if self.begun is None:
            return [event]
        self.ended = self._phase(look.step, first.step)
        return [self.ended, event]

    def so_far(self, now: int) -> list[Event]:
        """The phase as it stands at step `now`, with its share of the run up to there; nothing before it has begun."""
        if self.ended is not None:
            return [replace(self.ended, share=_share(self.ended.length, now))]
        return [] if self.begun is None else [self._phase(now, None)]

    def _phase(self, now: int, end: int | None) -> Event:
        assert self.begun is not None
        last = now if end is None else end
        length = max(0, last - self.begun)
        began = f"the loss had fallen to half of its start ({self.loss.start:.3g}) at step {self.begun}, features not useful"
        ended = f"useful from step {end}, {length} steps later" if end is not None else "not useful up to here"
        fell = f"the loss fell {self.loss.factor:.1f}x, the better probe {100 * abs(self.worst):.1f} points below the untrained encoder's at most"
        return Event(PHASE, self.begun, now, 0.95, (began, ended, fell), end, length, _share(length, now), round(abs(self.worst), 4),
                     round(self.loss.factor, 3))  # fmt: skip


def _share(length: int | None, now: int) -> float:
    return round((length or 0) / now, 4) if now else 0.0


def _sure(first: Look, second: Look) -> float:
    """Chance that the change is no accident of the test samples: Cantelli's bound on the smaller gap, in standard errors."""
    beyond = min(abs(look.gaps[look.better]) / (look.margin / 2) for look in (first, second))
    return round(1 - 1 / (1 + max(beyond, 1.0) ** 2 * LOOKS), 3)


def _said(first: Look, second: Look) -> tuple[str, ...]:
    name = second.better
    which = [one for one in second.gaps if all(look.gaps.get(one, -1) >= look.margin for look in (first, second))]
    who = "both encoders" if len(which) == 2 else f"the {which[0] if which else name} encoder"
    verb = "beat" if second.useful else "no longer beat"
    return (
        f"features of {who if second.useful else 'either encoder'} {verb} the untrained encoder's",
        f"{name} probe {second.probes[name]:.3f} at step {second.step}, {_against(second)} ({second.gaps[name]:+.3f}, margin {second.margin:.3f})",
        f"{LOOKS} looks in a row, from step {first.step}",
    )


def _against(look: Look) -> str:
    if look.reference > look.untrained:
        return f"majority class {look.reference:.3f} (untrained {look.untrained:.3f}, below it by chance)"
    return f"untrained {look.untrained:.3f}"


def latest(events: list[Record]) -> list[Record]:
    """Of a phase that was written when it began and when it ended, the newer line, in the older one's place."""
    newest = {(e["kind"], e["step"]): e for e in events if e["kind"] == PHASE}
    kept, seen = [], set()
    for event in events:
        key = (event["kind"], event["step"])
        if event["kind"] != PHASE:
            kept.append(event)
        elif key not in seen:
            seen.add(key)
            kept.append(newest[key])
    return kept
