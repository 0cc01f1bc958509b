"""A run in plain words and pictures: `python -m jepa_fast.report [RUN_DIR]`.

In: metrics.jsonl, events.jsonl and config.json of a run folder, finished or not. Out: report.html, one file that works
offline, and its figure as phase.png and phase.svg. Nothing here calls a run collapsed by its loss or its discrepancy.
"""

import sys
from dataclasses import asdict
from pathlib import Path

from jepa_fast import rundir
from jepa_fast.errors import UsageError, one_line_errors
from jepa_fast.log import read
from jepa_fast.monitor import phase
from jepa_fast.report.figure import phase_figure, svg
from jepa_fast.report.page import page
from jepa_fast.report.verdict import Record, verdict

__all__ = ["main", "verdict", "write"]

USAGE = """usage: python -m jepa_fast.report [RUN_DIR]

Writes report.html, phase.png and phase.svg into the run folder.
Without RUN_DIR: the run under runs/ that wrote last."""


def write(run_dir: Path) -> Path:
    """Write report.html, phase.png and phase.svg into the run folder; the path of the first. Raises UsageError."""
    records = _entries(run_dir / "metrics.jsonl")
    events = [e for e in _entries(run_dir / "events.jsonl") if "kind" in e]
    if not any("evidence" in e for e in events):  # another project's log, which has none
        events += [asdict(event) for event in phase.detect(records)]
    try:
        config, trouble = rundir.saved_config(run_dir), "No config.json here."
    except UsageError as error:
        config, trouble = None, str(error)
    figure, file = phase_figure(records, events), run_dir / "report.html"
    drawing = svg(figure)
    try:
        figure.savefig(run_dir / "phase.png", dpi=160)
        (run_dir / "phase.svg").write_text(drawing)
        file.write_text(page(run_dir.resolve().name, records, events, drawing, config, trouble))
    except OSError as error:
        raise UsageError(f"cannot write the report to {run_dir} ({error.strerror}); make it writable") from None
    return file


def _entries(file: Path) -> list[Record]:
    """The lines of a log that say at which step they hold."""
    return [r for r in read(file) if isinstance(r, dict) and phase.number(r.get("step")) is not None]


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(args):
        print(USAGE)
        return 0
    if len(args) > 1 or (args and args[0].startswith("-")):
        raise UsageError(f"unexpected {args[-1]}; give one run folder, as in python -m jepa_fast.report runs/demo-1")
    files = [Path(args[0]) / "metrics.jsonl"] if args else list(Path("runs").glob("*/metrics.jsonl"))
    files = sorted((file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime)
    if not files:
        place = f"{args[0]} holds" if args else "the folders under runs/ hold"
        raise UsageError(f"{place} no metrics.jsonl; give a run folder, or start a run with python -m jepa_fast.train")
    print(f"report: {write(files[-1].parent)}")
    return 0
