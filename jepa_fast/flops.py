"""Counted work: floating-point operations of a step from its realised token counts, and what hardware could make of it.

In: a configuration and a MaskPlan. Out: operations of the matrix products, two for a multiply-add, backward included;
norms, GELU and softmax are not counted, nor is what is recomputed. `python -m jepa_fast.flops PRESET` prints them, and
predictions for some GPUs that nobody has measured.
"""

import math
import sys
import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from jepa_fast.config import Config, check, replace
from jepa_fast.errors import Arguments, UsageError, one_line_errors
from jepa_fast.inputs import find
from jepa_fast.masks import packing
from jepa_fast.masks.packing import MaskPlan
from jepa_fast.masks.sample import sample_masks
from jepa_fast.model.jepa import JEPA
from jepa_fast.presets import preset


@dataclass(frozen=True)
class Flops:
    """Operations of one step, forward and backward."""

    target: float  # target encoder, on all tokens; forward only
    context: float
    predictor: float

    @property
    def total(self) -> float:
        return self.target + self.context + self.predictor


def step_flops(config: Config, plan: MaskPlan) -> Flops:
    """Operations of a step on the tokens that `plan` really draws, padding not counted; `plan` on the host."""
    model, inputs, tokens = config.model, plan.num_inputs, config.num_tokens
    context, sequences, targets = (
        np.diff(cu.numpy()).astype(float) for cu in (plan.context_cu, plan.predictor_cu, plan.target_cu)
    )
    d, w = model.width, model.predictor_width
    hidden, narrow_hidden = (
        round(d * model.mlp_ratio),
        round(w * model.predictor_mlp_ratio),
    )

    target = 2.0 * inputs * tokens * config.patch_dim * d
    target += model.depth * _block(inputs * tokens, inputs * tokens**2, d, hidden)

    embed = 2 * context.sum() * config.patch_dim * d
    encode = 2 * embed + 3 * model.depth * _block(context.sum(), (context**2).sum(), d, hidden)  # no gradient of pixels

    predict = 2 * context.sum() * d * w + 2 * targets.sum() * w * d  # in and out
    predict += (model.predictor_depth - 1) * _block(sequences.sum(), (sequences**2).sum(), w, narrow_hidden)
    predict += 4 * sequences.sum() * w * w  # the last block: keys and values of all, the rest of the targets alone
    predict += targets.sum() * (4 * w * w + 4 * w * narrow_hidden) + 4 * (sequences * targets).sum() * w
    return Flops(float(target), float(encode), 3 * float(predict))


def _block(tokens: float, pairs: float, width: int, hidden: int) -> float:
    """Forward of one transformer block; pairs: token pairs that attention compares, the sum of squared lengths."""
    return tokens * (8 * width * width + 4 * width * hidden) + 4 * pairs * width


def batch_rows(plan: MaskPlan) -> tuple[int, int, int]:
    """(inputs, tokens of the context encoder, of the predictor) of a plan that no ladder rounded up."""
    return plan.num_inputs, int(plan.context_cu[-1]), int(plan.predictor_cu[-1])


def usual_plan(config: Config, share: int, batches: int = 8) -> list[MaskPlan]:
    """Plans of `batches` batches of `share` inputs, as a run of this configuration draws them."""
    plans = []
    for step in range(batches):
        samples = np.arange(share) + step * share
        masks = sample_masks(config.masks, config.grid, config.train.seed, step, np.zeros_like(samples), samples)
        plans.append(packing.plan(masks, config.num_tokens))
    return plans


# ---- rates ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A datasheet: dense bf16 operations and memory bytes, per second."""

    flops: float
    bandwidth: float


CARDS = {"A100": Card(312e12, 2.0e12), "H100": Card(989e12, 3.35e12), "H200": Card(989e12, 4.8e12)}


def datasheet(device: torch.device) -> Card | None:
    """The card's datasheet, if it is one of CARDS."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((card for key, card in CARDS.items() if key in name), None)


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of large matrix products on random data, measured here; the best of a few, once a process."""
    size, rounds = (8192, 10) if device.type == "cuda" else (1024, 3)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))  # not zeros: those run faster
    best = math.inf
    for _ in range(rounds + 1):
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def utilisation(flops_per_s: float, device: torch.device, half: bool) -> dict[str, float]:
    """{'flops_per_s', and on CUDA 'mfu/measured', 'mfu/datasheet'}: one device's rate, and as a share of what it could do.

    measured: of a large bf16 (or float32) product on this device; datasheet: of the maker's number for bf16.
    """
    out = {"flops_per_s": flops_per_s}
    if device.type == "cuda":
        out["mfu/measured"] = flops_per_s / matmul_rate(device, torch.bfloat16 if half else torch.float32)
        card = datasheet(device)
        if card and half:
            out["mfu/datasheet"] = flops_per_s / card.flops
    return out


# ---- memory --------------------------------------------------------------------------------------

STATE_BYTES = 16  # of a trained parameter in float32: weight, gradient, two moments of AdamW
EMA_BYTES = 4  # of a target encoder's parameter


def state_bytes(config: Config) -> int:
    """Bytes of weights, gradients, optimizer and EMA, unsharded."""
    with torch.device("meta"):
        jepa = JEPA(config)
    sizes = [(p.numel(), p.requires_grad) for p in jepa.parameters()]
    return sum(n * (STATE_BYTES if trained else EMA_BYTES) for n, trained in sizes)


