"""The grid of runs on which the phase detector is calibrated: generated data, settings, training, thinned records.

    while python benchmarks/phase_grid.py FOLDER; do :; done    train what is missing, one run a call
    python benchmarks/phase_grid.py FOLDER --gather             add the finished runs to benchmarks/results/phase_runs.jsonl

Every run is `python -m jepa_fast.train` with other data, seed and settings. Runs with seeds below 100 are the first
calibration's, now all for tuning. Of the second, even seeds are for tuning and odd seeds untouched: other seeds, the
presets' own data at settings that people use, and generators that tuning has never seen (modulation, pulses, colour,
gaps, spots). Those were only looked at for what an untrained encoder's probe says, before any training. The third was
listed after the detector had been evaluated on the second, where no run had recovered: the presets' own length and rates.
The fourth was listed after the third had shown the confidences too high, and showed them still too high; the fifth, after
what the content counts for and the confidences had been set anew on all before.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import phase_data

RESULT = Path(__file__).parent / "results" / "phase_runs.jsonl"
EVERY = 20  # steps between the records that are kept
KEPT = (
    "content", "content/context", "content/untrained",
    "step", "loss", "skill", "spread", "norm/target", "discrepancy/visible", "discrepancy/full", "drift/total",
    *(f"{key}{encoder}" for key in ("rankme", "participation", "feature_std", "alpha_req", "lidar") for encoder in ("", "/context")),
    "probe/context", "probe/target", "probe/untrained", "probe/majority",
)  # fmt: skip

# ---- settings -------------------------------------------------------------------------------------


class Cell(NamedTuple):
    data: str
    seed: int
    changes: dict[str, Any]
    preset: str = "demo"

    @property
    def name(self) -> str:
        short = (f"{k.rpartition('.')[2]}={v}" for k, v in self.changes.items())
        middle = (self.preset,) if self.preset == "series" else ()
        return "-".join([self.data, f"s{self.seed}", *middle, *short]).replace("/", "_")

    @property
    def half(self) -> str:
        """`tuning`; then `untouched`, `long`, `mixed` and `fresh`, which were each untouched when they were evaluated."""
        if self.seed > 200:
            return "fresh" if self.seed > 300 else "mixed"
        if self.seed > 120:
            return "long"
        return "untouched" if self.seed > 100 and self.seed % 2 else "tuning"


SHORT = {
    "decay": "ema.decay", "final": "ema.final_decay", "schedule": "ema.schedule", "lr": "optim.lr", "std": "model.init_std",
    "norm": "objective.target_norm", "depth": "model.depth", "loss": "objective.loss", "ratio": "masks.ratio",
    "width": "model.width", "warmup": "optim.warmup_steps", "batch": "train.batch_size",
}  # fmt: skip


def cell(data: str, seed: int, steps: int, preset: str = "", **changes: Any) -> Cell:
    images = {"textures": "textures", "digits": "digits"} | dict.fromkeys(phase_data.IMAGES, "textures")
    changes = {"train.steps": steps, **{SHORT[k]: v for k, v in changes.items()}}
    return Cell(data, seed, changes, preset or images.get(data, "demo"))


def first() -> list[Cell]:
    """The first calibration's, in the order they were trained."""
    return [
        cell("sensor", 0, 1400, decay=0.996), cell("resonance", 1, 1200, decay=0.996),
        cell("sensor", 2, 800, decay=0.9999, width=64), cell("harmonics", 1, 800, decay=0.9999, width=64),
        cell("impacts", 0, 1200, decay=0.996, width=64),
        cell("sensor", 2, 800, decay=0.996, std=0.08, width=64), cell("chirp", 3, 800, decay=0.996, std=0.08, width=64),
        cell("impacts", 0, 1200, decay=0.996, std=0.03, width=64), cell("bandwidth", 1, 1200, decay=0.996, std=0.03, width=64),
        cell("weak_line", 0, 1200, decay=0.99, std=0.03, lr=3e-4, width=64), cell("sensor", 1, 1200, decay=0.99, std=0.04, lr=3e-4, width=64),
        cell("sensor", 4, 1000, decay=0.996, norm=False, std=0.04, lr=3e-4, width=64), cell("bandwidth", 3, 800, decay=0.99, norm=False, std=0.03, lr=3e-4, width=64),
        cell("impacts", 2, 600, decay=0.9, std=0.03, width=64), cell("resonance", 3, 600, decay=0.0, std=0.03, width=64),
        cell("sensor", 6, 900, decay=0.999, std=0.04, lr=3e-4, width=64), cell("harmonics", 5, 900, decay=0.999, std=0.04, lr=3e-4, width=64),
        cell("weak_line", 8, 700, decay=0.99, lr=3e-4), cell("sensor", 9, 700, decay=0.99, lr=3e-4),
        cell("weak_line", 2, 500, decay=1.0, std=0.03, width=64), cell("sensor", 3, 500, decay=1.0, std=0.04, width=64),
        cell("impacts", 12, 700, decay=0.99, lr=3e-4), cell("bandwidth", 11, 700, decay=0.99, lr=3e-4),
        cell("sensor", 12, 700, decay=0.99, std=0.05, lr=3e-4, width=64), cell("resonance", 7, 700, decay=0.99, std=0.05, lr=3e-4, width=64),
        cell("sensor", 10, 500, decay=0.0, std=0.03, lr=3e-4, width=64), cell("chirp", 11, 700, decay=0.99, lr=3e-4),
        cell("textures", 0, 500, decay=0.999),
        *(cell("sensor", 0, 1800, decay=decay) for decay in (0.0, 0.9, 0.99, 0.996, 0.999, 0.9999, 1.0)),  # docs/beta
        *(cell("sensor", seed, 1800, decay=0.996) for seed in (1, 2)),
    ]  # fmt: skip


