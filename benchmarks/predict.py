"""Predictions: bytes and operations counted from the model, over what a datasheet promises. Nothing here was measured.

`python -m benchmarks.table` writes the tables of BLOCKS into the documents, so that a prediction changes with the
code that it predicts. Sizes come from the presets (built on the meta device), token counts from their own masks.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks import rows
from benchmarks.work import (
    BATCH,
    DRAWS,
    MODELS,
    NETWORK,
    NVLINK,
    communication,
    model_flops,
    parameters,
    stages,
    tokens,
)  # fmt: skip
from jepa_fast.flops import CARDS
from jepa_fast.presets import preset

COPY_REACHES = 0.90  # of the datasheet's memory rate, by a large copy: an assumption until `ceiling` rows say it
MATMUL_REACHES = 0.80  # of the datasheet's matrix rate, likewise
TRAINED = preset("in1k-vitb16").masks.mode  # the masks of all presets for images
GOALS = {"B/16": 0.35, "L/16": 0.42, "H/14": 0.48}  # of the matrix rate that a large product reaches


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
            f"{1e3 * moved / CARDS[g].bandwidth:.2f} / {1e3 * moved / (0.92 * COPY_REACHES * CARDS[g].bandwidth):.2f}"
            for g in ("H100", "H200")
        ]
        eager = 28.0 * encoder
        lines.append([label, f"{encoder / 1e6:.1f} M", f"{moved / 1e9:.2f} GB", *cells, f"{eager / moved:.2f}"])
    header = ["encoder", "parameters", "bytes of one pass", "H100, ms: floor / predicted", "H200, ms: floor / predicted",
              "best eager way with distances, bytes over ours"]  # fmt: skip
    return markdown(header, lines)


def step_table(mode: str = TRAINED) -> str:
    lines = []
    for label, name in MODELS.items():
        ops = [op for stage in stages(name, mode).values() for op in stage]
        flops = model_flops(name, mode)
        cells = []
        for gpu in ("H100", "H200"):
            floor = sum(op.seconds(gpu) for op in ops)
            cells += [f"{1e3 * floor:.1f}", f"{100 * flops / floor / CARDS[gpu].flops:.0f} %", f"{BATCH / floor:,.0f}"]
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


def goal_table(mode: str = TRAINED) -> str:
    """The step that the project's goals for MFU mean."""
    lines = []
    for label, name in MODELS.items():
        cells = []
        for gpu in ("H100", "H200"):
            seconds = _at_goal(label, name, mode, gpu)
            floor = sum(op.seconds(gpu) for ops in stages(name, mode).values() for op in ops)
            cells += [f"{1e3 * seconds:.0f}", f"{BATCH / seconds:,.0f}", f"{seconds / floor:.2f}"]
        lines.append([label, f"{100 * GOALS[label]:.0f} %", *cells])
    header = ["model", "goal, MFU of the measured rate"]
    for gpu in ("H100", "H200"):
        header += [f"{gpu}: ms", "images/s", "over the floor"]
    return markdown(header, lines)


def _at_goal(label: str, name: str, mode: str, gpu: str) -> float:
    return model_flops(name, mode) / (GOALS[label] * MATMUL_REACHES * CARDS[gpu].flops)


def monitor_table(gpu: str = "H100", log_every: int = 20) -> str:
    """What monitoring adds to a step at the goal: distances fall out of the EMA's pass, signals are taken when logged."""
    lines = []
    for label, name in MODELS.items():
        config, (encoder, _) = preset(name), parameters(name)
        step, bandwidth = _at_goal(label, name, TRAINED, gpu), COPY_REACHES * CARDS[gpu].bandwidth
        ema = 12.0 * encoder / (0.92 * bandwidth)
        signals = 16 * 4.0 * BATCH * float(np.prod(config.grid)) * config.model.width / bandwidth + 1e-4
        by_hand = [
            28.0 * encoder / bandwidth - ema,
            2 * model_flops_of_targets(name) / (GOALS[label] * MATMUL_REACHES * CARDS[gpu].flops),
        ]
        paid = 0.03 * ema + signals / log_every
        lines.append([label, f"{1e3 * step:.0f}", f"{100 * ema / step:.2f} %", f"{100 * 0.03 * ema / step:.3f} %",
                      f"{100 * signals / log_every / step:.3f} %", f"**{100 * paid / step:.2f} %**",
                      *(f"{100 * x / step:.1f} %" for x in by_hand)])  # fmt: skip
    header = [f"model, {gpu}", "step, ms", "EMA", "distances, 3 % of it", f"a record every {log_every} steps", "monitoring in all",
              "eager distances every step", "a second forward every step"]  # fmt: skip
    return markdown(header, lines)


