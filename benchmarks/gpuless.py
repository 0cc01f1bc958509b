"""What a GPU would be asked to do, counted on a machine without one: `make gpuless`, or with tools/nullgpu preloaded.

    python -m benchmarks.gpuless            # every case against benchmarks/results/gpuless.csv; exit status 1 on a failure
    python -m benchmarks.gpuless --record   # write that file anew

Each case is a training step of a preset on its longest batch, in a process of its own. Counted: launches, bytes of
Inductor's kernels, graphs, peak memory by torch's allocator. Refused: an error, a wait for the device inside the step, a
call that a capture does not allow, a compilation after the first steps, more than the budget, memory.need off by 15 %.
No value and no time means anything here.
"""

import argparse
import csv
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

BUDGET = Path(__file__).parent / "results" / "gpuless.csv"
SERIES = {"data.channels": 1, "data.series_length": 500}
CASES: dict[str, tuple[int, str, int, dict[str, Any]]] = {  # name: compute capability, preset, batch, changes
    "b16-eager-sm90": (90, "in1k-vitb16", 128, {"model.compile": "off"}),
    "b16-eager-sm80": (80, "in1k-vitb16", 128, {"model.compile": "off"}),
    "b16-compiled-sm90": (90, "in1k-vitb16", 128, {"model.compile": "on"}),
    "b16-fsdp-sm90": (90, "in1k-vitb16", 128, {"model.compile": "off", "parallel.mode": "fsdp"}),
    "l16-eager-sm90": (90, "in1k-vitl16", 128, {"model.compile": "off"}),
    "h14-eager-sm90": (90, "in1k-vith14", 128, {"model.compile": "off"}),
    "series-eager-sm90": (90, "demo", 32, SERIES | {"model.compile": "off", "train.precision": "bf16"}),
    "series-graphs-sm90": (
        90, "demo", 32, SERIES | {"model.compile": "on", "model.cuda_graphs": True, "train.precision": "bf16"},
    ),
}  # fmt: skip
COUNTED = ("launches", "products", "graphs", "inductor_mb")  # more of these than the budget holds is a failure
SLACK = 1.01
COLUMNS = ("case", *COUNTED, "waits", "illegal", "peak_gb", "need_gb")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help="default: all")
    parser.add_argument("--record", action="store_true", help=f"write {BUDGET.name} anew")
    args = parser.parse_args(argv)
    budget = read_budget()
    rows, failures = dict(budget) if args.record else {}, list[str]()
    for name in args.cases or CASES:
        row = run(name)
        problems = judge(row, None if args.record else budget.get(name))
        failures += [f"{name}: {problem}" for problem in problems]
        rows[name] = row
        print("  ".join(f"{column} {row.get(column, '-')}" for column in COLUMNS), *problems, flush=True)
    if args.record and not failures:
        with BUDGET.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[name] for name in CASES if name in rows)
    print("\n".join(["", *failures]) if failures else "gpuless: every case is within its budget")
    return 1 if failures else 0


def read_budget() -> dict[str, dict[str, Any]]:
    if not BUDGET.exists():
        return {}
    with BUDGET.open() as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def judge(row: dict[str, Any], budget: dict[str, Any] | None) -> list[str]:
    """What is wrong with the counts of a case; `budget` None: there is none to keep."""
    if "error" in row:
        return [row["error"]]
    problems = [f"{row[what]} {said}" for what, said in FORBIDDEN.items() if row[what]]
    if abs(row["need_gb"] / row["peak_gb"] - 1) > 0.15 and row["peak_gb"] > 1:  # a small model's caches outweigh it
        problems.append(f"memory.need says {row['need_gb']} GB, the step takes {row['peak_gb']} GB")
    for column in COUNTED if budget else ():
        if row[column] > SLACK * float(budget[column]):
            problems.append(
                f"{column} is {row[column]}, the budget {budget[column]}: spend less, or --record and say why"
            )
    return problems


FORBIDDEN = {
    "waits": "waits for the device inside a step",
    "illegal": "calls that a capture does not allow",
    "late_graphs": "graphs compiled after the second step",
}


