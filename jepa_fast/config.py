"""What a run is: frozen dataclasses, one per stage of the pipeline.

A leaf: every stage may import it and it imports no stage. Derived values are properties, never
fields, so that a saved configuration cannot contradict itself. `Config.check` refuses what cannot
work, in one line that names the field.
"""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from jepa_fast.errors import UsageError, suggest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Run:
    dir: str = ""
    """Run folder. Empty: runs/<preset>-<n>, n the first free number."""


@dataclass(frozen=True)
class Data:
    kind: Literal["images", "series"] = "series"
    path: str = ""
    """Shards (a folder of .tar, a brace pattern, a glob, URLs), an image folder, CIFAR batches, a series file; several
    joined by `::`, or as lines of a .txt file. Empty: `embedded`."""
    weights: tuple[float, ...] = ()
    """Shares of the entries of `path` in every batch. Empty: they are one data set."""
    embedded: Literal["", "sensor", "digits", "textures", "textures224"] = ""
    """Data made on this machine, used when `path` is empty."""
    hint: str = ""
    """What to put where, told when `path` is empty and nothing is embedded."""
    image_size: int = 224
    """Side in pixels."""
    channels: int = 3
    """Image colour planes, or channels of a series (0: as the data have)."""
    random_crop: bool = True
    """RandomResizedCrop for training; off: the whole image, resized."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Share of the image's area that a crop takes."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Antialiased, either way."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    series_length: int = 500
    """Samples of one series. 0: as the data have."""
    series_norm: Literal["per_series", "train", "none"] = "per_series"
    """z-normalise every series by itself, or by the training set's statistics, or not at all."""
    workers: int = 2
    """Decoding threads of one process."""
    max_bad_share: float = 0.01
    """Largest share of samples that may be unreadable; those are replaced and reported."""
    shuffle_window: int = 0
    """Samples that are shuffled among themselves, out of 16 stretches of the files: for network disks. 0: all."""
    num_samples: int = 0
    """Samples of one pass over remote shards, which nobody can count beforehand."""
    label_filter: str = ""
    """File with one class (wnid or label) a line: only these are kept."""


@dataclass(frozen=True)
class Masks:
    mode: Literal["reference", "fixed", "subsampled", "packed", "random", "bernoulli"] = "packed"
    """`reference`, `fixed`, `subsampled`, `packed`: I-JEPA's multi-block masks; `random`, `bernoulli`: for series."""
    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    min_keep: int = 10
    """Fewest tokens of a context or a target."""
    group: int = 128
    """Images that share block sizes (and, in `reference` and `fixed`, the cut to the shortest context)."""
    context_tokens: int = 0
    """Tokens kept by `subsampled`. 0: a quarter of the grid."""
    ratio: float = 0.7
    """Share of hidden tokens for `random` (exactly int(ratio * N)) and `bernoulli` (in expectation)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How `ratio` (or, of block masks, `target_scale`) goes to its final value over the run."""
    final_ratio: float = 0.7
    final_target_scale: tuple[float, float] = (0.15, 0.2)


@dataclass(frozen=True)
class Model:
    width: int = 128
    depth: int = 2
    heads: int = 2
    mlp_ratio: float = 4.0
    patch: int = 16
    """Side of an image patch in pixels."""
    num_patches: int = 10
    """Patches of a series; the remainder at its end is dropped."""
    predictor_width: int = 128
    predictor_depth: int = 1
    predictor_heads: int = 0
    """0: as the encoder's."""
    predictor_mlp_ratio: float = 4.0
    """I-JEPA's is 4 whatever the encoder's (ViT-g's is 48/11)."""
    init_std: float = 0.02
    """Truncated normal of every linear weight and of the mask token."""
    depth_scaled_init: bool = False
    """Divide attention-output and MLP-output weights by sqrt(2 * layer)."""
    norm_eps: float = 1e-6
    residual: Literal["fp32", "bf16"] = "fp32"
    """Residual stream under `--train.precision bf16`: half its traffic, and other numbers."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of every block, with static shapes from a ladder of buckets. auto: on CUDA, from width 384."""
    cuda_graphs: bool = False
    """Replay compiled blocks as CUDA graphs: for models so small that launches cost more than the work."""


