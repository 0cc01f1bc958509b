"""Regularisers of the context encoder: what keeps pooled features from collapsing without the help of a slow teacher.

In: context features pooled over each input's visible tokens, [B, D]. Out: a float32 scalar with a gradient, made of the
global batch's statistics: sums are added over processes, with a gradient that is right where the gradients of processes
are averaged afterwards (DDP, FSDP). Every term is a mean over inputs, never a sum, so that one weight holds for every
batch size. A batch of one input per process is fine, of one input in all it is not.

- `vicreg` (C-JEPA's two terms, VICReg arXiv 2105.04906): 25 * mean_j max(0, 1 - sqrt(var_j + 1e-4))
  + 1 * sum_{i != j} cov_ij^2 / D, with var and cov over N - 1.
- `sigreg` (LeJEPA arXiv 2511.08544): for random directions a of length 1, the Epps-Pulley distance of a.z to N(0, 1):
  sum_k w_k [(mean cos(t_k a.z) - exp(-t_k^2 / 2))^2 + (mean sin(t_k a.z))^2], t of 17 knots on [0, 3], trapezoid weights
  times 2 (for the other half of the line) times exp(-t^2 / 2); mean over directions. LeJEPA multiplies by N, we do not:
  its .02 at N = 256 is our 5.
- `visreg` (VISReg arXiv 2606.02572): mean_j (1 - sigma_j)^2 + the sliced Wasserstein distance (squared) of (z - mean) / sigma
  to N(0, I). Its own weights of the two terms were not at hand; they are 1 and 1 here.
"""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Kind = Literal["none", "vicreg", "sigreg", "visreg"]
PUBLISHED = {"none": 0.0, "vicreg": 0.001, "sigreg": 5.0, "visreg": 1.0}  # weights; visreg's is ours
DIRECTIONS = 256
KNOTS = 17
VARIANCE_EPS = 1e-4


class Regularizer(nn.Module):
    """`seed` and `step` decide the random directions, the same on all processes; the loop sets `step`."""

    def __init__(self, kind: Kind, weight: float, seed: int):
        super().__init__()
        self.kind, self.weight = kind, weight or PUBLISHED[kind]
        self.seed, self.step = seed, 0

    def forward(self, pooled: Tensor) -> Tensor:
        """The term before its weight: [B, D] -> float32 scalar. All processes call it."""
        pooled = pooled.float()
        with torch.autocast(pooled.device.type, enabled=False):
            if self.kind == "vicreg":
                return vicreg(pooled)
            generator = torch.Generator(pooled.device).manual_seed((self.seed << 32) + self.step)
            a = torch.randn(pooled.shape[1], DIRECTIONS, generator=generator, device=pooled.device)
            a = a / a.norm(dim=0)
            return sigreg(pooled, a) if self.kind == "sigreg" else visreg(pooled, a)


def pool(context: Tensor, rows: Tensor, num_inputs: int, num_tokens: int) -> Tensor:
    """Mean over each input's visible tokens: context [Tc, D], rows int64 [Tc] of [B * N] -> [B, D]."""
    owner = rows // num_tokens
    sums = context.new_zeros(num_inputs, context.shape[1]).index_add(0, owner, context)
    return sums / owner.bincount(minlength=num_inputs).clamp(min=1).unsqueeze(1)


def vicreg(z: Tensor) -> Tensor:
    """[B, D] -> scalar."""
    count, width = _count(z), z.shape[1]
    centred = z - _added(z.sum(0)) / count
    covariance = _added(centred.T @ centred) / (count - 1)
    variance = covariance.diagonal()
    hinge = torch.relu(1 - (variance + VARIANCE_EPS).sqrt()).mean()
    between = (covariance.square().sum() - variance.square().sum()) / width
    return 25 * hinge + between


def sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """[B, D] and [D, M] unit vectors -> scalar."""
    t = torch.linspace(0, 3, KNOTS, device=z.device)
    normal = torch.exp(-t.square() / 2)
    weight = torch.full_like(t, 2 * 3 / (KNOTS - 1))
    weight[[0, -1]] /= 2
    angle = (z @ directions).unsqueeze(-1) * t  # [B, M, K]
    cos, sin = (_added(f(angle).sum(0)) / _count(z) for f in (torch.cos, torch.sin))
    distance = (cos - normal).square() + sin.square()
    return (distance @ (weight * normal)).mean()


def visreg(z: Tensor, directions: Tensor) -> Tensor:
    """[B, D] and [D, M] unit vectors -> scalar."""
    count = _count(z)
    centred = z - _added(z.sum(0)) / count
    sigma = (_added(centred.square().sum(0)) / (count - 1) + VARIANCE_EPS).sqrt()
    slices = _gathered((centred / sigma) @ directions).sort(0).values  # [N, M]
    rank = (torch.arange(count, device=z.device) + 0.5) / count
    quantiles = math.sqrt(2) * torch.erfinv(2 * rank - 1)
    return (1 - sigma).square().mean() + (slices - quantiles.unsqueeze(1)).square().mean()


# ---- over processes -------------------------------------------------------------------------------


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _count(z: Tensor) -> int:
    return len(z) * _num_processes()


def _added(value: Tensor) -> Tensor:
    """The sum over processes."""
    return _Sum.apply(value) if _num_processes() > 1 else value


def _gathered(value: Tensor) -> Tensor:
    """[B, ...] of every process -> [N, ...], of equal B."""
    return _Gather.apply(value) if _num_processes() > 1 else value


class _Sum(torch.autograd.Function):
    """The gradient is that of the sum of all processes' terms, which are equal: their number times the term's, and
    averaging gradients over processes takes the factor away again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class _Gather(torch.autograd.Function):
    """As `_Sum`: of the gradient each process keeps its own rows."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]
