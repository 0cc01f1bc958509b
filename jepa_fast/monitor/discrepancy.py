"""What the two encoders make of the same tokens: the paper's discrepancy, and what to read it against.

In: features that the training step computed anyway. Out: scalars on the device; nothing here
synchronises.
"""

import torch
from torch import Tensor, nn

from jepa_fast.model.jepa import token_loss

# Shape legend: B images, N tokens of one, Tc visible tokens of the batch, D width.


def discrepancy(context: Tensor, target: Tensor) -> Tensor:
    """C of equation 3: mean over tokens of ||f(x)_i - g(x_hat)_i||, features [T, D] of the same tokens."""
    return (context.float() - target.float()).norm(dim=-1).mean()


def instance_spread(target: Tensor) -> Tensor:
    """Mean over images and positions of ||g(x)_i - mean_x g(x)_i||, features [B, N, D], B > 1.

    Near 0 the encoder says the same of every image. Corrected for the mean being the batch's own.
    """
    target = target.float()
    b = target.shape[0]
    deviation = (target - target.mean(0, keepdim=True)).norm(dim=-1).mean()
    return deviation * (b / max(1, b - 1)) ** 0.5


def predictor_skill(loss: Tensor, regression_target: Tensor, rows: Tensor, weight: Tensor, kind: str) -> Tensor:
    """1 - loss / loss of the best constant predictor of each position; below 0 the predictor is worse than that.

    regression_target [B, N, D] is what the loss compares with, rows and weight the tokens it is taken at
    (MaskPlan.target_rows, target_weight). The constant is fitted on the batch itself and its loss
    corrected by B / (B - 1), which is exact for `l2`.
    """
    b = regression_target.shape[0]
    constant = _best_constant(regression_target, kind)  # [1, N, D]
    each = token_loss(constant.expand_as(regression_target), regression_target, kind).flatten()  # [B * N]
    return 1 - loss.detach() / ((weight @ each[rows]) * b / max(1, b - 1))


def _best_constant(target: Tensor, kind: str) -> Tensor:
    if kind == "l1":
        return target.median(0, keepdim=True).values
    constant = target.mean(0, keepdim=True)
    if kind == "smooth_l1":
        for _ in range(
            3
        ):  # reweighted means converge on the Huber location; three are within 1e-3 on layer-normed features
            weight = 1 / (target - constant).abs().clamp(min=1)
            constant = (weight * target).sum(0, keepdim=True) / weight.sum(0, keepdim=True)
    return constant


@torch.no_grad()
def full_discrepancy(context_encoder: nn.Module, target_encoder: nn.Module, inputs: Tensor) -> Tensor:
    """||f(x_hat)_i - g(x_hat)_i|| on whole inputs, mean over tokens: the second term of equation 4."""
    return discrepancy(context_encoder(inputs).flatten(0, 1), target_encoder(inputs).flatten(0, 1))
