"""Several runs beside each other. In: run folders. Out: rows of numbers, and what the paper claims beside them."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jepa_fast.errors import UsageError
from jepa_fast.monitor import phase
from jepa_fast.report.logs import Record, cannot_tell, last_of, looks, read_log, values

# Differences of configuration that do not make another run.
INCIDENTAL = ("run.", "log.", "checkpoint.", "parallel.", "data.workers", "monitor.", "preset")


@dataclass(frozen=True)
class Compared:
    """A run among others."""

    folder: Path
    fields: dict[str, Any]  # what it differs in from the others
    settings: dict[str, Any]  # all fields
    records: list[Record]
    events: list[Record]

    @property
    def label(self) -> str:
        short = {"ema.decay": "β", "masks.ratio": "p", "optim.lr": "lr", "train.seed": "seed"}
        said = [f"{short.get(k, k.rpartition('.')[2])} {v:g}" if isinstance(v, float) else f"{short.get(k, k.rpartition('.')[2])} {v}" for k, v in self.fields.items()]  # fmt: skip
        return ", ".join(said) or self.folder.name


def read_run(folder: Path, fields: list[str]) -> Compared:
    """One run, told apart by `fields`. Raises UsageError if the folder holds none."""
    records, events = read_log(folder)
    if not records:
        raise UsageError(f"{folder} holds no metrics.jsonl with records; give folders of runs")
    settings = _settings(folder / "config.json")
    return Compared(folder, {f: settings.get(f) for f in fields}, settings, records, events)


def _settings(file: Path) -> dict[str, Any]:
    """The fields of a config.json under their names, as they stand: pictures do not ask for this version's."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    sections = {k: v for k, v in raw.items() if isinstance(v, dict)} if isinstance(raw, dict) else {}
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}


def read_runs(folders: list[Path]) -> list[Compared]:
    """Runs, told apart by the fields in which their configurations differ; ordered by the first of these."""
    runs = [read_run(folder, []) for folder in folders]
    known = [n for n in runs[0].settings if not n.startswith(INCIDENTAL) and all(n in r.settings for r in runs)]
    names = [n for n in known if len({str(r.settings[n]) for r in runs}) > 1]
    if any(n.startswith(("data.", "model.")) for n in names):  # different recipes: the folder's name says it better
        names = []
    if "ema.decay" in names and "ema.final_decay" in names and all(r.settings["ema.schedule"] == "constant" for r in runs):  # fmt: skip
        names.remove("ema.final_decay")
    told = [Compared(r.folder, {n: r.settings[n] for n in names}, r.settings, r.records, r.events) for r in runs]
    return sorted(told, key=order) if names else told


def order(run: Compared) -> tuple[Any, ...]:
    return tuple((0, v, "") if isinstance(v, (int, float)) else (1, 0, str(v)) for v in run.fields.values())


# ---- numbers --------------------------------------------------------------------------------------


def at(points: list[tuple[int, float]], step: float) -> float:
    """The value nearest to `step`."""
    return min(points, key=lambda p: abs(p[0] - step))[1] if points else float("nan")


def smooth(points: list[tuple[int, float]], share: float = 0.02) -> list[tuple[int, float]]:
    """Centred running medians over `share` of the steps on either side."""
    if not points:
        return []
    reach = share * (points[-1][0] - points[0][0])
    steps = [s for s, _ in points]
    bounds = [(np.searchsorted(steps, s - reach), np.searchsorted(steps, s + reach, "right")) for s in steps]
    return [(s, statistics.median(v for _, v in points[a:b])) for s, (a, b) in zip(steps, bounds, strict=True)]


def measure(run: Compared) -> dict[str, float]:
    """What is compared of a run: NaN where it has no such thing."""
    loss, steps = smooth(values(run.records, "loss")), run.records[-1]["step"]
    nothing = float("nan")
    bottom = min(loss, key=lambda p: p[1]) if loss else (nothing, nothing)
    looked, skill, early = looks(run.records), values(run.records, "skill/smooth"), steps / 10
    better = [look.probes[look.better] for look in looked]
    begins, ends = phase_of(run)
    return {
        "steps": steps,
        "lowest loss": bottom[1],
        "at step": bottom[0],
        "final loss": loss[-1][1] if loss else nothing,
        "phase begins": begins,
        "phase ends": ends,  # NaN while it lasts
        "share of run": ((steps if ends != ends else ends) - begins) / steps if steps else nothing,
        "untrained": looked[-1].untrained if looked else nothing,
        "best probe": max(better, default=nothing),
        "final probe": better[-1] if looked else nothing,
        "skill": skill[-1][1] if skill else nothing,
        "C early": at(values(run.records, "discrepancy/full")[1:], early),  # both are 0 at step 0, whatever the run
        "drift early": at(values(run.records, "drift/total")[1:], early),
    }


