"""The runs of the calibration, and what is kept of each: `python experiments/phase/grid.py FOLDER [--workers 2]`.

Trains what is missing in FOLDER, one thread a run, and appends each finished run to rows.jsonl. Stop it at any time; the
same command goes on. README.md says what the runs are for.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROWS = Path(__file__).parent / "rows.jsonl"
FITTING = (
    "FordA", "ElectricDevices", "Crop", "CricketX", "CricketY", "CricketZ", "ECG5000", "Computers", "EOGHorizontalSignal",
    "EOGVerticalSignal", "FiftyWords", "Adiac", "CBF", "ChlorineConcentration", "AllGestureWiimoteX", "AllGestureWiimoteY",
    "AllGestureWiimoteZ", "DistalPhalanxOutlineCorrect", "DistalPhalanxOutlineAgeGroup", "DistalPhalanxTW", "Earthquakes",
    "Chinatown", "digits", "textures",
)  # fmt: skip
UNTOUCHED = (
    "FordB", "FaceAll", "FacesUCR", "EthanolLevel", "Fish", "FreezerRegularTrain", "FreezerSmallTrain", "GestureMidAirD1",
    "GestureMidAirD2", "GestureMidAirD3", "GesturePebbleZ1", "GesturePebbleZ2", "CinCECGTorso", "ACSF1", "ECGFiveDays",
    "ECG200", "BME", "ArrowHead", "DodgerLoopGame", "DiatomSizeReduction", "mnist5k",
)  # fmt: skip
IMAGES = ("digits", "textures", "mnist5k")
STEPS, LOOK = 1500, 50
LOOKS_ONLY = (
    "rankme", "participation", "feature_std", "alpha_req", "lidar", "readout", "probe/", "mismatch/", "spread/full",
    "discrepancy/full", "loss/heldout", "phase/",
)  # fmt: skip
KEPT = (
    "step",
    "loss",
    "skill",
    "position_share",
    "spread",
    "norm/",
    "discrepancy/",
    "drift/total",
    "schedule/ema_decay",
    *LOOKS_ONLY,
)


class Cell(NamedTuple):
    data: str
    round: int
    preset: str
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.round}-{self.data}"

    @property
    def part(self) -> str:
        return "untouched" if self.data in UNTOUCHED else "fitting"

    def arguments(self, folder: Path) -> list[str]:
        changes = {
            "run.dir": folder,
            "parallel.threads": 1,
            "monitor.every": LOOK,
            "checkpoint.every": 0,
            **self.changes,
        }
        return [self.preset, *(part for name, value in changes.items() for part in (f"--{name}", str(value)))]


def cells() -> Iterator[Cell]:
    """Without end, in the order they are trained: sets of both parts in turn, round after round."""
    turn = [name for pair in _in_turn(FITTING, UNTOUCHED) for name in pair]
    for number in count():
        rng = np.random.default_rng(number)
        for data in turn:
            if data in IMAGES and number % 2:
                continue
            yield _cell(data, number, rng)


def _in_turn(*parts: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    longest = max(map(len, parts))
    return (tuple(part[i] for part in parts if i < len(part)) for i in range(longest))


def _cell(data: str, number: int, rng: np.random.Generator) -> Cell:
    if data in IMAGES:
        preset, changes = data, {"train.steps": 2 * STEPS if data != "textures" else 2000, "monitor.probe_train": 1000}
    else:
        preset = "series" if number == 1 else "demo"
        changes = {"data.path": f"ucr:{data}", "train.steps": STEPS, "data.gaps": "interpolate", "data.lengths": "pad"}
    changes |= {"train.seed": 1000 * number + int(rng.integers(1000))}
    if number >= 2:
        changes |= _drawn(rng, number)
    return Cell(data, number, preset, changes)


def _drawn(rng: np.random.Generator, number: int) -> dict[str, Any]:
    """A setting at random; one draw in two leaves a lever where the preset has it."""
    decay = float(rng.choice([0.0, 0.5, 0.9, 0.99, 0.996, 0.999, 0.9999, 1.0]))
    drawn: dict[str, Any] = {"ema.decay": decay, "ema.final_decay": decay, "ema.schedule": "constant"}
    norm = str(rng.choice(["layer", "layer", "batch", "none"]))
    levers = {
        "optim.lr": float(rng.choice([3e-5, 3e-4, 1e-3])), "model.init_std": float(rng.choice([0.01, 0.04])),
        "objective.target_norm": norm, "model.depth": int(rng.choice([1, 3])),
    }  # fmt: skip
    drawn |= {name: value for name, value in levers.items() if rng.random() < 0.5}
    if "optim.lr" in drawn:
        drawn |= {"optim.start_lr": drawn["optim.lr"], "optim.final_lr": drawn["optim.lr"]}
    return drawn


# ---- training, and what is kept --------------------------------------------------------------------


def row(cell: Cell, folder: Path) -> dict[str, Any]:
    """One run as a line of rows.jsonl."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"name": cell.name, "part": cell.part, "data": cell.data, "preset": cell.preset, "changes": cell.changes,
            "records": [thinned(record) for record in records]}  # fmt: skip


def thinned(record: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in record.items() if k.startswith(KEPT) and isinstance(v, (int, float))}
    return {k: v if isinstance(v, int) else float(f"{v:.5g}") for k, v in kept.items()}


def train(cell: Cell, base: Path, launcher: list[str]) -> None:
    folder = base / cell.name
    if (folder / "row.json").exists():
        return
    log = folder.with_suffix(".log")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        done = subprocess.run(
            [*launcher, *cell.arguments(folder), "--resume", "auto"], stdout=out, stderr=out, env=environment
        )
    if done.returncode:
        print(f"{cell.name}: {log.read_text().splitlines()[-1:]}", flush=True)
        return
    held = row(cell, folder)
    (folder / "row.json").write_text(json.dumps(held))
    with ROWS.open("a") as rows:
        rows.write(json.dumps(held) + "\n")
    print(cell.name, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="rounds to begin with")
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-m", "jepa_fast.train"]
    with ThreadPoolExecutor(asked.workers) as pool:
        for cell in cells():
            if cell.round >= asked.rounds:
                break
            if cell.round >= asked.first:
                pool.submit(train, cell, asked.folder, launcher)


if __name__ == "__main__":
    main()
