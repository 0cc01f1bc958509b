"""Time series: float32 [C, L], normalised when they are read, cut into consecutive patches."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jepa_fast.inputs.kind import Kind, Require

if TYPE_CHECKING:
    from jepa_fast.config import Config

NORM = {
    "per_series": "z-normalised by itself",
    "train": "z-normalised by the training set's statistics",
    "none": "as it is",
}


class Series(Kind):
    name, method = "series", "TS-JEPA"
    mask_modes = ("random", "bernoulli")
    dtype, augmented = torch.float32, False

    def grid(self, config: "Config") -> tuple[int, ...]:
        """(patches,)"""
        return (config.model.num_patches,)

    def patch_dim(self, config: "Config") -> int:
        return config.data.channels * (config.data.series_length // config.model.num_patches)

    def patch_size(self, config: "Config") -> int:
        """Number of patches of one series."""
        return config.model.num_patches

    def shape(self, config: "Config") -> tuple[int, ...]:
        return (config.data.channels, config.data.series_length)

    def from_data(self, config: "Config", shape: tuple[int, ...]) -> dict[str, int]:
        return {"data.channels": shape[0], "data.series_length": shape[1]}

    def assumed(self, config: "Config") -> dict[str, int]:
        fallback = {"data.channels": 1, "data.series_length": 50 * config.model.num_patches}
        return {name: value for name, value in fallback.items() if not getattr(config.data, name.split(".")[1])}

    def check(self, config: "Config", require: Require) -> None:
        data, patches = config.data, config.model.num_patches
        require(data.decoder == "cpu", "data.decoder", data.decoder, "a series is no JPEG; leave it out")
        fewer = f"shorter than --model.num_patches {patches}: give fewer patches"
        long_enough = not data.series_length or data.series_length >= patches
        require(long_enough, "data.series_length", data.series_length, fewer)

    def grid_of(self, inputs: Tensor, size: int) -> tuple[int, ...]:
        return (size,)

    def cut(self, inputs: Tensor, size: int, mean: Tensor, std: Tensor, keep: Tensor | None = None) -> Tensor:
        return patchify_series(inputs if inputs.is_floating_point() else inputs.float(), size, keep)

    def misfit(self, shape: tuple[int, ...], size: int, patch_dim: int, num_tokens: int) -> str:
        if len(shape) == 2 and shape[0] * (shape[1] // size) == patch_dim:
            return ""
        return f"series of C channels and L samples with C * (L // {size}) = {patch_dim}"

    def preprocessing(self, config: "Config") -> str:
        data = config.data
        return (
            f"Series of {data.channels} channel(s) and {data.series_length} samples, each {NORM[data.series_norm]}, "
            f"cut into {config.model.num_patches} patches."
        )


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
