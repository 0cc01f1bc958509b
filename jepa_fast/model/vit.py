"""The encoder: a pre-LN Vision Transformer on packed tokens, for images and for series.

No class token, fixed sin-cos positions, final LayerNorm. Masked patches are dropped before anything is computed on
them, so hidden pixels cost nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from jepa_fast.model.attention import Attention, Sequences, uses_varlen
from jepa_fast.model.tokens import Tokenizer, sincos_table

# Shape legend: B images, N tokens of a full image, K kept tokens, T packed tokens, P numbers in a patch, D width.


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-LN transformer block on packed tokens [T, D]."""

    recompute = "none"  # in the backward: nothing; `selective`, all but products and attention; `full`, everything

    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, round(width * mlp_ratio))

    def forward(
        self, x: Tensor, sequences: Sequences, rows: Tensor | None = None, queries: Sequences | None = None
    ) -> Tensor:
        """[T, D] -> [T, D]; or, given int64 rows [R] and how they divide into sequences, those rows alone: -> [R, D]."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._forward(x, sequences, rows, queries)
        kept: dict[str, Any] = {"context_fn": _keep_products} if self.recompute == "selective" else {}
        return checkpoint(self._forward, x, sequences, rows, queries, use_reentrant=False, **kept)

    def _forward(self, x: Tensor, sequences: Sequences, rows: Tensor | None, queries: Sequences | None) -> Tensor:
        if rows is None or queries is None:
            x = x + self.attn(self.norm1(x), sequences)
        else:
            x = x.index_select(0, rows) + self.attn.of_rows(self.norm1(x), sequences, rows, queries)
        return x + self.mlp(self.norm2(x))


def _keep_products():
    """For `checkpoint`: matrix products and attention are kept, what lies between them (norms, GELU, sums) is not."""
    aten = torch.ops.aten
    costly = {
        aten.addmm.default, aten.mm.default, aten.linear.default,
        aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    }  # fmt: skip

    def policy(_context, op, *_args, **_kwargs):
        keep = op in costly or op.namespace in ("torch_attn", "flash_attn")
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Encoder(nn.Module):
    """f_theta (context encoder) and g_theta_bar (target encoder): patches -> features of the same tokens."""

    positions: Tensor

    def __init__(
        self, tokenizer: Tokenizer, grid: tuple[int, ...], patch_dim: int, *,
        width: int, depth: int, heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6, residual: str = "fp32",
    ):  # fmt: skip
        super().__init__()
        self.tokenizer = tokenizer
        self.grid = grid
        self.head_width = width // heads
        self.residual = residual  # fp32 (whatever the products are in), or bf16 under autocast
        self.patch_embed = nn.Linear(patch_dim, width)
        self.register_buffer("positions", sincos_table(grid, width), persistent=False)  # [N, D]
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)

    @property
    def width(self) -> int:
        return self.norm.normalized_shape[0]

    def forward(self, inputs: Tensor, keep: Tensor | None = None) -> Tensor:
        """Features of whole inputs, or of the kept tokens only.

        inputs: float or uint8 [B, C, H, W], or float [B, C, L]; any size that the patch divides. keep: int64 [B, K]
        token numbers, no repeats in a row. Returns [B, N, D] or [B, K, D].
        Raises ValueError if `keep` is out of range or repeats a token, or the inputs are not cut into patches as the
        encoder's were: other channels, a patch that does not divide the image, a series of another patch length.
        """
        grid = self.tokenizer.grid(inputs)
        table = self.positions if grid == self.grid else self._table(grid)
        if keep is None:
            return self._dense(self.tokenizer(inputs), table.expand(len(inputs), -1, -1))
        check_index("keep", keep, len(inputs), len(table))
        return self._dense(self.tokenizer(inputs, keep), table[keep])

    def encode(self, patches: Tensor) -> Tensor:
        """Features of all patches [B, N, P] of inputs of the configured size: -> [B, N, D]."""
        return self._dense(patches, self.positions.expand(len(patches), -1, -1))

    def packed(self, patches: Tensor, positions: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        """Features of packed tokens: patches [T, P], positions int64 [T], cu_seqlens int32 [B + 1] -> [T, D].

        Raises ValueError, on a CPU, where these do not fit together; elsewhere looking would be a synchronisation.
        """
        check_packed(patches, positions, cu_seqlens, max_len, len(self.positions))
        return self.encode_packed(patches, positions, cu_seqlens, max_len)

    def encode_packed(
        self, patches: Tensor, positions: Tensor, cu_seqlens: Tensor, max_len: int, bucket: int = 0,
        spare: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`packed` of a plan's tokens, which fit together: it reads nothing back.

        bucket: the blocks run on that many rows (at least T, 0: on T), which changes no feature and keeps shapes static.
        spare: int32, where each sequence of the rows behind the tokens ends.
        """
        x = self._enter(self._embed(patches) + self.positions[positions])
        varlen = uses_varlen(x, self.head_width)
        sequences = Sequences.of(cu_seqlens, max_len, len(x), bucket, varlen, spare=spare)
        return self._leave(self._run(pad_rows(x, bucket), sequences)[: len(x)])

    def _dense(self, patches: Tensor, positions: Tensor) -> Tensor:
        """patches [B, K, P], positions [B, K, D] -> [B, K, D]."""
        b, k, _ = patches.shape
        x = self._enter(self._embed(patches) + positions)
        x = self._run(x.view(b * k, -1), Sequences.equal(b, k, x.device))
        return self._leave(x).view(b, k, -1)

    def _embed(self, patches: Tensor) -> Tensor:
        if patches.shape[-1] != self.patch_embed.in_features:
            raise ValueError(
                f"patches of {patches.shape[-1]} numbers, channels included: this encoder was built for "
                f"{self.patch_embed.in_features}; give inputs with its channels (and, of series, its length)"
            )
        embedded: Tensor = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        return embedded

    def _enter(self, x: Tensor) -> Tensor:
        """Into the residual stream."""
        return x.bfloat16() if self.residual == "bf16" and torch.is_autocast_enabled(x.device.type) else x

    def _leave(self, x: Tensor) -> Tensor:
        """Out of the residual stream: features in the precision of the weights, for targets are compared in float32."""
        return self.norm(x.to(self.norm.weight.dtype))

    def _run(self, x: Tensor, sequences: Sequences) -> Tensor:
        for block in self.blocks:
            x = block(x, sequences)
        return x

    def _table(self, grid: tuple[int, ...]) -> Tensor:
        if len(grid) != len(self.grid):
            raise ValueError(f"inputs with a grid of {grid}: this encoder was built for {self.grid}")
        return sincos_table(grid, self.width, self.grid).to(self.positions)


