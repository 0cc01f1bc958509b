"""Predictions: bytes and operations counted from the model, over what a datasheet promises. Nothing here was measured.

`python -m benchmarks.table` writes the tables of BLOCKS into the documents, so that a prediction changes with the
code that it predicts. Sizes come from the presets (built on the meta device), token counts from their own masks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from jepa_fast.config import Config
from jepa_fast.data.masks import sample_masks
from jepa_fast.model.jepa import JEPA
from jepa_fast.presets import preset

# Datasheets, dense bf16 FLOP/s and bytes/s of memory; links: bytes/s a GPU can send (NVLink 4, one 400 Gb/s port).
GPUS = {"A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}
NVLINK, NETWORK = 450e9, 50e9
COPY_REACHES = 0.90  # of the datasheet's memory rate, by a large copy: an assumption until `ceiling` rows say it
MODELS = {"B/16": "in1k-vitb16", "L/16": "in1k-vitl16", "H/14": "in1k-vith14"}
BATCH = 128  # images a GPU


# ---- what a step has to do ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Realised token counts of a batch, and the lengths of the sequences they come in."""

    full: list[int]  # of the target encoder: every token
    context: list[int]
    predictor: list[int]  # one sequence an image and target block


@dataclass(frozen=True)
class Op:
    """One kind of operation of a step: its floating-point operations, and the bytes it must move."""

    name: str
    flops: float
    bytes: float

    def seconds(self, gpu: str) -> float:
        rate, bandwidth = GPUS[gpu]
        return max(self.flops / rate, self.bytes / bandwidth)


@cache
def tokens(name: str, mode: str, images: int = BATCH) -> Tokens:
    config = _config(name, mode)
    count = int(np.prod(config.grid))
    masks = sample_masks(config.masks, config.grid, 0, 0, np.zeros(images, np.int64), np.arange(images))
    context, target = masks.context_lengths, masks.target_lengths
    each = np.repeat(context + target, masks.num_targets)
    return Tokens([count] * images, context.tolist(), each.tolist())


@cache
def parameters(name: str) -> tuple[int, int]:
    """(encoder, predictor)."""
    with torch.device("meta"):
        jepa = JEPA(preset(name))
    return tuple(sum(p.numel() for p in m.parameters()) for m in (jepa.context_encoder, jepa.predictor))  # type: ignore[return-value]


def block_ops(lengths: Sequence[int], width: int, hidden: int, residual: int = 2) -> list[Op]:
    """One transformer block forward in bf16, fused as a compiler fuses it: a pass for each matrix product and attention,
    one for GELU, and one for each LayerNorm with the residual sum before it. `residual`: bytes of the stream's elements.
    """
    t, d, h = sum(lengths), width, hidden
    products = 2 * t * d * (4 * d + 2 * h)
    weights = 2 * d * (4 * d + 2 * h)
    moved = 2 * t * ((d + 3 * d) + (d + d) + (d + h) + (h + d)) + weights
    return [
        Op("matrix products", products, moved),
        Op("attention", 4 * d * sum(n * n for n in lengths), 2 * t * 4 * d),
        Op("LayerNorm and residual", 0, 2 * t * d * (2 * residual + 2 * 2)),
        Op("GELU", 0, 2 * t * 2 * h),
    ]


def eager_block_ops(lengths: Sequence[int], width: int, hidden: int, heads: int) -> list[Op]:
    """The same block as PyTorch runs it operation by operation under autocast, attention written out, float32 residuals.

    Per score: written in bf16, scaled, softmax into float32, cast, read by the second product: 20 bytes. Weights are
    cast from float32 in every forward.
    """
    t, d, h = sum(lengths), width, hidden
    weights = d * (4 * d + 2 * h)
    scores = heads * sum(n * n for n in lengths)
    return [
        Op("matrix products", 2 * t * weights, 2 * t * (9 * d + 2 * h) + (6 + 2) * weights),
        Op("attention", 4 * d * sum(n * n for n in lengths), 20 * scores + 2 * t * (4 * d + 8 * d)),
        Op("LayerNorm and residual", 0, 2 * t * d * (10 + 8 + 6)),
        Op("GELU", 0, 2 * t * 2 * h),
    ]


def backward(ops: Iterable[Op]) -> list[Op]:
    """Of the same operations: two products for each, and the traffic of gradients and of what was kept."""
    extra = {"matrix products": 2.0, "attention": 2.0, "LayerNorm and residual": 1.0, "GELU": 1.5}
    flops = {"matrix products": 2.0, "attention": 2.5}
    return [Op(op.name, flops.get(op.name, 0) * op.flops, extra[op.name] * op.bytes) for op in ops]


