"""A probe without labels: how well the features tell apart what the inputs themselves tell apart.

In: a fixed batch of inputs, and pooled features of them. Out: one accuracy. A linear probe asks whether the features hold
what the labels name. This one asks for pseudo-classes: clusters of a rich description of the inputs, at six granularities.
The description are shares of outputs above a bias, of random convolutions: the "proportion of positive values" of ROCKET
(Dempster et al. 2020, arXiv 1910.13051), on which linear classifiers are near the best known on the UCR archive; for images
the same in two dimensions. The measure is ours; experiments/phase says how well it foretells a labelled probe.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS, SEED = 128, 20190913
LENGTHS = (7, 9, 11)  # of a kernel on a series (ROCKET's)
SIDES = (3, 5, 7)  # of a kernel on an image
LARGEST = 64  # pixels of an image's side: larger ones are averaged down
BIASED = 64  # inputs whose outputs a bias is drawn from
COMPONENTS = 16  # principal components of the description
CLUSTERS = (2, 3, 4, 6, 10, 16)
RIDGE = 0.01  # penalty, relative to the number of inputs; the probe's


@torch.no_grad()
def description(inputs: Tensor) -> Tensor | None:
    """float64 [n, 16] of series [n, C, L] or images [n, C, H, W]: principal components of the standardised shares.

    None of inputs of another shape, of fewer than three, or that do not differ. Depends on the inputs alone.
    """
    if inputs.ndim not in (3, 4) or len(inputs) < 3:
        return None
    x = torch.cat([_standardised(part) for part in inputs.split(256)])
    generator = torch.Generator().manual_seed(SEED)
    shares = torch.stack([_positive_share(x, generator) for _ in range(KERNELS)], dim=1).double()
    shares = shares[:, shares.std(0) > 1e-6]
    if not shares.shape[1]:
        return None
    shares = (shares - shares.mean(0)) / shares.std(0)
    _, vectors = torch.linalg.eigh(shares.T @ shares)
    return shares @ vectors[:, -COMPONENTS:]


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


def pseudo_classes(inputs: Tensor) -> Tensor | None:
    """int64 [6, n]: the cluster of each input at every granularity (k-means), or None (see `description`). Deterministic."""
    described = description(inputs)
    if described is None:
        return None
    from sklearn.cluster import KMeans

    points = described.numpy()
    found = [KMeans(min(k, len(points) - 1), n_init=2, random_state=k).fit_predict(points) for k in CLUSTERS]
    return torch.from_numpy(np.stack(found)).long()


@torch.no_grad()
def readout(features: Tensor, classes: Tensor) -> float:
    """Accuracy of a ridge probe on pooled features [n, D], mean over the pseudo-classes [g, n].

    As the labelled probe: least squares on one-hot classes, standardised features, float64. Each input is left out of the
    fit that predicts it, in closed form. Independent of the features' scale. NaN of features that are not finite.
    """
    if not features.isfinite().all():
        return math.nan
    classes = classes.to(features.device)
    x = features.double()
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-8)
    onehot = [F.one_hot(labels).double() for labels in classes]
    y = torch.cat(onehot, dim=1)
    base, penalty = y.mean(0), RIDGE * len(x)
    if len(x) >= x.shape[1]:
        values, vectors = torch.linalg.eigh(x.T @ x)
        left = x @ vectors / values.clamp(min=1e-9).sqrt()
    else:
        values, left = torch.linalg.eigh(x @ x.T)
    shrunk = values.clamp(min=0) / (values.clamp(min=0) + penalty)
    fitted = left @ (shrunk[:, None] * (left.T @ (y - base))) + base
    leverage = (left.square() @ shrunk + 1 / len(x)).clamp(max=1 - 1e-9).unsqueeze(1)
    held_out = (fitted - leverage * y) / (1 - leverage)  # as if each input had been left out
    parts = held_out.split([part.shape[1] for part in onehot], dim=1)
    hits = [(part.argmax(1) == labels).double().mean() for part, labels in zip(parts, classes, strict=True)]
    return float(torch.stack(hits).mean())
