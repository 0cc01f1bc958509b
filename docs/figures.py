"""The runs behind "Reading your JEPA loss curve": their curves as docs/runs/*.csv, and the figures drawn from those.

python docs/figures.py             # draw docs/runs/*.svg from the committed curves
python docs/figures.py --train     # train every run again first (minutes each on two CPU cores)
python docs/figures.py --take NAME RUN_FOLDER    # the curves of a run that was trained elsewhere by the same command
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from jepa_fast.monitor import phase
from jepa_fast.report.figure import phase_figure, svg

HERE = Path(__file__).parent / "runs"
NARROW = "--model.width 64 --model.predictor_width 64"
FAST = "--optim.lr 3e-4 --optim.start_lr 3e-4 --optim.final_lr 3e-4"
RUNS = {  # name: what to give to python -m jepa_fast.train
    "recovery": "demo --train.steps 1400",
    "no-dip": f"demo --train.steps 1200 --train.seed 1 {NARROW} --model.init_std 0.04 --ema.decay 0.99 --ema.final_decay 0.99 {FAST}",
    "slow-target": f"demo --train.steps 800 --train.seed 2 {NARROW} --ema.decay 0.9999 --ema.final_decay 0.9999",
    "textures": "textures",
}
KEYS = (
    "step",
    "loss",
    "discrepancy/visible",
    "spread",
    "drift/total",
    "probe/context",
    "probe/target",
    "probe/untrained",
    "probe/majority",
)


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
    records = curves(name)
    return svg(phase_figure(records, [vars(event) for event in phase.detect(records)]))


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
