"""What a training step has to do: floating-point operations, bytes of memory, bytes between GPUs. Counted, not measured.

Sizes come from the presets (built on the meta device), token counts from their own masks; rates from datasheets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from jepa_fast.config import Config, replace
from jepa_fast.flops import CARDS, step_flops
from jepa_fast.masks.packing import plan
from jepa_fast.masks.sample import MaskBatch, sample_masks
from jepa_fast.model.jepa import JEPA
from jepa_fast.presets import preset

# Bytes/s a GPU can send (NVLink 4, one 400 Gb/s port).
NVLINK, NETWORK = 450e9, 50e9
MODELS = {"B/16": "in1k-vitb16", "L/16": "in1k-vitl16", "H/14": "in1k-vith14"}
BATCH = 128  # images a GPU
DRAWS = 8  # batches whose token counts are averaged: `reference` cuts each to its shortest context


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
        card = CARDS[gpu]
        return max(self.flops / card.flops, self.bytes / card.bandwidth)


@cache
def tokens(name: str, mode: str, step: int = 0, images: int = BATCH) -> Tokens:
    """Of the batch that a run would draw at that step."""
    masks = _masks(name, mode, step, images)
    context, target = masks.context_lengths, masks.target_lengths
    each = np.repeat(context + target, masks.num_targets)
    return Tokens([configuration(name, mode).num_tokens] * images, context.tolist(), each.tolist())


def _masks(name: str, mode: str, step: int, images: int) -> MaskBatch:
    config = configuration(name, mode)
    samples = np.arange(images) + step * images
    return sample_masks(config.masks, config.grid, 0, step, np.zeros(images, np.int64), samples)


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


@cache
def stages(name: str, mode: str, residual: int = 2, eager: bool = False) -> dict[str, list[Op]]:
    """{stage: operations} of one training step; `eager`: as facebookresearch/ijepa makes it, at the same token counts."""
    model = configuration(name, mode).model
    encoder, predictor = parameters(name)
    drawn = [tokens(name, mode, step) for step in range(DRAWS)]

    def tower(batches: list[list[int]], width: int, heads: int, depth: int, trained: bool) -> list[Op]:
        each, hidden = [], round(width * model.mlp_ratio)
        for lengths in batches:
            forward = (
                eager_block_ops(lengths, width, hidden, heads) if eager else block_ops(lengths, width, hidden, residual)
            )
            each.append(forward + (backward(forward) if trained else []))
        share = depth / len(batches)
        return [
            Op(same[0].name, share * sum(op.flops for op in same), share * sum(op.bytes for op in same))
            for same in zip(*each, strict=True)
        ]

    narrow_heads = model.predictor_heads or model.heads
    return {
        "target encoder": tower([d.full for d in drawn], model.width, model.heads, model.depth, trained=False),
        "context encoder": tower([d.context for d in drawn], model.width, model.heads, model.depth, trained=True),
        "predictor": tower(
            [d.predictor for d in drawn], model.predictor_width, narrow_heads, model.predictor_depth, trained=True
        ),
        "optimizer": [Op("AdamW, 28 B a parameter", 0, 28.0 * (encoder + predictor))],
        "EMA": [Op(f"update, {28 if eager else 12} B a parameter", 0, (28.0 if eager else 12.0) * encoder)],
    }


@cache
def model_flops(name: str, mode: str) -> float:
    """What MFU counts (jepa_fast.flops): of products and attention, backward included, what the loss needs."""
    config = configuration(name, mode)
    drawn = (plan(_masks(name, mode, step, BATCH), config.num_tokens) for step in range(DRAWS))
    return sum(step_flops(config, each).total for each in drawn) / DRAWS


def configuration(name: str, mode: str) -> Config:
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
