"""A table of a log -> the curve of one run: which column is the loss, what counts as a step, where it was restarted.

In: a Table. Out: a Curve, whose records `monitor.phase.detect` and the report read.
"""

import math
import re
from dataclasses import dataclass

from jepa_fast.diagnose.tables import Table
from jepa_fast.errors import UsageError, suggest

# Names people give these columns; compared in lower case, the earlier ones preferred.
LOSSES = ("loss", "train/loss", "train_loss", "loss/train", "training_loss", "train/loss_step", "train_loss_step", "total_loss",
          "train/total_loss", "losses/train", "pretrain/loss", "pretrain_loss", "ssl_loss", "jepa_loss", "train_loss_epoch")  # fmt: skip
STEPS = (
    "step",
    "_step",
    "global_step",
    "trainer/global_step",
    "train/global_step",
    "iteration",
    "iter",
    "itr",
    "it",
    "epoch",
)
OURS = re.compile(
    r"(discrepancy|drift|probe|skill)/.+|(rankme|participation|readout|lidar)(/context)?|readout/untrained|spread|skill|position_share|loss/heldout"
)  # keys of docs/metrics.md
MOST_RECORDS = 4000  # the detector's windows are tenths of a run: means over finer steps change nothing it sees


@dataclass(frozen=True)
class ColumnChoice:
    """What the command line asks for; empty: found by name."""

    loss: str = ""
    step: str = ""
    run: str = ""
    others: tuple[tuple[str, str], ...] = ()  # (our key, column)


@dataclass(frozen=True)
class Curve:
    records: list[dict[str, float]]
    unit: str  # what a step is
    notes: list[str]
    steps_per_epoch: int  # 0: not known


def curve(table: Table, choice: ColumnChoice, where: str) -> Curve:
    """The run of `table` that `choice` names. Raises UsageError if there is no such column or run."""
    wide = bool(_groups(table.columns))
    table, notes = _one_column_set(table, choice, where) if wide else (table, [])
    loss = choice.loss or _named(table.columns, LOSSES) or _refuse(table.columns, where)
    for column in filter(None, (loss, choice.step, *(column for _, column in choice.others))):
        if column not in table.columns:
            raise UsageError(
                f"{where} has no column {column!r}{suggest(column, table.columns)}; it has {_list(table.columns)}"
            )
    unit, per_epoch, steps = _count(table, loss, choice.step)
    stepped = [(step, row[loss]) for step, row in zip(steps, table.rows, strict=True) if loss in row]
    series, restarts = _run(stepped, "" if wide else choice.run, where)
    notes += table.notes + restarts
    lost = [step for step, value in series if not math.isfinite(value)]
    if lost:
        notes.append(f"{len(lost)} losses are not finite, the first at step {lost[0]:,}: left out")
    series = [(step, value) for step, value in series if math.isfinite(value)]
    if not series:
        raise UsageError(f"{where}: no loss in column {loss!r} is finite, so there is no curve to read")
    if len(series) > MOST_RECORDS:
        notes.append(f"{len(series):,} losses were averaged into {MOST_RECORDS:,} records")
        series = _averaged(series)
    by_step: dict[int, dict[str, float]] = {step: {"step": step, "loss": value} for step, value in series}
    for key, column in _others(table, choice, loss):
        for step, row in zip(steps, table.rows, strict=True):
            if 0 <= step <= series[-1][0] and math.isfinite(row.get(column, math.nan)):
                by_step.setdefault(step, {"step": step})[key] = row[column]
    return Curve([by_step[step] for step in sorted(by_step)], unit, notes, per_epoch)


def _refuse(columns: list[str], where: str) -> str:
    near = [name for name in columns if "loss" in name.lower()]
    if len(near) == 1:
        return near[0]
    said = (
        f"several columns could be the loss ({_list(near)})"
        if near
        else f"no column is called a loss; it has {_list(columns)}"
    )
    raise UsageError(f"{where}: {said}: name it with --loss-column")


def _named(columns: list[str], names: tuple[str, ...]) -> str:
    lower = {column.lower(): column for column in reversed(columns)}
    return next((lower[name] for name in names if name in lower), "")


def _list(columns: list[str]) -> str:
    return ", ".join(columns[:12]) + (f" and {len(columns) - 12} more" if len(columns) > 12 else "")


# ---- W&B charts: a column for each run ------------------------------------------------------------


def _groups(columns: list[str]) -> dict[str, list[str]]:
    """{run: its columns} of a chart's export, whose columns are 'RUN - METRIC' with __MIN and __MAX beside them."""
    out: dict[str, list[str]] = {}
    for column in columns:
        run, dash, _ = column.rpartition(" - ")
        if dash and not column.endswith(("__MIN", "__MAX")):
            out.setdefault(run, []).append(column)
    return out


