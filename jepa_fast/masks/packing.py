"""Masks -> index tensors: everything the model gathers with, worked out on the host.

In: a MaskBatch (which tokens each image keeps and predicts). Out: a MaskPlan of int64 rows into flat
token arrays, so that the model is gathers and matrix products, without a loop over images or a
device synchronisation. Token totals differ from batch to batch; where the model is compiled, a Ladder
rounds them up to one of a few buckets, so that shapes do not.

Shape legend: B images, N tokens of a full image, Tc context tokens of the batch, Tt target tokens,
S sequences (one per image in the encoder, one per image and target block in the predictor).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_fast.extension import extension
from jepa_fast.masks.ladder import Ladder
from jepa_fast.masks.sample import MaskBatch


@dataclass(frozen=True)
class MaskPlan:
    context_index: Tensor  # int64 [Tc], token number in its image: the position
    context_rows: Tensor  # int64 [Tc], row of the flattened [B * N] tokens
    context_cu: Tensor  # int32 [B + 1], where each image's context begins
    context_max: int  # longest context, or the ladder's bound on it
    context_bucket: int  # rows the encoder's blocks run on, Tc rounded up by the ladder; 0: on Tc
    context_spare: Tensor  # int32 [K], where each sequence of the rows behind the tokens ends; none of them is empty
    target_index: Tensor  # int64 [Tt], ordered by (image, target block, token)
    target_rows: Tensor  # int64 [Tt], row of the flattened [B * N] tokens
    target_weight: Tensor  # float32 [Tt], 1 / (B * target tokens of the image): sums to 1
    predictor_order: Tensor  # int64 [Tp], rows of [context tokens; mask tokens] in sequence order
    predictor_targets: Tensor  # int64 [Tt], rows of the packed predictor sequences that are mask tokens
    predictor_cu: Tensor  # int32 [B * num_targets + 1]
    predictor_max: int  # longest of them, or the ladder's bound
    predictor_bucket: int  # as context_bucket, of Tp
    predictor_spare: Tensor  # as context_spare
    target_cu: Tensor  # int32 [B * num_targets + 1], where each target block begins
    target_max: int  # largest target block, or the ladder's bound

    @property
    def num_inputs(self) -> int:
        return self.context_cu.numel() - 1

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


def spare_ends(total: int, bucket: int, count: int) -> Tensor:
    """int32 [count]: the rows from `total` to `bucket`, shared out evenly."""
    return torch.from_numpy((total + np.arange(1, count + 1) * (bucket - total) // max(count, 1)).astype(np.int32))


def plan(masks: MaskBatch, num_tokens: int, ladder: Ladder | None = None) -> MaskPlan:
    """The MaskPlan of `masks` for images of `num_tokens` tokens; its totals rounded up by `ladder`, if one is given.

    Raises ValueError where an image has no context or no target, or a token number is not one of an image's.
    """
    _check(masks, num_tokens)
    module = extension()
    made = _indices_in_cpp(module, masks, num_tokens) if module else indices_by_numpy(masks, num_tokens)
    bounds = ladder or Ladder((0,), (0,), 0, 0, 0)
    context_max = max(bounds.context_max, int(masks.context_lengths.max()))
    predictor_max = max(bounds.predictor_max, int((masks.context_lengths + masks.target_lengths).max()))
    context_bucket, context_spare = _bucket(bounds.context, len(masks.context), context_max)
    predictor_bucket, predictor_spare = _bucket(bounds.predictor, len(made["predictor_order"]), predictor_max)
    return MaskPlan(
        context_index=torch.from_numpy(masks.context),
        context_max=context_max,
        context_bucket=context_bucket,
        context_spare=context_spare,
        target_index=torch.from_numpy(masks.targets),
        predictor_max=predictor_max,
        predictor_bucket=predictor_bucket,
        predictor_spare=predictor_spare,
        target_max=max(bounds.target_max, int(masks.target_lengths.max())),
        **{name: torch.from_numpy(values) for name, values in made.items()},
    )


def _bucket(rungs: tuple[int, ...], total: int, longest: int) -> tuple[int, Tensor]:
    if rungs == (0,):
        return 0, torch.zeros(0, dtype=torch.int32)
    bucket, spare = Ladder.rung(rungs, total, longest)
    return bucket, spare_ends(total, bucket, spare)


def _indices_in_cpp(module: ModuleType, masks: MaskBatch, num_tokens: int) -> dict[str, np.ndarray]:
    return module.indices(
        masks.context, masks.context_lengths, masks.targets, masks.target_lengths, masks.num_targets, num_tokens
    )


def indices_by_numpy(masks: MaskBatch, num_tokens: int) -> dict[str, np.ndarray]:
    """What of a MaskPlan follows from the masks alone; csrc/jepa_fast/packing.cpp gives the same."""
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
    is_target = np.repeat(np.tile([False, True], len(sequence_image)), lengths)
    return {
        "context_rows": image_of_context * num_tokens + masks.context,
        "context_cu": _cu(masks.context_lengths),
        "target_rows": image_of_target * num_tokens + masks.targets,
        "target_weight": (1.0 / (num_images * target_totals[image_of_target])).astype(np.float32),
        "predictor_order": _ranges(begins, lengths),
        "predictor_targets": np.flatnonzero(is_target),
        "predictor_cu": _cu(context_part + target_part),
        "target_cu": _cu(target_part),
    }


def _check(masks: MaskBatch, num_tokens: int) -> None:
    for what, lengths in (("context", masks.context_lengths), ("target", masks.target_lengths)):
        if not len(lengths) or lengths.min() < 1:
            raise ValueError(
                f"image {int(lengths.argmin()) if len(lengths) else 0} has no {what} tokens; every image needs one"
            )
    for what, tokens in (("context", masks.context), ("target", masks.targets)):
        if tokens.min() < 0 or tokens.max() >= num_tokens:
            raise ValueError(f"{what} tokens are {tokens.min()} to {tokens.max()}; an image has 0 to {num_tokens - 1}")


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _cu(lengths: np.ndarray) -> np.ndarray:
    return _starts(lengths).astype(np.int32)


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """concatenate(arange(b, b + n) for b, n in zip(begins, lengths)), without the loop."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(begins - (ends - lengths), lengths)
