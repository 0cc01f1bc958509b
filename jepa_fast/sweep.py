"""Train over a grid of fields and compare: `python -m jepa_fast.sweep [PRESET] --section.field V1,V2,... [...]`.

A field with several values, separated by commas, is an axis; every combination is one run, in a process of its own.
Runs that are complete are kept, interrupted ones go on, so the same command finishes what it began. Ends in a table
(sweep.csv), figure 5 of the paper for these runs, and what the paper claims beside what was measured.
"""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from jepa_fast import checkpoint, cli, cores, log, rundir
from jepa_fast.errors import UsageError, one_line_errors
from jepa_fast.report import compare, paper

USAGE = """usage: python -m jepa_fast.sweep [PRESET] --section.field V1,V2,... [--section.field VALUE ...]

  --dir PATH     where the runs go, a folder each (default: sweeps/<preset>-<axes>)
  --jobs N       runs at a time (default: 2, where there are two cores); they share out the cores
  --dry-run      say which runs there would be, and stop

  python -m jepa_fast.sweep demo --ema.decay 0,.9,.99,.996,.999,.9999,1
  python -m jepa_fast.sweep demo --masks.ratio .3,.5,.7 --train.seed 0,1,2
  python -m jepa_fast.sweep textures --optim.lr 1e-4,5e-4 --ema.decay .99,.999"""


@dataclass(frozen=True)
class Sweep:
    preset: str
    axes: dict[str, list[str]]  # field: values, as given
    fixed: list[str]  # arguments of every run
    folder: Path
    jobs: int
    dry: bool = False

    def runs(self) -> dict[str, list[str]]:
        """{name of the run's folder: its arguments}, the last axis running fastest."""
        combinations = itertools.product(*([(field, value) for value in values] for field, values in self.axes.items()))
        return {
            ",".join(f"{field}={value}" for field, value in pairs): [x for f, v in pairs for x in (f"--{f}", v)]
            for pairs in combinations
        }


def parse(argv: list[str]) -> Sweep:
    """Raises UsageError; every run's configuration is checked before one starts."""
    argv = list(argv)
    preset = argv.pop(0) if argv and not argv[0].startswith("-") else "demo"
    axes: dict[str, list[str]] = {}
    fixed: list[str] = []
    options = {"--dir": "", "--jobs": ""}
    dry, i = False, 0
    while i < len(argv):
        name, has_value, value = argv[i].partition("=")
        i += 1
        if name == "--dry-run":
            dry = True
            continue
        values = [value] if has_value else []
        while not has_value and i < len(argv) and not argv[i].startswith("--"):
            values.append(argv[i])
            i += 1
        if name in ("--run.dir", "--resume"):
            raise UsageError(f"{name} is the sweep's own business: give --dir for where its runs go")
        if name in options:
            if len(values) != 1:
                raise UsageError(f"{name} takes one value")
            options[name] = values[0]
        elif len(values) == 1 and "," in values[0]:
            axes[name.removeprefix("--")] = _values(name, values[0])
        else:
            fixed += [name, *values]
    if not axes:
        raise UsageError("nothing to sweep over: give a field several values, as in --ema.decay .99,.996,.999")
    folder = Path(options["--dir"] or f"sweeps/{preset}-{'-'.join(axes)}")
    if options["--jobs"] and not (options["--jobs"].isdecimal() and int(options["--jobs"])):
        raise UsageError(f"--jobs {options['--jobs']}: give a number of processes of at least 1")
    jobs = int(options["--jobs"] or min(2, cores.usable()))
    sweep = Sweep(preset, axes, fixed, folder, jobs, dry)
    for arguments in sweep.runs().values():
        cli.parse([preset, *fixed, *arguments])
    return sweep


def _values(name: str, text: str) -> list[str]:
    values = [v for v in text.split(",") if v]
    if len(set(values)) != len(values):
        raise UsageError(f"{name} {text}: a value stands twice")
    return values


