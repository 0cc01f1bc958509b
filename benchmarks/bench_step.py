"""A training step and its parts, ours against facebookresearch/ijepa's: same images, weights, masks and token counts.

    python benchmarks/bench_step.py                          # ours alone: ViT-S/16 on a CPU; B/16, L/16, H/14 on CUDA
    python benchmarks/bench_step.py --peer PATH [--parts]    # PATH: a checkout of facebookresearch/ijepa
    python benchmarks/bench_step.py --peer PATH --shapes vit_b16 --batch 64

The masks are `reference` masks, cut to the shortest context of the batch, because the peer takes no others. Ours is
timed only if, from the peer's weights, it gives the peer's loss. The peer runs its own modules, optimizer groups and
gradient statistics, in its own order: forward, backward, AdamW, a norm of every gradient read on the host, EMA by a
loop; without its wrapping in DDP, which one process does not need. `ijepa` is as it runs: bf16 autocast on CUDA, float32
on a CPU, where `ijepa_bf16` adds autocast. `ijepa_patched` is what its users could make of that: SDPA, compiled blocks
(on CUDA), a foreach EMA, no statistics, nothing read back (peer_step.py). Ours is compiled on CUDA, as a run is; on a
CPU with --compile. `mfu_measured` is of a matrix product in the same rounds and precision, `mfu_datasheet` of the
vendor's figure. `work` is what `jepa_fast.flops` counts, so for the peer it understates the rate: it computes what we
leave out. Parts are timed by themselves, forward and backward together where there is a backward.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.harness import Bench, Case, arguments, matmul_rate, peak_memory
from benchmarks.our_step import OurStep
from benchmarks.peer_step import PeerStep
from jepa_fast.config import Config, check, replace
from jepa_fast.data.readers.generated import texture
from jepa_fast.flops import step_flops
from jepa_fast.masks.packing import plan
from jepa_fast.masks.sample import sample_masks
from jepa_fast.model.jepa import JEPA
from jepa_fast.presets import preset

DECAY, LR = 0.996, 1e-4
SHAPES = {  # the peer's name, width, depth, heads, patch, predictor depth
    "vit_ti16": ("vit_tiny", 192, 12, 3, 16, 6), "vit_s16": ("vit_small", 384, 12, 6, 16, 6),
    "vit_b16": ("vit_base", 768, 12, 12, 16, 6), "vit_l16": ("vit_large", 1024, 24, 16, 16, 12),
    "vit_h14": ("vit_huge", 1280, 32, 16, 14, 12),
}  # fmt: skip
OURS = {"jepa_fast": "fp32", "jepa_fast_bf16": "bf16", "jepa_fast_bf16_residual": "bf16 residual"}
PEERS = {"ijepa": False, "ijepa_patched": False, "ijepa_bf16": True}  # half precision
PARTS = ("target", "context", "predictor", "optimizer", "ema")
Step = OurStep | PeerStep


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=7, seconds=90)
    parser.add_argument("--peer", type=Path, help="a checkout of facebookresearch/ijepa")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, help="default: vit_s16 on a CPU, vit_b16 vit_l16 vit_h14 on CUDA"
    )
    parser.add_argument("--image", type=int, default=224, help="side in pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=0, help="images (16 on a CPU, 128 on CUDA)")
    parser.add_argument(
        "--compile", action="store_true", help="on a CPU too, ours with compiled blocks beside the others"
    )
    parser.add_argument("--parts", action="store_true", help="also the parts of the step")
    args = parser.parse_args(argv)
    cuda = args.device != "cpu"
    args.batch = args.batch or (128 if cuda else 16)
    if args.tiny:
        args.shapes, args.image, args.batch = ["vit_ti16"], 64, 4
    bench = Bench("step", args, tests=["tests/test_model.py"])
    if not has_bf16(bench.device):
        print("this CPU has no bf16 instructions: bf16 is left out, for it would be emulated and slow for everybody")
    for name in args.shapes or (["vit_b16", "vit_l16", "vit_h14"] if cuda else ["vit_s16"]):
        measure(bench, name, args)
    return bench.close()


def measure(bench: Bench, name: str, args: Any) -> None:
    config = configuration(name, args.image, args.batch)
    numbers = np.arange(args.batch)
    masks = sample_masks(config.masks, config.grid, 0, 0, np.zeros_like(numbers), numbers)
    images = textures(args.batch, args.image).to(bench.device)
    count = (int(masks.context_lengths[0]), int(masks.target_lengths[0]))
    shape = f"{name} {args.image} b{args.batch}"
    print(f"{shape}: {count[0]} context tokens and 4 targets of {count[1]} in every image, of {config.num_tokens}")

    start, steps = JEPA(config), dict[str, Step]()
    common = {"rate": LR, "decay": DECAY}
    for provider, half in providers(PEERS, bench.device) if args.peer else ():
        patched = provider == "ijepa_patched"
        steps[provider] = PeerStep(args.peer, SHAPES[name][0], config, masks, images, half, patched, **common)
    for provider, precision in providers(OURS, bench.device):
        steps[provider] = OurStep(config, masks, images, precision, bench.device.type == "cuda", **common)
        if args.compile and bench.device.type != "cuda":
            steps[f"{provider}_compiled"] = OurStep(config, masks, images, precision, True, **common)
    first = next(iter(steps.values()))
    first.take(start)
    reference = loss_of(first)

    work = step_flops(config, plan(masks, config.num_tokens))
    for part in ("step", *(PARTS if args.parts else ())):
        case = bench.case(shape, part)
        for provider, step in steps.items():
            call = (lambda step=step: whole(step)) if part == "step" else parts(step)[part]
            case.add(provider, call, check=agrees(step, start, reference))
        report(case, bench, steps, work.total if part == "step" else getattr(work, part, 0.0), args.batch)


# ---- a step, whoever's -----------------------------------------------------------------------------


def autocast(step: Step) -> AbstractContextManager:
    return torch.autocast(step.images.device.type, torch.bfloat16, enabled=step.half)


@torch.no_grad()
def loss_of(step: Step) -> float:
    with autocast(step):
        return float(step.forward())


def whole(step: Step) -> None:
    """Forward, backward, optimizer, EMA."""
    with autocast(step):
        loss = step.forward()
    loss.backward()
    step.update(loss)
    step.average()
    step.finish(loss)


def parts(step: Step) -> dict[str, Callable[[], object]]:
    """{part: a call of it alone}; encoder and predictor with their backward."""

    def run(part: Callable[[], Tensor]) -> Tensor:
        with autocast(step):
            return part()

    def optimizer() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        step.update(one)

    features = run(step.encode).detach().requires_grad_()
    gradients = [(p, torch.randn_like(p)) for p in step.trained]
    one = torch.ones((), device=step.images.device)
    return {
        "target": lambda: run(step.hidden),
        "context": lambda: run(step.encode).float().square().mean().backward(),
        "predictor": lambda: run(lambda: step.predict(features)).float().square().mean().backward(),
        "optimizer": optimizer,
        "ema": step.average,
    }


def agrees(step: Step, start: JEPA, reference: float) -> Callable[[], None]:
    """From the weights `start`, a step's loss is the reference."""

    def check() -> None:
        step.take(start)
        got, allowed = loss_of(step), 0.02 if step.half else 1e-4
        if not abs(got - reference) <= allowed * reference:
            raise AssertionError(f"its loss is {got:.6f}, the reference's {reference:.6f}")

    return check


