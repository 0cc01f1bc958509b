"""Refuses a configuration that cannot work, in one line that names the field, its value and the fix."""

import math
from typing import Any

from jepa_fast import inputs
from jepa_fast.config.names import flatten, get
from jepa_fast.config.sections import Config
from jepa_fast.errors import UsageError

FROM_0_TO_1 = ("ema.decay", "ema.final_decay", "data.max_bad_share")
AT_LEAST_1 = (
    "data.image_size", "data.workers", "masks.num_targets", "masks.min_keep", "masks.group", "model.width",
    "model.depth", "model.heads", "model.patch", "model.num_patches", "model.predictor_width", "model.predictor_depth",
    "train.batch_size", "train.max_bad_steps", "monitor.every", "monitor.probe_train", "monitor.probe_test",
    "monitor.knn", "log.every", "perturb.every",
)  # fmt: skip
NOT_NEGATIVE = (
    "data.channels", "data.series_length", "data.shuffle_window", "data.num_samples", "train.steps", "train.epochs",
    "train.seed", "optim.warmup_steps", "optim.warmup_epochs", "optim.lr", "optim.start_lr", "optim.final_lr",
    "optim.weight_decay", "optim.final_weight_decay", "optim.clip", "checkpoint.every", "checkpoint.keep",
    "monitor.spectrum_every", "monitor.lidar_every", "monitor.bound_every", "monitor.spectral_every",
    "monitor.lidar_views", "monitor.jacobian", "perturb.noise", "perturb.until", "masks.context_tokens",
    "parallel.threads", "parallel.micro_batch", "parallel.prefetch", "parallel.shards", "profile.steps",
    "model.predictor_heads", "optim.predictor_lr", "regularizer.weight",
)  # fmt: skip
ABOVE_0 = (
    "model.init_std", "model.mlp_ratio", "model.predictor_mlp_ratio", "model.norm_eps", "optim.eps", "ema.scale", "ema.gamma", "ema.power",
    "monitor.knn_temperature", "monitor.ridge", "parallel.timeout", "parallel.start_timeout",
)  # fmt: skip


# Larger values are slips or attacks: what they ask for would not fit into any machine.
MOST = {
    "model.depth": 1000, "model.predictor_depth": 1000, "model.width": 2**16, "model.predictor_width": 2**16,
    "model.mlp_ratio": 2**10, "model.predictor_mlp_ratio": 2**10, "model.num_patches": 2**20, "data.image_size": 2**16,
    "data.channels": 2**16, "data.series_length": 2**40, "train.steps": 2**53, "train.epochs": 1e9, "train.seed": 2**63 - 1,
    "train.batch_size": 2**31, "data.workers": 2**12, "optim.warmup_epochs": 1e9, "optim.warmup_steps": 2**53,
    "masks.num_targets": 2**16, "masks.group": 2**31, "data.num_samples": 2**53, "monitor.lidar_views": 2**12,
}  # fmt: skip
MOST_TOKENS = 2**20


def check(config: Config) -> Config:
    """The configuration itself. Raises UsageError naming the first field that cannot work, its value and the fix."""
    _check_ranges(config)
    _check_weights(config)
    _check_objective(config)
    _check_geometry(config)
    return config


def _require(ok: bool, name: str, value: Any, fix: str) -> None:
    if not ok:
        raise UsageError(f"--{name} is {value!r}: {fix}")


def _check_ranges(c: Config) -> None:
    for name, value in flatten(c).items():
        _require(not isinstance(value, float) or math.isfinite(value), name, value, "give a finite number")
    for name in FROM_0_TO_1:
        _require(0 <= get(c, name) <= 1, name, get(c, name), "give a number from 0 to 1")
    for name in ("masks.ratio", "masks.final_ratio"):
        fix = "some tokens must be hidden and some visible; give a number between 0 and 1"
        _require(0 < get(c, name) < 1, name, get(c, name), fix)
    for name in AT_LEAST_1:
        _require(get(c, name) >= 1, name, get(c, name), "give a whole number of at least 1")
    for name, most in MOST.items():
        _require(get(c, name) <= most, name, get(c, name), f"give {most:g} at most")
    for name in NOT_NEGATIVE:
        _require(get(c, name) >= 0, name, get(c, name), "it cannot be negative")
    for name in ABOVE_0:
        _require(get(c, name) > 0, name, get(c, name), "give a number above 0")
    for name, top in (
        ("masks.target_scale", 1),
        ("masks.final_target_scale", 1),
        ("masks.context_scale", 1),
        ("data.crop_scale", 1),
        ("masks.target_aspect", math.inf),
    ):
        low, high = get(c, name)
        _require(
            0 < low <= high <= top, name, (low, high), f"give two numbers, 0 < low <= high{' <= 1' if top == 1 else ''}"
        )
    _require(all(0 <= b < 1 for b in c.optim.betas), "optim.betas", c.optim.betas, "give two numbers from 0 to below 1")
    _require(
        c.train.steps > 0 or c.train.epochs > 0,
        "train.steps",
        c.train.steps,
        "give --train.steps or --train.epochs above 0",
    )