def execute(sweep: Sweep) -> dict[str, str]:
    """Run what is not complete, `jobs` at a time. Returns {name: why it failed} of those that did."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    _claim(sweep)
    threads = max(1, cores.usable() // sweep.jobs)
    began, runs = time.monotonic(), sweep.runs()
    failed: dict[str, str] = {}
    running: set[subprocess.Popen] = set()

    def one(name: str, arguments: list[str]) -> None:
        folder = sweep.folder / name
        if complete(folder):
            print(f"{name}: complete", flush=True)
            return
        command = [
            sys.executable, "-m", "jepa_fast.train", sweep.preset, "--parallel.threads", str(threads), *sweep.fixed,
            *arguments, "--run.dir", str(folder), "--resume", "auto",
        ]  # fmt: skip
        with (sweep.folder / f"{name}.log").open("w", encoding="utf-8") as out:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
            running.add(process)
            status = process.wait()
            running.discard(process)
        if status:
            said = (sweep.folder / f"{name}.log").read_text(encoding="utf-8").strip().splitlines()
            failed[name] = said[-1] if said else f"exit status {status}"
        records = log.read(folder / "metrics.jsonl")
        last = f"step {records[-1]['step']}, loss {records[-1].get('loss')}" if records else "no record"
        print(f"[{time.monotonic() - began:5.0f} s] {name}: {failed.get(name) or last}", flush=True)

    with ThreadPoolExecutor(sweep.jobs) as pool:
        try:
            list(pool.map(lambda item: one(*item), runs.items()))
        except BaseException:  # the sweep is stopped: so are its runs, each of which keeps a checkpoint to go on from
            for process in list(running):
                process.terminate()
            raise
    return failed


def _stop(number: int, _frame: object) -> NoReturn:
    print("stopped; the same command goes on from here", flush=True)
    raise SystemExit(128 + number)


def complete(folder: Path) -> bool:
    """Whether the run has made its last step and written its report."""
    config = rundir.saved_config(folder)
    last = config.train.steps if config else 0
    return bool(last) and last in checkpoint.found(folder) and (folder / "report.html").exists()


def _claim(sweep: Sweep) -> None:
    """Refuse a folder of another sweep; note which fields vary."""
    file = sweep.folder / "sweep.json"
    mine = {"preset": sweep.preset, "axes": list(sweep.axes), "fixed": sweep.fixed}
    if file.exists():
        held = json.loads(file.read_text(encoding="utf-8"))
        if held != mine:
            raise UsageError(f"{sweep.folder} holds another sweep ({held['preset']} over {', '.join(held['axes'])}): give another --dir")  # fmt: skip
    elif any(sweep.folder.iterdir()):
        raise UsageError(f"{sweep.folder} exists, is not empty and holds no sweep: give another --dir")
    file.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")


def conclude(sweep: Sweep) -> str:
    """Write sweep.csv and the figure; the table and the claims as text."""
    runs = [compare.read_run(sweep.folder / name, list(sweep.axes)) for name in sweep.runs() if (sweep.folder / name / "metrics.jsonl").exists()]  # fmt: skip
    rows = compare.summary(runs)
    if not rows:
        return "no run has written a record"
    with (sweep.folder / "sweep.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = paper.write(5, runs, sweep.folder / "figure-5")
    claims = compare.claims(runs)
    (sweep.folder / "claims.md").write_text("\n".join(f"- {line}" for line in claims) + "\n", encoding="utf-8")
    return "\n".join([compare.as_text(rows), "", *claims, "", f"figure: {figure}, table: {sweep.folder / 'sweep.csv'}"])


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0 if argv else 2
    sweep = parse(argv)
    names = list(sweep.runs())
    print(f"{len(names)} runs of {sweep.preset} in {sweep.folder}, {sweep.jobs} at a time", flush=True)
    if sweep.dry:
        print("\n".join(names))
        return 0
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        failed = execute(sweep)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print()
    print(conclude(sweep))
    for name, why in failed.items():
        print(f"failed: {name}: {why} (log: {sweep.folder / f'{name}.log'})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
