"""Controlled perturbation of the context encoder: noise that pushes it away from the target encoder."""

import torch
from torch import Tensor, nn

from fused_ema.op import local
from jepa_fast.config import Perturb


@torch.no_grad()
def perturb(encoder: nn.Module, config: Perturb, seed: int, step: int, gate: Tensor | None = None) -> None:
    """Add noise * std(W) * N(0, 1) to every weight matrix W, if it is due after optimizer step `step`.

    The noise is a function of (seed, step): the same on every process, and after a resume. A sharded matrix is taken
    shard by shard. Where `gate` (bool, on the device) is False the weights stay bit-identical, as in the EMA.
    """
    if not config.noise or step % config.every or (config.until and step >= config.until):
        return
    weights = [local(p) for p in encoder.parameters() if p.requires_grad and p.ndim > 1]
    generator = torch.Generator(weights[0].device).manual_seed((seed << 32) + step)
    for weight in (w for w in weights if w.numel() > 1):
        noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
        moved = torch.addcmul(weight, noise, weight.std(), value=config.noise)
        weight.copy_(moved if gate is None else torch.where(gate, moved, weight))