def second() -> list[Cell]:
    """In the order they are trained: any beginning is a fair sample of settings and data."""
    small, image = {"lr": 5e-4, "std": 0.05, "width": 64}, {"lr": 1e-3, "width": 64, "depth": 2, "batch": 16}
    return [
        cell("impacts", 100, 500, decay=0.99, **small), cell("sensor", 101, 1000, decay=0.996),
        cell("sensor", 100, 600, decay=0.99, lr=3e-4), cell("modulation", 101, 400, decay=0.99, **small),
        cell("pulses", 101, 400, decay=0.996, **small), cell("textures", 100, 250, decay=0.99, **image),
        cell("colour", 101, 400, decay=0.99, **small), cell("weak_line", 100, 400, decay=0.99, **small),
        cell("digits", 101, 250, decay=0.99, **image), cell("sensor", 103, 500, decay=0.99, final=1.0, schedule="cosine", lr=3e-4),
        cell("gaps", 101, 400, decay=0.99, **small), cell("bandwidth", 100, 400, decay=0.99, **small),
        cell("spots", 101, 300, decay=0.99, **image), cell("sensor", 105, 400, "series", lr=5e-4),
        cell("pulses", 103, 400, decay=0.999, **small), cell("sensor", 107, 400, decay=0.9999, lr=3e-4),
        cell("textures", 103, 300, decay=0.999, **image), cell("modulation", 103, 400, "series", lr=1e-3, std=0.05),
        cell("digits", 100, 250, decay=0.996, **image), cell("sensor", 113, 500, decay=0.996, lr=5e-4, std=0.04, width=64),
        cell("colour", 103, 300, decay=0.9, **small), cell("sensor", 111, 500, decay=0.999, lr=3e-4),
        cell("digits", 103, 300, decay=0.999, **image), cell("gaps", 103, 300, decay=0.9999, **small),
        cell("pulses", 105, 400, "series", lr=1e-3, std=0.04), cell("spots", 103, 300, decay=0.999, **image),
        cell("sensor", 115, 500, decay=0.99, norm=False, lr=5e-4, std=0.04, width=64), cell("modulation", 105, 400, decay=0.999, **small),
        cell("sensor", 109, 600, decay=0.99, lr=2e-4), cell("colour", 105, 400, decay=0.999, **small),
        cell("resonance", 100, 400, decay=0.999, **small), cell("chirp", 100, 400, decay=0.99, **small),
        cell("sensor", 117, 400, decay=0.99, warmup=150, **small), cell("textures", 105, 250, decay=0.99, **image),
    ]  # fmt: skip


