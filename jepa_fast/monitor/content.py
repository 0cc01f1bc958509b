"""What features tell of their inputs, without labels: a probe whose targets are the inputs' own spectra.

In: a fixed batch of inputs, and pooled features of them. Out: one correlation. A probe asks whether the features hold what
the labels name; this asks whether they hold what varies most between the inputs' power spectra, which every input has.
The measure is ours.
"""

import math

import torch
from torch import Tensor

BANDS = 64  # of equal width, or fewer where inputs are short
COMPONENTS = 4  # of the spectra's principal components: the first few are what inputs differ in, the rest noise
PENALTIES = (0.01, 0.1, 1.0, 10.0)  # of the ridge, relative to the number of inputs


def signature(inputs: Tensor) -> Tensor | None:
    """Principal components of the inputs' log spectra, float64 [n, 4]: series [n, C, L], images [n, C, H, W]; else None."""
    if inputs.ndim not in (3, 4) or len(inputs) < 2:
        return None
    measure = _series_power if inputs.ndim == 3 else _image_power
    power = torch.cat([measure(part.double().mean(1)) for part in inputs.split(256)])
    if not power.shape[1]:
        return None
    bands = [band.mean(1) for band in power.tensor_split(min(BANDS, power.shape[1]), dim=1)]
    logs = torch.stack(bands, dim=1).clamp(min=1e-12).log()
    logs = logs - logs.mean(0)
    return logs @ torch.linalg.eigh(logs.T @ logs)[1][:, -COMPONENTS:]


def _series_power(x: Tensor) -> Tensor:
    """[n, L] -> power at each frequency above zero."""
    return torch.fft.rfft(x).abs().square()[:, 1:]


def _image_power(x: Tensor) -> Tensor:
    """[n, H, W] -> mean power on each ring of equal frequency above zero, up to the shorter side's Nyquist."""
    side = min(x.shape[1:])
    fy, fx = (torch.fft.fftfreq(length, device=x.device) for length in x.shape[1:])
    ring = (torch.hypot(fy[:, None], fx[None, :]) * side).round().long().flatten()
    power = torch.fft.fft2(x).abs().square().flatten(1)
    sums = power.new_zeros(len(x), int(ring.max()) + 1).index_add_(1, ring, power)
    return (sums / ring.bincount())[:, 1 : side // 2 + 1]


def content(features: Tensor, signature: Tensor) -> float:
    """How well ridge regression reads `signature` [n, k] from pooled features [n, D]: correlation, 0 to 1.

    The root of the share of the signature's variance that is predicted, each input being left out of the fit that
    predicts it (in closed form), each component at the best of four penalties. Independent of the features' scale.
    NaN of features that are not finite.
    """
    if not features.isfinite().all():
        return math.nan
    x, y = features.double(), signature.to(features.device)
    x, y = (x - x.mean(0)) / x.std(0).clamp(min=1e-8), y - y.mean(0)
    total = (1 - 1 / len(x)) ** -2 * y.square().sum(0)  # errors of the mean of the other inputs
    if not total.sum() > 0:
        return 0.0
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
