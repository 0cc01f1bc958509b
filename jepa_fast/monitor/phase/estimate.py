"""The probability that an encoder's features beat the untrained encoder's, from signals that need no labels.

A logistic model on a few scale-free signals. Its numbers are in `weights.json`; `experiments/phase/fit.py` fits them on
real runs and writes that file, README.md there says how well it does on data sets that the fit never saw. What a log
lacks decides which of several models is used (`TIERS`); a log with a loss alone gets none.
"""

import json
import math
from collections import deque
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jepa_fast.monitor.phase.curves import number, positive
from jepa_fast.monitor.phase.shapes import LossShape

Record = dict[str, Any]
LEAST_SKILL = -1.0  # a predictor far worse than a constant is as good as one that is twice as bad
WINDOW, FEWEST = 0.1, 6  # share of the steps so far, and records, that a signal of single batches is averaged over
ENCODERS = ("context", "target")
SUFFIX = {"context": "/context", "target": ""}  # of the keys of a record
# The models, best first, and the signals each needs: the first whose signals are all there is used.
TIERS: dict[str, tuple[str, ...]] = {
    "readout": ("readout", "skill"),
    "readout alone": ("readout",),
    "spectrum": ("skill", "rankme"),
    "skill": ("skill",),
    "risen": ("risen",),  # the loss alone, once it has fallen far and risen for good; before, nothing can be said
}
FALLEN = 5.0  # times: a loss that fell less before it rose says nothing
LIMITS = {"readout": 0.1, "rankme": 1.5}  # a signal beyond says no more


class Estimate(NamedTuple):
    context: float | None  # probability that this encoder is useful now; None where nothing can be said
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
        variance = sum((b - a) ** 2 for a, b in pairwise(values)) / (2 * (len(values) - 1))
        return math.sqrt(variance / len(values))


class Signals:
    """Scale-free signals, as known after each record."""

    def __init__(self) -> None:
        self.skill, self.share = Smoothed(), Smoothed()
        self.start: dict[str, float] = {}  # first values
        self.now: dict[str, float] = {}  # newest values
        self.lowest = math.inf  # loss
        self.looked = False
        self.shape, self.risen = LossShape(), False

    def add(self, step: int, record: Record) -> None:
        self.looked = False
        minima = [event for event in self.shape.add(step, record) if event.kind == "loss_minimum"]
        if minima and self.start["loss"] >= FALLEN * self.lowest > 0:
            self.risen = True
        skill, loss, share = (number(record.get(key)) for key in ("skill", "loss", "position_share"))
        if skill is not None:
            self.skill.add(step, max(LEAST_SKILL, skill))
        if share is not None:
            self.share.add(step, share)
        if (untrained := number(record.get("readout/untrained"))) is not None:
            self.now["readout/untrained"] = untrained
        held = {key: positive(record.get(key)) for key in ("spread", "rankme", "rankme/context")}
        held |= {key: number(record.get(key)) for key in ("readout", "readout/context")}
        held["constant"] = loss / (1 - skill) if loss is not None and skill is not None and skill < 1 else None
        for key, value in {**held, "loss": loss}.items():
            if value is not None:
                self.start.setdefault(key, value)
                self.now[key] = value
                if key == "loss" and value > 0:
                    self.lowest = min(self.lowest, value)
                self.looked |= key.startswith(("readout", "rankme"))

    def of(self, encoder: str) -> dict[str, float | None]:
        """The signals by name; None where the log lacks one."""
        suffix = SUFFIX[encoder]
        untrained, now = self.now.get("readout/untrained"), self.now.get(f"readout{suffix}")
        found = {
            "readout": now - untrained if now is not None and untrained is not None else None,
            "skill": self.skill.mean,
            "rankme": self._change(f"rankme{suffix}"),
            "risen": 1.0 if self.risen else None,
        }
        return {name: _within(LIMITS.get(name), value) for name, value in found.items()}

    def _change(self, key: str) -> float | None:
        """Log ratio of now to the start."""
        if key not in self.now or not self.start[key] > 0 or not self.now[key] > 0:
            return None
        return math.log(self.now[key] / self.start[key])

    def facts(self) -> tuple[str, ...]:
        """What the predictor and the targets do, where it says something. No estimate."""
        said = []
        skill, error = self.skill.mean, self.skill.error
        if skill is not None and skill - 2 * error <= 0:
            what = "worse than" if skill + 2 * error < 0 else "no better than"
            said.append(f"the predictor is {what} the best trivial one (skill {skill:.2f} +- {2 * error:.2f})")
        elif skill is not None:
            said.append(f"the predictor is better than every trivial one (skill {skill:.2f} +- {2 * error:.2f})")
        spread, loss, constant = (self._change(key) for key in ("spread", "loss", "constant"))
        if spread is not None and spread < -math.log(1.5):
            said.append(f"the targets shrink: they vary {math.exp(-spread):.1f}x less between inputs than at the start")
        if loss is not None and constant is not None and loss < -math.log(2) and constant < 0.8 * loss:
            said.append(
                f"the loss fell {math.exp(-loss):.1f}x, that of the best constant {math.exp(-constant):.1f}x: the targets became easier"
            )
        return tuple(said)


