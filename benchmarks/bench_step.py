"""A training step and its parts, ours against facebookresearch/ijepa's: same images, weights, masks and token counts.

    python benchmarks/bench_step.py                          # ours alone: ViT-S/16 on a CPU; B/16, L/16, H/14 on CUDA
    python benchmarks/bench_step.py --peer PATH [--parts]    # PATH: a checkout of facebookresearch/ijepa
    python benchmarks/bench_step.py --peer PATH --shapes vit_b16 --batch 64

The masks are `reference` masks, cut to the shortest context of the batch, because the peer takes no others. Ours is
timed only if, from the peer's weights, it gives the peer's loss. The peer runs its own modules, optimizer groups and
gradient statistics, in its own order: forward, backward, AdamW, a norm of every gradient read on the host, EMA by a
loop; without its wrapping in DDP, which one process does not need. `ijepa` is as it runs: bf16 autocast on CUDA, float32
on a CPU, where `ijepa_bf16` adds autocast. `ijepa_patched` is what its users could make of that: SDPA, compiled blocks
(on CUDA), a foreach EMA, no statistics, nothing read back (patched_peer.py). `mfu_measured` is of a matrix product in
the same rounds and precision, `mfu_datasheet` of the vendor's figure. Ours is compiled on CUDA, as a run is; on a CPU with --compile. `work` is
what `jepa_fast.flops` counts, so for the peer it understates the rate: it computes what we leave out. Parts are timed
by themselves, forward and backward together where there is a backward.
"""

import logging
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.harness import Bench, Case, arguments, matmul_rate, peak_memory
from benchmarks.patched_peer import foreach_ema, patch
from jepa_fast import optim
from jepa_fast.config import Config, check, replace
from jepa_fast.data.embedded import texture
from jepa_fast.data.masks import MaskBatch, sample_masks
from jepa_fast.data.packing import MaskPlan, ladder, plan
from jepa_fast.ema import TargetEMA
from jepa_fast.flops import step_flops
from jepa_fast.interop import save_official
from jepa_fast.model.attention import choose_backend
from jepa_fast.model.compile import compile_blocks
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

    start, steps = JEPA(config), dict[str, Ours | Peer]()
    for provider, half in providers(PEERS, bench.device) if args.peer else ():
        patched = provider == "ijepa_patched"
        steps[provider] = Peer(args, name, config, masks, images, bench.device, half, patched)
    for provider, precision in providers(OURS, bench.device):
        steps[provider] = Ours(config, masks, images, bench.device, precision, compiled=bench.device.type == "cuda")
        if args.compile and bench.device.type != "cuda":
            steps[f"{provider}_compiled"] = Ours(config, masks, images, bench.device, precision, compiled=True)
    first = next(iter(steps.values()))
    first.take(start)
    reference = first.loss()

    work = step_flops(config, plan(masks, config.num_tokens))
    for part in ("step", *(PARTS if args.parts else ())):
        case = bench.case(shape, part)
        for provider, step in steps.items():
            call = step.step if part == "step" else step.parts()[part]
            case.add(provider, call, check=agrees(step, start, reference))
        report(case, bench, steps, work.total if part == "step" else getattr(work, part, 0.0), args.batch)


def report(case: Case, bench: Bench, steps: "dict[str, Ours | Peer]", work: float, batch: int) -> None:
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


def agrees(step: "Ours | Peer", start: JEPA, reference: float) -> Callable[[], None]:
    """From the weights `start`, a step's loss is the reference."""

    def check() -> None:
        step.take(start)
        got, allowed = step.loss(), 0.02 if step.half else 1e-4
        if not abs(got - reference) <= allowed * reference:
            raise AssertionError(f"its loss is {got:.6f}, the reference's {reference:.6f}")

    return check


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


# ---- ours ----------------------------------------------------------------------------------------


class Ours:
    """The loop's step, as train.py makes it."""

    def __init__(
        self, config: Config, masks: MaskBatch, images: Tensor, device: torch.device, precision: str, compiled: bool = False
    ):  # fmt: skip
        changes = {"train.precision": precision[:4], "model.residual": "bf16" if "residual" in precision else "fp32"}
        self.half, self.images, self.device = precision != "fp32", images, device
        config = replace(config, changes)
        torch.manual_seed(0)
        self.jepa = JEPA(config).to(device)
        choose_backend(device, self.half)
        if compiled:
            compile_blocks(self.jepa)
        steps = ladder(config, len(images)) if compiled and device.type == "cuda" else None
        self.plan: MaskPlan = plan(masks, config.num_tokens, steps).to(device)
        self.optimizer = optim.build(self.jepa, config.optim)
        optim.set_rates(self.optimizer, LR, 0.04)
        self.ema = TargetEMA(self.jepa)

    def take(self, source: JEPA) -> None:
        self.jepa.load_state_dict(source.state_dict())

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def forward(self) -> Tensor:
        with self.autocast():
            return self.jepa(self.images, self.plan).loss

    @torch.no_grad()
    def loss(self) -> float:
        return float(self.forward())

    def step(self) -> None:
        loss = self.forward()
        loss.backward()
        finite = optim.step_if_finite(self.optimizer, loss)
        self.ema.update(DECAY, gate=finite)

    def parts(self) -> dict[str, Callable[[], object]]:
        jepa, chosen = self.jepa, self.plan
        patches = jepa.context_encoder.tokenizer(self.images)
        visible = patches.flatten(0, 1).index_select(0, chosen.context_rows)

        def target() -> None:
            with torch.no_grad(), self.autocast():
                jepa.normalise(jepa.target_encoder.encode(patches).flatten(0, 1).index_select(0, chosen.target_rows))

        def encode() -> Tensor:
            with self.autocast():
                return jepa.context_encoder.packed(
                    visible, chosen.context_index, chosen.context_cu, chosen.context_max, chosen.context_bucket
                )

        features = encode().detach().requires_grad_()

        def predictor() -> None:
            with self.autocast():
                out = jepa.predictor.packed(features, chosen)
            out.float().square().mean().backward()

        def optimizer() -> None:
            optim.step_if_finite(self.optimizer, one)
            for parameter, gradient in gradients:
                parameter.grad = gradient

        one = torch.ones((), device=self.device)
        gradients = [(p, torch.randn_like(p)) for p in jepa.parameters() if p.requires_grad]
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return {
            "target": target,
            "context": lambda: encode().float().square().mean().backward(),
            "predictor": predictor,
            "optimizer": optimizer,
            "ema": lambda: self.ema.update(DECAY, gate=one.bool()),
        }


