"""A run in plain words and pictures: `python -m jepa_fast.report [RUN_DIR ...]`.

In: metrics.jsonl, events.jsonl and config.json of run folders, finished or not. Out: report.html, one file that works
offline, and its figure as phase.png and phase.svg; of several runs comparison.html; with --figure a figure of the
paper. Nothing here calls a run collapsed by its loss or its discrepancy.
"""

import sys
from pathlib import Path

from jepa_fast import rundir
from jepa_fast.config import Config
from jepa_fast.errors import Arguments, UsageError, one_line_errors, reading
from jepa_fast.report import compare, coverage, paper
from jepa_fast.report.figure import detail_figures, phase_figure, svg
from jepa_fast.report.logs import left_out, read_log
from jepa_fast.report.page import Section, comparison, page
from jepa_fast.report.verdict import verdict

__all__ = ["left_out", "main", "verdict", "write"]

USAGE = """usage: python -m jepa_fast.report [RUN_DIR]
       python -m jepa_fast.report RUN_DIR RUN_DIR ... [--out FOLDER]
       python -m jepa_fast.report --figure 1|2|3|4|5 RUN_DIR ... [--out FOLDER]

One run: report.html, phase.png and phase.svg, into its folder. Without RUN_DIR: the run under runs/ that wrote last.
Several: comparison.html and comparison.png, into FOLDER (default: here). --figure N: the paper's figure N of these
runs, figure-N.png and .svg."""


def write(run_dir: Path) -> Path:
    """Write report.html, phase.png and phase.svg into the run folder; the path of the first. Raises UsageError."""
    with reading(run_dir, "a run"):
        return _write(run_dir)


def _write(run_dir: Path) -> Path:
    records, events = read_log(run_dir)
    try:
        config, trouble = rundir.saved_config(run_dir), "No config.json here."
    except UsageError as error:
        config, trouble = None, str(error)
    figure, file = phase_figure(records, events), run_dir / "report.html"
    drawing = svg(figure)
    sections: list[Section] = [
        (name, says, svg(drawn)) for name, (says, drawn) in detail_figures(records, events).items()
    ]
    sections += _masks(config)
    try:
        figure.savefig(run_dir / "phase.png", dpi=160)
        (run_dir / "phase.svg").write_text(drawing, encoding="utf-8")
        file.write_text(
            page(run_dir.resolve().name, records, events, drawing, sections, config, trouble), encoding="utf-8"
        )
    except OSError as error:
        raise UsageError(f"cannot write the report to {run_dir} ({error.strerror}); make it writable") from None
    return file


def _masks(config: Config | None) -> list[Section]:
    if config is None:
        return []
    found = coverage.coverage(config)
    return [("What the masks cover", " ".join(coverage.sentences(found)), svg(coverage.coverage_figure(found)))]


def write_comparison(folders: list[Path], out: Path) -> Path:
    """Write comparison.html, .png and .svg of several runs; the path of the first. Raises UsageError."""
    runs = compare.read_runs(folders)
    several = 5 if all(run.fields for run in runs) else 3
    paper.write(several, runs, out / "comparison")
    title = "Runs compared" + (f" over {', '.join(runs[0].fields)}" if runs[0].fields else "")
    file = out / "comparison.html"
    drawing = (out / "comparison.svg").read_text(encoding="utf-8")
    file.write_text(comparison(title, drawing, compare.summary(runs), compare.claims(runs)), encoding="utf-8")
    return file


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    parser = Arguments("report", USAGE)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--figure", type=int)
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args(argv)
    folders = [_run(folder) for folder in args.runs] or [_newest()]
    if args.figure is not None:
        runs = compare.read_runs(folders)
        print(f"figure {args.figure}: {paper.write(args.figure, runs, args.out / f'figure-{args.figure}')}")
    elif len(folders) > 1:
        print(f"report: {write_comparison(folders, args.out)}")
    else:
        print(f"report: {write(folders[0])}")
    return 0


def _run(folder: Path) -> Path:
    if not (folder / "metrics.jsonl").is_file():
        raise UsageError(
            f"{folder} holds no metrics.jsonl; give a run folder, or start a run with python -m jepa_fast.train"
        )
    return folder


def _newest() -> Path:
    files = sorted(Path("runs").glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UsageError(
            "the folders under runs/ hold no metrics.jsonl; give a run folder, or start a run with python -m jepa_fast.train"
        )
    return files[-1].parent
