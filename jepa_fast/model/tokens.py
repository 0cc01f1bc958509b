"""Inputs -> patches, and the positions that go with them.

Shape legend: B images or series, N tokens, K kept tokens, P numbers in a patch, C channels, D width.
"""

import torch
from torch import Tensor, nn

from jepa_fast.inputs import find


def sincos_table(grid: tuple[int, ...], width: int, trained: tuple[int, ...] | None = None) -> Tensor:
    """Fixed positions [N, width], float32, for a 1-D or 2-D grid.

    As facebookresearch/ijepa: frequencies 10000^(-2i/d), sines then cosines; in 2-D the first half
    of the features encodes the column, the second the row. For inputs of another size than those trained on, the grid
    is laid over the same extent as `trained`: token centres at ((i + 1/2) * trained / grid - 1/2).
    """
    axes = [_centres(n, t) for n, t in zip(grid, trained or grid, strict=True)]
    if len(grid) == 1:
        return _sincos(axes[0], width).float()
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return torch.cat([_sincos(columns.flatten(), width // 2), _sincos(rows.flatten(), width // 2)], dim=1).float()


def _centres(n: int, trained: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) * (trained / n) - 0.5


def _sincos(position: Tensor, width: int) -> Tensor:
    frequency = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = position[:, None] * frequency  # [N, width / 2]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Tokenizer(nn.Module):
    """Cuts inputs [B, C, ...] into normalised patches [B, N, P]; how, the kind of input says (jepa_fast.inputs)."""

    mean: Tensor
    std: Tensor

    def __init__(self, kind: str, size: int, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()):
        super().__init__()
        self.kind, self.size = kind, size  # size: pixels of a patch's side, or number of patches of a series
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def grid(self, inputs: Tensor) -> tuple[int, ...]:
        """Tokens along each axis that `inputs` are cut into. Raises ValueError if the patch does not divide an image."""
        return find(self.kind).grid_of(inputs, self.size)

    def forward(self, inputs: Tensor, keep: Tensor | None = None) -> Tensor:
        """All patches [B, N, P], or those of the tokens int64 keep [B, K]: the others are never touched."""
        return find(self.kind).cut(inputs, self.size, self.mean, self.std, keep)