def phase_of(run: Compared) -> tuple[float, float]:
    """(first step, end) of the collapse phase by the probes; NaN where there is none, or no end yet."""
    found, nothing = last_of(phase.PHASE, run.events), float("nan")
    if found is None or cannot_tell(looks(run.records)):
        return nothing, nothing
    return found["step"], nothing if found.get("end") is None else found["end"]


def summary(runs: list[Compared]) -> list[dict[str, Any]]:
    """A row for each run: the fields it differs in, and what it measured."""
    return [{**({"run": run.folder.name} if not run.fields else run.fields), **measure(run)} for run in runs]


def as_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for a terminal."""
    said = [[_short(v) for v in row.values()] for row in rows]
    widths = [max(len(head), *(len(row[i]) for row in said)) for i, head in enumerate(rows[0])]
    lines = [list(rows[0]), *said]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return f"{value}"


# ---- claims ---------------------------------------------------------------------------------------


def claims(runs: list[Compared]) -> list[str]:
    """What the paper says of the field that varies, beside what these runs did. Seeds are averaged."""
    said: list[str] = []
    if (decays := _by(runs, "ema.decay")) and len(decays) >= 3:
        s = f"near step {runs[0].records[-1]['step'] // 10:,}, a tenth of the run"
        said += [
            _claim("Corollary 4.3: a larger β makes the encoders' discrepancy smaller early in training",
                   decays, "C early", -1, f"C on whole inputs {s}"),
            _claim("Its argument: near β = 1 the target tracks the encoder closely, so ‖θ − θ̄‖ is small",
                   decays, "drift early", -1, f"‖θ − θ̄‖ {s}"),
            _claim("Corollary 4.3: a larger β prolongs the collapse phase", decays, "phase ends", 1,
                   "step at which the phase ends"),
            _claim("Section 5.3: β changes downstream performance", decays, "final probe", 0,
                   "probe of the better encoder at the end"),
        ]  # fmt: skip
    if (ratios := _by(runs, "masks.ratio")) and len(ratios) >= 3:
        said += [
            _claim("Proposition 4.4's reading: a larger masking ratio delays escape", ratios, "phase ends", 1,
                   "step at which the phase ends"),
        ]  # fmt: skip
    seeds = {run.settings.get("train.seed") for run in runs}
    if said and len(seeds) == 1:
        said.append("One seed for each value: no error bars, so differences may be chance.")
    return said


def _by(runs: list[Compared], field: str) -> dict[float, list[dict[str, float]]]:
    """{value of `field`: measurements of its runs}, if only seeds vary beside it; else {}."""
    if any(set(run.fields) - {field, "train.seed"} or not isinstance(run.fields.get(field), float) for run in runs):
        return {}
    groups: dict[float, list[dict[str, float]]] = {}
    for run in sorted(runs, key=order):
        groups.setdefault(run.fields[field], []).append(_censored(measure(run)))
    return groups


def _censored(measured: dict[str, float]) -> dict[str, float]:
    """A phase that has not ended counts as one that ends at the last step, and is marked."""
    lasts = measured["phase begins"] == measured["phase begins"] and measured["phase ends"] != measured["phase ends"]
    return measured | {"lasts": lasts, "phase ends": measured["steps"] if lasts else measured["phase ends"]}


def _claim(claim: str, groups: dict[float, list[dict[str, float]]], key: str, sign: int, what: str) -> str:
    """One line: the claim, the measured values, and whether their order agrees with it (Spearman's rank correlation)."""
    points = [(x, statistics.fmean(m[key] for m in group)) for x, group in groups.items() if all(m[key] == m[key] for m in group)]  # fmt: skip
    if len(points) < 3:
        return f"{claim}. Not measured here."
    pending = {x for x, group in groups.items() if key == "phase ends" and any(m["lasts"] for m in group)}
    shown = ", ".join(f"{x:g}: {y:.4g}{' or later' if x in pending else ''}" for x, y in points)
    rho = spearman([x for x, _ in points], [y for _, y in points])
    if not sign:
        low, high = min(y for _, y in points), max(y for _, y in points)
        return f"{claim}. Measured, {what}: {shown}; from {low:.3g} to {high:.3g}."
    agrees = "agrees" if rho * sign >= 0.5 else "the opposite" if rho * sign <= -0.5 else "no clear order"
    return f"{claim}. Measured, {what}: {shown}; rank correlation {rho:+.2f}: {agrees}."


def spearman(x: list[float], y: list[float]) -> float:
    """Rank correlation, ties at their mean rank; 0 where either is constant."""
    ranks = []
    for values_ in (np.asarray(x), np.asarray(y)):
        _, inverse, counts = np.unique(values_, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    a, b = (r - r.mean() for r in ranks)
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / size if size else 0.0


__all__ = ["Compared", "as_text", "claims", "last_of", "measure", "read_run", "read_runs", "summary"]
