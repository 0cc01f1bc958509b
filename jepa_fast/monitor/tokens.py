"""Which tokens a loop means, however it says so: index tensors of several shapes -> rows of [B * N]."""

from collections.abc import Sequence

import torch
from torch import Tensor

Tokens = Tensor | Sequence[Tensor] | None
"""int64 [B, K], token numbers of each input (or a list of such, as I-JEPA keeps its masks); bool [B, N]; or
int64 [T], rows of the flattened [B * N]. None: all."""


def as_tokens(features: Tensor, name: str) -> Tensor:
    """[B, N, D] as it is; [B, D] (one feature an input) as [B, 1, D]."""
    if features.ndim == 2:
        return features.unsqueeze(1)
    if features.ndim != 3:
        raise ValueError(f"{name} features are {list(features.shape)}; give [B, N, D] or [B, D]")
    return features


def rows_of(tokens: Tokens, batch: int, num_tokens: int, device: torch.device) -> Tensor:
    """int64 [T]. Raises ValueError or TypeError on tensors that are none of the above."""
    if tokens is None:
        return torch.arange(batch * num_tokens, device=device)
    if not isinstance(tokens, Tensor):
        return torch.cat([rows_of(part, batch, num_tokens, device) for part in tokens])
    tokens = tokens.to(device)
    if tokens.dtype == torch.bool:
        if tokens.shape != (batch, num_tokens):
            raise ValueError(f"a bool mask of tokens must be [{batch}, {num_tokens}], got {list(tokens.shape)}")
        return tokens.flatten().nonzero().squeeze(1)
    if tokens.is_floating_point() or tokens.ndim not in (1, 2):
        raise TypeError(f"token numbers must be integers [B, K] or [T], got {tokens.dtype} {list(tokens.shape)}")
    if tokens.ndim == 1:
        return tokens.long()
    if tokens.shape[0] != batch:
        raise ValueError(f"token numbers are {list(tokens.shape)} for a batch of {batch} inputs")
    return (tokens.long() + num_tokens * torch.arange(batch, device=device).unsqueeze(1)).flatten()