def _within(limit: float | None, value: float | None) -> float | None:
    return value if value is None or limit is None else max(-limit, min(limit, value))


class Estimator:
    """Takes one record after the other; the probabilities of both encoders after each."""

    def __init__(self) -> None:
        self.signals = Signals()

    @property
    def skill(self) -> Smoothed:
        return self.signals.skill

    def add(self, step: int, record: Record) -> Estimate:
        self.signals.add(step, record)
        found = {name: self.signals.of(name) for name in ENCODERS}
        tiers = {name: tier_of(signals) for name, signals in found.items()}
        p = {name: probability(tier, found[name]) if tier else None for name, tier in tiers.items()}
        of_pair = all(tier in (None, "skill", "risen") for tier in tiers.values())
        if of_pair:
            p["target"] = None  # one signal, of the pair: it says nothing of one encoder rather than the other
        looked = self.signals.looked or (of_pair and ("skill" in record or "loss" in record))
        reasons = tuple(_reason(name, p[name], found[name], self.signals) for name in ENCODERS if p[name] is not None)
        return Estimate(p["context"], p["target"], looked, self.signals.facts(), reasons)


def tier_of(signals: dict[str, float | None]) -> str | None:
    return next((tier for tier, needs in TIERS.items() if all(signals[name] is not None for name in needs)), None)


def probability(tier: str, signals: dict[str, float | None]) -> float:
    """Of the logistic model `tier`, rounded to a thousandth."""
    model = weights()[tier]
    x = model["bias"] + sum(model[name] * (signals[name] or 0.0) for name in TIERS[tier])
    return round(1 / (1 + math.exp(-max(-30.0, min(30.0, x)))), 3)


@cache
def weights() -> dict[str, dict[str, float]]:
    return json.loads((Path(__file__).parent / "weights.json").read_text(encoding="utf-8"))


def _reason(name: str, p: float | None, signals: dict[str, float | None], held: Signals) -> str:
    said = f"{name} encoder useful with probability {p:.2f}"
    now, untrained = held.now.get(f"readout{SUFFIX[name]}"), held.now.get("readout/untrained")
    if signals["readout"] is not None and now is not None and untrained is not None:
        said += f": its features tell pseudo-classes of the inputs apart with accuracy {now:.3f}, the untrained encoder's with {untrained:.3f}"
    elif signals["skill"] is None:
        said += f": the loss fell {held.start['loss'] / held.lowest:.0f}x, and has risen since for good"
    elif signals["rankme"] is not None:
        said += f": RankMe {math.exp(signals['rankme']):.2f}x of its start"
    return said
