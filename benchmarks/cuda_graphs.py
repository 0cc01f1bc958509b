"""Steps that launches bind: eager, compiled, and compiled with every block's launches replayed as a CUDA graph.

    python -m benchmarks.cuda_graphs                 # CUDA: TS-JEPA (`demo`) and ViT-S/16
    python -m benchmarks.cuda_graphs --device cpu    # eager alone: does it run?

Whole steps (forward, backward, optimizer, EMA), interleaved; each way is refused unless its first loss is eager's. Rows
go to the bench `step`; `speedup` is over eager.
"""

import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Bench, arguments
from benchmarks.one_step import OneStep

SHAPES = {"demo b32": ("demo", 32), "vit_s16 b256": ("images", 256)}
WAYS = {
    "jepa_fast_eager": {"model.compile": "off"},
    "jepa_fast_compiled": {"model.compile": "on"},
    "jepa_fast_graphs": {"model.compile": "on", "model.cuda_graphs": True},
}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=15, seconds=5)
    args = parser.parse_args(argv)
    bench = Bench("step", args, tests=["tests/test_model_gpu.py"])
    cuda = bench.device.type == "cuda"
    for shape, (name, batch) in SHAPES.items():
        if (name, cuda) == ("images", False):
            continue
        case = bench.case(shape, "step")
        precision = {"train.precision": "bf16" if cuda else "fp32"}
        first: list[Tensor] = []
        for way, changes in WAYS.items() if cuda else list(WAYS.items())[:1]:
            step = OneStep(name, batch, bench.device, changes | precision)
            case.add(way, step, check=partial(agrees, step, first, 2e-2 if cuda else 1e-5))
        if case.run():
            case.speedup("speedup", over="jepa_fast_eager")
            print(case.table())
    return bench.close()


def agrees(step: OneStep, first: list[Tensor], tolerance: float) -> None:
    """Before any update every way has the same loss."""
    first.append(step.forward().loss.detach().clone())
    torch.testing.assert_close(first[-1], first[0], rtol=tolerance, atol=0)


if __name__ == "__main__":
    sys.exit(main())
