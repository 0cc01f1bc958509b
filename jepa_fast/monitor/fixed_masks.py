"""The run's own masks on the fixed inputs of an examination: drawn once, the same at every look."""

import numpy as np
from torch import Tensor, nn

from jepa_fast.config import Config
from jepa_fast.masks.packing import MaskPlan, plan
from jepa_fast.masks.sample import sample_masks


class FixedMasks:
    """What `Examination` takes as views, of our own encoders. View k is mask number k of each input."""

    def __init__(self, config: Config):
        self.config = config
        self._plans: dict[tuple[int, int], MaskPlan] = {}

    def plan(self, num_inputs: int, view: int) -> MaskPlan:
        """Which tokens are visible and hidden: the same on every run of the same masks, whatever its seed."""
        if (num_inputs, view) not in self._plans:
            c, numbers = self.config, np.arange(num_inputs)
            masks = sample_masks(c.masks, c.grid, 0, view, np.full(num_inputs, view), numbers)
            self._plans[num_inputs, view] = plan(masks, c.num_tokens)
        return self._plans[num_inputs, view]

    def __call__(self, encoder: nn.Module, inputs: Tensor, view: int) -> tuple[Tensor, Tensor]:
        masks = self.plan(len(inputs), view).to(inputs.device)
        patches = encoder.tokenizer(inputs).flatten(0, 1)[masks.context_rows]  # type: ignore[operator]
        features = encoder.encode_packed(patches, masks.context_index, masks.context_cu, masks.context_max)  # type: ignore[operator]
        return features, masks.context_rows

    def embed(self, encoder: nn.Module, inputs: Tensor) -> Tensor:
        """x_hat: patch embedding and positions, [B, N, D]."""
        patches = encoder.tokenizer(inputs).to(encoder.positions.dtype)  # type: ignore[operator]
        return encoder.patch_embed(patches) + encoder.positions  # type: ignore[operator]
