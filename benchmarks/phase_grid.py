"""The grid of runs on which the phase detector is calibrated: generated data, settings, training, thinned records.

    while python benchmarks/phase_grid.py FOLDER; do :; done    train what FOLDER lacks, one run a call
    python benchmarks/phase_grid.py FOLDER --gather             write the finished runs to benchmarks/results/phase_runs.jsonl

Every run is `python -m jepa_fast.train` with other data, seed and settings. The grid is split before anything is fitted,
by generator *and* seed: the tuning half has even seeds and its own generators, the untouched half odd seeds and others.
Only the demo's generator is in both, under different seeds. Settings were revised while the first runs came in, as narrow
models with a small initialisation start too near chance for a dip to show. The list is longer than what has been run.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.signal import lfilter

RESULT = Path(__file__).parent / "results" / "phase_runs.jsonl"
LENGTH, TRAIN, TEST = 500, 3000, 1000
EVERY = 20  # steps between the records that are kept
KEPT = (
    "step", "loss", "skill", "spread", "norm/target", "discrepancy/visible", "discrepancy/full", "drift/total",
    *(f"{key}{encoder}" for key in ("rankme", "participation", "feature_std", "alpha_req", "lidar") for encoder in ("", "/context")),
    "probe/context", "probe/target", "probe/untrained", "probe/majority",
)  # fmt: skip

# ---- data -----------------------------------------------------------------------------------------
# Like the demo's sensor set: the classes overlap, single samples tell little and the spectrum much.


def _ar2(rng: np.random.Generator, frequency: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Unit-variance resonances [n, LENGTH] at `frequency` cycles/sample."""
    out = []
    for f, r in zip(frequency, np.broadcast_to(radius, frequency.shape), strict=True):
        x = lfilter([1], [1, -2 * r * np.cos(2 * np.pi * f), r * r], rng.normal(size=LENGTH + 400))[400:]
        out.append(x / x.std())
    return np.stack(out)


def _ar1(rng: np.random.Generator, count: int, coefficient: float = 0.6) -> np.ndarray:
    x = lfilter([1], [1, -coefficient], rng.normal(size=(count, LENGTH + 100)), axis=1)[:, 100:]
    return x * np.sqrt(1 - coefficient**2)


