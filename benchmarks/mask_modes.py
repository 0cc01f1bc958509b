"""Which mask mode is worth its work: probe accuracy and loss of equal operations, textures, several seeds.

    python benchmarks/mask_modes.py [--seeds 5] [--steps 2600] [--modes packed subsampled fixed reference]
    python benchmarks/mask_modes.py --steps 1500 --model.width 64 --train.batch_size 32    # fields of the preset, changed

Every run gets the operations that `--steps` steps of `reference` take, counted from the tokens each mode really draws
(`jepa_fast.flops`), so a mode that uses more of an image makes fewer steps. Runs that are finished are not made again.
Results are appended to results/mask_modes.csv: the last step's probes (fractions) and loss. Takes minutes a run.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import machine, rows
from jepa_fast import cli, train
from jepa_fast.flops import step_flops, usual_plan

MODES = ("reference", "fixed", "subsampled", "packed")
SHOWN = {"probe/target": "1", "probe/context": "1", "probe/untrained": "1", "loss": "loss"}  # key: unit


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2600, help="of `reference` (%(default)s)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--runs", type=Path, default=Path("runs/mask_modes"), help="where the runs are (%(default)s)")
    parser.add_argument("--out", type=Path, default=rows.RESULTS, help="folder of the CSV file (%(default)s)")
    args, fields = parser.parse_known_args(argv)
    named = zip(fields[::2], fields[1::2], strict=True)
    shape = " ".join(["textures", *(f"{k.rpartition('.')[2]}={v}" for k, v in named if not k.startswith("--monitor."))])
    budget = args.steps * work("reference", fields)
    environment = machine.environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for mode in args.modes:
        steps = max(1, round(budget / work(mode, fields)))
        found = [
            last_record(args.runs / f"{mode}-{args.steps}-{seed}", mode, steps, seed, fields)
            for seed in range(args.seeds)
        ]
        for key, unit in SHOWN.items():
            values = [record[key] for record in found]
            row = rows.make("mask_modes", mode, shape, "float32", key, unit, values) | environment
            rows.append([row], args.out / "mask_modes.csv")
            print(
                f"{mode:11} {steps:6} steps  {key:16} p20 {row['p20']}  p50 {row['p50']}  p80 {row['p80']}  n {len(values)}"
            )
    return 0


def work(mode: str, fields: list[str]) -> float:
    """Operations of a step, the mean of many batches."""
    config = cli.parse(["textures", "--masks.mode", mode, *fields]).config
    plans = usual_plan(config, config.train.batch_size, 64)
    return sum(step_flops(config, p).total for p in plans) / len(plans)


def last_record(folder: Path, mode: str, steps: int, seed: int, fields: list[str]) -> dict:
    """The last line of a run's metrics, which is made first if it is not there."""
    options = {"masks.mode": mode, "train.steps": steps, "train.seed": seed, "run.dir": folder, "monitor.every": steps}
    code = train.main(
        ["textures", *(str(w) for k, v in options.items() for w in (f"--{k}", v)), *fields, "--resume", "auto"]
    )
    if code:
        raise SystemExit(f"{folder}: the run ended with status {code}")
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
