"""Where one training step spends its time: a table of its kernels, rows of the ten longest, and a trace to look at.

    python -m benchmarks.kernel_table --preset in1k-vitb16 --batch 128 --trace trace.json.gz
    python -m benchmarks.kernel_table --out benchmarks/results        # the rows of docs/performance.md

The trace opens in https://ui.perfetto.dev or chrome://tracing. Three steps warm up, the next ones are recorded, each by
itself. `share_of_step` is of all kernels' own time. On a CPU a kernel is an operator; there `work` counts the operations of
matrix products, and `fraction_of_matmul` is its part of what a large product reached in the same process.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import rows
from benchmarks.harness import matmul_rate, sample, synchronize
from benchmarks.machine import environment
from benchmarks.one_step import OneStep

STAGES = ("forward", "backward and optimizer", "EMA and distances")  # our own marks in the trace
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
RECORDED, SHOWN = 3, 10


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="in1k-vitb16")
    parser.add_argument("--batch", type=int, default=0, help="images (128 on CUDA, 4 on a CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=25, help="lines of the table (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the CSV file that rows are appended to")
    parser.add_argument("--trace", type=Path, help="where to write the trace; .json or .json.gz")
    parser.add_argument("--tiny", action="store_true", help="the textures preset, batch 8: does it run?")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    dtype = "bfloat16" if cuda else "float32"
    name, batch = ("textures", 8) if args.tiny else (args.preset, args.batch or (128 if cuda else 4))
    step = OneStep(name, batch, device, {} if cuda else {"train.precision": "fp32"})
    for _ in range(3):
        step()
    recorded = [record(step, device) for _ in range(RECORDED)]
    averages = recorded[-1].key_averages()
    about = environment(device)
    print(f"{name}, batch {batch}, {about['device']}, torch {torch.__version__}")
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    print(averages.table(sort_by=order, row_limit=args.rows, max_name_column_width=60))
    if args.out:
        ceiling = best_product(torch.bfloat16 if cuda else torch.float32, device)
        made = longest([own_times(one, cuda) for one in recorded], f"{name} b{batch}", dtype, ceiling)
        rows.append([row | about for row in made], args.out / "profile.csv")
    if args.trace:
        args.trace.parent.mkdir(parents=True, exist_ok=True)
        recorded[-1].export_chrome_trace(str(args.trace))
        print(f"trace: {args.trace}")
    return 0


def record(step: OneStep, device: torch.device) -> profile:
    """One step, its stages marked."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    synchronize(device)
    with profile(activities=activities, with_flops=True) as recorded:
        with record_function(STAGES[0]):
            output = step.forward()
        with record_function(STAGES[1]):
            finite = step.learn(output)
        with record_function(STAGES[2]):
            step.ema.update(step.decay, gate=finite)
        synchronize(device)
    return recorded


def best_product(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s that a large matrix product reaches."""
    call, operations, _ = matmul_rate(dtype, device)
    return operations / statistics.median(sample(call, device) for _ in range(5))


def own_times(recorded: profile, cuda: bool) -> dict[str, Any]:
    """{kernel: its events, summed}. On a CPU the mark around the EMA is its kernel, which is no operator of torch."""
    marks = STAGES if cuda else STAGES[:2]
    events = (e for e in recorded.key_averages() if not cuda or e.device_type == DeviceType.CUDA)
    return {e.key: e for e in events if e.key not in marks and own_ms(e) > 0}


def own_ms(event: Any) -> float:
    """Milliseconds of an event without what it calls."""
    return (event.self_device_time_total if event.device_type == DeviceType.CUDA else event.self_cpu_time_total) / 1e3


def longest(steps: list[dict[str, Any]], shape: str, dtype: str, ceiling: float) -> list[rows.Row]:
    """Rows of the kernels that took longest in the last of the recorded steps; `ceiling`: FLOP/s of a large product."""
    made = []
    for name in sorted(steps[-1], key=lambda name: own_ms(steps[-1][name]), reverse=True)[:SHOWN]:
        found = [(step[name], sum(map(own_ms, step.values()))) for step in steps if name in step]
        values = {
            ("self_ms", "ms"): [own_ms(e) for e, _ in found],
            ("share_of_step", "1"): [own_ms(e) / whole for e, whole in found],
            ("calls", "1"): [float(e.count) for e, _ in found],
        }
        if name in PRODUCTS:
            rates = [1e3 * e.flops / own_ms(e) for e, _ in found]
            values["work", "GFLOP/s"] = [rate / 1e9 for rate in rates]
            values["fraction_of_matmul", "1"] = [rate / ceiling for rate in rates]
        shown = name.removeprefix("aten::")[:70]
        made += [rows.make("profile", shown, shape, dtype, *metric, each) for metric, each in values.items()]
    return made


if __name__ == "__main__":
    sys.exit(main())
