"""The predictor: context features and the positions of hidden tokens -> predicted target features.

Every target block of an image is one sequence [context tokens, mask tokens] with full attention;
the outputs at the mask tokens, projected back to the encoder's width, are the predictions.
"""

import torch
from torch import Tensor, nn

from jepa_fast.data.packing import MaskPlan
from jepa_fast.model.attention import Sequences
from jepa_fast.model.tokens import sincos_table
from jepa_fast.model.vit import Block

# Shape legend: B images, K context tokens and M target tokens of one, Tc and Tt the same over a batch,
# Tp tokens of all predictor sequences, D the encoder's width, W the predictor's.


class Predictor(nn.Module):
    """P_phi."""

    positions: Tensor

    def __init__(
        self, grid: tuple[int, ...], encoder_width: int, *,
        width: int, depth: int, heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6,
    ):  # fmt: skip
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))  # 3-D, so that weight decay applies as in ijepa
        self.register_buffer("positions", sincos_table(grid, width), persistent=False)  # [N, W]
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Linear(width, encoder_width)

    def forward(self, context: Tensor, context_index: Tensor, target_index: Tensor) -> Tensor:
        """One target block an image: context [B, K, D], int64 [B, K] and [B, M] -> predictions [B, M, D]."""
        b, k, _ = context.shape
        m = target_index.shape[1]
        x = torch.cat([self._place(context, context_index), self._hidden(target_index)], dim=1)  # [B, K + M, W]
        sequences = Sequences.uniform(b, k + m, context.device)
        x = self._run(x.reshape(b * (k + m), -1), sequences).view(b, k + m, -1)
        return self.proj(self.norm(x[:, k:]))

    def packed(self, context: Tensor, plan: MaskPlan) -> Tensor:
        """All target blocks of a batch in one pass: context [Tc, D] -> predictions [Tt, D], in the plan's target order."""
        x = torch.cat([self._place(context, plan.context_index), self._hidden(plan.target_index)])  # [Tc + Tt, W]
        x = x[plan.predictor_order]  # [Tp, W]
        x = self._run(x, Sequences.of(plan.predictor_cu, plan.predictor_max, len(x)))
        return self.proj(self.norm(x[plan.predictor_targets]))

    def _place(self, context: Tensor, index: Tensor) -> Tensor:
        return self.embed(context) + self.positions[index]

    def _hidden(self, index: Tensor) -> Tensor:
        return self.mask_token.view(-1) + self.positions[index]

    def _run(self, x: Tensor, sequences: Sequences) -> Tensor:
        for block in self.blocks:
            x = block(x, sequences)
        return x
