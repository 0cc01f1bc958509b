"""The communication volumes of `work.py`, checked by counting: what two gloo processes really write to their sockets.

    python -m benchmarks.count_bytes                 # DDP, FSDP with and without resharding, two processes

Linux only: the count is `wchar` of /proc/self/io, every byte a process writes, taken around one training step of a small
model. gloo's reduce-scatter is an all-reduce (it sends twice what a ring would); the prediction beside it knows.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import work
from benchmarks.one_step import OneStep
from jepa_fast.model.jepa import JEPA
from jepa_fast.parallel import World

MODES = ("ddp", "fsdp", "fsdp-keep")
CHANGES = {"train.precision": "fp32", "model.width": 192, "model.depth": 4, "model.predictor_width": 192}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args(argv)
    for mode in args.modes:
        counted, predicted = count(mode, args.ranks)
        print(f"{mode:10} {args.ranks} processes: {counted:,} B sent in a step, predicted {predicted:,.0f}")
    return 0


def count(mode: str, ranks: int) -> tuple[int, float]:
    """(bytes that process 0 wrote during one step, bytes predicted for it)."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (ranks, mode, folder), nprocs=ranks)
        counted, predicted = (Path(folder) / "counted").read_text().split()
    return int(counted), float(predicted)


def _process(rank: int, ranks: int, mode: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    changes = {"parallel.mode": mode.removesuffix("-keep"), "parallel.reshard_after_forward": mode == "fsdp"}
    world = World(rank, ranks, torch.device("cpu"), ranks)
    step = OneStep("textures", 4, world.device, CHANGES | changes, world)
    step.learn(step.forward())
    dist.barrier()
    before = written()
    step.learn(step.forward())
    after = written()
    if rank == 0:
        (Path(folder) / "counted").write_text(f"{after - before} {expected(step.jepa, mode, ranks)}")
    dist.barrier()
    dist.destroy_process_group()


def expected(jepa: JEPA, mode: str, ranks: int) -> float:
    """What `work.communication` says, and what gloo adds to it."""
    encoder, predictor = (sum(p.numel() for p in m.parameters()) for m in (jepa.context_encoder, jepa.predictor))
    sent = work.communication(encoder, predictor, mode, ranks, gathered=4)["inside a node"]
    if mode != "ddp":
        sent += work.reduce_scatter(4 * (encoder + predictor), ranks)  # the second half of gloo's all-reduce
    return sent


def written() -> int:
    """Bytes this process has written so far, to sockets and everything else."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("wchar")))


if __name__ == "__main__":
    sys.exit(main())