def third() -> list[Cell]:
    """Long enough to recover: the demo's recipe on untouched seeds and generators, in the order they are trained."""
    return [
        cell("sensor", 121, 1800, decay=0.996), cell("modulation", 121, 1500, decay=0.996),
        cell("sensor", 123, 1800, decay=0.99), cell("gaps", 121, 1500, decay=0.99),
        cell("sensor", 125, 1800, decay=0.999), cell("colour", 121, 1500, decay=0.996),
        cell("sensor", 127, 1500, decay=0.996, lr=2e-4), cell("pulses", 121, 1500, decay=0.99),
        cell("sensor", 129, 1800, decay=0.98), cell("modulation", 123, 1500, decay=0.99, lr=2e-4),
        cell("sensor", 131, 1800, decay=0.996), cell("gaps", 123, 1500, decay=0.996),
    ]  # fmt: skip


def fourth() -> list[Cell]:
    """Short and long, old data and new, in the order they are trained."""
    small, image = {"lr": 5e-4, "std": 0.05, "width": 64}, {"lr": 1e-3, "width": 64, "depth": 2, "batch": 16}
    return [
        cell("sensor", 201, 1800, decay=0.996), cell("weak_line", 201, 1500, decay=0.99),
        cell("bursts", 201, 1500, decay=0.99), cell("gaps", 203, 400, decay=0.99, **small),
        cell("sensor", 203, 1500, decay=0.98), cell("resonance", 201, 1500, decay=0.996),
        cell("stripes", 201, 300, decay=0.99, **image), cell("modulation", 203, 400, decay=0.99, **small),
        cell("sensor", 205, 500, decay=0.99, **small), cell("digits", 201, 300, decay=0.99, **image),
        cell("pulses", 201, 1500, decay=0.98), cell("weak_line", 203, 400, decay=0.996, **small),
        cell("sensor", 207, 1800, decay=0.99), cell("bursts", 203, 500, decay=0.99, **small),
        cell("gaps", 201, 1500, decay=0.98), cell("sensor", 209, 500, decay=0.9, lr=3e-4),
        cell("resonance", 203, 400, decay=0.99, **small), cell("stripes", 203, 300, decay=0.999, **image),
    ]  # fmt: skip


def fifth() -> list[Cell]:
    """Settings and data at which runs dip and at which they do not, and again two generators more."""
    small, image = {"lr": 5e-4, "std": 0.05, "width": 64}, {"lr": 1e-3, "width": 64, "depth": 2, "batch": 16}
    return [
        cell("sensor", 301, 1800, decay=0.996), cell("sensor", 303, 1500, decay=0.99),
        cell("sensor", 305, 500, decay=0.99, **small), cell("sensor", 307, 600, decay=0.99, lr=3e-4),
        cell("sawtooth", 301, 1500, decay=0.99), cell("echo", 301, 1500, decay=0.996),
        cell("weak_line", 301, 400, decay=0.99, **small), cell("impacts", 301, 700, decay=0.99, lr=3e-4),
        cell("digits", 301, 400, decay=0.996, **image), cell("resonance", 301, 700, decay=0.99, **small),
        cell("sensor", 309, 500, decay=0.999, lr=3e-4), cell("sensor", 311, 1500, decay=0.998),
        cell("gaps", 301, 500, decay=0.996, **small), cell("modulation", 301, 500, decay=0.99, **small),
        cell("spots", 301, 300, decay=0.996, **image), cell("stripes", 301, 400, decay=0.99, **image),
        cell("sawtooth", 303, 500, decay=0.99, **small), cell("echo", 303, 500, decay=0.99, **small),
        cell("sensor", 313, 800, decay=0.996, norm=False, **small), cell("weak_line", 303, 700, decay=0.99, lr=3e-4),
        cell("bandwidth", 301, 700, decay=0.99, lr=3e-4), cell("harmonics", 301, 700, decay=0.99, **small),
        cell("colour", 301, 700, decay=0.99), cell("textures", 301, 300, decay=0.99, **image),
    ]  # fmt: skip


def cells() -> list[Cell]:
    return first() + second() + third() + fourth() + fifth()


