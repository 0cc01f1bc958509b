"""How many directions the features use. In: pooled features [n, D]. Out: floats, NaN of features that are not finite."""

import math

import torch
from torch import Tensor

ALPHA_RANGE = (11, 100)  # eigenvalues that the power law is fitted to, counted from 1
ZERO = 1e-10  # of the largest: an eigenvalue that is rounding


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885): exp of the entropy of the singular values, uncentred, 1 to D.

    Singular values come from the Gram matrix in float64: measured equal to the SVD to 1e-4, several times faster.
    """
    singular = _eigenvalues(_gram(features.double())).clamp(min=0).sqrt()
    return _effective_number(singular, eps)


def participation_ratio(features: Tensor) -> float:
    """tr(C)^2 / ||C||_F^2 of the covariance C: effective number of directions, without an eigen-decomposition."""
    gram = _gram(_centred(features))
    return float(gram.trace() ** 2 / gram.square().sum().clamp(min=torch.finfo(torch.float64).tiny))


def feature_std(features: Tensor) -> float:
    """Mean over features of the standard deviation of l2-normalised features (SimSiam): 1/sqrt(D) if spread, 0 if not."""
    z = torch.nn.functional.normalize(features.double(), dim=1)
    return float(z.std(0).mean())


def alpha_req(features: Tensor) -> float:
    """Decay alpha of the covariance's eigenvalues, lambda_j ~ j^-alpha (Agrawal et al. 2022), j from 11 to 100.

    About 1 is called good. NaN where it says nothing: with fewer than 20 such eigenvalues, or with eigenvalues of
    the range at zero (rank collapse, where a fit through rounding errors looks like any other). Of D at most 100 the
    last one may be zero, and is left out: a LayerNorm takes one direction away.
    """
    n, d = features.shape
    first, last = ALPHA_RANGE[0], min(ALPHA_RANGE[1], d, n - 1)
    eigenvalues = _eigenvalues(_gram(_centred(features))).flip(0)
    if last == d and not eigenvalues[-1] > ZERO * eigenvalues[0]:
        last -= 1  # features from a LayerNorm sum to a constant: that direction says nothing of collapse
    if last - first < 20 or not eigenvalues[last - 1] > ZERO * eigenvalues[0]:
        return math.nan
    used = eigenvalues[first - 1 : last]
    x, y = torch.arange(first, last + 1, dtype=torch.float64).log(), used.log().cpu()
    x = x - x.mean()
    return float(-(x @ (y - y.mean())) / (x @ x))


def lidar(views: Tensor, delta: float = 1e-4, eps: float = 1e-8) -> float:
    """LiDAR (Thilak et al. 2023, arXiv 2312.04000): effective number of directions that tell images from each other
    better than they tell views of the same image apart. views [n images, q views, D], q > 1; 1 to min(n - 1, D).
    """
    n, q, _ = views.shape
    if n < 2 or q < 2:
        raise ValueError(f"LiDAR needs at least two images and two views of each, got {n} and {q}")
    views = views.double()
    if not views.isfinite().all():
        return math.nan
    means = views.mean(1)  # [n, D]
    between = (means - means.mean(0)) / math.sqrt(n - 1)
    within = (views - means.unsqueeze(1)).flatten(0, 1) / math.sqrt(n * (q - 1))
    scatter = within.T @ within
    scatter.diagonal().add_(delta)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(scatter), between.T, upper=False)  # [D, n]
    return _effective_number(_eigenvalues(_gram(whitened)).clamp(min=0), eps)


def _eigenvalues(gram: Tensor) -> Tensor:
    """Rising; NaN of a matrix that is not finite, where the solver would raise."""
    return torch.linalg.eigvalsh(gram) if gram.isfinite().all() else gram.new_full(gram.shape[:1], math.nan)


def _effective_number(values: Tensor, eps: float) -> float:
    p = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny) + eps
    return float(torch.exp(-(p * p.log()).sum()))


def _centred(features: Tensor) -> Tensor:
    z = features.double()
    return (z - z.mean(0)) / math.sqrt(max(1, len(z) - 1))


def _gram(z: Tensor) -> Tensor:
    """z'z or zz', the smaller: their eigenvalues above zero are the same."""
    return z.T @ z if z.shape[0] >= z.shape[1] else z @ z.T