# ---- the peer ------------------------------------------------------------------------------------


class Peer:
    """facebookresearch/ijepa's step, put together from a checkout's own parts."""

    def __init__(
        self, args: Any, name: str, config: Config, masks: MaskBatch, images: Tensor, device: torch.device, half: bool,
        patched: bool = False,
    ):  # fmt: skip
        if not (args.peer / "src" / "helper.py").is_file():
            raise SystemExit(f"error: {args.peer} is no checkout of facebookresearch/ijepa: it has no src/helper.py")
        sys.path.append(str(args.peer))
        import src.helper as helper

        logging.getLogger().setLevel(logging.WARNING)  # it prints its modules
        from src.masks.utils import apply_masks
        from src.utils.logging import grad_logger

        self.apply_masks, self.grad_logger, self.half, self.device, self.images = (
            apply_masks,
            grad_logger,
            half,
            device,
            images,
        )
        self.encoder, self.predictor = helper.init_model(
            device,
            config.model.patch,
            SHAPES[name][0],
            args.image,
            config.model.predictor_depth,
            config.model.predictor_width,
        )
        self.target, _ = helper.init_model(device, config.model.patch, SHAPES[name][0], args.image)
        self.target.requires_grad_(False)
        self.patched = patched
        if patched:
            patch(self.encoder, self.target, self.predictor, compiled=device.type == "cuda")
        self.optimizer, *_ = helper.init_opt(self.encoder, self.predictor, 100, 0.0, LR, 1, 10)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = LR, 0.0 if group.get("WD_exclude") else 0.04
        batch = len(images)
        context = torch.from_numpy(masks.context).view(batch, -1)
        targets = torch.from_numpy(masks.targets).view(batch, masks.num_targets, -1)
        self.context, self.targets = [context.to(device)], [t.contiguous().to(device) for t in targets.unbind(1)]

    def take(self, source: JEPA) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_official(source, Path(folder) / "weights.pth.tar")
            state = torch.load(Path(folder) / "weights.pth.tar")
        for name, module in (("encoder", self.encoder), ("predictor", self.predictor), ("target_encoder", self.target)):
            module.load_state_dict({key.removeprefix("module."): value for key, value in state[name].items()})

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def hidden(self) -> Tensor:
        with torch.no_grad():
            features = self.target(self.images)
            return self.apply_masks(F.layer_norm(features, features.shape[-1:]), self.targets)

    def forward(self) -> Tensor:
        with self.autocast():
            hidden = self.hidden()
            return F.smooth_l1_loss(
                self.predictor(self.encoder(self.images, self.context), self.context, self.targets), hidden
            )

    @torch.no_grad()
    def loss(self) -> float:
        return float(self.forward())

    def step(self) -> None:
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        if not self.patched:
            self.grad_logger(self.encoder.named_parameters())
        self.optimizer.zero_grad()
        self.average()
        if not self.patched:
            float(loss.detach())

    @torch.no_grad()
    def average(self) -> None:
        if self.patched:
            foreach_ema(self.target, self.encoder, DECAY)
            return
        for source, target in zip(self.encoder.parameters(), self.target.parameters(), strict=True):
            target.data.mul_(DECAY).add_((1.0 - DECAY) * source.detach().data)

    def parts(self) -> dict[str, Callable[[], object]]:
        def target() -> None:
            with self.autocast():
                self.hidden()

        def encode() -> Tensor:
            with self.autocast():
                return self.encoder(self.images, self.context)

        features = encode().detach().requires_grad_()

        def predictor() -> None:
            with self.autocast():
                out = self.predictor(features, self.context, self.targets)
            out.float().square().mean().backward()

        def optimizer() -> None:
            self.optimizer.step()
            if not self.patched:
                self.grad_logger(self.encoder.named_parameters())
            self.optimizer.zero_grad()
            for parameter, gradient in gradients:
                parameter.grad = gradient

        both: list[nn.Module] = [self.encoder, self.predictor]
        gradients = [(p, torch.randn_like(p)) for m in both for p in m.parameters() if p.requires_grad]
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return {
            "target": target,
            "context": lambda: encode().float().square().mean().backward(),
            "predictor": predictor,
            "optimizer": optimizer,
            "ema": self.average,
        }


if __name__ == "__main__":
    sys.exit(main())
