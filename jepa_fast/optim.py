"""AdamW over context encoder and predictor, and the step that refuses non-finite gradients.

The check and the decision stay on the device: a bad step leaves weights, moments and step counters
as they were (fused AdamW's `found_inf`), and the caller gets the verdict as a device tensor.
"""

import torch
from torch import Tensor, nn

from jepa_fast.config import Optim


def build(module: nn.Module, config: Optim) -> torch.optim.AdamW:
    """AdamW on what requires gradients. Biases and 1-D parameters are not decayed, unless `decay_vectors`."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 or config.decay_vectors else plain).append(parameter)
    groups = [{"params": decayed, "decays": True}, {"params": plain, "decays": False}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def step_if_finite(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float = 0.0) -> Tensor:
    """One optimizer step, or none if the loss or the gradient norm is not finite.

    Returns whether it was made: a bool scalar on the device.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    finite = torch.isfinite(norm) & torch.isfinite(loss.detach())
    if clip:
        torch._foreach_mul_(gradients, torch.clamp(clip / (norm + 1e-6), max=1.0))
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # read by fused AdamW
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite
