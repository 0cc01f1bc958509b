"""Read the log of another trainer and say which phase it shows: `python -m jepa_fast.diagnose LOG`.

In: a log file (and, if there are, checkpoints and data). Out: a verdict with its evidence and its limits on the terminal,
and a folder with metrics.jsonl, events.jsonl, report.html and the figure, which `python -m jepa_fast.report` reads too.
"""

import json
import sys
from pathlib import Path
from typing import Any

from jepa_fast import report
from jepa_fast.diagnose import weights
from jepa_fast.diagnose.curves import ColumnChoice, Curve, curve
from jepa_fast.diagnose.tables import KNOWN, Table, read
from jepa_fast.errors import Arguments, UsageError, one_line_errors
from jepa_fast.report.logs import with_phase

__all__ = ["diagnose", "main"]

EXAMPLES = f"""Reads {KNOWN}.

  python -m jepa_fast.diagnose logs/jepa_r0.csv
  python -m jepa_fast.diagnose logs/jepa_r0.csv --checkpoints 'logs/jepa-ep*.pth.tar' --data IMAGES
  python -m jepa_fast.diagnose wandb_export.csv --run breezy-sun-1
  python -m jepa_fast.diagnose metrics.csv --loss-column pretrain/l --column probe/target=val_acc"""


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = Arguments("diagnose", EXAMPLES)
    parser.add_argument("log", type=Path, help="log file, TensorBoard folder or run folder")
    parser.add_argument("--loss-column", default="", help="column (or tag) of the training loss")
    parser.add_argument("--step-column", default="", help="column that counts steps")
    parser.add_argument("--run", default="", help="which run, where the file holds several: its number or W&B name")
    parser.add_argument("--column", action="append", default=[], metavar="KEY=NAME",
                        help="read column NAME as KEY of docs/metrics.md, as in probe/target=val_acc")  # fmt: skip
    parser.add_argument("--checkpoints", default="", metavar="GLOB", help="checkpoints that hold both encoders")
    parser.add_argument(
        "--data",
        default="",
        help="images or series: predictor's skill, discrepancy, spectrum and probes at each checkpoint",
    )
    parser.add_argument("--heads", type=int, default=0, help="attention heads of the checkpoints' encoders, for --data, "
                        "where their width does not tell them")  # fmt: skip
    parser.add_argument(
        "--predictor-heads", type=int, default=0, help="likewise of their predictors; default: the encoder's"
    )
    parser.add_argument("--out", type=Path, help="folder to write; default diagnoses/<log>-<n>")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if options.data and not options.checkpoints:
        raise UsageError("--data needs the encoders: give --checkpoints 'DIR/*.pth.tar' too")
    for name in ("heads", "predictor_heads"):
        count = getattr(options, name)
        if count < 0 or (count and not options.data):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {count}: a number of heads goes with --checkpoints and --data")
    bad = next((pair for pair in options.column if "=" not in pair), None)
    if bad:
        raise UsageError(f"--column {bad}: write KEY=NAME, as in --column probe/target=val_acc")
    others = tuple(tuple(pair.split("=", 1)) for pair in options.column)
    folder = options.out or _free(options.log)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--out {folder} exists and is not empty; nothing was written over: give another folder")
    choice = ColumnChoice(options.loss_column, options.step_column, options.run, others)
    heads = options.heads, options.predictor_heads
    diagnose(options.log, choice, options.checkpoints, options.data, folder, *heads)
    return 0


def diagnose(
    log: Path, choice: ColumnChoice, checkpoints: str, data: str, folder: Path, heads: int = 0, predictor_heads: int = 0
) -> list[dict[str, Any]]:
    """Print what the log shows and write `folder`. Raises UsageError before anything is written."""
    table = read(log)
    read_curve = curve(table, choice, str(log))
    records = read_curve.records
    if checkpoints:
        measured, on_predictors = weights.measure(checkpoints, data, read_curve.steps_per_epoch, heads, predictor_heads)
        records = _merged(records, measured)
    records, events = with_phase(records)
    _write(folder, records, events)
    file = report.write(folder)

    last = int(records[-1]["step"])
    print(
        f"{log}: {table.kind}, {len(records):,} record{'s' * (len(records) != 1)}, steps {int(records[0]['step']):,} to {last:,} ({read_curve.unit})"
    )
    print(f"\n{report.verdict(records, events, '')}\n")
    for event in events:
        print(
            f"event: {event['kind'].replace('_', ' ')}, step {event['step']:,} (called at {event['called_at']:,}, confidence {event['confidence']})"
        )
        print("".join(f"  {said}\n" for said in event["evidence"]), end="")
    if checkpoints:
        print(_on_drift(measured))
        print("".join(f"{line}\n" for line in on_predictors), end="")
    print("limits:")
    print("".join(f"  - {limit}\n" for limit in limits(table, read_curve, records)), end="")
    print(f"figure: {folder / 'phase.png'}\nreport: {file}")
    return events


def limits(table: Table, read_curve: Curve, records: list[dict[str, Any]]) -> list[str]:
    """What this log cannot say, and what was done to it on the way."""
    keys = {key for record in records for key in record}
    said = list(read_curve.notes)
    if not any(key.startswith("probe/") for key in keys):
        said.append("without a probe nothing here is a fact about the features: the phase is an estimate, or unknown")
    if not any(key.startswith("discrepancy/") for key in keys):
        said.append("the log holds no discrepancy of the two encoders; --checkpoints and --data measure it")
    losses = [record["loss"] for record in records if "loss" in record]
    if "CSV" in table.kind and 0 < min(losses) < 1e-3:
        said.append(
            f"the smallest loss is {min(losses):.5f}: a trainer that prints five decimals rounds it by up to 5e-6"
        )
    if read_curve.unit == "row of the log":
        said.append("no column counts steps, so rows were counted: distances in steps mean nothing if rows are uneven")
    return said


def _on_drift(measured: list[dict[str, float]]) -> str:
    """||theta - theta_bar|| in a line: first, largest and last, and the layer that lags most."""
    largest = max(measured, key=lambda record: record["drift/total"])
    layers = {key: value for key, value in measured[-1].items() if key.startswith("drift/") and key != "drift/total"}
    most = max(layers, key=layers.__getitem__)
    shown = {int(r["step"]): r["drift/total"] for r in (measured[0], largest, measured[-1])}
    points = ", ".join(f"{shown[step]:.4g} at step {step:,}" for step in sorted(shown))
    return f"drift ||theta - theta_bar||: {points}; in the last checkpoint {most.removeprefix('drift/')} lags most ({layers[most]:.4g})"


def _merged(records: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the log says stands; checkpoints add the curves it lacks."""
    known = {key for record in records for key in record} - {"step"}
    by_step = {record["step"]: dict(record) for record in records}
    for record in measured:
        by_step.setdefault(record["step"], {}).update({k: v for k, v in record.items() if k not in known})
    return [by_step[step] for step in sorted(by_step)]


def _free(log: Path) -> Path:
    stem = (log.resolve().name if log.is_dir() else log.name.split(".")[0]) or "log"
    taken = (path.name.removeprefix(f"{stem}-") for path in Path("diagnoses").glob(f"{stem}-*"))
    return Path("diagnoses") / f"{stem}-{max([int(n) for n in taken if n.isdecimal()], default=0) + 1}"


def _write(folder: Path, records: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in (("metrics.jsonl", records), ("events.jsonl", events)):
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write to --out {folder} ({error.strerror}); choose a folder that can be written"
        ) from None