# ---- rows ------------------------------------------------------------------------------------------


def report(case: Case, bench: Bench, steps: dict[str, Step], work: float, batch: int) -> None:
    for dtype in (torch.float32, torch.bfloat16) if has_bf16(bench.device) else (torch.float32,):
        case.ceiling(f"matmul_{dtype}".replace("torch.", ""), *matmul_rate(dtype, bench.device))
    if case.run():
        case.rate("images_per_s", "1/s", batch)
        if work:
            case.rate("work", "GFLOP/s", work / 1e9)
            for name in case.calls:
                mfu(case, bench, name, steps[name].half, work)
        for peer in PEERS:
            case.speedup("ratio_to_" + peer, over=peer)
        for name in case.calls if case.dtype == "step" else ():
            peak = peak_memory(case.calls[name], bench.device)
            if peak is not None:
                bench.record(case.shape, case.dtype, name, "peak_memory", "GB", [peak / 1e9])
        print(case.table(), flush=True)


def mfu(case: Case, bench: Bench, name: str, half: bool, work: float) -> None:
    """Of the matrix rate in the provider's own precision, round by round; of the datasheet's where there is one."""
    ceiling, times = "matmul_bfloat16" if half else "matmul_float32", case.times[name]
    amount, published = case.ceilings[ceiling][1], machine.datasheet(bench.device)
    pairs = zip(times, case.times[f"ceiling {ceiling}"], strict=True)
    bench.record(case.shape, case.dtype, name, "mfu_measured", "1", [work / own / (amount / t) for own, t in pairs])
    if half and published:
        bench.record(case.shape, case.dtype, name, "mfu_datasheet", "1", [work / own / published[0] for own in times])


def providers(table: dict[str, Any], device: torch.device) -> list[tuple[str, Any]]:
    """(name, precision) of those that make sense here: on CUDA nobody trains these in float32."""
    if device.type == "cuda":
        return (
            [("ijepa", True), ("ijepa_patched", True)]
            if table is PEERS
            else [(n, p) for n, p in OURS.items() if p != "fp32"]
        )
    return [(n, p) for n, p in table.items() if has_bf16(device) or p in (False, "fp32")]


def has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ---- what is given to it ----------------------------------------------------------------------------


def configuration(name: str, image: int, batch: int) -> Config:
    _, width, depth, heads, patch, predictor_depth = SHAPES[name]
    changes = {
        "model.width": width, "model.depth": depth, "model.heads": heads, "model.patch": patch,
        "model.predictor_depth": predictor_depth, "data.image_size": image, "train.batch_size": batch,
        "masks.mode": "reference", "masks.group": batch, "masks.min_keep": 10 if image >= 128 else 1,
    }  # fmt: skip
    return check(replace(preset("in1k-vitb16"), changes))


def textures(count: int, size: int) -> Tensor:
    """float32 [count, 3, size, size], generated images, z-normalised."""
    rng = np.random.default_rng(0)
    grey = np.stack([texture(i % 4, size, rng) for i in range(count)]).astype(np.float32)
    return torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1)


if __name__ == "__main__":
    sys.exit(main())
