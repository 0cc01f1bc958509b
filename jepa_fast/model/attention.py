"""Self-attention over packed sequences, one backend for the whole run.

T tokens of S sequences lie in one [T, ...] tensor; `cu_seqlens` says where each begins. Sequences of equal length
are a plain batch for SDPA. Ragged ones go to a variable-length flash kernel on CUDA in half precision; on a CPU to
SDPA one length at a time, if they are long enough for that; elsewhere to SDPA on a padded batch with a key mask
(benchmarks/bench_attention.py compares them). Which one is settled when `Sequences` is made, once a forward, so that
nothing inside a block depends on it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shape legend: T packed tokens, Tq of them that ask, S sequences, n longest sequence, H heads, d head width, D = H * d.

HALF = (torch.float16, torch.bfloat16)
LONG = (
    64  # tokens of neighbouring sequences of equal length from which a call of their own beats a padded batch's share
)


@dataclass(frozen=True)
class Sequences:
    """How T packed tokens divide into S sequences. A bucket may be longer than its tokens: see `of`."""

    cu_seqlens: Tensor  # int32 [S + 1], or [S + 1 + spare sequences]
    count: int  # S
    max_len: int  # n, or a bound on it
    uniform: bool  # every sequence has max_len tokens: the packed tensor is a dense batch
    slots: Tensor | None = (
        None  # int64 [T], a token's row in the padded [S * n] layout; None: dense, or a varlen kernel
    )
    mask: Tensor | None = None  # bool [S, 1, 1, n], which slots hold a token
    lengths: tuple[int, ...] | None = None  # of the S sequences, where each length is to have a call of its own
    varlen: bool = False  # for a variable-length kernel

    @staticmethod
    def of(
        cu_seqlens: Tensor, max_len: int, total: int, bucket: int = 0, varlen: bool = False, compiled: bool = False,
        spare: Tensor | None = None,
    ) -> "Sequences":  # fmt: skip
        """From cumulative lengths [S + 1], a bound on the longest, and the number of tokens; no host synchronisation.

        bucket: length of the packed tensor where it is longer than its `total` tokens (0: it is not). The rows behind
        the tokens form sequences of their own, so that no token sees them; spare: int32, where each of those ends, for
        varlen. varlen: for a variable-length kernel. compiled: for a block that must not depend on the lengths
        themselves, as in a bucket it never does.
        """
        count = cu_seqlens.numel() - 1
        length = bucket or total
        if count * max_len == total == length:
            return Sequences(cu_seqlens, count, max_len, uniform=True)
        device = cu_seqlens.device
        if varlen:
            if spare is not None and spare.numel():
                cu_seqlens = torch.cat([cu_seqlens, spare])
            return Sequences(cu_seqlens, count, max_len, uniform=False, varlen=True)
        if not bucket and not compiled and device.type == "cpu":
            lengths = tuple(cu_seqlens.diff().tolist())
            if sum(1 for _ in groupby(lengths)) * LONG <= total:
                return Sequences(cu_seqlens, count, max_len, uniform=False, lengths=lengths)
        starts = cu_seqlens[:-1].long()
        sequence = torch.repeat_interleave(cu_seqlens.diff().long(), output_size=total)
        shift = torch.arange(count, device=device) * max_len - starts
        slots = torch.arange(total, device=device) + shift[sequence]
        slots = F.pad(slots, (0, length - total), value=count * max_len)  # rows behind the tokens: one slot too far
        held = torch.zeros(count * max_len + 1, dtype=torch.bool, device=device).index_fill_(0, slots, True)
        mask = held[:-1].view(count, 1, 1, max_len)
        return Sequences(cu_seqlens, count, max_len, uniform=False, slots=slots, mask=mask)

    @staticmethod
    def equal(count: int, length: int, device: torch.device) -> "Sequences":
        """`count` sequences of `length` tokens."""
        cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device=device) * length
        return Sequences(cu_seqlens, count, length, uniform=True)

    def batch(self, x: Tensor) -> Tensor:
        """[T, H, d] -> [S, H, n, d], zeros where there is no token."""
        if self.slots is not None:
            empty = x.new_zeros(self.count * self.max_len + 1, *x.shape[1:])
            x = empty.index_copy(0, self.slots, x)[:-1]
        return x.view(self.count, self.max_len, *x.shape[1:]).transpose(1, 2)

    def unbatch(self, x: Tensor) -> Tensor:
        """[S, H, n, d] -> [T, H, d]; rows behind the tokens hold some finite value."""
        flat = x.transpose(1, 2).reshape(self.count * self.max_len, x.shape[1], x.shape[3])
        return flat if self.slots is None else flat.index_select(0, self.slots.clamp(max=len(flat) - 1))


# ---- the backend: chosen once, when this module is loaded ---------------------------------------


def _find_varlen() -> tuple[str, Callable[..., Any] | None, str]:
    """(name, kernel, reason) of the variable-length kernel. Both take (q, k, v, cu_q, cu_k, max_q, max_k).

    Later arguments differ between versions, and are left at their defaults: scale 1 / sqrt(d), not causal, no dropout.
    """
    if not torch.cuda.is_available():
        return "sdpa", None, "no CUDA device: padded batches"
    try:
        from flash_attn import flash_attn_varlen_func

        return "flash_attn", flash_attn_varlen_func, "flash-attn is installed"
    except ImportError as error:  # also where it was built for another torch
        absent = "" if isinstance(error, ModuleNotFoundError) else f"; flash-attn cannot be loaded ({error})"
    try:
        from torch.nn.attention.varlen import varlen_attn

        return "varlen_attn", varlen_attn, f"torch's variable-length attention{absent}"
    except ImportError:
        return "sdpa", None, f"this torch has no variable-length kernel{absent or ' and flash-attn is not installed'}"


_NAME, _VARLEN, _REASON = _find_varlen()


@cache
def choose_backend(device: torch.device, half: bool) -> tuple[str, str]:
    """(backend for ragged sequences, reason), for the log; on every process, before the first forward.

    Backends: flash_attn, varlen_attn, sdpa. Switches torch to FlashAttention 3 where that is built for this GPU.
    """
    if device.type != "cuda" or _VARLEN is None:
        return "sdpa", _REASON if device.type == "cuda" else "no CUDA device: padded batches"
    if not half:
        return "sdpa", "fp32: the variable-length kernels take fp16 and bf16 only"
    if not _has_flash(device):
        return "sdpa", "a GPU before Ampere: the variable-length kernels need compute capability 8.0"
    if _NAME != "varlen_attn":
        return _NAME, _REASON
    flash = "FlashAttention 2"
    if torch.cuda.get_device_capability(device)[0] == 9:
        flash = _activate_flash3()
    if (cudnn := _torch_takes_cudnn(device)) is None:
        return _NAME, f"{_REASON}: {flash}"
    return _NAME, f"{_REASON}: {cudnn} where a sequence may have over {CUDNN_FROM} queries, else {flash}"


CUDNN_FROM = 128  # queries of the longest sequence, beyond which torch 2.14 and later leave FlashAttention for cuDNN


def _torch_takes_cudnn(device: torch.device) -> str | None:
    """cuDNN and its version, if this torch's varlen_attn calls it for long sequences on this GPU."""
    from torch.nn.attention import varlen

    asks = getattr(varlen, "_should_use_cudnn", None)  # from torch 2.14
    index = torch.cuda.current_device() if device.index is None else device.index
    if asks is None or not asks(index):
        return None
    version = torch.backends.cudnn.version() or 0
    return f"cuDNN {version // 10000}.{version // 100 % 100}"