def model_flops_of_targets(name: str) -> float:
    """One encoder, forward, on whole images."""
    return sum(op.flops for op in stages(name, TRAINED)["target encoder"])


def feeding_table(gpu: str = "H100") -> str:
    """What feeds the GPUs at the goal: cores that decode and crop at the rate measured here, and bytes read."""
    rate, told = decode_rate()
    lines = []
    for label, name in MODELS.items():
        for count in (1, 8):
            demand = count * BATCH / _at_goal(label, name, TRAINED, gpu)
            cores = f"{math.ceil(demand / rate)}" if rate else "not measured"
            lines.append([f"{label}, {count}", f"{demand:,.0f}", cores, f"{110e3 * demand / 1e9:.2f}"])
    return markdown([f"model, number of {gpu}", "images/s", f"cores, {told}", "GB/s at 110 kB an image"], lines)


def decode_rate() -> tuple[float, str]:
    """(images/s of one core that decodes and crops to 224, of the newest rows; what to say of it); 0 where there are none."""
    found = [
        row for row in rows.read()
        if row["bench"] == "data" and row["provider"] == "jepa_fast" and row["metric"] == "images_per_s"
        and row["shape"].startswith("decode+crop") and row["shape"].endswith("bilinear")
    ]  # fmt: skip
    if not found:
        return 0.0, "by rows of bench_data.py"
    return float(found[-1]["p50"]), f"at {float(found[-1]['p50']):.0f} images/s each ({found[-1]['device']})"


def token_table() -> str:
    lines = []
    for label, name in MODELS.items():
        for mode in ("reference", "fixed", "subsampled", "packed"):
            drawn = [tokens(name, mode, step) for step in range(DRAWS)]
            each = [
                np.mean([sum(counts) for counts in kind]) / BATCH
                for kind in ([d.full for d in drawn], [d.context for d in drawn], [d.predictor for d in drawn])
            ]
            lines.append(
                [f"{label}, {mode}", *(f"{x:.0f}" for x in each), f"{model_flops(name, mode) / BATCH / 1e9:.0f}"]
            )
    header = ["model, masks", "tokens", "context tokens", "predictor tokens (4 blocks)", "GFLOP an image"]
    return markdown(header, lines)


def roofline_table(name: str = "in1k-vitb16", mode: str = TRAINED, gpu: str = "H100") -> str:
    """One step, operation by operation: what it does, what it moves, which of the two binds."""
    rate, bandwidth = CARDS[gpu].flops, CARDS[gpu].bandwidth
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


def residual_table(mode: str = TRAINED, gpu: str = "H100") -> str:
    lines = []
    for label, name in MODELS.items():
        floors = [sum(op.seconds(gpu) for ops in stages(name, mode, r).values() for op in ops) for r in (2, 4)]
        lines.append([label, *(f"{1e3 * f:.1f}" for f in floors), f"{floors[1] / floors[0]:.3f}"])
    return markdown(["model", f"bf16 residual stream: floor on {gpu}, ms", "fp32 residual stream", "ratio"], lines)


def communication_table() -> str:
    lines = []
    for label, name in MODELS.items():
        encoder, predictor = parameters(name)
        floor = sum(op.seconds("H100") for ops in stages(name, TRAINED).values() for op in ops)
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
    "goal": goal_table,
    "monitor": monitor_table,
    "feeding": feeding_table,
    "tokens": token_table,
    "roofline": roofline_table,
    "residual": residual_table,
    "communication": communication_table,
}
