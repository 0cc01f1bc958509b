"""Inputs -> patches, and the positions that go with them.

Shape legend: B images or series, N tokens, P numbers in a patch, C channels, D width.
"""

import torch
from torch import Tensor, nn


def patchify_images(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C * patch * patch]; tokens in raster order, (channel, row, column) inside a patch."""
    b, c, h, w = images.shape
    if h % patch or w % patch:
        raise ValueError(
            f"images of {h} x {w} pixels: the patch size {patch} does not divide them; resize or change the patch"
        )
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def patchify_series(series: Tensor, num_patches: int) -> Tensor:
    """[B, C, L] -> [B, num_patches, C * (L // num_patches)]; the remainder at the end is dropped."""
    b, c, length = series.shape
    size = length // num_patches
    if size == 0:
        raise ValueError(f"a series of {length} samples cannot be cut into {num_patches} patches; give fewer patches")
    x = series[..., : size * num_patches].reshape(b, c, num_patches, size)
    return x.transpose(1, 2).reshape(b, num_patches, c * size)


def sincos_table(grid: tuple[int, ...], width: int) -> Tensor:
    """Fixed positions [N, width], float32, for a 1-D or 2-D grid.

    As facebookresearch/ijepa: frequencies 10000^(-2i/d), sines then cosines; in 2-D the first half
    of the features encodes the column, the second the row.
    """
    if len(grid) == 1:
        return _sincos(torch.arange(grid[0]), width).float()
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.cat([_sincos(columns.flatten(), width // 2), _sincos(rows.flatten(), width // 2)], dim=1).float()


def _sincos(position: Tensor, width: int) -> Tensor:
    frequency = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = position.double()[:, None] * frequency  # [N, width / 2]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Tokenizer(nn.Module):
    """Cuts a normalised input into patches: [B, C, H, W] or [B, C, L] -> [B, N, P]. uint8 images are normalised first."""

    mean: Tensor
    std: Tensor

    def __init__(self, kind: str, size: int, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()):
        super().__init__()
        self.kind, self.size = kind, size  # size: pixels of a patch's side, or number of patches of a series
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.kind == "series":
            return patchify_series(inputs.float(), self.size)
        if inputs.dtype == torch.uint8:
            inputs = (inputs.float() / 255 - self.mean) / self.std
        return patchify_images(inputs, self.size)