def _activate_flash3() -> str:
    """Switch torch's flash kernels to FlashAttention 3, and say what came of it."""
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
        return "FlashAttention 3"
    except (
        Exception
    ) as error:  # not built, built without its backward, or a torch that cannot: all leave FlashAttention 2
        return f"FlashAttention 2 (3 is not available: {str(error).splitlines()[0]})"


def uses_varlen(x: Tensor, head_width: int) -> bool:
    """Whether attention on the features x goes to a variable-length kernel; else ragged sequences are padded for SDPA.

    The kernels take half precision on CUDA, from Ampere on, and heads of 8, 16, ... 256 features.
    """
    half = x.dtype in HALF or torch.is_autocast_enabled("cuda")
    return (
        _VARLEN is not None
        and x.is_cuda
        and half
        and head_width % 8 == 0
        and head_width <= 256
        and _has_flash(x.device)
    )


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, queries: Sequences, keys: Sequences) -> Tensor:
    """softmax(q k^T / sqrt(d)) v inside each sequence: q [Tq, H, d], k and v [T, H, d] -> [Tq, H, d]."""
    if queries.varlen or keys.varlen:  # one of them may be uniform
        assert _VARLEN is not None
        # Of self-attention both are one tensor, and a compiled autograd.Function takes no tensor twice: a view is another.
        return _VARLEN(q, k, v, queries.cu_seqlens, keys.cu_seqlens.view(-1), queries.max_len, keys.max_len)
    if keys.lengths is not None or queries.lengths is not None:  # one of them may be uniform, or too ragged for it
        return _length_by_length(q, k, v, queries, keys)
    out = F.scaled_dot_product_attention(queries.batch(q), keys.batch(k), keys.batch(v), attn_mask=keys.mask)
    return queries.unbatch(out)


def _length_by_length(q: Tensor, k: Tensor, v: Tensor, queries: Sequences, keys: Sequences) -> Tensor:
    """A call for each run of neighbouring sequences with equally many queries and keys, without padding or mask."""
    asking, answering = (each.lengths or tuple(each.cu_seqlens.diff().tolist()) for each in (queries, keys))
    runs = [(*pair, len(list(same))) for pair, same in groupby(zip(asking, answering, strict=True))]
    of_queries, of_keys = [n * count for n, _, count in runs], [n * count for _, n, count in runs]
    out = []
    for (_, _, count), *parts in zip(runs, q.split(of_queries), k.split(of_keys), v.split(of_keys), strict=True):
        batch = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in parts)  # [count, H, n, d]
        out.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


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
        return self.proj(attend(q, k, v, sequences, sequences).flatten(1))

    def of_rows(self, x: Tensor, sequences: Sequences, rows: Tensor, queries: Sequences) -> Tensor:
        """As forward, for rows [Tq] of x only, whose sequences are `queries`: -> [Tq, D]. Every token is still a key."""
        width = x.shape[1]
        weight, bias = self.qkv.weight.split([width, 2 * width]), self.qkv.bias.split([width, 2 * width])
        q = F.linear(x.index_select(0, rows), weight[0], bias[0]).view(len(rows), self.heads, -1)
        k, v = F.linear(x, weight[1], bias[1]).view(len(x), 2, self.heads, -1).unbind(1)
        return self.proj(attend(q, k, v, queries, sequences).flatten(1))