@dataclass(frozen=True)
class Objective:
    loss: Literal["l2", "smooth_l1", "l1"] = "smooth_l1"
    """Mean over features and tokens. `l2` is the paper's equation 2 divided by the width."""
    target_norm: bool = True
    """LayerNorm without affine over the target encoder's features."""


@dataclass(frozen=True)
class EMA:
    decay: float = 0.996
    """Beta of equation 1 at step 0."""
    final_decay: float = 1.0
    """Beta at the last step."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    scale: float = 1.0
    """The schedule runs over `scale` times the run's steps (the reference's ipe_scale)."""


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    start_lr: float = 2e-4
    final_lr: float = 1e-6
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    """Added to `warmup_steps`, in passes over the data."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """After the linear warm-up."""
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    wd_schedule: Literal["constant", "cosine"] = "cosine"
    decay_vectors: bool = False
    """Also decay biases and 1-D parameters."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 0.0
    """Largest global gradient norm. 0: no clipping."""


@dataclass(frozen=True)
class Perturb:
    """Controlled perturbation of the context encoder: Gaussian noise on its weights, after the optimizer's step."""

    noise: float = 0.0
    """Standard deviation, relative to that of each weight matrix. 0: none."""
    every: int = 1
    """Steps between perturbations."""
    until: int = 0
    """First step without. 0: to the end."""


@dataclass(frozen=True)
class Train:
    steps: int = 1800
    """Optimizer steps of the whole run. 0: `epochs` decides."""
    epochs: float = 0.0
    batch_size: int = 32
    """Global batch, over all processes."""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; loss, layer-normed targets, optimizer and EMA stay fp32."""
    max_bad_steps: int = 10
    """Consecutive steps with a non-finite loss or gradient before the run stops."""
    deterministic: bool = False
    """Only operations that repeat bit for bit, as far as torch has them. On a CPU they do in any case."""


@dataclass(frozen=True)
class Parallel:
    mode: Literal["auto", "single", "ddp", "fsdp", "hsdp"] = "auto"
    """auto: what memory allows, the cheapest in communication first; the first lines of a run say what and why."""
    micro_batch: int = 0
    """Inputs of one forward in one process; gradients add up over its share of the batch. 0: the whole share at once."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: free a block's gathered weights after its forward (ZeRO-3). Off: only after its backward (ZeRO-2)."""
    prefetch: int = 1
    """fsdp, hsdp: blocks gathered ahead of the one that computes."""
    shards: int = 0
    """hsdp: processes that one copy of the model is cut over. 0: those of one machine."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """fsdp, hsdp: precision in which gradients are added up."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: what blocks compute again in the backward, for memory: all but products and attention, or all."""
    threads: int = 0
    """CPU threads of one process. 0: the machine's cores shared out over its processes."""
    start_timeout: float = 1800.0
    """Seconds that processes wait for one another up to the end of the first step: opening data, compiling."""
    timeout: float = 300.0
    """The same afterwards; longer than the monitor's examination takes."""


@dataclass(frozen=True)
class Monitor:
    every: int = 100
    """Steps between examinations (probes, discrepancies on whole inputs); step 0 and the last step always."""
    spectrum_every: int = 0
    """Steps between RankMe and its like. 0: as `every`. Likewise the next three."""
    lidar_every: int = 0
    bound_every: int = 0
    spectral_every: int = 0
    """Spectral norms of the drift."""
    lidar_views: int = 4
    """Masks of the same input that LiDAR compares. Below 2: no LiDAR."""
    jacobian: int = 0
    """Power iterations through the encoder's Jacobian at a look at the bound. 0: none."""
    probe_train: int = 1000
    """Labelled samples the probe is fitted on (or all there are)."""
    probe_test: int = 2000
    """Labelled samples it is scored on (or all there are)."""
    ridge: float = 1e-2
    """Ridge penalty, relative to the number of samples."""
    knn: int = 20
    knn_temperature: float = 0.07


