"""The runs of the trial, and what is kept of each: `python experiments/remedies/run.py FOLDER [--grid remedies]`.

Trains what is not in rows.jsonl yet, one thread a run, and appends each finished run to it. Stop it at any time; the same
command goes on. README.md says what the runs are for.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from jepa_fast.monitor.phase import Look, look_of

ROWS = Path(__file__).parent / "rows.jsonl"
STEPS, LOOK = 1500, 50
TUNED_ON = ("FordA",)
SETS = (
    "FordB", "ElectricDevices", "FaceAll", "CricketX", "Crop", "FiftyWords", "EOGHorizontalSignal", "ECG5000",
    "ChlorineConcentration", "Adiac", "EthanolLevel", "AllGestureWiimoteX",
)  # fmt: skip
IMAGES = {"mnist5k": 2000, "textures": 2000}  # steps

BATCH: dict[str, Any] = {"objective.target_norm": "batch"}
FROZEN: dict[str, Any] = {"teacher.kind": "frozen"}
SLOW: dict[str, Any] = {"ema.decay": 0.9999, "ema.final_decay": 0.9999}
POWER: dict[str, Any] = {"ema.schedule": "power"}
ESCAPE: dict[str, Any] = {"ema.schedule": "escape"}
NO_TEACHER: dict[str, Any] = {"teacher.kind": "none"}
SIGREG: dict[str, Any] = {"regularizer.kind": "sigreg"}

# Most telling first: a tier is run for all sets and seeds before the next begins.
TIERS: tuple[dict[str, dict[str, Any]], ...] = (
    {"paper": {}, "batch": BATCH, "frozen": FROZEN, "batch+frozen": BATCH | FROZEN},
    {"batch+escape": BATCH | ESCAPE, "batch+slow": BATCH | SLOW, "position": {"objective.target_norm": "position"},
     "power": POWER, "lejepa": NO_TEACHER | SIGREG, "none": NO_TEACHER},
    {"escape": ESCAPE, "slow": SLOW, "centre": {"objective.target_norm": "centre"}, "no_norm": {"objective.target_norm": "none"},
     "batch_running": BATCH | {"objective.target_stats": "running"}, "batch+power": BATCH | POWER, "sigreg": SIGREG,
     "vicreg": {"regularizer.kind": "vicreg"}, "visreg": {"regularizer.kind": "visreg"}},
    {"batch+lejepa": BATCH | NO_TEACHER | SIGREG, "pixels": {"objective.target": "pixels"},
     "predictor_lr_4": {"optim.predictor_lr": 4.0}, "depth_scaled_init": {"model.depth_scaled_init": True},
     "ratio_ramp": {"masks.schedule": "linear", "masks.ratio": 0.3, "masks.final_ratio": 0.7}},
)  # fmt: skip
BETAS = {f"beta={b:g}": {"ema.decay": b, "ema.final_decay": b} for b in (0, 1, 0.996, 0.9, 0.999, 0.99, 0.9999, 0.5)}
RATIOS = {f"ratio={r:g}": {"masks.ratio": r, "masks.final_ratio": r} for r in (0.7, 0.3, 0.9, 0.5)}


class Cell(NamedTuple):
    grid: str
    remedy: str
    data: str
    seed: int
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.grid}-{self.remedy}-{self.data}-{self.seed}"

    def arguments(self, folder: Path) -> list[str]:
        fields: dict[str, Any] = {
            "run.dir": folder, "parallel.threads": 1, "train.seed": self.seed, "monitor.every": LOOK, "checkpoint.every": 0,
            "monitor.lidar_views": 0, "log.every": 10, "log.report": False,
        }  # fmt: skip
        if self.data in IMAGES:
            preset, fields["train.steps"] = self.data, IMAGES[self.data]
        else:
            preset, fields["train.steps"] = "demo", STEPS
            fields |= {"data.path": f"ucr:{self.data}", "data.gaps": "interpolate", "data.lengths": "pad"}
        return [preset, *(part for k, v in (fields | self.changes).items() for part in (f"--{k}", str(v)))]


def cells(grid: str, seeds: range) -> Iterator[Cell]:
    """In the order they are trained."""
    if grid == "remedies":
        for tier in TIERS:
            for seed in seeds:
                yield from (Cell(grid, n, data, seed, c) for data in (*SETS, *TUNED_ON) for n, c in tier.items())
    elif grid == "images":
        for seed in seeds:
            yield from (Cell(grid, n, data, seed, c) for tier in TIERS[:2] for n, c in tier.items() for data in IMAGES)
    else:
        levels = {"beta": BETAS, "ratio": RATIOS}[grid]
        for seed in seeds:
            for data in ("FordA", "FordB", "CricketX", "FaceAll"):
                yield from (Cell(grid, name, data, seed, changes) for name, changes in levels.items())


# ---- what is kept of a run ------------------------------------------------------------------------


def end_of_phase(found: list[Look]) -> int | None:
    """The first of two consecutive useful looks, by the project's one definition (`jepa_fast.monitor.phase.facts`)."""
    return next((found[i].step for i in range(len(found) - 1) if found[i].useful and found[i + 1].useful), None)


