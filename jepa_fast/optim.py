"""AdamW over context encoder and predictor, and the step that refuses non-finite gradients.

The check and the decision stay on the device: a bad step leaves weights, moments and step counters
as they were (fused AdamW's `found_inf`), and the caller gets the verdict as a device tensor. Where
parameters are sharded each process checks and clips its own shards, and one small all-reduce makes
the norm and the verdict those of all.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jepa_fast.config import Optim


def build(module: nn.Module, config: Optim) -> torch.optim.AdamW:
    """AdamW on what requires gradients. Biases and 1-D parameters are not decayed, unless `decay_vectors`.

    What belongs to the predictor has `predictor_lr` times the learning rate.
    """
    groups: list[dict] = [
        {"params": [], "decays": decays, "factor": factor}
        for factor in dict.fromkeys((1.0, config.predictor_lr))
        for decays in (True, False)
    ]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 or config.decay_vectors
            factor = config.predictor_lr if name.startswith("predictor.") else 1.0
            next(g for g in groups if (g["decays"], g["factor"]) == (decays, factor))["params"].append(parameter)
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def step_if_finite(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float = 0.0) -> Tensor:
    """One optimizer step, or none if the loss or the gradient norm is not finite on any process.

    Returns whether it was made: a bool scalar on the device, the same on all processes. No host synchronisation.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm, finite = _judge(gradients, loss.detach())
    shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if clip:
        torch._foreach_mul_(shards, torch.clamp(clip / (norm + 1e-6), max=1.0).float())
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # read by fused AdamW
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return finite


def _judge(gradients: list[Tensor], loss: Tensor) -> tuple[Tensor, Tensor]:
    """(norm of the whole gradient, float64; whether it and every process's loss are finite)."""
    shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norms = torch._foreach_norm([s for s in shards if s.numel()])
    square = torch.stack(norms).double().square().sum() if norms else loss.new_zeros((), dtype=torch.float64)
    both = torch.stack([square, (~torch.isfinite(loss)).double()])
    first = gradients[0]
    if isinstance(first, DTensor):
        mesh = first.device_mesh
        dist.all_reduce(both, group=mesh.get_group(mesh.ndim - 1))  # over the shards of one copy
        if mesh.ndim > 1:  # copies hold the same gradient, but each has seen losses of its own
            dist.all_reduce(both[1:], group=mesh.get_group(0))
    elif dist.is_initialized():
        dist.all_reduce(both[1:])
    norm = both[0].sqrt()
    return norm, torch.isfinite(norm) & (both[1] == 0)


def moments(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """{'<parameter>.<moment>': tensor}: all that AdamW remembers, the tensors themselves; zeros before the first step."""
    held: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            held |= {f"{name}.{moment}": value for moment, value in state.items()}
    return held