def arguments(one: Cell, folder: Path) -> list[str]:
    """The command line of a cell's run."""
    changes = {"data.embedded": one.data} if one.data not in phase_data.GENERATORS else {}
    changes |= one.changes | {
        "train.seed": one.seed,
        "monitor.every": 50 if one.preset in ("textures", "digits") and one.seed >= 100 else 100,
        "log.every": 10,
        "checkpoint.every": 0,
        "monitor.lidar_every": 100 if one.seed < 100 else 200,
        "monitor.bound_every": 100 if one.seed < 100 else 1000,
    }
    if "ema.decay" in changes:
        changes = {"ema.final_decay": changes["ema.decay"], "ema.schedule": "constant"} | changes
    if "optim.lr" in changes:
        changes["optim.final_lr"] = changes["optim.lr"]
        changes["optim.start_lr"] = 0 if "optim.warmup_steps" in changes else changes["optim.lr"]
    if one.preset in ("demo", "series") and "model.width" in changes:
        changes["model.predictor_width"] = changes["model.width"]
    if one.data in phase_data.GENERATORS:
        changes["data.path"] = phase_data.write(folder, one.data)
    if one.data == "textures":
        changes |= {"monitor.probe_train": 2000, "monitor.probe_test": 1000}
    if one.data == "textures" and one.seed < 100:
        changes |= {"model.width": 64, "model.depth": 2, "train.batch_size": 48}
    if one.data in phase_data.IMAGES:
        changes |= {"data.image_size": phase_data.SIZE, "model.patch": 6, "masks.min_keep": 1}
    if one.data == "digits":
        changes |= {"data.image_size": 16, "masks.min_keep": 1}
    changes["parallel.threads"], changes["data.workers"] = 1, 1
    changes["run.dir"] = folder / "runs" / one.name
    return [one.preset, *(str(part) for k, v in changes.items() for part in (f"--{k}", v))]


def finished(one: Cell, folder: Path) -> bool:
    return (folder / "runs" / one.name / "report.html").exists()


def gathered() -> list[dict[str, Any]]:
    """The runs of the result file."""
    return [json.loads(line) for line in RESULT.read_text().splitlines()] if RESULT.exists() else []


# ---- training, gathering --------------------------------------------------------------------------


def train(folder: Path) -> None:
    """The first run of the list that is nowhere; one a call, so that the list may change between runs."""
    held = {run["name"] for run in gathered()}
    one = next((c for c in cells() if c.name not in held and not finished(c, folder)), None)
    if one is None:
        sys.exit("all runs are finished")
    run_dir = folder / "runs" / one.name
    if run_dir.exists():  # a run that was cut off starts again
        run_dir.rename(folder / f"cut-{one.name}-{run_dir.stat().st_mtime_ns}")
    with (folder / "train.log").open("a") as log:
        subprocess.run([sys.executable, "-m", "jepa_fast.train", *arguments(one, folder)], stdout=log, stderr=log)


def thin(records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns of the records every EVERY steps and with probes, four digits; `loss` is the mean of the records between."""
    kept, losses = [], []
    for record in records:
        losses.append(record["loss"])
        if record["step"] % EVERY == 0 or "probe/context" in record:
            kept.append(record | {"loss": None if None in losses else sum(losses) / len(losses)})
            losses = []
    keys = [key for key in KEPT if any(key in record for record in kept)]
    return {k: [round4(r.get(k)) for r in kept] for k in keys}


def round4(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def gather(folder: Path) -> Iterator[dict[str, Any]]:
    """The runs that are gathered already, and then the others that are finished."""
    held = gathered()
    yield from held
    for one in cells():
        if one.name not in {run["name"] for run in held} and finished(one, folder):
            lines = (folder / "runs" / one.name / "metrics.jsonl").read_text().splitlines()
            columns = thin([json.loads(line) for line in lines])
            yield {"name": one.name, "half": one.half, "data": one.data, "seed": one.seed, "columns": columns}


def main() -> None:
    folder = Path(sys.argv[1])
    if "--gather" in sys.argv:
        lines = [json.dumps(run, separators=(",", ":")) + "\n" for run in gather(folder)]
        RESULT.write_text("".join(lines))
    else:
        train(folder)


if __name__ == "__main__":
    main()
