"""The mask sampler, C++ against Python: microseconds an image on one core, as a batch of 128 is drawn.

    python benchmarks/bench_masks.py

A sampler is timed only if its masks are the Python one's, bit for bit.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.harness import Bench, arguments
from jepa_fast.config import Masks
from jepa_fast.extension import extension
from jepa_fast.masks.reference import BLOCKLESS, MODES
from jepa_fast.masks.sample import MaskBatch, sample_masks

GRIDS = {"14x14": (14, 14), "16x16": (16, 16)}


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__, rounds=15).parse_args(argv)
    if args.device != "cpu":
        args.device = "cpu"  # masks are drawn on the host
    args.threads = 1
    bench = Bench("masks", args, tests=["tests/test_masks.py"])
    batch = 8 if args.tiny else 128
    for grid_name, grid in list(GRIDS.items())[: 1 if args.tiny else None]:
        for mode in MODES:
            config = Masks(mode, **({"num_targets": 1, "min_keep": 1} if mode in BLOCKLESS else {}))
            case = bench.case(f"{grid_name} {mode}", "int64")
            for backend in ("python", "cpp") if extension() else ("python",):
                draw = sampler(config, grid, batch, backend)
                case.add(
                    backend, draw, check=lambda d=draw, c=config, g=grid: same(d(), sampler(c, g, batch, "python")())
                )
            if case.run():
                case.derive("us_per_image", "us", lambda own, _: 1e6 * own / batch)
                case.speedup("over_python", over="python")
                print(case.table(), flush=True)
    return bench.close()


def sampler(config: Masks, grid: tuple[int, ...], batch: int, backend: str) -> Callable[[], MaskBatch]:
    rows = np.arange(batch)
    epochs = np.zeros_like(rows)
    return lambda: sample_masks(config, grid, 0, 0, epochs, rows, backend=backend)  # type: ignore[arg-type]


def same(a: MaskBatch, b: MaskBatch) -> None:
    for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


if __name__ == "__main__":
    sys.exit(main())