def outcome(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One run as numbers: end of the phase, best and final probes, and the looks they come from."""
    found = [look for record in records if (look := look_of(record)) is not None]
    last = found[-1]
    losses = [r["loss"] for r in records if isinstance(r.get("loss"), float)]
    return {
        "steps": records[-1]["step"], "end": end_of_phase(found), "untrained": last.untrained, "reference": last.reference,
        "tests": last.num_test,
        "best": {name: max(look.probes[name] for look in found) for name in ("context", "target")},
        "final": {name: last.probes[name] for name in ("context", "target")},
        "loss": {"first": losses[0], "lowest": min(losses), "last": losses[-1]},
        "looks": [[look.step, round(look.probes["context"], 4), round(look.probes["target"], 4)] for look in found],
    }  # fmt: skip


def done() -> set[str]:
    """Names of the runs that rows.jsonl holds."""
    return {json.loads(line)["name"] for line in ROWS.read_text().splitlines()} if ROWS.exists() else set()


WRITING = Lock()


def train(cell: Cell, base: Path) -> None:
    """One run, its row, and its checkpoints away."""
    folder = base / cell.name
    log = base / f"{cell.name}.log"
    command = [sys.executable, "-m", "jepa_fast.train", *cell.arguments(folder), "--resume", "auto"]
    with log.open("w") as out:
        ended = subprocess.run(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ended.returncode:
        print(f"failed: {cell.name}: {(log.read_text().strip().splitlines() or ['no output'])[-1]}", flush=True)
        return
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    row = {"name": cell.name, "grid": cell.grid, "remedy": cell.remedy, "data": cell.data, "seed": cell.seed,
           "changes": cell.changes, **outcome(records)}  # fmt: skip
    with WRITING, ROWS.open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    best = max(row["best"].values())
    print(f"{cell.name}: end {row['end']}, best {best:.3f} (untrained {row['untrained']:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--grid", choices=("remedies", "images", "beta", "ratio"), default="remedies")
    parser.add_argument("--seeds", type=int, default=8, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="remedies, separated by commas")
    parser.add_argument("--sets", default="", help="data sets, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="say which runs are missing, and stop")
    asked = parser.parse_args()
    only, sets = ({name for name in text.split(",") if name} for text in (asked.only, asked.sets))
    held = done()
    missing = [
        cell
        for cell in cells(asked.grid, range(asked.first, asked.first + asked.seeds))
        if cell.name not in held and (not only or cell.remedy in only) and (not sets or cell.data in sets)
    ]
    print(f"{len(missing)} runs to make, {len(held)} in {ROWS.name}", flush=True)
    if asked.dry_run:
        print("\n".join(cell.name for cell in missing))
        return
    asked.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(asked.workers) as pool:
        list(pool.map(lambda cell: train(cell, asked.folder), missing))


if __name__ == "__main__":
    main()