def stages(name: str, mode: str, residual: int = 2, eager: bool = False) -> dict[str, list[Op]]:
    """{stage: operations} of one training step; `eager`: as facebookresearch/ijepa makes it, at the same token counts."""
    config, counts = _config(name, mode), tokens(name, mode)
    m = config.model
    encoder, predictor = parameters(name)

    def tower(lengths: Sequence[int], width: int, depth: int, trained: bool) -> list[Op]:
        hidden = round(width * m.mlp_ratio)
        if eager:
            forward = eager_block_ops(lengths, width, hidden, m.heads)
        else:
            forward = block_ops(lengths, width, hidden, residual)
        ops = forward + (backward(forward) if trained else [])
        return [Op(op.name, depth * op.flops, depth * op.bytes) for op in ops]

    return {
        "target encoder": tower(counts.full, m.width, m.depth, trained=False),
        "context encoder": tower(counts.context, m.width, m.depth, trained=True),
        "predictor": tower(counts.predictor, m.predictor_width, m.predictor_depth, trained=True),
        "optimizer": [Op("AdamW, 28 B a parameter", 0, 28.0 * (encoder + predictor))],
        "EMA": [Op(f"EMA, {28 if eager else 12} B a parameter", 0, (28.0 if eager else 12.0) * encoder)],
    }


def model_flops(name: str, mode: str) -> float:
    """What MFU counts: each product and attention once forward, twice backward."""
    total = 0.0
    for stage, ops in stages(name, mode).items():
        half = len(ops) // 2 if stage in ("context encoder", "predictor") else len(ops)
        total += sum(op.flops for op in ops[:half]) * (3 if half < len(ops) else 1)
    return total


def _config(name: str, mode: str) -> Config:
    from jepa_fast.config import replace

    return replace(preset(name), {"masks.mode": mode})


# ---- what is sent between GPUs ----------------------------------------------------------------------------
# Bytes that one GPU sends, for the ring algorithms that NCCL and gloo use on large messages.


