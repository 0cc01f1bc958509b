"""The predictor: context features and the positions of hidden tokens -> predicted target features.

Every target block of an image is one sequence [context tokens, mask tokens] with full attention;
the outputs at the mask tokens, projected back to the encoder's width, are the predictions.
"""

import torch
from torch import Tensor, nn

from jepa_fast.masks.packing import MaskPlan
from jepa_fast.model.attention import Sequences, uses_varlen
from jepa_fast.model.tokens import sincos_table
from jepa_fast.model.vit import Block, check_index, pad_rows

# Shape legend: B images, K context tokens and M target tokens of one, Tc and Tt the same over a batch,
# Tp tokens of all predictor sequences, D the encoder's width, W the predictor's.


class Predictor(nn.Module):
    """P_phi. out_width: numbers of what it predicts for a token; 0: the encoder's width."""

    positions: Tensor

    def __init__(
        self, grid: tuple[int, ...], encoder_width: int, *,
        width: int, depth: int, heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6, residual: str = "fp32",
        out_width: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.grid = grid
        self.head_width = width // heads
        self.residual = residual  # as Encoder's
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))  # 3-D, so that weight decay applies as in ijepa
        self.register_buffer("positions", sincos_table(grid, width), persistent=False)  # [N, W]
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Linear(width, out_width or encoder_width)

    def forward(self, context: Tensor, context_index: Tensor, target_index: Tensor) -> Tensor:
        """One target block an image: context [B, K, D], int64 [B, K] and [B, M] -> predictions [B, M, D].

        Raises ValueError if the context is not of the encoder's width, an index is out of range or repeats a token in a row.
        """
        if context.dim() != 3 or context.shape[2] != self.embed.in_features:
            raise ValueError(f"context must be [B, K, {self.embed.in_features}]; it is {list(context.shape)}")
        b, k, _ = context.shape
        check_index("context_index", context_index, b, len(self.positions))
        check_index("target_index", target_index, b, len(self.positions))
        if context_index.shape[1] != k:
            raise ValueError(f"context has {k} tokens an image, context_index {context_index.shape[1]}; give one each")
        m = target_index.shape[1]
        x = torch.cat([self._place(context, context_index), self._hidden(target_index)], dim=1)  # [B, K + M, W]
        device = x.device
        rows = (torch.arange(b, device=device)[:, None] * (k + m) + torch.arange(k, k + m, device=device)).flatten()
        sequences, queries = Sequences.equal(b, k + m, device), Sequences.equal(b, m, device)
        x = self._run(self._enter(x).flatten(0, 1), sequences, rows, sequences, queries)
        return self.proj(self.norm(x)).view(b, m, -1)

    def packed(self, context: Tensor, plan: MaskPlan) -> Tensor:
        """All target blocks of a batch in one pass: context [Tc, D] -> predictions [Tt, D], in the plan's target order."""
        x = torch.cat([self._place(context, plan.context_index), self._hidden(plan.target_index)])  # [Tc + Tt, W]
        x = self._enter(x).index_select(0, plan.predictor_order)  # [Tp, W]
        varlen, rows, bucket = uses_varlen(x, self.head_width), plan.predictor_targets, plan.predictor_bucket
        last = Sequences.of(plan.predictor_cu, plan.predictor_max, len(x), varlen=varlen, compiled=bucket > 0)
        queries = Sequences.of(plan.target_cu, plan.target_max, len(rows), varlen=varlen, compiled=bucket > 0)
        sequences = last
        if bucket:
            sequences = Sequences.of(
                plan.predictor_cu, plan.predictor_max, len(x), bucket, varlen, spare=plan.predictor_spare
            )
        return self.proj(self.norm(self._run(x, sequences, rows, last, queries, bucket)))

    def _place(self, context: Tensor, index: Tensor) -> Tensor:
        return self.embed(context) + self.positions[index]

    def _hidden(self, index: Tensor) -> Tensor:
        return self.mask_token.view(-1) + self.positions[index]

    def _enter(self, x: Tensor) -> Tensor:
        """Into the residual stream."""
        return x.bfloat16() if self.residual == "bf16" and torch.is_autocast_enabled(x.device.type) else x

    def _run(
        self, x: Tensor, sequences: Sequences, rows: Tensor, last: Sequences, queries: Sequences, bucket: int = 0
    ) -> Tensor:
        """The last block only where its outputs are read, at the mask tokens: context tokens are keys to it and no more."""
        total = len(x)
        x = pad_rows(x, bucket)
        for block in self.blocks[:-1]:
            x = block(x, sequences)
        return self.blocks[-1](x[:total], last, rows, queries)
