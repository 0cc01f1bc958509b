"""How far the label-free events can be trusted: recall, false alarms and lead time on runs whose probes are withheld.

    python benchmarks/calibrate_phase.py            print the tables
    python benchmarks/calibrate_phase.py --write    and write them to benchmarks/results/phase.md

The runs are those of benchmarks/results/phase_runs.jsonl (see phase_grid.py). A run's truth is what the probe events say:
`features_below_untrained` and `features_recovered`. The detector sees the same records without any probe. What it knows
of the curves was fixed on the tuning half; the rules it is compared with have one threshold each, best on that half too.
"""

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import phase_grid as grid
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

    @property
    def room(self) -> bool:
        """Whether the untrained encoder stands far enough above the majority class for features to fall below it."""
        start = self.records[0]
        return start["probe/untrained"] - start["probe/majority"] >= phase.PROBE_MARGIN


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


def without_probes(records: list[Record], only: tuple[str, ...] = (), content: bool = True) -> list[Record]:
    """The records as a project without labels has them; `only` these keys, if given."""
    hidden = ("probe/",) if content else ("probe/", "content")
    keep = [
        k for k in {k for r in records for k in r} if not k.startswith(hidden) and (not only or k in ("step", *only))
    ]
    return [{k: r[k] for k in keep if k in r} for r in records]


# ---- rules: records -> step of the alarm, step of the all-clear ------------------------------------

Rule = Callable[[list[Record]], tuple[int | None, int | None]]


def detector(*only: str, content: bool = True) -> Rule:
    def rule(records: list[Record]) -> tuple[int | None, int | None]:
        events = {e.kind: e.called_at for e in reversed(phase.detect(without_probes(records, only, content)))}
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
        held = [run for run in tuning if any(key in record for record in run.records)]
        alarms = [threshold(key, ratio)(run.records)[0] is not None for run in held]
        dips = [run.below is not None for run in held]
        return rate(alarms, dips) - rate(alarms, [not d for d in dips])

    return max((0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95), key=score)


def rate(hits: list[bool], among: list[bool]) -> float:
    chosen = [hit for hit, counts in zip(hits, among, strict=True) if counts]
    return sum(chosen) / len(chosen) if chosen else float("nan")


# ---- scores ----------------------------------------------------------------------------------------

HEADS = {
    "recall": "collapses called before their end", "false": "false alarms", "room": "false alarms where a dip had room",
    "lead": "lead of the call, steps", "clear": "recoveries called", "clear_lead": "lead of the call, steps",
    "early": "recoveries called, none by the probe",
}  # fmt: skip


def scores(rule: Rule, chosen: list[Run]) -> dict[str, list[float]]:
    """By measure, one number a run that it applies to: 0 or 1 for rates, steps for lead times."""
    out: dict[str, list[float]] = {k: [] for k in HEADS}
    for run in chosen:
        alarm, clear = rule(run.records)
        if run.below is None:
            out["false"].append(alarm is not None)
            if run.room:
                out["room"].append(alarm is not None)
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
        else:
            out["early"].append(clear is not None)
    return out


def summary(values: list[float], steps: bool) -> str:
    """A rate, or the median of steps, with its 95 % bootstrap interval over runs, and the number of runs."""
    if not values:
        return "no such run"
    held, rng, of = np.array(values, float), np.random.default_rng(0), np.median if steps else np.mean
    low, high = np.quantile([of(rng.choice(held, len(held))) for _ in range(2000)], (0.025, 0.975))
    if steps:
        return f"{of(held):+.0f} [{low:+.0f}, {high:+.0f}]"
    return f"{held.sum():.0f} of {len(held)}, {of(held):.2f} [{low:.2f}, {high:.2f}]"


def table(rules: dict[str, Rule], chosen: list[Run]) -> str:
    lines = ["| rule | " + " | ".join(HEADS.values()) + " |", "|---|" + "---|" * len(HEADS)]
    for name, rule in rules.items():
        key = name.split("`")[1] if "`" in name else "loss"
        held = scores(rule, [run for run in chosen if any(key in record for record in run.records)])
        lines.append(f"| {name} | " + " | ".join(summary(held[k], "lead" in k) for k in HEADS) + " |")
    return "\n".join(lines)


