"""Fit the estimate of `jepa_fast.monitor.phase` on rows.jsonl and judge it: `python experiments/phase/fit.py [--evaluate]`.

Without an option: fits every tier on the data sets of the fitting part and writes weights.json of the package; prints how
well it does on data sets left out of the fit. With --evaluate: judges the weights as they stand on the untouched part, and
writes results.md.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from experiments.phase import grid
from jepa_fast.monitor.phase import estimate
from jepa_fast.monitor.phase.facts import LOOKS, look_of

WEIGHTS = Path(estimate.__file__).parent / "weights.json"
RESULTS = Path(__file__).parent / "results.md"
FAMILIES = (
    "Cricket",
    "EOG",
    "AllGestureWiimote",
    "DistalPhalanx",
    "GestureMidAir",
    "GesturePebble",
    "Freezer",
    "Fac",
    "Ford",
)
RESAMPLES = 1000
SEEN_BEFORE = (
    "These data sets are not quite untouched: a first model, which also used LiDAR, was judged on them before, and LiDAR was "
    "dropped because of what came out. So the figures of the estimate are slightly optimistic; README.md has those of the first model."
)


class Look(NamedTuple):
    """One look of one run: what the probes say, and what the signals were."""

    run: str
    data: str
    step: int
    useful: dict[str, bool]  # encoder -> its probe is above the untrained encoder's by the margin
    signals: dict[str, dict[str, float | None]]
    single: dict[str, float]  # signals that others look at, by name
    gap: float  # the better encoder's labelled probe less the reference

    @property
    def better(self) -> bool:
        return any(self.useful.values())


def family(data: str) -> str:
    return next((name for name in FAMILIES if data.startswith(name)), data)


def looks_of(row: dict[str, Any]) -> list[Look]:
    signals, found, first = estimate.Signals(), [], {}
    for record in row["records"]:
        signals.add(record["step"], record)
        look = look_of(record)
        for key, value in record.items():
            first.setdefault(key, value)
        if look is None or record["step"] == 0:  # at step 0 both encoders are the untrained one
            continue
        useful = {name: gap >= look.margin for name, gap in look.gaps.items()}
        held = {name: signals.of(name) for name in estimate.ENCODERS}
        single = _single(record, first, held)
        found.append(Look(row["name"], row["data"], look.step, useful, held, single, look.gaps[look.better]))
    return found


def _single(
    record: dict[str, Any], first: dict[str, Any], held: dict[str, dict[str, float | None]]
) -> dict[str, float]:
    """Each signal alone, of the better encoder, so that larger means more useful."""

    def grown(key: str) -> float:
        now, start = (max(1e-9, r.get(key, math.nan)) for r in (record, first))
        return math.log(now / start)

    best = lambda name: max((v for s in held.values() if (v := s[name]) is not None), default=math.nan)  # noqa: E731
    return {
        "readout": best("readout"), "skill": best("skill"), "loss (low)": -record["loss"],
        "discrepancy C": record["discrepancy/visible"], "C / spread (low)": -record["discrepancy/relative"],
        "spread": max(grown("spread/full"), grown("spread/full/context")), "RankMe": max(grown("rankme"), grown("rankme/context")),
        "LiDAR": max(grown("lidar"), grown("lidar/context")), "alpha-ReQ (low)": -np.nanmin([record.get("alpha_req", math.nan), record.get("alpha_req/context", math.nan), 99.0]),
        "step": float(record["step"]),
    }  # fmt: skip


# ---- fitting ----------------------------------------------------------------------------------------


def fit(looks: list[Look], tier: str, shrink: float = 1.0) -> dict[str, float]:
    """A logistic model of one encoder's usefulness; families of data sets weigh the same. shrink: of its log odds."""
    names = estimate.TIERS[tier]
    cases = [
        (look, name) for look in looks for name in look.useful if all(look.signals[name][s] is not None for s in names)
    ]
    x = np.array([[look.signals[name][s] for s in names] for look, name in cases])
    y = np.array([look.useful[name] for look, name in cases])
    counts: dict[str, int] = {}
    for look, _ in cases:
        counts[family(look.data)] = counts.get(family(look.data), 0) + 1
    weight = np.array([len(cases) / len(counts) / counts[family(look.data)] for look, _ in cases])
    if tier == "risen":  # one signal that is there or not: its share
        return {"bias": 0.0, "risen": math.log(weight[y].sum() / weight[~y].sum())}
    scale = x.std(0) + 1e-9
    model = LogisticRegression(C=1.0, max_iter=1000).fit(x / scale, y, sample_weight=weight)
    base = math.log(weight[y].sum() / weight[~y].sum())
    bias = base + shrink * (float(model.intercept_[0]) - base)
    return {"bias": bias, **{s: shrink * float(w) for s, w in zip(names, model.coef_[0] / scale, strict=True)}}


