"""How much of the inputs can be read from the features: a probe without labels.

In: a fixed batch of inputs, and pooled features of them. Out: one correlation. A linear probe asks whether the features hold
what the labels name. This asks whether they hold what a rich description of the inputs says: the shares of outputs above a
bias, of random convolutions (the "proportion of positive values" of ROCKET, Dempster et al. 2020, arXiv 1910.13051, on which
linear classifiers are near the best known on the UCR archive; for images likewise in two dimensions). The measure is ours;
experiments/phase says how well it foretells a labelled probe.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS, SEED = 128, 20190913
LENGTHS = (7, 9, 11)  # of a kernel on a series (ROCKET's)
SIDES = (3, 5, 7)  # of a kernel on an image
LARGEST = 64  # pixels of an image's side: larger ones are averaged down
BIASED = 64  # inputs whose outputs a bias is drawn from
COMPONENTS = 8  # principal components of the description, each of unit variance
PENALTIES = (0.01, 0.1, 1.0, 10.0)  # of the ridge, relative to the number of inputs


@torch.no_grad()
def description(inputs: Tensor) -> Tensor | None:
    """float64 [n, 8] of series [n, C, L] or images [n, C, H, W]: principal components, uncorrelated and of unit variance.

    None of inputs of another shape, of fewer than three, or that do not differ. Depends on the inputs alone.
    """
    if inputs.ndim not in (3, 4) or len(inputs) < 3:
        return None
    x = _standardised(inputs)
    generator = torch.Generator().manual_seed(SEED)
    shares = torch.stack([_positive_share(x, generator) for _ in range(KERNELS)], dim=1).double()
    shares = shares[:, shares.std(0) > 1e-6]
    if not shares.shape[1]:
        return None
    shares = (shares - shares.mean(0)) / shares.std(0)
    values, vectors = torch.linalg.eigh(shares.T @ shares / len(shares))
    kept = min(COMPONENTS, int((values > 1e-6 * values[-1]).sum()), len(shares) - 2)
    return (shares @ vectors[:, -kept:]) / values[-kept:].sqrt()


def _standardised(inputs: Tensor) -> Tensor:
    """float32, each input of mean 0 and standard deviation 1; large images averaged down."""
    x = inputs.float()
    if x.ndim == 4 and max(x.shape[2:]) > LARGEST:
        factor = LARGEST / max(x.shape[2:])
        x = F.interpolate(x, scale_factor=factor, mode="bilinear", antialias=True)
    axes = tuple(range(1, x.ndim))
    return (x - x.mean(axes, keepdim=True)) / x.std(axes, keepdim=True).clamp(min=1e-8)


def _positive_share(x: Tensor, generator: torch.Generator) -> Tensor:
    """[n]: share of the outputs of one random kernel that are above a bias drawn from its outputs."""
    dims = x.ndim - 2
    sizes = LENGTHS if dims == 1 else SIDES
    shortest = min(x.shape[2:])
    size = max(1, min(sizes[_draw(len(sizes), generator)], shortest))
    kernel = torch.randn(1, x.shape[1], *(size,) * dims, generator=generator)
    kernel = (kernel - kernel.mean() if kernel.numel() > 1 else kernel).to(x.device)
    reach = math.log2(max(1.0, (shortest - 1) / max(1, size - 1)))
    dilation = int(2 ** (float(torch.rand(1, generator=generator)) * reach))
    padding = (size - 1) * dilation // 2 if _draw(2, generator) else 0
    convolve = F.conv1d if dims == 1 else F.conv2d
    level = float(torch.rand(1, generator=generator))
    bias, shares = None, []
    for part in x.split(256):
        out = convolve(part, kernel, padding=padding, dilation=dilation).flatten(1)
        if bias is None:  # the first inputs decide it
            some = out[:BIASED].flatten().sort().values
            bias = some[min(len(some) - 1, int(level * len(some)))]
        shares.append((out > bias).float().mean(1))
    return torch.cat(shares).cpu()


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))


@torch.no_grad()
def readout(features: Tensor, described: Tensor) -> float:
    """How well ridge regression reads a description [n, k] from pooled features [n, D]: correlation, 0 to 1.

    The root of the share of the description's variance that is predicted, each input being left out of the fit that
    predicts it (in closed form), each component at the best of four penalties. Independent of the features' scale.
    NaN of features that are not finite.
    """
    if not features.isfinite().all():
        return math.nan
    x, y = features.double(), described.to(features.device)
    x, y = (x - x.mean(0)) / x.std(0).clamp(min=1e-8), y - y.mean(0)
    total = (1 - 1 / len(x)) ** -2 * y.square().sum(0)  # errors of the mean of the other inputs
    if len(x) >= x.shape[1]:
        values, vectors = torch.linalg.eigh(x.T @ x)
        left = x @ vectors / values.clamp(min=1e-9).sqrt()
    else:
        values, left = torch.linalg.eigh(x @ x.T)
    inside = left.T @ y
    errors = []
    for penalty in PENALTIES:
        shrunk = values.clamp(min=0) / (values.clamp(min=0) + penalty * len(x))
        leverage = (left.square() @ shrunk + 1 / len(x)).clamp(max=1 - 1e-9)
        errors.append(((y - left @ (shrunk[:, None] * inside)) / (1 - leverage)[:, None]).square().sum(0))
    least = torch.stack([*errors, total]).amin(0)
    return float((1 - least.sum() / total.sum()).clamp(min=0).sqrt())
