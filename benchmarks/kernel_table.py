"""Where one training step spends its time: a table of its kernels, and a trace to look at.

    python -m benchmarks.kernel_table --preset in1k-vitb16 --batch 128 --trace trace.json.gz

The trace opens in https://ui.perfetto.dev or chrome://tracing. Three steps warm up, the fourth is recorded.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness import synchronize
from benchmarks.machine import environment
from benchmarks.one_step import OneStep


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="in1k-vitb16")
    parser.add_argument("--batch", type=int, default=0, help="images (128 on CUDA, 4 on a CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=25, help="lines of the table (%(default)s)")
    parser.add_argument("--trace", type=Path, help="where to write the trace; .json or .json.gz")
    parser.add_argument("--tiny", action="store_true", help="the textures preset, batch 8: does it run?")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    name, batch = ("textures", 8) if args.tiny else (args.preset, args.batch or (128 if device.type == "cuda" else 4))
    step = OneStep(name, batch, device)
    for _ in range(3):
        step()
    synchronize(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as recorded:
        with record_function("forward"):
            output = step.forward()
        with record_function("backward and optimizer"):
            finite = step.learn(output)
        with record_function("EMA and distances"):
            step.ema.update(step.decay, gate=finite)
        synchronize(device)
    print(f"{name}, batch {batch}, {environment(device)['device']}, torch {torch.__version__}")
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(recorded.key_averages().table(sort_by=order, row_limit=args.rows, max_name_column_width=60))
    if args.trace:
        args.trace.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(args.trace))
        print(f"trace: {args.trace}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
