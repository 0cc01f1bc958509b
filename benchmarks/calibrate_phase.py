"""How far the label-free events can be trusted: recall, false alarms and lead time on runs whose probes are withheld.

    python benchmarks/calibrate_phase.py            print the tables
    python benchmarks/calibrate_phase.py --write    and write them to benchmarks/results/phase.md

The runs are those of benchmarks/results/phase_runs.jsonl (see phase_grid.py). A run's truth is what the probe events say:
`features_below_untrained` and `features_recovered`. The detector sees the same records without any probe. What it knows
of the curves was fixed on the tuning half; the rules it is compared with have one threshold each, best on that half too.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa_fast.monitor import phase

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]


class Run(NamedTuple):
    name: str
    half: str
    data: str
    records: list[Record]
    below: phase.Event | None  # the truth
    recovered: phase.Event | None


def runs() -> list[Run]:
    out = []
    for line in (RESULTS / "phase_runs.jsonl").read_text().splitlines():
        held = json.loads(line)
        columns = held["columns"]
        rows = zip(*columns.values(), strict=True)
        records = [{k: v for k, v in zip(columns, row, strict=True) if v is not None} for row in rows]
        events = {e.kind: e for e in reversed(phase.detect(records))}
        truth = events.get("features_below_untrained"), events.get("features_recovered")
        out.append(Run(held["name"], held["half"], held["data"], records, *truth))
    return out


def without_probes(records: list[Record], only: tuple[str, ...] = ()) -> list[Record]:
    """The records as a project without labels has them; `only` these keys, if given."""
    keep = [
        k for k in {k for r in records for k in r} if not k.startswith("probe/") and (not only or k in ("step", *only))
    ]
    return [{k: r[k] for k in keep if k in r} for r in records]


# ---- rules: records -> step of the alarm, step of the all-clear ------------------------------------

Rule = Callable[[list[Record]], tuple[int | None, int | None]]


def detector(*only: str) -> Rule:
    def rule(records: list[Record]) -> tuple[int | None, int | None]:
        events = {e.kind: e.called_at for e in reversed(phase.detect(without_probes(records, only)))}
        return events.get("collapse_suspected"), events.get("recovery_suspected")

    return rule


def threshold(key: str, ratio: float) -> Rule:
    """Alarm once `key` stands at `ratio` of its first value or lower; all-clear once it is back above."""

    def rule(records: list[Record]) -> tuple[int | None, int | None]:
        points = list(phase.series(records, key))
        alarm = next((step for step, value in points if value <= ratio * points[0][1]), None)
        clear = next((s for s, v in points if alarm is not None and s > alarm and v > ratio * points[0][1]), None)
        return alarm, clear

    return rule


def best_threshold(key: str, tuning: list[Run]) -> float:
    def score(ratio: float) -> float:
        alarms = [threshold(key, ratio)(run.records)[0] is not None for run in tuning]
        dips = [run.below is not None for run in tuning]
        return rate(alarms, dips) - rate(alarms, [not d for d in dips])

    return max((0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95), key=score)


def rate(hits: list[bool], among: list[bool]) -> float:
    chosen = [hit for hit, counts in zip(hits, among, strict=True) if counts]
    return sum(chosen) / len(chosen) if chosen else float("nan")


# ---- scores ----------------------------------------------------------------------------------------


def scores(rule: Rule, chosen: list[Run]) -> dict[str, list[float]]:
    """By measure, one number a run that it applies to: 0 or 1 for rates, steps for lead times."""
    out: dict[str, list[float]] = {k: [] for k in ("recall", "false", "lead", "clear", "early", "clear_lead")}
    for run in chosen:
        alarm, clear = rule(run.records)
        if run.below is None:
            out["false"].append(alarm is not None)
            continue
        end = run.recovered.called_at if run.recovered else np.inf
        hit = alarm is not None and alarm <= end
        out["recall"].append(hit)
        if hit:
            out["lead"].append(run.below.called_at - alarm)
        if run.recovered:
            out["clear"].append(clear is not None)
            if clear is not None:
                out["clear_lead"].append(run.recovered.called_at - clear)
        elif alarm is not None:
            out["early"].append(clear is not None)
    return out


def interval(values: list[float], of: Callable[[np.ndarray], float]) -> str:
    """The value, with the 95 % bootstrap interval over runs, and n."""
    if not values:
        return "n = 0"
    held, rng = np.array(values, float), np.random.default_rng(0)
    again = [of(rng.choice(held, len(held))) for _ in range(2000)]
    low, high = np.quantile(again, (0.025, 0.975))
    form = "{:.2f} [{:.2f}, {:.2f}], n = {}" if of is np.mean else "{:+.0f} [{:+.0f}, {:+.0f}], n = {}"
    return form.format(of(held), low, high, len(held))


HEADS = {
    "recall": "recall", "false": "false alarms", "lead": "lead, steps", "clear": "recoveries called",
    "clear_lead": "lead, steps", "early": "recovery called, none by the probe",
}  # fmt: skip


def table(rules: dict[str, Rule], chosen: list[Run]) -> str:
    lines = ["| rule | " + " | ".join(HEADS.values()) + " |", "|---|" + "---|" * len(HEADS)]
    for name, rule in rules.items():
        held = scores(rule, chosen)
        cells = [interval(held[k], np.median if "lead" in k else np.mean) for k in HEADS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    for run in (r for r in runs() if r.half == "tuning"):
        a, c = detector()(run.records)
        print(
            run.half,
            run.name,
            "below",
            run.below and (run.below.step, run.below.called_at),
            "rec",
            run.recovered and (run.recovered.step, run.recovered.called_at),
            "alarm",
            a,
            "clear",
            c,
        )
