"""What a checkpoint costs the training loop, and how long it takes in all.

    python benchmarks/bench_checkpoint.py                            # ViT-B/16 on a CPU
    python benchmarks/bench_checkpoint.py --shapes vit_b16 vit_h14   # GPU: default ViT-B, L and H

`step+checkpoint` begins a checkpoint and makes a step as train.py does: the copy of the weights goes on beside forward
and backward, and must be done before the optimizer. Its `overhead_steps` over `step` is the stall, in steps. `written`
is begin to rename, with nothing beside it: copying, writing, hashing, syncing; `torch.save` is the plain way of writing
the same tensors, unverified and unsynced.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.harness import Bench, arguments
from benchmarks.one_step import OneStep
from jepa_fast import checkpoint, optim

SHAPES = {  # name: (preset, images a step on CPU, on CUDA)
    "textures": ("textures", 64, 64),
    "vit_b16": ("in1k-vitb16", 4, 128),
    "vit_l16": ("in1k-vitl16", 2, 128),
    "vit_h14": ("in1k-vith14", 1, 64),
}


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: what the device is for")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (a temporary folder)")
    args = parser.parse_args(argv)
    bench = Bench("checkpoint", args, tests=["tests/test_checkpoint.py"])
    default = ["vit_b16", "vit_l16", "vit_h14"] if bench.device.type == "cuda" else ["vit_b16"]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for shape in ["textures"] if args.tiny else args.shapes or default:
            measure(bench, shape, Path(folder) / shape)
    return bench.close()


def measure(bench: Bench, shape: str, folder: Path) -> None:
    name, on_cpu, on_cuda = SHAPES[shape]
    cuda = bench.device.type == "cuda"
    dtype = "bfloat16" if cuda else "float32"  # few CPUs multiply bf16
    step = OneStep(name, on_cuda if cuda else on_cpu, bench.device, {"train.precision": "bf16" if cuda else "fp32"})
    step()  # moments are there
    writer = checkpoint.Writer(folder, keep=1)
    number = iter(range(1, 10**9))

    def tensors() -> dict[str, torch.Tensor]:
        return step.jepa.state_dict() | optim.moments(step.optimizer, step.jepa)

    def begin() -> None:
        writer.save(next(number), tensors(), {})

    def stepped() -> None:
        begin()
        output = step.forward()
        output.loss.backward()
        writer.staged()
        finite = optim.step_if_finite(step.optimizer, output.loss, step.config.optim.clip)
        step.ema.update(step.decay, gate=finite)

    def written() -> None:
        begin()
        writer.finish()

    def verified() -> None:
        written()
        checkpoint.verify(folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip())

    case = bench.case(shape, dtype)
    case.add("step", step, check=step, before=writer.finish)
    case.add("step+checkpoint", stepped, check=verified, before=writer.finish)
    case.add("written", written, check=verified, before=writer.finish)
    case.add("torch.save", lambda: torch.save(tensors(), folder / "plain.pt"), check=step, before=writer.finish)
    num_bytes = sum(t.numel() * t.element_size() for t in tensors().values())
    bench.record(shape, dtype, "written", "bytes", "GB", [num_bytes / 1e9])
    if case.run():
        case.overhead("overhead_steps", over="step")
        case.rate("bytes_per_s", "GB/s", num_bytes / 1e9)
        print(case.table())
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
