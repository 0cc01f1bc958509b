"""What differs between one kind of input and another, in one record."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jepa_fast.config import Config

Require = Callable[[bool, str, Any, str], None]  # (holds, field, its value, what to do)


class Kind(ABC):
    """Geometry, patches, checks and words of one kind of input. It has no state.

    Shape legend: B inputs, C channels, N tokens, K kept tokens, P numbers in a patch.
    """

    name: ClassVar[str]  # as in data.kind
    method: ClassVar[str]  # as papers call a JEPA of it
    mask_modes: ClassVar[tuple[str, ...]]  # that masks.mode may be
    dtype: ClassVar[torch.dtype]  # of a sample
    augmented: ClassVar[bool]  # whether a sample differs from epoch to epoch

    # ---- geometry, from the configuration

    @abstractmethod
    def grid(self, config: "Config") -> tuple[int, ...]:
        """Tokens along each axis."""

    @abstractmethod
    def patch_dim(self, config: "Config") -> int:
        """Numbers in one patch."""

    @abstractmethod
    def patch_size(self, config: "Config") -> int:
        """The number that says how inputs are cut, as `cut` and `grid_of` take it."""

    @abstractmethod
    def shape(self, config: "Config") -> tuple[int, ...]:
        """Of one sample, [C, ...]; 0 on an axis that the data decide."""

    def from_data(self, config: "Config", shape: tuple[int, ...]) -> dict[str, int]:
        """{field: value} that samples of `shape` decide, or that must agree with them."""
        return {}

    def assumed(self, config: "Config") -> dict[str, int]:
        """{field: value} to reckon with where the data would decide and there are none."""
        return {}

    @abstractmethod
    def check(self, config: "Config", require: Require) -> None:
        """Call `require` for every field that this kind restricts; masks.mode is checked already."""

    # ---- tensors

    @abstractmethod
    def grid_of(self, inputs: Tensor, size: int) -> tuple[int, ...]:
        """Tokens along each axis that inputs [B, C, ...] are cut into. Raises ValueError if they cannot be."""

    @abstractmethod
    def cut(self, inputs: Tensor, size: int, mean: Tensor, std: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalised patches [B, N, P], or those of the tokens int64 keep [B, K]; mean and std: [C, 1, 1].

        Raises ValueError if the inputs cannot be cut.
        """

    def example(self, config: "Config", count: int, generator: torch.Generator | None = None) -> Tensor:
        """Inputs [count, C, ...] of the right shape and dtype: zeros, or noise if there is a generator."""
        shape = (count, *self.shape(config))
        if generator is None:
            return torch.zeros(shape, dtype=self.dtype)
        if self.dtype == torch.uint8:
            return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return torch.randn(shape, generator=generator)

    # ---- words

    @abstractmethod
    def misfit(self, shape: tuple[int, ...], size: int, patch_dim: int, num_tokens: int) -> str:
        """What an encoder of these numbers takes, if samples of `shape` are something else; '' if they fit."""

    @abstractmethod
    def preprocessing(self, config: "Config") -> str:
        """What happens to a sample before the encoder, in one sentence for a model card."""