def run(name: str) -> dict[str, Any]:
    """The counts of one case, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        trace, result = Path(folder) / "trace", Path(folder) / "result.json"
        environment = os.environ | {
            "NULLGPU_CC": str(CASES[name][0]), "NULLGPU_TRACE": str(trace), "TORCHINDUCTOR_BENCHMARK_KERNEL": "1",
            "TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        }  # fmt: skip
        call = [sys.executable, "-c", f"from benchmarks.gpuless import step; step({name!r}, {str(result)!r})"]
        done = subprocess.run(call, env=environment, capture_output=True, text=True)
        if done.returncode or not result.exists():
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            return {"case": name, "error": f"ended with {done.returncode}: {last}"}
        return {"case": name} | json.loads(result.read_text()) | counts(trace.read_text())


def counts(trace: str) -> dict[str, int]:
    """Of the marked step, but for `illegal`, which counts from the start."""
    marked = trace[trace.index("MARK step\n") : trace.index("MARK end\n")].splitlines()
    first = Counter(" ".join(line.split()[:2]) for line in marked)
    kernels = sum(n for kind, n in first.items() if kind.startswith("KERNEL "))
    waits = sum(line.startswith("SYNC ") or "WAITS" in line for line in marked)
    graphs = first["GRAPH launch"]
    return {
        "launches": kernels + graphs, "products": first["KERNEL gemm"], "waits": waits,
        "illegal": trace.count("CAPTURE-ILLEGAL"),
    }  # fmt: skip


# ---- in the case's own process --------------------------------------------------------------------


def step(name: str, result: str) -> None:
    """Three steps on the longest batch, then a marked one; writes what the trace does not say."""
    import torch
    import torch._inductor.config as inductor

    from benchmarks.one_step import OneStep
    from jepa_fast import parallel
    from jepa_fast.model import attention, jepa
    from jepa_fast.model.compile import num_graphs

    inductor.compile_threads = 1
    jepa.initialise = lambda module, model: None  # no value matters, and drawing 600 M normals takes a minute
    null = ctypes.CDLL("libcuda.so.1")
    _, preset, batch, changes = CASES[name]
    device = torch.device("cuda", 0)
    sharded = changes.get("parallel.mode") == "fsdp"
    world = parallel.join(_config(preset, batch, changes)) if sharded else None
    attention.choose_backend(device, True)
    one = OneStep(preset, batch, device, changes, world)
    one.masks = _longest_masks(one)
    moved = _watch_inductor()
    one(), one()
    graphs = num_graphs()
    one()
    torch.cuda.reset_peak_memory_stats()
    moved.clear()
    torch.cuda.set_sync_debug_mode("error")
    null.nullgpu_mark(b"step")
    one()
    null.nullgpu_mark(b"end")
    torch.cuda.set_sync_debug_mode("default")
    need = parallel.memory.need(one.config, "ddp", 1, 1)
    said = {
        "graphs": graphs, "late_graphs": num_graphs() - graphs, "inductor_mb": round(moved.total() / 1e6),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1), "need_gb": round(need.total / 1e9, 1),
    }  # fmt: skip
    Path(result).write_text(json.dumps(said))
    if world is not None:
        parallel.leave()


def _config(preset: str, batch: int, changes: dict[str, Any]):
    from jepa_fast import presets
    from jepa_fast.config import replace

    return replace(presets.preset(preset), {"train.batch_size": batch} | changes)


def _longest_masks(one):
    """A plan of the batch that memory.need counts with."""
    from jepa_fast.masks.ladder import ladder, spares
    from jepa_fast.masks.packing import plan
    from jepa_fast.model.compile import _even, _masks, compiles
    from jepa_fast.parallel.memory import _longest_batch

    rungs = ladder(one.config, one.batch)
    if len(rungs.context) == 1:
        return one.masks
    context, sequences = _longest_batch(one.config, one.batch)
    context -= spares(rungs.context, rungs.context_max)[-2]
    sequences -= spares(rungs.predictor, rungs.predictor_max)[-2]
    blocks = one.config.masks.num_targets
    visible = _even(context, one.batch)
    hidden = (_even(sequences // blocks, one.batch) - visible).clip(1)
    compiled = compiles(one.config, one.world.device)
    return plan(_masks(visible, hidden, blocks), one.config.num_tokens, rungs if compiled else None).to(
        one.world.device
    )


def _watch_inductor() -> Counter:
    """Bytes that every launch of a compiled kernel reads and writes, by Inductor's own metadata, as they happen."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    moved, launch = Counter(), CachingAutotuner.run

    def counted(self, *args, **kwargs):
        moved[self.inductor_meta.get("kernel_name", "")] += int(1e9 * self.inductor_meta.get("kernel_num_gb", 0))
        return launch(self, *args, **kwargs)

    CachingAutotuner.run = counted
    return moved


if __name__ == "__main__":
    sys.exit(main())