def predicted(looks: Iterable[Look], tier: str, weights: dict[str, float]) -> np.ndarray:
    """Probability that the better encoder is useful; NaN where a signal is missing."""
    return np.array([max(_one(look.signals[name], tier, weights) for name in look.useful) for look in looks])


def _one(signals: dict[str, float | None], tier: str, weights: dict[str, float]) -> float:
    if any(signals[s] is None for s in estimate.TIERS[tier]):
        return math.nan
    x = weights["bias"] + sum(weights[s] * (signals[s] or 0.0) for s in estimate.TIERS[tier])
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, x))))


def left_out(looks: list[Look], tier: str, shrink: float) -> np.ndarray:
    """Predictions for each family by the model fitted on all others."""
    p = np.full(len(looks), np.nan)
    for one in sorted({family(look.data) for look in looks}):
        weights = fit([look for look in looks if family(look.data) != one], tier, shrink)
        held = [i for i, look in enumerate(looks) if family(look.data) == one]
        p[held] = predicted([looks[i] for i in held], tier, weights)
    return p


def best_shrink(looks: list[Look], tier: str) -> float:
    """Of the log odds: what gives the lowest Brier score on families left out. Sets differ more than the signals know."""
    y = np.array([look.better for look in looks], float)
    tried = np.arange(0.3, 1.01, 0.1)
    scores = [np.nanmean((left_out(looks, tier, s) - y) ** 2) for s in tried]
    return float(tried[int(np.argmin(scores))])


# ---- judging ----------------------------------------------------------------------------------------


def auroc(y: np.ndarray, score: np.ndarray) -> float:
    """NaN if only one kind is there."""
    known = np.isfinite(score)
    y, score = y[known], score[known]
    if y.all() or not y.any():
        return math.nan
    ranks = rankdata(score)
    return float((ranks[y].sum() - y.sum() * (y.sum() + 1) / 2) / (y.sum() * (~y).sum()))


def within(runs: np.ndarray, y: np.ndarray, score: np.ndarray) -> float:
    """Mean AUROC within runs that have looks of both kinds."""
    found = [auroc(y[runs == run], score[runs == run]) for run in np.unique(runs)]
    return float(np.nanmean(found)) if np.isfinite(found).any() else math.nan


def neighbours(looks: list[Look]) -> np.ndarray:
    """The labelled probe's gap, mean of the two looks before and after: what labels themselves would say, a ceiling."""
    found = np.full(len(looks), np.nan)
    runs = np.array([look.run for look in looks])
    for run in np.unique(runs):
        places = np.flatnonzero(runs == run)
        gaps = np.pad([looks[i].gap for i in places], 2, mode="edge")
        found[places] = (gaps[:-4] + gaps[1:-3] + gaps[3:-1] + gaps[4:]) / 4
    return found


def escapes(looks: list[Look], p: np.ndarray) -> list[tuple[str, float]]:
    """(data, |estimated - true| end of the phase over the run's length) of runs with both; 1 where only one has an end."""
    found = []
    for run in sorted({look.run for look in looks}):
        mine = [(look, q) for look, q in zip(looks, p, strict=True) if look.run == run]
        steps = [look.step for look, _ in mine]
        true, guess = _first([look.better for look, _ in mine], steps), _first([q >= 0.5 for _, q in mine], steps)
        if true is None and guess is None:
            continue
        error = 1.0 if true is None or guess is None else abs(true - guess) / steps[-1]
        found.append((mine[0][0].data, error))
    return found


def _first(flags: list[bool], steps: list[int]) -> int | None:
    """The first of two in a row."""
    return next((steps[i] for i in range(len(flags) - 1) if all(flags[i : i + LOOKS])), None)