def reliability(chosen: list[Run]) -> str:
    """Mean confidence of the calls beside how many were right, of all runs and of those in which a dip would show."""
    lines = [
        "| event | mean confidence | right | right where a dip had room | there, half as far below |",
        "|---|---|---|---|---|",
    ]
    for kind in ("collapse_suspected", "recovery_suspected"):
        called = [(run, e) for run in chosen for e in phase.detect(without_probes(run.records)) if e.kind == kind]
        right = [
            run.below is not None if kind == "collapse_suspected" else _above(run, e.called_at) for run, e in called
        ]
        shows = [yes for yes, (run, _) in zip(right, called, strict=True) if run.room]
        sure = f"{np.mean([e.confidence for _, e in called]):.2f}" if called else "never called"
        half = f"{sum(_half(run) for run, _ in called if run.room)} of {len(shows)}" if "collapse" in kind else ""
        lines.append(f"| `{kind}` | {sure} | {sum(right)} of {len(right)} | {sum(shows)} of {len(shows)} | {half} |")
    return "\n".join(lines)


def _half(run: Run) -> bool:
    """Whether two probes in a row were below the untrained encoder's by half the margin."""
    probed = [r for r in run.records if "probe/context" in r]
    low = [
        r["probe/untrained"] - (r["probe/context"] + r["probe/target"]) / 2 >= phase.PROBE_MARGIN / 2 for r in probed
    ]
    return any(a and b for a, b in pairwise(low))


def _above(run: Run, step: int) -> bool:
    """Whether the first probes from `step` on are above the untrained encoder's by the margin."""
    probed = (r for r in run.records if r["step"] >= step and "probe/context" in r)
    record = next(probed, run.records[-1])
    return (record["probe/context"] + record["probe/target"]) / 2 - record["probe/untrained"] >= phase.PROBE_MARGIN


def each(chosen: list[Run]) -> str:
    """A line a run: what the probe says, and when the detector called it."""
    lines = [
        "| run | untrained | below, called | recovered, called | suspected | recovery suspected |",
        "|---|---|---|---|---|---|",
    ]
    for run in chosen:
        alarm, clear = detector()(run.records)
        truth = [f"{e.step}, {e.called_at}" if e else "" for e in (run.below, run.recovered)]
        floor = "" if run.room else " (no room)"
        lines.append(
            f"| {run.name} | {run.records[0]['probe/untrained']:.3f}{floor} | {truth[0]} | {truth[1]} | {alarm or ''} | {clear or ''} |"
        )
    return "\n".join(lines)


def report() -> str:
    everything = runs()
    halves = {name: [run for run in everything if run.half == name] for name in TITLES}
    keys = {k for run in everything for r in run.records for k in r}
    rules = {
        "every signal, of runs with `content`": detector(),
        "`content` alone": detector("content", "content/context", "content/untrained"),
        "every signal but it, of runs with `content`": detector(content=False),
        "every signal but the content, of all runs": detector(content=False),
        "loss alone": detector("loss"),
        "loss, discrepancy": detector("loss", "discrepancy/visible"),
        "loss, skill": detector("loss", "skill"),
        "loss, spread": detector("loss", "spread"),
    }
    for key in ("rankme", "rankme/context", "participation", "alpha_req", "lidar", "spread", "loss"):
        if key in keys:
            ratio = best_threshold(key, halves["tuning"])
            rules[f"`{key}` at {ratio:g} of its start"] = threshold(key, ratio)
    parts = [HEADER.format(every=grid.EVERY, **{name: len(chosen) for name, chosen in halves.items()})]
    for name, chosen in halves.items():
        generators = ", ".join(sorted({run.data for run in chosen}))
        dips = sum(run.below is not None for run in chosen)
        parts.append(f"## {TITLES[name]}: {len(chosen)} runs, {dips} with a dip; {generators}\n")
        parts += [table(rules, chosen), "", reliability(chosen), "", each(chosen), ""]
    return "\n".join(parts)


