"""What the label-free signals say of the features: `collapse_suspected`, then `recovery_suspected`, each with a confidence.

Every gauge has a vote from -1 (speaks against) to 1 (speaks for), 0 at `middle`; a belief is the weighted sum of the
votes that there are, in log odds. So a signal that is missing leaves the belief nearer to even, and with a loss alone it
stays there. A belief above even that lasts is called.

What varies less between inputs may be what a label asks for, or not: without the content (which says what the features
still tell of the inputs) no rule on the other signals told the two apart on generators left out of its fit. So the
content, where it is logged, outvotes all others together, and without it a confidence stays near even.

Middles and weights were set on the tuning half of benchmarks/results/phase_runs.jsonl, confidences and what a loss of
content counts for on all but its fresh runs (benchmarks/calibrate_phase.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jepa_fast.monitor.phase.curves import Event, Level
from jepa_fast.monitor.phase.gauges import Content, Gauge, Reading, Record, gauges
from jepa_fast.monitor.phase.shapes import Valley

ROWS, LASTS = 2, 0.1  # records, and share of the steps so far, that must agree


class Ballot(NamedTuple):
    """How one gauge votes: (measure - middle) / half, cut to -1..most, times its weight."""

    gauge: str
    weight: float
    middle: float
    half: float
    measure: Callable[[Reading], float]
    says: str
    most: float = 1.0


def _fall(reading: Reading) -> float:
    return reading.fall


def _rise(reading: Reading) -> float:
    return reading.rise


def _poverty(reading: Reading) -> float:
    return -math.log(reading.now)


def _depth(reading: Reading) -> float:
    return -math.log(reading.lowest)


def _return(reading: Reading) -> float:
    return -reading.fall


def _back(reading: Reading) -> float:
    """How near the start, if it has come from lower at all."""
    return -reading.fall - max(0.0, 0.1 - reading.rise) / 0.1


MOVED = "{gauge} went from {start:.3g} to {now:.3g} ({change:.2f}x)"
CAME_BACK = "{gauge} was lowest at {lowest:.3g} and is {now:.3g} (start {start:.3g})"
POOR = "{now:.1%} of the targets' energy varies between inputs"
BIAS = -0.2  # of both beliefs: without a signal, no
# Confidence is 1 / (1 + exp(-a - b * belief)): near the share of the calls that were right on the runs it was set on, where a
# dip could show. Beyond calling, belief told right from wrong only a little there, so b is small.
SURE = {"collapse_suspected": (-0.75, 0.33), "recovery_suspected": (0.0, 0.5)}
RESOLVED = 5  # records that a fall of the loss must have for the first to be its beginning
CONTENT = 2.5  # weight of the content
LOST = {"collapse_suspected": 0.05, "recovery_suspected": 0.03}  # the correlation that counts as a difference
MOST_LOST = 2.0  # votes of the content for a collapse: the more it has lost, the oftener a call is right
MINIMUM = 0.5  # weight of a loss minimum whose fall was tenfold
COLLAPSE = (
    Ballot("spread", 0.6, 0.12, 0.12, _fall, MOVED),
    Ballot("constant loss", 0.4, 0.12, 0.12, _fall, MOVED),
    Ballot("rankme", 0.3, 0.12, 0.12, _fall, MOVED),
    # Vetoes: poor features are nothing to suspect by themselves, but rich ones may lose half their variation.
    Ballot("share", 2.8, -math.log(0.06), 0.4, _poverty, POOR, most=0.0),
    Ballot("loss share", 1.2, -math.log(0.07), 0.4, _depth, "the lowest loss is {lowest:.1%} of the first", most=0.0),
)
RECOVERY = (
    Ballot("loss", 0.5, 0.3, 0.15, _rise, CAME_BACK),
    Ballot("spread", 0.5, -0.25, 0.15, _back, CAME_BACK),
    Ballot("constant loss", 0.3, -0.25, 0.15, _back, CAME_BACK),
    Ballot("rankme", 0.3, -0.38, 0.15, _back, CAME_BACK),
    Ballot("rankme/context", 0.5, -0.1, 0.2, _return, CAME_BACK),
    Ballot("participation/context", 0.4, 0.4, 0.2, _fall, MOVED),
)


class Vote(NamedTuple):
    weight: float
    share: float  # of it, -1 to 1
    says: Callable[[], str]  # only called events need the words

    @property
    def weighted(self) -> float:
        return self.weight * self.share


class Suspicions:
    """A collapse, then a recovery, each when its belief has lasted for two records and a tenth of the steps so far."""

    def __init__(self) -> None:
        self.gauges, self.content = gauges(), Content()
        self.expected = ["collapse_suspected", "recovery_suspected"]
        self.minimum: Vote | None = None
        self.bottom = 0  # its step
        self.first: int | None = None
        self.since, self.rows = 0, 0

    def add(self, step: int, record: Record, levels: dict[str, Level], minimum: Valley | None) -> Event | None:
        self.first = step if self.first is None else self.first
        if minimum:
            self.minimum, self.bottom = _minimum(minimum), minimum.low.step
        looked = self.content.add(record)
        for name in levels.keys() & self.gauges.keys():
            self.gauges[name].add(levels[name])
        if not self.expected or not (levels or looked):
            return None
        kind = self.expected[0]
        ballots: tuple[Ballot, ...] = COLLAPSE if kind == "collapse_suspected" else RECOVERY
        votes = _content(self.content, kind)
        if any(vote.share > 0 for vote in votes):  # it knows better than the vetoes
            ballots = tuple(ballot for ballot in ballots if ballot.most > 0)
        votes += _votes(self.gauges, ballots)
        if self.minimum and kind == "collapse_suspected":
            votes.append(self.minimum)
        belief = BIAS + sum(vote.weighted for vote in votes)
        if belief <= 0:
            self.rows = 0
            return None
        self.since, self.rows = (self.since if self.rows else step), self.rows + 1
        settled = self.minimum in votes  # it has lasted before it was called
        if not settled and (self.rows < ROWS or step - self.since < LASTS * (step - self.first)):
            return None
        self.expected.pop(0)
        since = self.bottom if settled else self.since  # by its minimum at the latest
        self.rows = 0
        return _event(kind, since, step, belief, votes)


def _votes(held: dict[str, Gauge], ballots: tuple[Ballot, ...]) -> list[Vote]:
    votes = []
    for ballot in ballots:
        reading = held[ballot.gauge].reading
        if ballot.gauge == "loss share" and (held["share"].reading or (reading and reading.num_falling < RESOLVED)):
            continue  # the share itself is known; or the log is too coarse to know the first loss
        if reading is not None:
            vote = max(-1.0, min(ballot.most, (ballot.measure(reading) - ballot.middle) / ballot.half))
            votes.append(Vote(ballot.weight, vote, partial(_say, ballot, reading)))
    return votes


def _say(ballot: Ballot, reading: Reading) -> str:
    name = {"constant loss": "loss / (1 - skill)"}.get(ballot.gauge, ballot.gauge)
    return ballot.says.format(gauge=name, change=reading.now / reading.start, **reading._asdict())


def _content(content: Content, kind: str) -> list[Vote]:
    """Even at half of what counts as a difference, sure at all of it; against, until there are looks enough.

    None where the untrained features told too little to lose it, unless more is told now.
    """
    if content.start is None:
        return []
    if kind == "collapse_suspected" and -LOST[kind] < content.fall and content.start < LOST[kind]:
        return []
    lost, most = (content.fall, MOST_LOST) if kind == "collapse_suspected" else (-content.fall, 1.0)
    said = f"content went from {content.start:.3f} to {content.now:.3f} (correlation with the inputs' spectra)"
    return [Vote(CONTENT, max(-1.0, min(most, 2 * lost / LOST[kind] - 1)), lambda: said)]


def _minimum(v: Valley) -> Vote:
    fall = v.high.log - v.low.log
    said = f"loss fell {math.exp(fall):.1f}x to step {v.low.step} and then rose for good"
    return Vote(MINIMUM, min(1.0, fall / math.log(10)), lambda: said)


def _event(kind: str, step: int, called_at: int, belief: float, votes: list[Vote]) -> Event:
    """Evidence in the order of its weight, for before against; what hardly speaks either way is left out."""
    ordered = sorted(votes, key=lambda vote: -vote.weighted)
    evidence = [vote.says() for vote in ordered if vote.share > 0.1]
    evidence += [f"but {vote.says()}" for vote in reversed(ordered) if vote.share < -0.1]
    evidence.append("no probe was looked at for this")
    level, slope = SURE[kind]
    sure = 1 / (1 + math.exp(-level - slope * belief))
    return Event(kind, step, called_at, round(sure, 3), tuple(evidence))
