"""Spectral norm of theta - theta_bar per matrix: warm-started power iteration, one pair of products per call."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fused_ema.op import local
from fused_ema.sharding import shard_groups

_BATCH_ELEMENTS = 1 << 24  # differences materialised at a time: 64 MiB


class SpectralDrift:
    """Keeps the right singular vector of every matrix between calls. Equal shapes share one batched product."""

    def __init__(self) -> None:
        self.vectors: dict[str, Tensor] = {}  # to be saved where a resumed run must find the same norms

    def __call__(self, matrices: Sequence[tuple[str, Tensor, Tensor]], iterations: int) -> dict[str, float]:
        """matrices: (name, theta, theta_bar), sharded along dimension 0 if at all. Raises ValueError otherwise."""
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; give at least 1")
        norms: dict[str, Tensor] = {}
        for batch in _batches(matrices):
            names = [name for name, _, _ in batch]
            drift = torch.stack([_flat(theta) - _flat(average).to(local(theta).device) for _, theta, average in batch])
            columns = drift.shape[2]
            start = [self.vectors.get(n) for n in names]
            v = torch.stack(
                [_random_unit(columns, n, drift.device) if s is None else s for n, s in zip(names, start, strict=True)]
            )
            groups = shard_groups(batch[0][1])
            for _ in range(iterations):
                v, sigma = _iterate(drift, v, groups)
            self.vectors |= dict(zip(names, v, strict=True))
            norms |= dict(zip(names, sigma, strict=True))
        if not norms:
            return {}
        values = torch.stack([norms[name] for name, _, _ in matrices]).tolist()
        return dict(zip([name for name, _, _ in matrices], values, strict=True))


def _iterate(drift: Tensor, v: Tensor, groups: tuple[dist.ProcessGroup, ...]) -> tuple[Tensor, Tensor]:
    """v [B, n] -> the next v and ||D' D v|| / ||D v|| [B], where D [B, m, n] may be this rank's rows of it."""
    u = torch.bmm(drift, v.unsqueeze(2))  # [B, m, 1]
    w = torch.bmm(drift.transpose(1, 2), u).squeeze(2)  # [B, n]
    both = torch.cat([w, u.square().sum(dim=(1, 2)).unsqueeze(1)], dim=1)
    for group in groups:
        dist.all_reduce(both, group=group)
    w, u_norm = both[:, :-1], both[:, -1].sqrt()
    w_norm = torch.linalg.vector_norm(w, dim=1)
    moved = ((w_norm > 0) & w_norm.isfinite()).unsqueeze(1)  # else the next call starts where this one did
    sigma = torch.where(u_norm == 0, 0.0, w_norm / u_norm)
    return torch.where(moved, w / w_norm.clamp_min(torch.finfo(w.dtype).tiny).unsqueeze(1), v), sigma


def _batches(matrices: Sequence[tuple[str, Tensor, Tensor]]) -> list[list[tuple[str, Tensor, Tensor]]]:
    """Equal shapes (and shards) together, at most _BATCH_ELEMENTS elements at a time."""
    alike: dict[tuple, list] = {}
    for matrix in matrices:
        name, theta, _ = matrix
        placements = getattr(theta, "placements", ())
        if any(not p.is_replicate() and not p.is_shard(0) for p in placements):
            raise ValueError(
                f"parameter {name!r} is sharded as {placements}; the spectral norm needs shards of dimension 0"
            )
        alike.setdefault((_flat_shape(theta), theta.shape, local(theta).device, shard_groups(theta)), []).append(matrix)
    out = []
    for group in alike.values():
        size = max(1, _BATCH_ELEMENTS // max(1, math.prod(group[0][1].shape)))
        out += [group[i : i + size] for i in range(0, len(group), size)]
    return out


def _flat_shape(tensor: Tensor) -> tuple[int, int]:
    return local(tensor).shape[0], math.prod(tensor.shape[1:])


def _flat(tensor: Tensor) -> Tensor:
    return local(tensor).detach().float().reshape(_flat_shape(tensor))


def _random_unit(length: int, name: str, device: torch.device) -> Tensor:
    """The same on every rank."""
    generator = torch.Generator("cpu").manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(name)))
    v = torch.randn(length, generator=generator, dtype=torch.float32, device="cpu")
    return (v / torch.linalg.vector_norm(v)).to(device)
