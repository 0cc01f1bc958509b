"""The training objective on fixed inputs under fixed masks: a loss that inputs, masks and augmentation do not move.

In: a JEPA and inputs that it does not train on. Out: a loss. No gradient, no random number, no word to other processes
(but those that sharded weights need), and nothing in the model changes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from jepa_fast.config import Config
from jepa_fast.masks.packing import MaskPlan
from jepa_fast.model.jepa import JEPA, token_loss
from jepa_fast.model.targets import centred_by_own, regress
from jepa_fast.monitor.fixed_masks import FixedMasks

CHUNK = 64  # inputs of one forward; statistics over inputs, where the targets need any, are of so many


class Seen(NamedTuple):
    loss: Tensor  # float32 scalar, as JEPA.forward gives it
    targets: Tensor  # float32 [B, N, D], what the loss compares with; of patches [B, N, P] if it predicts them
    context: (
        Tensor  # float32 [Tc, D], features of the visible tokens (or [Tc, P], the tokens), normalised like the targets
    )
    centred: bool  # whether the targets have mean 0 at each position by construction


@torch.no_grad()
def objective(jepa: JEPA, inputs: Tensor, plan: MaskPlan) -> Seen:
    """JEPA.forward for inputs [B, ...] that are no part of the training."""
    patches = jepa.context_encoder.tokenizer(inputs)  # [B, N, P]
    target = jepa.target_encoder.encode(patches)  # [B, N, D]
    wanted = patches if jepa.pixels else target
    statistics = jepa.targets.statistics_apart(wanted)
    targets = jepa.targets(wanted, statistics)
    visible = patches.flatten(0, 1).index_select(0, plan.context_rows)  # [Tc, P]
    context = jepa.context_encoder.encode_packed(
        visible, plan.context_index, plan.context_cu, plan.context_max
    )  # [Tc, D]
    hidden = targets.flatten(0, 1).index_select(0, plan.target_rows)  # [Tt, D]
    loss = (plan.target_weight * token_loss(jepa.predictor.packed(context, plan), hidden, jepa.loss)).sum()
    alike = regress(visible if jepa.pixels else context, jepa.target_norm, statistics, positions=plan.context_index)
    return Seen(loss, targets, alike, centred_by_own(jepa.target_norm, statistics))


class HeldOut:
    """`loss/heldout` of a JEPA, whichever inputs it is given: the masks are those of the run's first step, the same always."""

    def __init__(self, jepa: JEPA, config: Config):
        self.jepa, self.masks = jepa, FixedMasks(config)

    def __call__(self, inputs: Tensor) -> float:
        """Mean over inputs [n, ...], on the device that they are to be seen on."""
        total = torch.zeros((), device=inputs.device)
        for view, part in enumerate(inputs.tensor_split(math.ceil(len(inputs) / CHUNK))):
            seen = objective(self.jepa, part, self.masks.plan(len(part), view).to(inputs.device))
            total += seen.loss * len(part)
        return float(total / len(inputs))