def activation_bytes(config: Config, inputs: int, context: int, sequences: int) -> float:
    """Estimated bytes that the forward of a step leaves for its backward, with the target features and one block's work.

    inputs: of the batch; context, sequences: rows that the context encoder's and the predictor's blocks run on. A block keeps, a token and in units of its width: two inputs of LayerNorms in the residual's precision, and in that
    of the products the LayerNorms' outputs, q k v, the attention's output, and the MLP's two layers before and after
    GELU. With `parallel.recompute` only the products' outputs and one residual, or nothing but the block's input, and
    what one block then makes again.
    """
    model = config.model
    products = 2 if config.train.precision == "bf16" else 4
    residual = 2 if model.residual == "bf16" else 4

    def each(width: int, ratio: float) -> tuple[float, float]:
        """Bytes of a token in one block: all, and those kept."""
        whole = width * (2 * residual + products * (2 + 3 + 1 + 2 * ratio))
        inputs = width * residual
        return whole, {"none": whole, "selective": inputs + width * products * (6 + ratio), "full": inputs}[
            config.parallel.recompute
        ]

    wide, wide_kept = each(model.width, model.mlp_ratio)
    narrow, narrow_kept = each(model.predictor_width, model.predictor_mlp_ratio)
    kept = model.depth * context * wide_kept + model.predictor_depth * sequences * narrow_kept
    again = max(context * (wide - wide_kept), sequences * (narrow - narrow_kept))
    target = inputs * config.num_tokens * (4 * model.width + wide)  # float32 features, and a block at a time
    return kept + again + target


# ---- predictions: python -m jepa_fast.flops PRESET ------------------------------------------------

ATTAINED = 0.8  # share of the datasheet that large bf16 products reach: 790 of 989 TFLOP/s on one H200
TRAFFIC = {"bf16": 36.0, "fp32": 72.0}  # bytes a token, a layer, a feature, forward and backward, outside the products


def predicted_rate(config: Config, plans: list[MaskPlan], card: Card) -> float:
    """Inputs per second of one device that nobody measured: products at ATTAINED of the datasheet, then the traffic
    of norms, GELU, residuals, AdamW and EMA at the memory's bandwidth, one after the other."""
    model = config.model
    inputs = sum(p.num_inputs for p in plans)
    work = sum(step_flops(config, p).total for p in plans)
    rows = sum(
        model.depth * model.width * (int(p.context_cu[-1]) + p.num_inputs * config.num_tokens / 3)
        + model.predictor_depth * model.predictor_width * int(p.predictor_cu[-1])
        for p in plans
    )
    moved = rows * TRAFFIC[model.residual] + len(plans) * 2 * state_bytes(config)
    return inputs / (work / (ATTAINED * card.flops) + moved / card.bandwidth)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Operations of a preset's step from its masks, its memory, and predictions for GPUs."""
    parser = Arguments("flops", main.__doc__ or "")
    parser.add_argument("preset")
    parser.add_argument("--share", type=int, default=128, help="inputs of one device's batch (%(default)s)")
    parser.add_argument("--masks.mode", dest="mode", help="instead of the preset's")
    parser.add_argument("--model.residual", dest="residual", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args(argv)
    if args.share < 1:
        raise UsageError(f"--share is {args.share}: give at least 1")
    config = preset(args.preset)
    config = replace(config, find(config.data.kind).assumed(config))
    changes = {"masks.mode": args.mode or config.masks.mode, "train.precision": "bf16", "model.residual": args.residual}
    config = check(replace(config, changes))
    print(table(config, args.share))


def table(config: Config, share: int) -> str:
    plans = usual_plan(config, share)
    inputs = sum(p.num_inputs for p in plans)
    parts = [step_flops(config, p) for p in plans]
    total = sum(f.total for f in parts)
    tokens = {
        "context": sum(int(p.context_cu[-1]) for p in plans) / inputs,
        "target": sum(int(p.target_cu[-1]) for p in plans) / inputs,
    }
    lines = [
        f"{config.preset}, masks {config.masks.mode}: {config.num_tokens} tokens an input, of which {tokens['context']:.1f}"
        f" are context and {tokens['target']:.1f} predicted (mean of {inputs} inputs, blocks overlap)",
        "",
        "counted work of a step, 1e9 operations an input (forward and backward)",
        *(
            f"  {name:18}{sum(getattr(f, name) for f in parts) / inputs / 1e9:10.2f}{100 * sum(getattr(f, name) for f in parts) / total:7.1f} %"
            for name in ("target", "context", "predictor")
        ),
        f"  {'total':18}{total / inputs / 1e9:10.2f}",
        "",
        f"memory: {state_bytes(config) / 2**30:.2f} GiB of weights, gradients, AdamW and EMA (counted);"
        f" {activation_bytes(config, *batch_rows(plans[0])) / 2**30:.2f} GiB of activations at {share} inputs (estimated)",
        "",
        f"PREDICTIONS, not measurements: one device, {share} inputs, bf16, residual {config.model.residual}; products at"
        f" {ATTAINED:.0%} of the datasheet, then memory traffic.",
        "Launches, data and small products' losses are left out: an upper bound, and no guide for tiny models.",
        f"  {'':6}{'datasheet':>14}{'memory':>12}{'inputs/s':>12}{'of products':>14}{'of datasheet':>14}",
    ]
    for name, card in CARDS.items():
        rate = predicted_rate(config, plans, card)
        share_of = rate * total / inputs / card.flops
        lines.append(
            f"  {name:6}{card.flops / 1e12:8.0f} TFLOP/s{card.bandwidth / 1e12:7.2f} TB/s{rate:12.0f}"
            f"{share_of / ATTAINED:13.1%} {share_of:13.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