def weak_line(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """A strong line that says nothing, and a weak second one that carries the class."""
    strong = _ar2(rng, 0.05 + rng.normal(0, 0.008, len(y)), np.array(0.985))
    weak = _ar2(rng, 0.13 + 0.025 * y + rng.normal(0, 0.005, len(y)), np.array(0.985))
    return strong + 0.6 * weak + 0.8 * _ar1(rng, len(y))


def impacts(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """Shocks that ring out, as of a damaged bearing; the class is their rate."""
    out = np.zeros((len(y), LENGTH))
    ring = np.exp(-np.arange(30) / 7) * np.sin(2 * np.pi * 0.1 * np.arange(30))
    for i, label in enumerate(y):
        period, at = (90, 40, 18)[label] * rng.normal(1, 0.08), rng.uniform(0, 48)
        while at < LENGTH:
            out[i, int(at)] += rng.uniform(0.7, 1.3)
            at += period * rng.normal(1, 0.03)
        out[i] = np.convolve(out[i], ring)[:LENGTH]
    return out / out.std() + 0.3 * _ar1(rng, len(y), 0.4)


def resonance(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """One broader line at a higher frequency, shifted by the class."""
    line = _ar2(rng, 0.10 + 0.03 * y + rng.normal(0, 0.008, len(y)), np.array(0.97))
    return line + 1.2 * _ar1(rng, len(y))


def bandwidth(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """The class is how sharp a line is, not where."""
    line = _ar2(rng, 0.1 + rng.normal(0, 0.01, len(y)), np.array([0.985, 0.8])[y])
    return line + 0.3 * _ar1(rng, len(y))


def harmonics(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """A tone and its octave, of random phases; the class is its pitch."""
    t, n = np.arange(LENGTH), (len(y), 1)
    pitch = (0.04 + 0.012 * y + rng.normal(0, 0.004, len(y)))[:, None]
    tones = (a * np.sin(2 * np.pi * (k * pitch * t + rng.uniform(size=n))) for k, a in ((1, 1.0), (2, 0.7)))
    return sum(tones) + _ar1(rng, len(y))


def chirp(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """A tone whose pitch rises; the class is how fast."""
    t, n = np.arange(LENGTH), (len(y), 1)
    rate = (np.array([4e-5, 12e-5])[y] + rng.normal(0, 2e-5, len(y)))[:, None]
    phase = rng.normal(0.05, 0.006, n) * t + rate * t * t / 2 + rng.uniform(size=n)
    return 1.3 * np.sin(2 * np.pi * phase) + 0.8 * _ar1(rng, len(y))


GENERATORS: dict[str, tuple[Callable[[np.random.Generator, np.ndarray], np.ndarray], int]] = {
    "weak_line": (weak_line, 2), "impacts": (impacts, 3), "resonance": (resonance, 2), "bandwidth": (bandwidth, 2),
    "harmonics": (harmonics, 4), "chirp": (chirp, 2),
}  # fmt: skip
TUNING = ("sensor", "weak_line", "impacts", "textures")  # with even seeds; odd seeds are the untouched half's


def write_data(folder: Path, name: str) -> Path:
    """The training file of a generated set, written on first use."""
    folder = folder / "data" / name
    if not (folder / "test.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make, num_classes = GENERATORS[name]
        rng = np.random.default_rng([20250905, *name.encode()])
        for split, count in (("train", TRAIN), ("test", TEST)):
            y = rng.integers(0, num_classes, count)
            x = make(rng, y)
            x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
            np.save(folder / f"{split}_labels.npy", y)
            np.save(folder / f"{split}.npy", x.astype(np.float32))
    return folder / "train.npy"


# ---- settings -------------------------------------------------------------------------------------


class Cell(NamedTuple):
    data: str
    seed: int
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        short = (f"{k.rpartition('.')[2]}={v}" for k, v in self.changes.items())
        return "-".join([self.data, f"s{self.seed}", *short]).replace("/", "_")


def _cell(data: str, seed: int, steps: int, **changes: Any) -> Cell:
    names = {
        "decay": "ema.decay", "lr": "optim.lr", "std": "model.init_std", "norm": "objective.target_norm", "depth": "model.depth",
        "loss": "objective.loss", "ratio": "masks.ratio", "width": "model.width", "warmup": "optim.warmup_steps",
    }  # fmt: skip
    return Cell(data, seed, {"train.steps": steps, **{names[k]: v for k, v in changes.items()}})


def cells() -> list[Cell]:
    """In the order they are trained, a tuning run and an untouched one by turns: any beginning is a fair sample."""
    c = _cell
    return [
        c("sensor", 0, 1400, decay=0.996), c("resonance", 1, 1200, decay=0.996),
        c("sensor", 2, 800, decay=0.9999, width=64), c("harmonics", 1, 800, decay=0.9999, width=64),
        c("impacts", 0, 1200, decay=0.996, width=64),
        c("sensor", 2, 800, decay=0.996, std=0.08, width=64), c("chirp", 3, 800, decay=0.996, std=0.08, width=64),
        c("impacts", 0, 1200, decay=0.996, std=0.03, width=64), c("bandwidth", 1, 1200, decay=0.996, std=0.03, width=64),
        c("weak_line", 0, 1200, decay=0.99, std=0.03, lr=3e-4, width=64), c("sensor", 1, 1200, decay=0.99, std=0.04, lr=3e-4, width=64),
        c("sensor", 4, 1000, decay=0.996, norm=False, std=0.04, lr=3e-4, width=64), c("bandwidth", 3, 800, decay=0.99, norm=False, std=0.03, lr=3e-4, width=64),
        c("impacts", 2, 600, decay=0.9, std=0.03, width=64), c("resonance", 3, 600, decay=0.0, std=0.03, width=64),
        c("sensor", 6, 900, decay=0.999, std=0.04, lr=3e-4, width=64), c("harmonics", 5, 900, decay=0.999, std=0.04, lr=3e-4, width=64),
        c("weak_line", 8, 700, decay=0.99, lr=3e-4), c("sensor", 9, 700, decay=0.99, lr=3e-4),
        c("weak_line", 2, 500, decay=1.0, std=0.03, width=64), c("sensor", 3, 500, decay=1.0, std=0.04, width=64),
        c("impacts", 12, 700, decay=0.99, lr=3e-4), c("bandwidth", 11, 700, decay=0.99, lr=3e-4),
        c("sensor", 12, 700, decay=0.99, std=0.05, lr=3e-4, width=64), c("resonance", 7, 700, decay=0.99, std=0.05, lr=3e-4, width=64),
        c("sensor", 10, 500, decay=0.0, std=0.03, lr=3e-4, width=64), c("chirp", 11, 700, decay=0.99, lr=3e-4),
        c("textures", 0, 500, decay=0.999), c("digits", 1, 400, decay=0.999),
        c("impacts", 4, 500, decay=0.9999, std=0.04, lr=3e-4, width=64), c("harmonics", 7, 700, decay=0.99, std=0.03, lr=3e-4, width=64),
        c("sensor", 22, 600, decay=0.99, lr=3e-4, depth=1), c("sensor", 5, 500, decay=0.9999, std=0.04, lr=1e-3, width=64),
        c("weak_line", 4, 600, decay=0.99, std=0.04, loss="l1", lr=3e-4, width=64), c("chirp", 5, 600, decay=0.99, std=0.04, loss="l1", lr=3e-4, width=64),
        c("sensor", 14, 700, decay=0.99, warmup=200, std=0.03, lr=3e-4, width=64), c("bandwidth", 7, 700, decay=0.99, warmup=200, std=0.03, lr=3e-4, width=64),
        c("impacts", 8, 500, decay=0.99, std=0.08, lr=3e-4, width=64), c("sensor", 7, 500, decay=0.99, std=0.08, lr=1e-3, width=64),
        c("weak_line", 10, 600, decay=0.999, std=0.04, lr=1e-3, width=64), c("chirp", 9, 600, decay=0.999, std=0.04, lr=1e-3, width=64),
        c("sensor", 20, 600, decay=0.996, std=0.03, lr=1e-3, width=64), c("resonance", 11, 600, decay=0.9, std=0.03, lr=3e-4, width=64),
        c("weak_line", 6, 600, decay=0.999, std=0.03, width=64, depth=1, ratio=0.4), c("bandwidth", 5, 600, decay=0.99, std=0.03, lr=3e-4, width=64, depth=1, ratio=0.4),
        c("sensor", 24, 600, decay=0.99, lr=3e-4), c("sensor", 13, 600, decay=0.99, lr=3e-4, loss="smooth_l1"),
        c("textures", 2, 500, decay=0.9999), c("digits", 3, 400, decay=0.99),
        c("sensor", 16, 600, decay=0.9999, lr=3e-4), c("bandwidth", 9, 600, decay=0.9999, lr=3e-4),
        c("sensor", 18, 700, decay=0.9, std=0.04, lr=1e-3, width=64), c("sensor", 11, 800, decay=0.996, std=0.04, lr=3e-4, width=64),
    ]  # fmt: skip


def half(cell: Cell) -> str:
    """`tuning` or `untouched`."""
    return "tuning" if cell.data in TUNING and cell.seed % 2 == 0 else "untouched"


def arguments(cell: Cell, folder: Path) -> list[str]:
    """The command line of a cell's run."""
    preset = cell.data if cell.data in ("textures", "digits") else "demo"
    changes = dict(cell.changes) | {
        "train.seed": cell.seed,
        "monitor.every": 100,
        "log.every": 10,
        "checkpoint.every": 0,
    }
    changes["ema.final_decay"] = changes["ema.decay"]
    if "optim.lr" in changes:
        changes["optim.final_lr"] = changes["optim.lr"]
        changes["optim.start_lr"] = 0 if "optim.warmup_steps" in changes else changes["optim.lr"]
    changes["ema.schedule"] = "constant"
    if preset == "demo" and "model.width" in changes:
        changes["model.predictor_width"] = changes["model.width"]
    if preset == "digits":  # these two at a third of the presets' cost
        changes |= {"model.width": 64, "train.batch_size": 32}
    if cell.data in GENERATORS:
        changes["data.path"] = write_data(folder, cell.data)
    if preset == "textures":
        changes |= {
            "model.width": 64,
            "model.depth": 2,
            "train.batch_size": 48,
            "monitor.probe_train": 2000,
            "monitor.probe_test": 1000,
        }
    changes["parallel.threads"], changes["data.workers"] = 1, 1
    changes["run.dir"] = folder / "runs" / cell.name
    return [preset, *(str(part) for k, v in changes.items() for part in (f"--{k}", v))]


def finished(cell: Cell, folder: Path) -> bool:
    return (folder / "runs" / cell.name / "report.html").exists()


# ---- training, gathering --------------------------------------------------------------------------


def train(folder: Path) -> None:
    """The first run of the list that is not finished; one a call, so that the list may change between runs."""
    cell = next((c for c in cells() if not finished(c, folder)), None)
    if cell is None:
        sys.exit("all runs are finished")
    run_dir = folder / "runs" / cell.name
    if run_dir.exists():  # a run that was cut off starts again
        run_dir.rename(folder / f"cut-{cell.name}-{run_dir.stat().st_mtime_ns}")
    with (folder / "train.log").open("a") as log:
        subprocess.run([sys.executable, "-m", "jepa_fast.train", *arguments(cell, folder)], stdout=log, stderr=log)


def thin(records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns of the records every EVERY steps, four digits; `loss` is the mean of the records between."""
    kept, losses = [], []
    for record in records:
        losses.append(record["loss"])
        if record["step"] % EVERY == 0:
            kept.append(record | {"loss": None if None in losses else sum(losses) / len(losses)})
            losses = []
    keys = [key for key in KEPT if any(key in record for record in kept)]
    return {k: [round4(r.get(k)) for r in kept] for k in keys}


def round4(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def gather(folder: Path) -> Iterator[dict[str, Any]]:
    for cell in cells():
        if finished(cell, folder):
            lines = (folder / "runs" / cell.name / "metrics.jsonl").read_text().splitlines()
            columns = thin([json.loads(line) for line in lines])
            yield {"name": cell.name, "half": half(cell), "data": cell.data, "seed": cell.seed, "columns": columns}


def main() -> None:
    folder = Path(sys.argv[1])
    if "--gather" in sys.argv:
        RESULT.write_text("".join(json.dumps(run, separators=(",", ":")) + "\n" for run in gather(folder)))
    else:
        train(folder)


if __name__ == "__main__":
    main()
