"""The runs behind "Reading your JEPA loss curve": their curves as docs/runs/*.csv, and the figures drawn from those.

python docs/figures.py             # draw docs/runs/*.svg from the committed curves
python docs/figures.py --train     # train every run again first (one to two minutes each on two CPU cores)
python docs/figures.py --take NAME RUN_FOLDER    # the curves of a run that was trained elsewhere by the same command
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from jepa_fast.report.figure import phase_figure, svg
from jepa_fast.report.logs import with_phase

HERE = Path(__file__).parent / "runs"
RUNS = {  # name: what to give to python -m jepa_fast.train
    "forda": "demo",
    "fordb": "demo --data.path ucr:FordB",
    "frozen": "demo --ema.decay 1 --ema.final_decay 1",
    "batch": "demo --objective.target_norm batch",
}
KEYS = (
    "step", "loss", "skill", "discrepancy/visible", "spread", "drift/total", "lidar", "lidar/context",
    "rankme", "rankme/context", "readout", "readout/context", "readout/untrained",
    "probe/context", "probe/target", "probe/untrained", "probe/majority", "probe/num_test",
)  # fmt: skip


def take(name: str, run: Path) -> None:
    """Keep the curves of a run folder as docs/runs/<name>.csv."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with (HERE / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(KEYS)
        writer.writerows(
            [f"{r[k]:.5g}" if isinstance(r.get(k), float) else r.get(k, "") for k in KEYS] for r in records
        )


def curves(name: str) -> list[dict[str, float]]:
    """The records of docs/runs/<name>.csv."""
    with (HERE / f"{name}.csv").open() as file:
        return [{k: int(v) if k == "step" else float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def draw(name: str) -> str:
    """The figure as SVG, with the events that the detector calls."""
    return svg(phase_figure(*with_phase(curves(name))))


def main(argv: list[str]) -> None:
    if argv[:1] == ["--take"]:
        take(argv[1], Path(argv[2]))
        return
    if argv == ["--train"]:
        for name, command in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / name
                subprocess.run(
                    [sys.executable, "-m", "jepa_fast.train", *command.split(), "--run.dir", str(run)], check=True
                )
                take(name, run)
    for name in RUNS:
        (HERE / f"{name}.svg").write_text(draw(name))


if __name__ == "__main__":
    main(sys.argv[1:])
