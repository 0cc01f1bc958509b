"""What each way of sharing out costs on one process, where there is nothing to send: hooks, copies, gathers of one.

    python benchmarks/bench_parallel.py                                    # ViT-S/16 on a CPU
    torchrun --nproc_per_node=8 benchmarks/bench_parallel.py --shapes vit_l16   # with something to send

Whole steps (forward, backward, optimizer, EMA) of single, ddp, fsdp with both reshard settings, interleaved.
`overhead_fraction` is the time over `single` (over `ddp` on several processes). The batch is for one process.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.harness import Bench, arguments
from benchmarks.one_step import OneStep
from jepa_fast import parallel
from jepa_fast.config import replace
from jepa_fast.presets import preset

SHAPES = {  # name: (preset, images of one process on CPU, on CUDA)
    "textures": ("textures", 64, 64),
    "vit_s16": ("images", 8, 256),
    "vit_b16": ("in1k-vitb16", 4, 128),
    "vit_l16": ("in1k-vitl16", 2, 128),
    "vit_h14": ("in1k-vith14", 1, 64),
}
WAYS = {
    "single": {"parallel.mode": "single"},
    "ddp": {"parallel.mode": "ddp"},
    "fsdp": {"parallel.mode": "fsdp"},
    "fsdp, no reshard": {"parallel.mode": "fsdp", "parallel.reshard_after_forward": False},
}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=9, seconds=60)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: what the device is for")
    args = parser.parse_args(argv)
    size = int(os.environ.get("WORLD_SIZE", 1))
    world = parallel.join(
        replace(preset("images"), {"parallel.mode": "ddp", "parallel.threads": args.threads, "train.batch_size": size})
    )
    if world.size > 1:
        args.seconds = float("inf")  # all processes make the same number of rounds
    if not world.is_main:
        args.out, args.ungated, sys.stdout = Path(os.devnull), True, open(os.devnull, "w")  # noqa: SIM115
    bench = Bench("parallel", args, tests=["tests/test_parallel.py"])
    if not world.is_main:
        bench.path = None
    default = ["vit_b16", "vit_l16"] if bench.device.type == "cuda" else ["vit_s16"]
    for shape in ["textures"] if args.tiny else args.shapes or default:
        name, on_cpu, on_cuda = SHAPES[shape]
        batch = on_cuda if bench.device.type == "cuda" else on_cpu
        dtype = "bfloat16" if bench.device.type == "cuda" else "float32"
        case = bench.case(f"{shape} x{world.size}", dtype)
        precision = {"train.precision": "bf16" if dtype == "bfloat16" else "fp32"}
        first: list[torch.Tensor] = []
        for way, changes in WAYS.items():
            if way == "single" and world.size > 1:
                continue
            step = OneStep(name, batch, world.device, changes | precision, world=world)

            def check(step: OneStep = step, first: list[torch.Tensor] = first, dtype: str = dtype) -> None:
                """Before any update every way has the same loss."""
                first.append(step.forward().loss.detach())
                torch.testing.assert_close(first[-1], first[0], rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=0)

            case.add(way, step, check=check)
        if case.run():
            case.overhead("overhead_fraction", over="single" if world.size == 1 else "ddp")
            print(case.table())
    parallel.leave()
    return bench.close()


if __name__ == "__main__":
    sys.exit(main())