def all_reduce(size: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * size


def all_gather(size: float, ranks: int) -> float:
    """`size`: of the gathered tensor."""
    return (ranks - 1) / ranks * size


def reduce_scatter(size: float, ranks: int) -> float:
    """`size`: of what each GPU puts in. gloo makes an all-reduce of it, twice as much (seen by counting bytes)."""
    return (ranks - 1) / ranks * size


def communication(
    encoder: int, predictor: int, mode: str, ranks: int, node: int = 8, gathered: int = 2
) -> dict[str, float]:
    """Bytes one GPU sends in a step: {'inside a node', 'between nodes'}, of so many parameters.

    Parameters are gathered in `gathered` bytes (bf16), gradients reduced in float32. Modes: ddp, fsdp (resharded after
    the forward), fsdp-keep (not resharded), hsdp (sharded inside a node, replicated between nodes). Of a ring through
    several nodes every GPU is the exit of one of `node` parallel rings, each with a port and a share of its own.
    """
    trained = encoder + predictor
    gathers = {"ddp": 0, "fsdp": 2 * trained + encoder, "fsdp-keep": trained + encoder, "hsdp": 2 * trained + encoder}
    if mode == "hsdp":
        shards = min(node, ranks)
        inside = all_gather(gathered * gathers[mode], shards) + reduce_scatter(4 * trained, shards)
        return {"inside a node": inside, "between nodes": all_reduce(4 * trained / shards, max(1, ranks // node))}
    if mode == "ddp":
        sent = all_reduce(4 * trained, ranks)
    else:
        sent = all_gather(gathered * gathers[mode], ranks) + reduce_scatter(4 * trained, ranks)
    return {"inside a node": sent, "between nodes": sent / node if ranks > node else 0.0}


# ---- tables ------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    numbers = "|".join(["---", *["---:"] * (len(header) - 1)])
    return "\n".join(["| " + " | ".join(header) + " |", f"|{numbers}|", *("| " + " | ".join(x) + " |" for x in lines)])


def ema_table() -> str:
    lines = []
    for label, name in MODELS.items():
        encoder, _ = parameters(name)
        moved = 12.0 * encoder
        cells = [
            f"{1e3 * moved / GPUS[g][1]:.2f} / {1e3 * moved / (0.92 * COPY_REACHES * GPUS[g][1]):.2f}"
            for g in ("H100", "H200")
        ]
        eager = 28.0 * encoder
        lines.append([label, f"{encoder / 1e6:.1f} M", f"{moved / 1e9:.2f} GB", *cells, f"{eager / moved:.2f}"])
    header = ["encoder", "parameters", "bytes of one pass", "H100, ms: floor / predicted", "H200, ms: floor / predicted",
              "best eager way with distances, bytes over ours"]  # fmt: skip
    return markdown(header, lines)


def step_table(mode: str = "packed") -> str:
    lines = []
    for label, name in MODELS.items():
        ops = [op for stage in stages(name, mode).values() for op in stage]
        flops = model_flops(name, mode)
        cells = []
        for gpu in ("H100", "H200"):
            floor = sum(op.seconds(gpu) for op in ops)
            cells += [f"{1e3 * floor:.1f}", f"{100 * flops / floor / GPUS[gpu][0]:.0f} %", f"{BATCH / floor:,.0f}"]
        lines.append([label, f"{flops / BATCH / 1e9:.0f}", *cells])
    header = ["model", "GFLOP an image"]
    for gpu in ("H100", "H200"):
        header += [f"{gpu}: floor, ms", "MFU there, of datasheet", "images/s there"]
    return markdown(header, lines)


def peer_table(mode: str = "reference") -> str:
    """The floors of the same work, eager and fused: what arithmetic alone promises of the ratio to ijepa."""
    lines = []
    for label, name in MODELS.items():
        cells = []
        for gpu in ("H100", "H200"):
            ours, theirs = (
                sum(op.seconds(gpu) for ops in stages(name, mode, eager=e).values() for op in ops)
                for e in (False, True)
            )
            cells += [f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", f"{theirs / ours:.2f}"]
        lines.append([label, *cells])
    header = ["model"]
    for gpu in ("H100", "H200"):
        header += [f"{gpu}: fused, ms", "eager, ms", "ratio"]
    return markdown(header, lines)


def token_table() -> str:
    lines = []
    for label, name in MODELS.items():
        for mode in ("reference", "fixed", "subsampled", "packed"):
            counts = tokens(name, mode)
            each = [sum(x) / BATCH for x in (counts.full, counts.context, counts.predictor)]
            lines.append(
                [f"{label}, {mode}", *(f"{x:.0f}" for x in each), f"{model_flops(name, mode) / BATCH / 1e9:.0f}"]
            )
    return markdown(
        ["model, masks", "tokens", "context tokens", "predictor tokens (4 blocks)", "GFLOP an image"], lines
    )


def roofline_table(name: str = "in1k-vitb16", mode: str = "packed", gpu: str = "H100") -> str:
    """One step, operation by operation: what it does, what it moves, which of the two binds."""
    rate, bandwidth = GPUS[gpu]
    work = stages(name, mode)
    total = sum(op.seconds(gpu) for ops in work.values() for op in ops)
    lines = []
    for stage, ops in work.items():
        for kind in dict.fromkeys(op.name for op in ops):
            same = [op for op in ops if op.name == kind]
            flops, moved = sum(op.flops for op in same), sum(op.bytes for op in same)
            spent = sum(op.seconds(gpu) for op in same)
            binds = "matrix rate" if flops / rate > moved / bandwidth else "memory"
            lines.append([f"{stage}: {kind}", f"{flops / 1e12:.2f}" if flops else "", f"{moved / 1e9:.2f}",
                          f"{flops / moved:.0f}" if flops else "", f"{1e3 * spent:.2f}", f"{100 * spent / total:.0f} %", binds])  # fmt: skip
    lines.append(["**step**", f"{sum(op.flops for o in work.values() for op in o) / 1e12:.2f}",
                  f"{sum(op.bytes for o in work.values() for op in o) / 1e9:.2f}", "", f"{1e3 * total:.2f}", "100 %", ""])  # fmt: skip
    return markdown(["operation", "TFLOP", "GB", "FLOP/B", f"floor on {gpu}, ms", "share", "bound by"], lines)


def residual_table(mode: str = "packed", gpu: str = "H100") -> str:
    lines = []
    for label, name in MODELS.items():
        floors = [sum(op.seconds(gpu) for ops in stages(name, mode, r).values() for op in ops) for r in (2, 4)]
        lines.append([label, *(f"{1e3 * f:.1f}" for f in floors), f"{floors[1] / floors[0]:.3f}"])
    return markdown(["model", f"bf16 residual stream: floor on {gpu}, ms", "fp32 residual stream", "ratio"], lines)


def communication_table() -> str:
    lines = []
    for label, name in MODELS.items():
        encoder, predictor = parameters(name)
        floor = sum(op.seconds("H100") for ops in stages(name, "packed").values() for op in ops)
        for ranks in (8, 64):
            for mode in ("ddp", "fsdp", "fsdp-keep", "hsdp"):
                sent = communication(encoder, predictor, mode, ranks)
                inside, between = sent["inside a node"], sent["between nodes"]
                seconds = (
                    inside / NVLINK + between / NETWORK if mode == "hsdp" else max(inside / NVLINK, between / NETWORK)
                )
                lines.append([f"{label}, {ranks} GPUs, {mode}", f"{inside / 1e9:.2f}", f"{between / 1e9:.2f}",
                              f"{1e3 * seconds:.1f}", f"{1e3 * floor:.1f}", f"{seconds / floor:.2f}"])  # fmt: skip
    header = ["model, GPUs, mode", "GB sent inside a node", "GB sent between nodes", "at link rate, ms", "step's own floor, ms",
              "ratio"]  # fmt: skip
    return markdown(header, lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "ema": ema_table,
    "step": step_table,
    "peer": peer_table,
    "tokens": token_table,
    "roofline": roofline_table,
    "residual": residual_table,
    "communication": communication_table,
}