@dataclass(frozen=True)
class Checkpoint:
    every: int = 0
    """Steps between checkpoints. 0: only at the end."""
    keep: int = 2
    """Newest checkpoints kept. 0: all."""
    background: bool = True
    """Write while training goes on. Off: training waits."""


@dataclass(frozen=True)
class Log:
    every: int = 10
    """Steps between records of metrics.jsonl."""
    tensorboard: bool = False
    """Also write records as TensorBoard events (needs the package tensorboard)."""


@dataclass(frozen=True)
class Profile:
    steps: int = 0
    """Steps traced by torch.profiler, after five to warm up: profile/rank*.json and a table of kernels in the run folder."""


@dataclass(frozen=True)
class Init:
    from_: str = ""
    """Whose weights training starts from (`--init.from`): a run or a checkpoint of one, an official, timm or transformers one."""


@dataclass(frozen=True)
class Config:
    preset: str = "demo"
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    masks: Masks = field(default_factory=Masks)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    ema: EMA = field(default_factory=EMA)
    optim: Optim = field(default_factory=Optim)
    perturb: Perturb = field(default_factory=Perturb)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    monitor: Monitor = field(default_factory=Monitor)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    profile: Profile = field(default_factory=Profile)
    init: Init = field(default_factory=Init)

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis: (rows, columns) of an image, (patches,) of a series."""
        if self.data.kind == "images":
            return (self.data.image_size // self.model.patch,) * 2
        return (self.model.num_patches,)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        if self.data.kind == "images":
            return self.data.channels * self.model.patch**2
        return self.data.channels * (self.data.series_length // self.model.num_patches)

    def check(self) -> "Config":
        """Refuse what cannot work. Raises UsageError naming the field, its value and the mend."""
        _check_ranges(self)
        _check_weights(self)
        _check_geometry(self)
        return self


def _require(ok: bool, name: str, value: Any, mend: str) -> None:
    if not ok:
        raise UsageError(f"--{name} is {value!r}: {mend}")


def _check_ranges(c: Config) -> None:
    infinite: list[tuple[str, Any]] = [
        (name, value) for name, value in flatten(c).items() if isinstance(value, float) and not math.isfinite(value)
    ]
    _require(not infinite, *(infinite or [("", "")])[0], "give a finite number")
    for name, low, high in (
        ("ema.decay", 0, 1),
        ("ema.final_decay", 0, 1),
        ("data.max_bad_share", 0, 1),
    ):
        value = get(c, name)
        _require(low <= value <= high, name, value, f"give a number from {low} to {high}")
    for name in ("masks.ratio", "masks.final_ratio"):
        _require(
            0 < get(c, name) < 1,
            name,
            get(c, name),
            "some tokens must be hidden and some visible; give a number between 0 and 1",
        )
    for name in (
        "data.image_size", "data.workers", "masks.num_targets", "masks.min_keep",
        "masks.group", "model.width", "model.depth", "model.heads", "model.patch", "model.num_patches",
        "model.predictor_width", "model.predictor_depth", "train.batch_size", "train.max_bad_steps", "monitor.every",
        "monitor.probe_train", "monitor.probe_test", "monitor.knn", "log.every", "perturb.every",
    ):  # fmt: skip
        _require(get(c, name) >= 1, name, get(c, name), "give a whole number of at least 1")
    for name in ("data.channels", "data.series_length", "data.shuffle_window", "data.num_samples", "train.steps", "train.epochs", "train.seed", "optim.warmup_steps", "optim.warmup_epochs", "optim.lr", "optim.start_lr",
                 "optim.final_lr", "optim.weight_decay", "optim.final_weight_decay", "optim.clip", "checkpoint.every",
                 "checkpoint.keep", "monitor.spectrum_every", "monitor.lidar_every", "monitor.bound_every",
                 "monitor.spectral_every", "perturb.noise", "perturb.until", "monitor.lidar_views", "monitor.jacobian", "masks.context_tokens", "parallel.threads",
                 "parallel.micro_batch", "parallel.prefetch", "parallel.shards", "profile.steps", "model.predictor_heads"):  # fmt: skip
        _require(get(c, name) >= 0, name, get(c, name), "it cannot be negative")
    for name in (
        "model.init_std",
        "model.mlp_ratio",
        "model.predictor_mlp_ratio",
        "model.norm_eps",
        "optim.eps",
        "ema.scale",
        "monitor.knn_temperature",
        "monitor.ridge",
        "parallel.timeout",
        "parallel.start_timeout",
    ):
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


def _check_geometry(c: Config) -> None:
    m = c.model
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
    if c.data.kind == "images":
        _require(c.data.channels in (1, 3), "data.channels", c.data.channels, "give 1 (grey) or 3 (colour)")
        _require(
            c.data.image_size % m.patch == 0,
            "data.image_size",
            c.data.image_size,
            f"--model.patch {m.patch} must divide it",
        )
        _require(
            len(c.data.mean) == len(c.data.std) == c.data.channels,
            "data.mean",
            c.data.mean,
            f"give --data.channels ({c.data.channels}) numbers, and as many for --data.std",
        )
        _require(all(s > 0 for s in c.data.std), "data.std", c.data.std, "give numbers above 0")
        _require(
            c.masks.mode not in ("random", "bernoulli") or c.num_tokens >= 2,
            "masks.mode",
            c.masks.mode,
            "needs at least two tokens",
        )
    else:
        _require(
            c.masks.mode in ("random", "bernoulli"), "masks.mode", c.masks.mode, "a series takes random or bernoulli"
        )
        _require(
            not c.data.series_length or c.data.series_length >= m.num_patches,
            "data.series_length",
            c.data.series_length,
            f"shorter than --model.num_patches {m.num_patches}: give fewer patches",
        )
    if c.masks.mode == "random":
        for name in ("masks.ratio",) if c.masks.schedule == "constant" else ("masks.ratio", "masks.final_ratio"):
            hidden = int(get(c, name) * c.num_tokens)
            _require(
                0 < hidden < c.num_tokens,
                name,
                get(c, name),
                f"hides {hidden} of {c.num_tokens} tokens; some must be hidden and some visible",
            )


# ---- dotted names, JSON -------------------------------------------------------------------------


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{'section.field': value}, the names the command line uses (`init.from` for `init.from_`)."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), prefix + f.name.rstrip("_")
        if dataclasses.is_dataclass(value):
            out |= flatten(value, name + ".")
        else:
            out[name] = value
    return out


def get(config: Config, name: str) -> Any:
    """The value of 'section.field'."""
    return flatten(config)[name]


def replace(config: Config, changes: dict[str, Any]) -> Config:
    """A copy with {'section.field': value} changed. Raises UsageError on an unknown name."""
    known = flatten(config)
    for name, value in changes.items():
        if name not in known:
            raise UsageError(f"unknown field {name}{suggest(name, known)}; --print-config lists all")
        head, _, leaf = name.rpartition(".")
        leaf = "from_" if leaf == "from" else leaf
        if head:
            section = dataclasses.replace(getattr(config, head), **{leaf: value})
            config = dataclasses.replace(config, **{head: section})
        else:
            config = dataclasses.replace(config, **{leaf: value})
    return config


def to_json(config: Config) -> str:
    """The configuration as config.json holds it: sections of fields, under their command-line names."""
    nested: dict[str, Any] = {}
    for name, value in flatten(config).items():
        section, _, leaf = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    return json.dumps(nested, indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Config:
    """Read a saved configuration back. Raises UsageError if it is damaged or from another version."""
    try:
        return _build(Config, json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{where} is not a configuration of this version ({error}); start a new run folder") from None


def _build(cls: type, raw: dict[str, Any]) -> Any:
    hints = {name.rstrip("_"): (name, kind) for name, kind in typing.get_type_hints(cls).items()}
    unknown = set(raw) ^ set(hints)
    if unknown:
        raise ValueError(f"unknown or missing field {sorted(unknown)[0]}")
    values = {}
    for key, value in raw.items():
        name, kind = hints[key]
        if dataclasses.is_dataclass(kind):
            value = _build(typing.cast(type, kind), value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