def interval(looks: list[Look], statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """95 % by bootstrap over families: statistic takes the numbers of the looks drawn."""
    rng, families = np.random.default_rng(0), np.array([family(look.data) for look in looks])
    places = {one: np.flatnonzero(families == one) for one in np.unique(families)}
    names = list(places)
    drawn = [
        statistic(np.concatenate([places[one] for one in rng.choice(names, len(names))])) for _ in range(RESAMPLES)
    ]
    return tuple(np.nanquantile(drawn, [0.025, 0.975]))  # type: ignore[return-value]


def report(looks: list[Look], weights: dict[str, dict[str, float]]) -> str:
    y, runs = np.array([look.better for look in looks]), np.array([look.run for look in looks])
    sets = sorted({look.data for look in looks})
    lines = [
        "# How well the estimate does on data sets that the fit never saw", "",
        f"{len(set(runs))} runs on {len(sets)} data sets ({', '.join(sets)}), {len(looks)} looks, {y.mean():.0%} of them useful. "
        "Generated by `python experiments/phase/fit.py --evaluate`; brackets are 95 % intervals, bootstrap over families of data sets.", "",
        SEEN_BEFORE, "",
        "| tier or signal | AUROC pooled | AUROC within runs | Brier score |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    base = y.mean() * (1 - y.mean())
    scores = {f"estimate, {tier}": predicted(looks, tier, weights[tier]) for tier in estimate.TIERS}
    scores |= {name: np.array([look.single[name] for look in looks]) for name in looks[0].single}
    scores["a labelled probe at the looks before and after"] = neighbours(looks)
    for name, p in scores.items():
        low, high = interval(looks, lambda i, p=p: auroc(y[i], p[i]))
        brier = f"{np.nanmean((p - y) ** 2):.3f}" if name.startswith("estimate") else ""
        lines.append(f"| {name} | {auroc(y, p):.3f} [{low:.3f}, {high:.3f}] | {within(runs, y, p):.3f} | {brier} |")
    lines += [
        "",
        f"Brier score of the base rate: {base:.3f}.",
        "",
        "| probability | looks | useful |",
        "|---|---:|---:|",
    ]
    p = scores["estimate, readout"]
    for low in np.arange(0, 1, 0.1):
        held = (p >= low) & (p < low + 0.1)
        lines.append(
            f"| {low:.1f} to {low + 0.1:.1f} | {held.sum()} | {y[held].mean():.0%} |"
            if held.any()
            else f"| {low:.1f} to {low + 0.1:.1f} | 0 | |"
        )
    sure = p > 0.9
    errors = np.array([error for _, error in escapes(looks, p)])
    right = f"{y[sure].mean():.0%} of {sure.sum()}" if sure.any() else "none"
    lines += ["", f"Of looks called useful with probability above .9, useful are: {right}.",
              f"End of the phase within 10 % of the run: {np.mean(errors <= 0.1):.0%} of {len(errors)} runs that escape or are said to."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluate", action="store_true")
    asked = parser.parse_args()
    rows = [json.loads(line) for line in grid.ROWS.read_text().splitlines()]
    part = "untouched" if asked.evaluate else "fitting"
    looks = [look for row in rows if row["part"] == part for look in looks_of(row)]
    if asked.evaluate:
        RESULTS.write_text(report(looks, estimate.weights()))
        print(RESULTS.read_text())
        return
    y, runs = np.array([look.better for look in looks]), np.array([look.run for look in looks])
    print(
        f"{len(set(runs))} runs, {len({family(look.data) for look in looks})} families, {len(looks)} looks, {y.mean():.0%} useful"
    )
    weights = {}
    for tier in estimate.TIERS:
        shrink = best_shrink(looks, tier)
        p = left_out(looks, tier, shrink)
        sure = p > 0.9
        print(f"{tier}: shrink {shrink:.1f}, pooled {auroc(y, p):.3f}, within {within(runs, y, p):.3f}, Brier {np.nanmean((p - y) ** 2):.3f}, "
              f"above .9: {y[sure].mean() if sure.any() else math.nan:.2f} of {sure.sum()}")  # fmt: skip
        weights[tier] = {name: round(value, 3) for name, value in fit(looks, tier, shrink).items()}
    WEIGHTS.write_text(json.dumps(weights, indent=2) + "\n")


if __name__ == "__main__":
    main()
