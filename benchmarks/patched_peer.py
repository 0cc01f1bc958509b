"""facebookresearch/ijepa as its users could make it in an afternoon: SDPA, compiled blocks, a foreach EMA.

Patched at run time on modules made from a checkout's own files, given by path; none of its code is in this tree. What
is relied on: an attention module has `qkv`, `proj`, `num_heads` and returns (output, weights); its block ignores the
weights; an encoder keeps its blocks in `blocks`, the predictor in `predictor_blocks`.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patch(encoder: nn.Module, target: nn.Module, predictor: nn.Module, compiled: bool) -> None:
    """Attention through SDPA in all three, and every block compiled (static shapes: the masks of a run are cut)."""
    for module in (encoder, target, predictor):
        blocks = module.predictor_blocks if hasattr(module, "predictor_blocks") else module.blocks
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            block.attn.forward = MethodType(_sdpa, block.attn)
            if compiled:
                block.compile(dynamic=False)


def _sdpa(self: nn.Module, x: Tensor) -> tuple[Tensor, None]:
    batch, count, width = x.shape
    q, k, v = self.qkv(x).view(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
    out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
    return self.proj(out.transpose(1, 2).reshape(batch, count, width)), None


@torch.no_grad()
def foreach_ema(target: nn.Module, encoder: nn.Module, decay: float) -> None:
    """One fused pass where the peer makes three a tensor."""
    torch._foreach_lerp_(list(target.parameters()), list(encoder.parameters()), 1 - decay)
