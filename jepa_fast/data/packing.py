"""Masks -> index tensors: everything the model gathers with, worked out on the host.

In: a MaskBatch (which tokens each image keeps and predicts). Out: a MaskPlan of int64 rows into flat
token arrays, so that the model is gathers and matrix products, without a loop over images or a
device synchronisation.

Shape legend: B images, N tokens of a full image, Tc context tokens of the batch, Tt target tokens,
S sequences (one per image in the encoder, one per image and target block in the predictor).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_fast.data.masks import MaskBatch


@dataclass(frozen=True)
class MaskPlan:
    context_index: Tensor  # int64 [Tc], token number in its image: the position
    context_rows: Tensor  # int64 [Tc], row of the flattened [B * N] tokens
    context_cu: Tensor  # int32 [B + 1], where each image's context begins
    context_max: int  # longest context
    target_index: Tensor  # int64 [Tt], ordered by (image, target block, token)
    target_rows: Tensor  # int64 [Tt], row of the flattened [B * N] tokens
    target_weight: Tensor  # float32 [Tt], 1 / (B * target tokens of the image): sums to 1
    predictor_order: Tensor  # int64 [Tp], rows of [context tokens; mask tokens] in sequence order
    predictor_targets: Tensor  # int64 [Tt], rows of the packed predictor sequences that are mask tokens
    predictor_cu: Tensor  # int32 [B * num_targets + 1]
    predictor_max: int

    def to(self, device: torch.device) -> "MaskPlan":
        """The same plan with its tensors on `device`; asynchronous from pinned memory."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin(self) -> "MaskPlan":
        """The same plan in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "MaskPlan":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)


def plan(masks: MaskBatch, num_tokens: int) -> MaskPlan:
    """The MaskPlan of `masks` for images of `num_tokens` tokens."""
    num_images, blocks = len(masks.context_lengths), masks.num_targets
    image_of_context = np.repeat(np.arange(num_images), masks.context_lengths)
    target_totals = blocks * masks.target_lengths  # target tokens of each image
    image_of_target = np.repeat(np.arange(num_images), target_totals)

    # One predictor sequence per (image, block): the image's context, then the block's mask tokens.
    sequence_image = np.repeat(np.arange(num_images), blocks)
    context_part, target_part = masks.context_lengths[sequence_image], masks.target_lengths[sequence_image]
    context_starts = _starts(masks.context_lengths)[:-1][sequence_image]
    target_starts = len(masks.context) + _starts(target_part)[:-1]
    begins = np.stack([context_starts, target_starts], 1).ravel()
    lengths = np.stack([context_part, target_part], 1).ravel()
    predictor_order = _ranges(begins, lengths)
    is_target = np.repeat(np.tile([False, True], len(sequence_image)), lengths)
    predictor_lengths = context_part + target_part

    return MaskPlan(
        context_index=torch.from_numpy(masks.context),
        context_rows=torch.from_numpy(image_of_context * num_tokens + masks.context),
        context_cu=_cu(masks.context_lengths),
        context_max=int(masks.context_lengths.max()),
        target_index=torch.from_numpy(masks.targets),
        target_rows=torch.from_numpy(image_of_target * num_tokens + masks.targets),
        target_weight=torch.from_numpy((1.0 / (num_images * target_totals[image_of_target])).astype(np.float32)),
        predictor_order=torch.from_numpy(predictor_order),
        predictor_targets=torch.from_numpy(np.flatnonzero(is_target)),
        predictor_cu=_cu(predictor_lengths),
        predictor_max=int(predictor_lengths.max()),
    )


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _cu(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(_starts(lengths).astype(np.int32))


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """concatenate(arange(b, b + n) for b, n in zip(begins, lengths)), without the loop."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(begins - (ends - lengths), lengths)
