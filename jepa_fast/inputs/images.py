"""Images: uint8 [C, H, W], square patches in raster order, normalised on the device."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jepa_fast.inputs.kind import Kind, Require

if TYPE_CHECKING:
    from jepa_fast.config import Config


class Images(Kind):
    name, method = "images", "I-JEPA"
    mask_modes = ("reference", "fixed", "subsampled", "packed", "random", "bernoulli")
    dtype, augmented = torch.uint8, True

    def grid(self, config: "Config") -> tuple[int, ...]:
        """(rows, columns)"""
        return (config.data.image_size // config.model.patch,) * 2

    def patch_dim(self, config: "Config") -> int:
        return config.data.channels * config.model.patch**2

    def patch_size(self, config: "Config") -> int:
        """Side of a patch in pixels."""
        return config.model.patch

    def shape(self, config: "Config") -> tuple[int, ...]:
        return (config.data.channels, config.data.image_size, config.data.image_size)

    def check(self, config: "Config", require: Require) -> None:
        data, patch = config.data, config.model.patch
        require(data.channels in (1, 3), "data.channels", data.channels, "give 1 (grey) or 3 (colour)")
        require(
            data.image_size % patch == 0, "data.image_size", data.image_size, f"--model.patch {patch} must divide it"
        )
        as_many = f"give --data.channels ({data.channels}) numbers, and as many for --data.std"
        require(len(data.mean) == len(data.std) == data.channels, "data.mean", data.mean, as_many)
        require(all(s > 0 for s in data.std), "data.std", data.std, "give numbers above 0")
        blockless = config.masks.mode in ("random", "bernoulli")
        require(not blockless or config.num_tokens >= 2, "masks.mode", config.masks.mode, "needs at least two tokens")

    def grid_of(self, inputs: Tensor, size: int) -> tuple[int, int]:
        return image_grid(inputs, size)

    def cut(self, inputs: Tensor, size: int, mean: Tensor, std: Tensor, keep: Tensor | None = None) -> Tensor:
        """uint8 is normalised by mean and std of each channel; floats are taken as normalised."""
        if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
            raise ValueError(f"images are {inputs.dtype}; give uint8 (0 to 255), or normalised floats")
        patches = patchify_images(inputs, size, keep)
        if patches.dtype != torch.uint8:
            return patches
        colours = patches.view(*patches.shape[:2], inputs.shape[1], -1)  # [B, N, C, patch * patch]
        return ((colours.float() / 255 - mean[:, 0]) / std[:, 0]).flatten(2)

    def misfit(self, shape: tuple[int, ...], size: int, patch_dim: int, num_tokens: int) -> str:
        if len(shape) == 3 and shape[0] * size**2 == patch_dim and not (shape[1] % size or shape[2] % size):
            return ""
        side = math.isqrt(num_tokens) * size
        return f"images of {patch_dim // size**2} channel(s) and {side} x {side} pixels"

    def preprocessing(self, config: "Config") -> str:
        data, side = config.data, f"{config.data.image_size} x {config.data.image_size}"
        sized = f"resized to {side} pixels (bilinear)"
        if data.random_crop:
            shorter = round(data.image_size * 256 / 224)
            sized = f"resized to {shorter} pixels on the shorter side (bilinear), the middle {side} cut out"
        colour = "grey" if data.channels == 1 else "RGB"
        return f"Images {sized}, {colour}, divided by 255, then minus mean {list(data.mean)}, divided by std {list(data.std)}."


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
