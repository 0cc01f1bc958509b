"""How many directions the features use. In: pooled features [n, D]. Out: floats."""

import torch
from torch import Tensor


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885): exp of the entropy of the singular values, uncentred, 1 to D.

    Singular values come from the Gram matrix in float64: measured equal to the SVD to 1e-4, several times faster.
    """
    z = features.double()
    gram = z.T @ z if z.shape[0] >= z.shape[1] else z @ z.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny) + eps
    return float(torch.exp(-(p * p.log()).sum()))


def participation_ratio(features: Tensor) -> float:
    """tr(C)^2 / ||C||_F^2 of the covariance C: effective number of directions, without an eigen-decomposition."""
    z = features.double()
    z = z - z.mean(0)
    gram = z.T @ z if z.shape[0] >= z.shape[1] else z @ z.T
    return float(gram.trace() ** 2 / gram.square().sum().clamp(min=torch.finfo(torch.float64).tiny))
