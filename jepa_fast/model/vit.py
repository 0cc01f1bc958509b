"""The encoder: a pre-LN Vision Transformer on packed tokens, for images and for series.

No class token, fixed sin-cos positions, final LayerNorm. Masked patches are dropped before the patch
embedding, so hidden pixels cost nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast.model.attention import Attention, Sequences
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

    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, round(width * mlp_ratio))

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        x = x + self.attn(self.norm1(x), sequences)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """f_theta (context encoder) and g_theta_bar (target encoder): patches -> features of the same tokens."""

    positions: Tensor

    def __init__(
        self, tokenizer: Tokenizer, grid: tuple[int, ...], patch_dim: int, *,
        width: int, depth: int, heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6,
    ):  # fmt: skip
        super().__init__()
        self.tokenizer = tokenizer
        self.patch_embed = nn.Linear(patch_dim, width)
        self.register_buffer("positions", sincos_table(grid, width), persistent=False)  # [N, D]
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)

    @property
    def width(self) -> int:
        return self.norm.normalized_shape[0]

    def forward(self, inputs: Tensor, keep: Tensor | None = None) -> Tensor:
        """Features of whole inputs, or of the kept tokens only.

        inputs: float or uint8 [B, C, H, W], or float [B, C, L]. keep: int64 [B, K] token numbers, no
        repeats in a row. Returns [B, N, D] or [B, K, D].
        Raises ValueError if `keep` is out of range or repeats a token.
        """
        return self.encode(self.tokenizer(inputs), keep)

    def encode(self, patches: Tensor, keep: Tensor | None = None) -> Tensor:
        """As forward, on patches [B, N, P]."""
        b, n, _ = patches.shape
        positions = torch.arange(n, device=patches.device).expand(b, n)
        if keep is not None:
            _check_keep(keep, b, n)
            patches = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
            positions = keep
        k = positions.shape[1]
        sequences = Sequences.uniform(b, k, patches.device)
        x = self._run(patches.reshape(b * k, -1), positions.reshape(-1), sequences)
        return x.view(b, k, -1)

    def packed(self, patches: Tensor, positions: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
        """Features of packed tokens: patches [T, P], positions int64 [T], cu_seqlens int32 [B + 1] -> [T, D]."""
        return self._run(patches, positions, Sequences.of(cu_seqlens, max_len, len(patches)))

    def _run(self, patches: Tensor, positions: Tensor, sequences: Sequences) -> Tensor:
        x = self.patch_embed(patches) + self.positions[positions]  # [T, D]
        for block in self.blocks:
            x = block(x, sequences)
        return self.norm(x)


def _check_keep(keep: Tensor, batch: int, tokens: int) -> None:
    if keep.dim() != 2 or keep.shape[0] != batch or keep.dtype != torch.int64:
        raise ValueError(f"keep must be int64 [{batch}, K] token numbers, got {keep.dtype} {list(keep.shape)}")
    if keep.device.type == "cpu":  # on a device the check would be a synchronisation; gather asserts the range there
        if keep.numel() and not (int(keep.min()) >= 0 and int(keep.max()) < tokens):
            raise ValueError(
                f"keep holds token {int(keep.max())} or {int(keep.min())}; an image has tokens 0 to {tokens - 1}"
            )
        if (keep.sort(1).values.diff(dim=1) == 0).any():
            raise ValueError("keep names a token twice in one row; every kept token once")
