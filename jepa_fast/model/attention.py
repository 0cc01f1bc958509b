"""Self-attention over packed sequences, one backend for the whole run.

T tokens of S sequences lie in one [T, ...] tensor; `cu_seqlens` says where each begins. Sequences of
equal length are a plain batch for SDPA. Ragged ones go to a variable-length flash kernel on CUDA in
half precision, and elsewhere to SDPA on a padded batch with a key mask (measured fastest on CPU).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shape legend: T packed tokens, S sequences, n longest sequence, H heads, d head width, D = H * d.


@dataclass(frozen=True)
class Sequences:
    """How T packed tokens divide into S sequences."""

    cu_seqlens: Tensor  # int32 [S + 1]
    max_len: int
    slots: Tensor | None  # int64 [T], row of each token in a padded [S * max_len] layout; None: all lengths are equal

    @property
    def count(self) -> int:
        return self.cu_seqlens.numel() - 1

    @staticmethod
    def of(cu_seqlens: Tensor, max_len: int, total: int) -> "Sequences":
        """From the cumulative lengths, the longest one and the number of tokens; no host synchronisation."""
        count = cu_seqlens.numel() - 1
        if count * max_len == total:
            return Sequences(cu_seqlens, max_len, None)
        starts = cu_seqlens[:-1].long()
        sequence = torch.repeat_interleave(cu_seqlens.diff().long(), output_size=total)
        slots = (
            torch.arange(total, device=cu_seqlens.device)
            + (torch.arange(count, device=starts.device) * max_len - starts)[sequence]
        )
        return Sequences(cu_seqlens, max_len, slots)

    @staticmethod
    def uniform(count: int, length: int, device: torch.device) -> "Sequences":
        """`count` sequences of `length` tokens."""
        return Sequences(torch.arange(count + 1, dtype=torch.int32, device=device) * length, length, None)


def choose_backend(device: torch.device, half: bool) -> tuple[str, str]:
    """(backend for ragged sequences, reason), for the log. Backends: flash_attn, varlen_attn, sdpa."""
    if device.type != "cuda":
        return "sdpa", "no CUDA device: padded batches"
    if not half:
        return "sdpa", "fp32: the variable-length kernels take fp16 and bf16 only"
    if _flash_attn_varlen() is not None:
        return "flash_attn", "flash-attn is installed"
    if _torch_varlen() is not None:
        return "varlen_attn", "torch's variable-length flash kernel"
    return "sdpa", "this torch has no variable-length kernel and flash-attn is not installed"


def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """softmax(q k^T / sqrt(d)) v inside each sequence; q, k, v and the result [T, H, d]."""
    if sequences.slots is None:
        return _sdpa_uniform(q, k, v, sequences)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        varlen = _flash_attn_varlen() or _torch_varlen()
        if varlen is not None:  # both take (q, k, v, cu_q, cu_k, max_q, max_k); later arguments differ between versions
            cu, longest = sequences.cu_seqlens, sequences.max_len
            return varlen(q, k, v, cu, cu, longest, longest)
    return _sdpa_padded(q, k, v, sequences)


def _sdpa_uniform(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    count, length = sequences.count, sequences.max_len
    bq, bk, bv = (x.reshape(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # [S, H, n, d]
    return F.scaled_dot_product_attention(bq, bk, bv).transpose(1, 2).reshape(q.shape)


def _sdpa_padded(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    count, length, slots = sequences.count, sequences.max_len, sequences.slots
    assert slots is not None
    pq, pk, pv = (_pad(x, slots, count, length) for x in (q, k, v))  # [S, H, n, d]
    real = torch.zeros(count * length, dtype=torch.bool, device=q.device).index_fill_(0, slots, True)
    out = F.scaled_dot_product_attention(pq, pk, pv, attn_mask=real.view(count, 1, 1, length))
    return out.transpose(1, 2).reshape(count * length, *q.shape[1:])[slots]


def _pad(x: Tensor, slots: Tensor, count: int, length: int) -> Tensor:
    empty = x.new_zeros(count * length, *x.shape[1:])
    return empty.index_copy(0, slots, x).view(count, length, *x.shape[1:]).transpose(1, 2)


@cache
def _flash_attn_varlen() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def _torch_varlen() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


class Attention(nn.Module):
    """Multi-head self-attention on packed tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """[T, D] -> [T, D]."""
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # each [T, H, d]
        return self.proj(attend(q, k, v, sequences).reshape(x.shape))