def _check_weights(c: Config) -> None:
    weights = c.data.weights
    _require(all(0 < w < math.inf for w in weights), "data.weights", weights, "give numbers above 0")
    _require(
        not weights or min(weights) >= sum(weights) / 1000,
        "data.weights",
        weights,
        "each must be 0.001 of the sum or more",
    )


def _check_objective(c: Config) -> None:
    norm = c.objective.target_norm
    _require(
        norm in ("layer", "none") or c.objective.target_stats == "running" or c.train.batch_size > 1,
        "objective.target_norm",
        norm,
        "a batch of 1 has no statistics over inputs; give a larger --train.batch_size, or --objective.target_stats running",
    )

    kind, teacher = c.regularizer.kind, c.teacher
    _require(
        kind == "none" or c.train.batch_size > 1,
        "regularizer.kind",
        kind,
        "it compares inputs with one another; give a --train.batch_size of 2 or more",
    )
    _require(
        kind != "none" or not c.regularizer.weight,
        "regularizer.weight",
        c.regularizer.weight,
        "there is no regulariser; give --regularizer.kind vicreg, sigreg or visreg",
    )
    _require(
        not teacher.from_ or teacher.kind == "frozen",
        "teacher.from",
        teacher.from_,
        f"a teacher of --teacher.kind {teacher.kind} has the context encoder's weights; give --teacher.kind frozen",
    )
    _require(
        teacher.kind == "ema" or c.ema.schedule != "escape",
        "ema.schedule",
        c.ema.schedule,
        f"a teacher of --teacher.kind {teacher.kind} has no decay to wait for; give --teacher.kind ema",
    )


def _check_geometry(c: Config) -> None:
    m = c.model
    _require(
        c.num_tokens <= MOST_TOKENS,
        "model.patch",
        m.patch,
        f"makes {c.num_tokens} tokens of an input, at most {MOST_TOKENS}",
    )
    _require(m.width % m.heads == 0, "model.width", m.width, f"--model.heads {m.heads} must divide it")
    _require(m.width % 4 == 0, "model.width", m.width, "the sin-cos positions need a multiple of 4")
    _require(
        m.predictor_width % 4 == 0,
        "model.predictor_width",
        m.predictor_width,
        "the sin-cos positions need a multiple of 4",
    )
    heads = m.predictor_heads or m.heads
    _require(
        m.predictor_width % heads == 0,
        "model.predictor_width",
        m.predictor_width,
        f"its {heads} heads (--model.predictor_heads) must divide it",
    )
    _require(
        m.residual == "fp32" or c.train.precision == "bf16",
        "model.residual",
        m.residual,
        "needs --train.precision bf16",
    )
    _require(
        not m.cuda_graphs or m.compile != "off", "model.cuda_graphs", m.cuda_graphs, "needs --model.compile on or auto"
    )
    kind = inputs.find(c.data.kind)
    allowed = f"{kind.name} take {', '.join(kind.mask_modes)}"
    _require(c.masks.mode in kind.mask_modes, "masks.mode", c.masks.mode, allowed)
    kind.check(c, _require)
    if c.masks.mode == "random":
        for name in ("masks.ratio",) if c.masks.schedule == "constant" else ("masks.ratio", "masks.final_ratio"):
            hidden = int(get(c, name) * c.num_tokens)
            _require(
                0 < hidden < c.num_tokens,
                name,
                get(c, name),
                f"hides {hidden} of {c.num_tokens} tokens; some must be hidden and some visible",
            )
