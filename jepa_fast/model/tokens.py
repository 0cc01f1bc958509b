"""Inputs -> patches, and the positions that go with them.

Shape legend: B images or series, N tokens, K kept tokens, P numbers in a patch, C channels, D width.
"""

import torch
from torch import Tensor, nn


def patchify_images(images: Tensor, patch: int, keep: Tensor | None = None) -> Tensor:
    """[B, C, H, W] -> [B, N, C * patch * patch], or [B, K, ...] of the tokens int64 keep [B, K] alone.

    Tokens in raster order, (channel, row, column) inside a patch.
    """
    b, c = images.shape[:2]
    rows, columns = image_grid(images, patch)
    x = images.reshape(b, c, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)  # a view: nothing is copied yet
    if keep is not None:
        x = x[torch.arange(b, device=keep.device)[:, None], keep // columns, keep % columns]
    return x.reshape(b, -1, c * patch * patch)


def image_grid(images: Tensor, patch: int) -> tuple[int, int]:
    """(rows, columns) of tokens. Raises ValueError if the patch does not divide the image."""
    if images.dim() != 4 or not len(images):
        raise ValueError(
            f"images must be [batch, channels, height, width], at least one; they are {list(images.shape)}"
        )
    h, w = images.shape[2:]
    if not h or not w or h % patch or w % patch:
        raise ValueError(
            f"images of {h} x {w} pixels: the patch size {patch} does not divide them; resize or change the patch"
        )
    return h // patch, w // patch


def patchify_series(series: Tensor, num_patches: int, keep: Tensor | None = None) -> Tensor:
    """[B, C, L] -> [B, num_patches, C * (L // num_patches)], or of the kept patches; the remainder at the end is dropped."""
    if series.dim() != 3 or not len(series):
        raise ValueError(f"series must be [batch, channels, length], at least one; they are {list(series.shape)}")
    b, c, length = series.shape
    size = length // num_patches
    if size == 0:
        raise ValueError(f"a series of {length} samples cannot be cut into {num_patches} patches; give fewer patches")
    x = series[..., : size * num_patches].reshape(b, c, num_patches, size).transpose(1, 2)
    if keep is not None:
        x = x[torch.arange(b, device=keep.device)[:, None], keep]
    return x.reshape(b, -1, c * size)


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
    """Cuts inputs into patches: [B, C, H, W] or [B, C, L] -> [B, N, P]. uint8 images are normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self, kind: str, size: int, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()):
        super().__init__()
        self.kind, self.size = kind, size  # size: pixels of a patch's side, or number of patches of a series
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def grid(self, inputs: Tensor) -> tuple[int, ...]:
        """Tokens along each axis that `inputs` are cut into. Raises ValueError if the patch does not divide an image."""
        return (self.size,) if self.kind == "series" else image_grid(inputs, self.size)

    def forward(self, inputs: Tensor, keep: Tensor | None = None) -> Tensor:
        """All patches [B, N, P], or those of the tokens int64 keep [B, K]: the others are never touched."""
        if self.kind == "series":
            return patchify_series(inputs if inputs.is_floating_point() else inputs.float(), self.size, keep)
        if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
            raise ValueError(f"images are {inputs.dtype}; give uint8 (0 to 255), or normalised floats")
        patches = patchify_images(inputs, self.size, keep)
        if patches.dtype != torch.uint8:
            return patches
        colours = patches.view(*patches.shape[:2], inputs.shape[1], -1)  # [B, N, C, patch * patch]
        return ((colours.float() / 255 - self.mean[:, 0]) / self.std[:, 0]).flatten(2)