TITLES = {
    "tuning": "The tuning half", "untouched": "The untouched half", "long": "The long runs", "mixed": "The mixed runs",
    "fresh": "The fresh runs",
}  # fmt: skip
HEADER = """# How far the label-free events can be trusted

Written by `python benchmarks/calibrate_phase.py --write`; the runs are in phase_runs.jsonl, made by phase_grid.py, logged
every {every} steps with probes every 100, of small images every 50. {tuning} runs are the tuning half, on which middles and
weights were set by hand: all runs of a first calibration (whose untouched half is so spent), the demo's sweep over the EMA
decay, and a few fresh ones. {untouched} runs are the untouched half: other seeds, and generators that tuning never saw
(modulation, pulses, colour, gaps, spots) beside the sets that the presets train on. The detector was frozen before a row of
them was evaluated. Before that, a search for an error in the log of the grid had shown rows of two of them and watching it
grow single progress lines of others; the list was shortened and reordered as it ran, for want of time, and five runs of it
were finished and added later; and all generators were checked for what an untrained encoder's probe makes of them. What the
detector does with `content` alone was mended after the first evaluation, which moved no other row.
The {long} long runs were listed after that: untouched seeds, settings near the demo's, long enough to recover. What the
detector does where the content is unsure was mended before they were evaluated, and nothing after. Their progress lines were
seen as they ran. They showed the confidence of a collapse too high (0.80 with 2 of 7 right), so the confidences were set anew.
The {mixed} mixed runs, with two generators more (bursts, stripes), still showed it too high (0.53 with 3 of 11 right). On all runs
up to them it was seen that the calls that are right are those where the content has lost most, so the loss that counts was
raised from 0.03 to 0.05, and one beyond it now adds to the belief; confidences were set on these runs again. So no table but the
last is of a detector that had not seen its runs. The {fresh} fresh runs (sawtooth, echo are new) were evaluated once, after that:
9 of 13 dips called, 1 call in the 11 others, 10 of 10 calls in runs half as far below. Then a reader saw that untrained features
which tell next to nothing of their inputs have no content to lose, and that this counted as "nothing lost": there the content now
has no vote. That came to light by other runs, but moved rows of this table too, one of them for the better.

Truth is the probe rule: the mean of both encoders' probes 0.026 below the untrained encoder's in two records in a row, and
later above it by as much. The detector sees the records without probes. *Lead* is how many steps before the probe rule could
say so the call came; negative is later. A dip has *no room* where the untrained encoder is within 0.026 of the majority
class. Brackets are 95 % bootstrap intervals over runs (which cannot see past a rate of 0 or 1: read n); lead times are medians. A rule "`key` at r of its start" gives
the alarm when that one signal falls to r of its first value, and the all-clear when it is back; r was chosen on the tuning half.
*Right* is a suspected collapse in a run with a dip, and a suspected recovery whose next probes are 0.026 above the untrained
encoder's. *Half as far below* are calls in runs where the probes were 0.013 below in two records in a row.
`content` is what the features tell of their inputs' spectra (docs/metrics.md); runs from the second list on have it, in part
measured from features that were kept, by the code that now logs it.
Not every run logs every other key (the grid grew while the monitor did): n says how many did.
All data but the digits are generated, models are small and runs short: the table says how the rules compare, not what they
do elsewhere. Most classes here show in a power spectrum, which is what `content` reads: where a class does not, expect less
of it. In the untouched half no run recovers by the probe rule; of the long runs those that dip do. There nearly every curve
has the shape of the phase, so that a rule of curves alone gives an alarm in nearly every run, and few probes stand 0.026 below
for long: whether features really got worse behind that shape, only `content` says, and not always rightly.
"""


def main() -> None:
    text = report()
    print(text)
    if "--write" in sys.argv:
        (RESULTS / "phase.md").write_text(text)


if __name__ == "__main__":
    main()