def pad_rows(x: Tensor, bucket: int) -> Tensor:
    """[T, D] -> [bucket, D] with zero rows behind; x itself if bucket is 0."""
    return F.pad(x, (0, 0, 0, bucket - len(x))) if bucket > len(x) else x


def check_index(name: str, index: Tensor, batch: int, tokens: int) -> None:
    """Raises ValueError unless `index` is int64 [batch, K] of different token numbers below `tokens` in each row."""
    what = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else f"a {type(index).__name__}"
    if not isinstance(index, Tensor) or index.dim() != 2 or index.dtype != torch.int64:
        raise ValueError(f"{name} must be an int64 tensor [{batch}, K] of token numbers; it is {what}")
    if index.shape[0] != batch or index.shape[1] == 0:
        raise ValueError(f"{name} must be int64 [{batch}, K] token numbers, K at least 1; it is {what}")
    if (
        index.device.type != "cpu"
    ):  # there the check would be a synchronisation, and gathers assert the range themselves
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= tokens:
        raise ValueError(f"{name} holds token {low if low < 0 else high}; an input has tokens 0 to {tokens - 1}")
    twice = (index.sort(1).values.diff(dim=1) == 0).any(1)
    if twice.any():
        raise ValueError(f"{name} names a token twice in row {int(twice.nonzero()[0])}; give every token once")


def check_packed(patches: Tensor, positions: Tensor, cu_seqlens: Tensor, max_len: int, tokens: int) -> None:
    """Raises ValueError unless T patches have T positions below `tokens`, in sequences that end at T, none over max_len."""
    total = len(patches)
    if not total or positions.shape != (total,):
        raise ValueError(
            f"{total} packed patches and positions of {list(positions.shape)}: give one of each for every visible token"
        )
    if positions.device.type != "cpu":
        return
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= tokens:
        raise ValueError(f"positions hold token {low if low < 0 else high}; an input has tokens 0 to {tokens - 1}")
    lengths = cu_seqlens.diff().tolist()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or min(lengths) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to the {total} packed tokens; it is {cu_seqlens.tolist()[:12]}")
    if max(lengths) > max_len:
        raise ValueError(f"max_len is {max_len}, but a sequence has {max(lengths)} tokens; give the longest or more")
