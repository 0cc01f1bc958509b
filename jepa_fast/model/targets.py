"""Target features -> regression targets, exactly as the loss uses them; their statistics are those of the global batch.

The constant that a predictor may learn in place of the content is the mean of the targets at each position. What is
subtracted and divided here decides what such a constant earns:

| norm | target of a feature vector h | a constant per position earns |
|---|---|---|
| `layer` | LayerNorm of h without affine (I-JEPA) | all that inputs have in common |
| `batch` | (h - mean) / std of each feature over inputs and positions | what inputs have in common at a position |
| `position` | (h - mean) / std of each feature and position over inputs | nothing |
| `centre` | h - mean of each feature and position over inputs | nothing |
| `none` | h | all that inputs have in common |

`centre` divides by nothing: it takes away what a constant can predict and keeps the scale of the features, so that the
loss in `l2` starts at their variance over inputs. Under it the loss falls if features shrink, so read the skill.

std is sqrt(var + EPS), as in LayerNorm: a feature without variance is 0, not noise blown up. Everything here runs without
gradient, in float32 (sums over processes and running averages in float64), outside of the compiled blocks, and reads
nothing back to the host.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Shape legend: B inputs of this process, N tokens of one, D width; S is [D] under `batch`, else [N, D].

TargetNorm = Literal["layer", "batch", "position", "centre", "none"]
FROM_BATCH = ("batch", "position", "centre")  # need statistics over inputs
EPS = 1e-5  # LayerNorm's default
MOMENTUM = 0.99  # of running statistics: they are of the last 100 steps or so


class Statistics(NamedTuple):
    mean: Tensor  # float32 S
    std: Tensor  # float32 S; sqrt(var + EPS)
    own: bool  # they are of the batch that they are applied to, not running ones


def norm_of(name: str | bool) -> TargetNorm:
    """The name, with True for `layer` and False for `none` as older configurations have it. Raises ValueError."""
    if isinstance(name, bool):
        return "layer" if name else "none"
    if name not in get_args(TargetNorm):
        raise ValueError(f"target_norm is {name!r}; give one of {', '.join(get_args(TargetNorm))}")
    return name  # type: ignore[return-value]


@torch.no_grad()
def statistics(features: Tensor, norm: TargetNorm) -> Statistics | None:
    """Of target features [B, N, D] of the global batch; None for a norm that needs none. All processes call it."""
    if norm not in FROM_BATCH:
        return None
    mean, square = _moments(features, norm)
    return _as_statistics(mean, square, own=True)


@torch.no_grad()
def regress(
    features: Tensor, norm: TargetNorm, given: Statistics | None = None, positions: Tensor | None = None
) -> Tensor:
    """The regression targets of features [B, N, D]: float32 [B, N, D].

    given: the statistics to use; None: those of the features themselves, over all processes. positions int64 [T]: of
    features [T, D] of single tokens, with statistics given if the norm needs any.
    """
    features = features.float()
    if norm == "layer":
        return F.layer_norm(features, features.shape[-1:])
    if norm == "none":
        return features
    used = given or statistics(features, norm)
    assert used is not None
    mean, std, _ = used
    if positions is not None and mean.ndim == 2:
        mean, std = mean[positions], std[positions]
    return features - mean if norm == "centre" else (features - mean) / std


def centred_by_own(norm: TargetNorm, used: Statistics | None) -> bool:
    """Whether targets have mean 0 at each position of the batch by construction, so that no constant beats 0 in `l2`."""
    return norm in ("position", "centre") and used is not None and used.own


class Targets(nn.Module):
    """The regression targets of a run: which norm, and with `running` statistics the state that they need.

    `batch`: every forward uses the statistics of its own inputs, over all processes. A step of several micro batches
    would then train on other targets than the whole batch, so such a run is refused before it starts.
    `running`: averages of the mean and of the mean square over steps, from those of step t with weight
    max(1 - MOMENTUM, 1 / (t + 1)); all forwards of a step use the averages up to the step before (the first step:
    those of its first forward), so a batch of one input per process works, and micro batches make no difference. The
    averages are in checkpoints.
    """

    mean: Tensor
    square: Tensor
    steps: Tensor  # float64 scalar: updates made
    step_mean: Tensor  # sums over the forwards since the last one, weighted by their inputs
    step_square: Tensor
    step_inputs: Tensor

    def __init__(self, norm: TargetNorm, stats: Literal["batch", "running"], num_tokens: int, width: int):
        super().__init__()
        self.norm = norm
        self.running = stats == "running" and norm in FROM_BATCH
        if self.running:
            shape = (width,) if norm == "batch" else (num_tokens, width)
            for name in ("mean", "square"):
                self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
                self.register_buffer(f"step_{name}", torch.zeros(shape, dtype=torch.float64), persistent=False)
            self.register_buffer("steps", torch.zeros((), dtype=torch.float64))
            self.register_buffer("step_inputs", torch.zeros((), dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def statistics(self, features: Tensor) -> Statistics | None:
        """What this forward's targets are made with. features [B, N, D]. All processes call it."""
        if not self.running:
            return statistics(features, self.norm)
        mean, square = _moments(features, self.norm)
        begins = (self.steps == 0) & (self.step_inputs == 0)
        self.mean.copy_(torch.where(begins, mean, self.mean))
        self.square.copy_(torch.where(begins, square, self.square))
        self.step_mean.add_(mean, alpha=len(features))
        self.step_square.add_(square, alpha=len(features))
        self.step_inputs.add_(len(features))
        return _as_statistics(self.mean, self.square, own=False)

    @torch.no_grad()
    def statistics_apart(self, features: Tensor) -> Statistics | None:
        """For inputs that are no part of the training: the running averages, or the statistics of `features` [B, N, D] alone.

        Changes nothing and asks no other process.
        """
        if self.norm not in FROM_BATCH:
            return None
        mean, square = _moments(features, self.norm, num_processes=1)
        if self.running:
            mean, square = (torch.where(self.steps > 0, *pair) for pair in ((self.mean, mean), (self.square, square)))
        return _as_statistics(mean, square, own=not self.running)

    def forward(self, features: Tensor, given: Statistics | None) -> Tensor:
        """float32 [B, N, D]."""
        return regress(features, self.norm, given)

    @torch.no_grad()
    def update(self, gate: Tensor) -> None:
        """After a step: fold its statistics into the running ones, where `gate` (bool, on the device) is True."""
        if not self.running:
            return
        mean, square = self.step_mean / self.step_inputs, self.step_square / self.step_inputs
        gate = gate & mean.isfinite().all() & square.isfinite().all()
        weight = torch.clamp(1 / (self.steps + 1), min=1 - MOMENTUM)
        self.mean.copy_(torch.where(gate, self.mean.lerp(mean, weight), self.mean))
        self.square.copy_(torch.where(gate, self.square.lerp(square, weight), self.square))
        self.steps.add_(gate)
        self.forget()

    def forget(self) -> None:
        """Drop what forwards since the last update have seen: they were no part of the training."""
        if self.running:
            for sums in (self.step_mean, self.step_square, self.step_inputs):
                sums.zero_()


def _moments(features: Tensor, norm: TargetNorm, num_processes: int | None = None) -> tuple[Tensor, Tensor]:
    """(mean, mean square) over the global batch, float64 S; with `num_processes` 1 over this process's part.

    Each process takes its own mean and variance in float32, the second about the first; only sums over processes are of
    squares, in float64, whose digits suffice for a mean thousands of times the deviation.
    """
    over = (0, 1) if norm == "batch" else (0,)
    variance, mean = torch.var_mean(features.float(), dim=over, correction=0)
    mean, variance = mean.double(), variance.double()
    if (num_processes or _num_processes()) == 1:
        return mean, variance + mean.square()
    count = mean.new_tensor([float(len(features))])
    sums = torch.cat([count, (mean * count).flatten(), ((variance + mean.square()) * count).flatten()])
    dist.all_reduce(sums)
    first, second = (sums[1:] / sums[0]).view(2, *mean.shape)
    return first, second


def _as_statistics(mean: Tensor, square: Tensor, own: bool) -> Statistics:
    variance = (square - mean.square()).clamp(min=0)
    return Statistics(mean.float(), (variance + EPS).sqrt().float(), own)


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
