"""Ragged self-attention, forward and backward, on the lengths that `packed` masks really leave.

    python benchmarks/bench_attention.py [--device cuda]

`ours` is what a run uses: a variable-length kernel on CUDA, on a CPU one call for each run of equal lengths.

Shapes are those of the context encoder (B/16 and S/16 at 224 pixels). A provider is timed only if values and
gradients are those of one sequence at a time.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Bench, arguments
from jepa_fast.config import Masks
from jepa_fast.masks.sample import sample_masks
from jepa_fast.model import attention
from jepa_fast.model.attention import Sequences, attend

HEADS = {"vit_s16": 6, "vit_b16": 12}
WIDTH = 64  # of a head


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--batch", type=int, default=0, help="images (16 on a CPU, 128 on CUDA)")
    args = parser.parse_args(argv)
    bench = Bench("attention", args, tests=["tests/test_attention.py"])
    cuda = bench.device.type == "cuda"
    batch = args.batch or (4 if args.tiny else 128 if cuda else 16)
    dtype = torch.bfloat16 if cuda else torch.float32
    attention.choose_backend(bench.device, cuda)
    rows = np.arange(batch)
    lengths = sample_masks(Masks("packed"), (14, 14), 0, 0, np.zeros_like(rows), rows).context_lengths.tolist()
    total, longest = sum(lengths), max(lengths)
    print(
        f"{batch} sequences of {min(lengths)} to {longest} tokens, {total} in all, {1 - total / batch / longest:.0%} of a padded batch is padding"
    )
    for name, heads in list(HEADS.items())[: 1 if args.tiny else None]:
        measure(bench, f"{name} b{batch}", heads, lengths, dtype)
    return bench.close()


def measure(bench: Bench, shape: str, heads: int, lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=bench.device)
    total, longest = sum(lengths), max(lengths)
    q, k, v, grad = (torch.randn(total, heads, WIDTH, device=bench.device, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ways: dict[str, Callable[[], Tensor]] = {
        "one_at_a_time": lambda: one_at_a_time(q, k, v, lengths),
        "ours": lambda: attend(
            q, k, v, *[Sequences.of(cu, longest, total, varlen=attention.uses_varlen(q, q.shape[2]))] * 2
        ),
        "padded": lambda: attend(q, k, v, *[Sequences.of(cu, longest, total, bucket=total)] * 2),
        "block_diagonal": lambda: block_diagonal(q, k, v, cu, total),
    }
    reference = backward(ways["one_at_a_time"], leaves, grad)
    case = bench.case(shape, str(dtype).removeprefix("torch."))
    for way, call in ways.items():
        run = partial(backward, call, leaves, grad)
        case.add(way, run, check=lambda run=run: close(run(), reference))
    work = 12.0 * sum(n * n for n in lengths) * heads * WIDTH  # forward, and twice that backward
    for cold in (False, True):  # in a step the caches hold what the layer before left there: between the two
        if case.run(cold):
            case.rate("work", "GFLOP/s", work / 1e9)
            case.speedup("over_one_at_a_time", over="one_at_a_time")
    print(case.table(), flush=True)


def one_at_a_time(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    out = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts
    ]
    return torch.cat(out)


def block_diagonal(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, total: int) -> Tensor:
    sequence = torch.repeat_interleave(cu.diff().long(), output_size=total)
    mask = sequence[:, None] == sequence
    return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask)[0].transpose(
        0, 1
    )


def backward(call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = call()
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    tolerance = 1e-5 if got[0].dtype == torch.float32 else 2e-2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=10 * tolerance)


if __name__ == "__main__":
    sys.exit(main())