def _one_column_set(table: Table, choice: ColumnChoice, where: str) -> tuple[Table, list[str]]:
    """The columns of one run, under the metrics' own names (a column named in full by --loss-column keeps its name)."""
    groups = _groups(table.columns)
    owner = next((run for run, columns in groups.items() if choice.loss in columns), "")
    run = choice.run or owner or (next(iter(groups)) if len(groups) == 1 else "")
    if run not in groups:
        asked = f"no run {run!r}{suggest(run, groups)}" if run else f"{len(groups)} runs"
        raise UsageError(f"{where} holds {asked}: choose one with --run: {_list(list(groups))}")
    short = {c: c if c == choice.loss else c.rpartition(" - ")[2] for c in groups[run]}
    short |= {column: column for column in table.columns if " - " not in column}
    rows = [{short[c]: v for c, v in row.items() if c in short} for row in table.rows]
    return Table(table.kind, rows, table.notes), [f"run {run!r} of {len(groups)} in the chart"]


# ---- steps and restarts ---------------------------------------------------------------------------


def _count(table: Table, loss: str, asked: str) -> tuple[str, int, list[int]]:
    """(what a step is, steps of an epoch or 0, the step of every row)."""
    with_loss = [row for row in table.rows if loss in row]
    if not asked and all(_whole(row.get("epoch")) and _whole(row.get("itr")) for row in with_loss):
        per_epoch = int(max(row["itr"] for row in with_loss)) + 1
        steps = [int((row.get("epoch", 0) - 1) * per_epoch + row.get("itr", 0)) for row in table.rows]
        return f"iteration, {per_epoch:,} an epoch", per_epoch, steps
    column = asked or _named([c for c in table.columns if all(_whole(row.get(c)) for row in with_loss)], STEPS)
    if asked and not all(_whole(row.get(asked)) for row in with_loss):
        raise UsageError(
            f"--step-column {asked} holds no whole number in every row with a loss; leave it out to count rows"
        )
    if not column:
        return "row of the log", 0, list(range(len(table.rows)))
    return column, 0, [int(row[column]) if _whole(row.get(column)) else -1 for row in table.rows]


def _whole(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value == int(value) and value >= 0


def _run(stepped: list[tuple[int, float]], asked: str, where: str) -> tuple[list[tuple[int, float]], list[str]]:
    """One run of a file that holds restarts. A step that goes back continues from there: what lay past it is cut;
    back to where a run began, it is a new run. Losses of one step are averaged."""
    runs: list[list[tuple[int, list[float]]]] = []
    resumed = 0
    for step, loss in stepped:
        if runs and step == runs[-1][-1][0]:
            runs[-1][-1][1].append(loss)
            continue
        if not runs or step <= runs[-1][0][0]:
            runs.append([])
        elif step < runs[-1][-1][0]:
            resumed += 1
            while runs[-1][-1][0] >= step:
                runs[-1].pop()
        runs[-1].append((step, [loss]))
    if asked and (not re.fullmatch(r"\d+", asked) or not 1 <= int(asked) <= len(runs)):
        raise UsageError(f"--run {asked}: {where} holds {len(runs)} run(s); give a number from 1 to {len(runs)}")
    number = int(asked) if asked else len(runs)
    notes = []
    if len(runs) > 1:
        lengths = ", ".join(f"{len(run):,}" for run in runs)
        notes.append(
            f"the file holds {len(runs)} runs (of {lengths} steps), appended: this is run {number}; --run N takes another"
        )
    if resumed:
        notes.append(f"{resumed} restart(s) repeated steps: what they repeated replaces what was there")
    return [(step, sum(losses) / len(losses)) for step, losses in runs[number - 1]], notes


def _averaged(series: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over equally many rows, at the last step of each, as our own log's losses are."""
    out = []
    for i in range(MOST_RECORDS):
        part = series[i * len(series) // MOST_RECORDS : (i + 1) * len(series) // MOST_RECORDS]
        out.append((part[-1][0], sum(loss for _, loss in part) / len(part)))
    return out


# ---- other curves ---------------------------------------------------------------------------------


def _others(table: Table, choice: ColumnChoice, loss: str) -> list[tuple[str, str]]:
    """(our key, column): those asked for, those that bear our names, and of our own log everything."""
    named = [c for c in table.columns if OURS.fullmatch(c) or table.kind.startswith("jepa-fast")]
    return [(column, column) for column in named if column not in (loss, "step")] + list(choice.others)
