"""The JEPA: context encoder, target encoder, predictor and loss, composed.

In: inputs and a MaskPlan. Out: the loss (equation 2 of the paper, or I-JEPA's smooth-L1) and the two
encodings, which the monitor compares. Knows nothing of devices, optimizers or files.

Precision under bf16 autocast: matrix products and attention are bf16. Weights stay float32 (so do their moments and
the EMA, whose steps bf16 would round away); so do the residual stream (unless `model.residual` says otherwise), both
encodings, the layer-normed targets and the loss, whose sums over many small terms need the digits.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast.config import Config, Model
from jepa_fast.inputs import find
from jepa_fast.masks.packing import MaskPlan
from jepa_fast.model.predictor import Predictor
from jepa_fast.model.regularizers import Regularizer, pool
from jepa_fast.model.targets import Statistics, Targets
from jepa_fast.model.tokens import Tokenizer
from jepa_fast.model.vit import Block, Encoder

# Shape legend: B images, N tokens of one, Tc context and Tt target tokens of the batch, D width.


class Output(NamedTuple):
    loss: Tensor  # float32 scalar: what is minimised
    context: Tensor  # [Tc, D] f(x): visible tokens by the context encoder, detached
    target: Tensor  # [B, N, D] g(x_hat): all tokens by the target encoder, as it gives them
    terms: dict[
        str, Tensor
    ]  # of the loss, by name, before weights: float32 scalars, detached. `prediction` is the mean over
    # features, an image's target tokens and images; `regularizer` is there if the run has one
    statistics: Statistics | None  # with them targets.regress(wanted, norm, statistics) is what the loss compared with
    wanted: Tensor  # [B, N, D] what the loss regresses on before it is normalised: `target`, or the patches [B, N, P]


class JEPA(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        model = config.model
        self.loss = config.objective.loss
        self.target_norm = config.objective.target_norm
        self.pixels = config.objective.target == "pixels"
        wanted = config.patch_dim if self.pixels else model.width
        self.targets = Targets(self.target_norm, config.objective.target_stats, config.num_tokens, wanted)
        self.regularizer = Regularizer(config.regularizer.kind, config.regularizer.weight, config.train.seed)
        self.cuda_graphs = model.cuda_graphs
        self.phase: Callable[[str], AbstractContextManager] = nullcontext  # a clock replaces it
        self.context_encoder = _encoder(config)
        self.target_encoder = _encoder(config).requires_grad_(False)
        self.predictor = Predictor(
            config.grid, model.width, width=model.predictor_width, depth=model.predictor_depth,
            heads=model.predictor_heads or model.heads,
            mlp_ratio=model.predictor_mlp_ratio, eps=model.norm_eps,
            residual=model.residual, out_width=wanted,
        )  # fmt: skip
        initialise(self.context_encoder, model)
        initialise(self.predictor, model)
        self.target_encoder.load_state_dict(self.context_encoder.state_dict())  # theta_bar(0) = theta(0)

    def forward(self, inputs: Tensor, plan: MaskPlan) -> Output:
        """inputs: uint8 or float [B, C, H, W], or float [B, C, L]."""
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step gave out may be written over
        patches = self.context_encoder.tokenizer(inputs)  # [B, N, P], cut and normalised once for both encoders
        self._check(inputs, plan)

        with torch.no_grad():
            with self.phase("target"):
                target = self.target_encoder.encode(patches)  # [B, N, D]
            wanted = patches if self.pixels else target
            statistics = self.targets.statistics(wanted)
            regression = self.targets(wanted, statistics)  # [B, N, D]

        visible = patches.flatten(0, 1).index_select(0, plan.context_rows)  # [Tc, P]
        context = self.context_encoder.encode_packed(
            visible, plan.context_index, plan.context_cu, plan.context_max, plan.context_bucket, plan.context_spare
        )  # [Tc, D]
        prediction = self.predictor.packed(context, plan)  # [Tt, D]

        hidden = regression.flatten(0, 1).index_select(0, plan.target_rows)  # [Tt, D]
        each = token_loss(prediction, hidden, self.loss)  # [Tt]
        loss = (plan.target_weight * each).sum()  # not `@`: autocast would halve it
        terms = {"prediction": loss.detach()}
        if self.regularizer.kind != "none":
            regularizer = self.regularizer(pool(context, plan.context_rows, *target.shape[:2]))
            loss = loss + self.regularizer.weight * regularizer
            terms["regularizer"] = regularizer.detach()
        return Output(loss, context.detach(), target, terms, statistics, wanted)

    def _check(self, inputs: Tensor, plan: MaskPlan) -> None:
        grid, own = self.context_encoder.tokenizer.grid(inputs), self.context_encoder.grid
        if grid != own:
            raise ValueError(f"inputs of {list(inputs.shape)} have {grid} tokens; this JEPA was built for {own}")
        if len(inputs) != plan.num_inputs:
            raise ValueError(f"{len(inputs)} inputs and masks of {plan.num_inputs}: give as many masks as inputs")


def token_loss(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    """Mean over features of `l2`, `smooth_l1` (beta 1) or `l1`, in float32: [..., D] -> [...].

    `l2` times D is the squared norm of the paper's equation 2.
    """
    prediction, target = prediction.float(), target.float()
    if kind == "l2":
        error = F.mse_loss(prediction, target, reduction="none")
    elif kind == "l1":
        error = F.l1_loss(prediction, target, reduction="none")
    else:
        error = F.smooth_l1_loss(prediction, target, reduction="none")
    return error.mean(-1)


def _encoder(config: Config) -> Encoder:
    data, model = config.data, config.model
    size = find(data.kind).patch_size(config)
    return Encoder(
        Tokenizer(data.kind, size, data.mean, data.std), config.grid, config.patch_dim,
        width=model.width, depth=model.depth, heads=model.heads, mlp_ratio=model.mlp_ratio, eps=model.norm_eps,
        residual=model.residual,
    )  # fmt: skip


@torch.no_grad()
def initialise(module: nn.Module, model: Model) -> None:
    """Truncated normal (std init_std, cut at +-2) on linear weights and the mask token; biases 0, LayerNorms 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=model.init_std)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, Predictor):
            nn.init.trunc_normal_(part.mask_token, std=model.init_std)
    if model.depth_scaled_init and isinstance(module, (Encoder, Predictor)):
        for layer, block in enumerate(module.blocks, start=1):
            assert isinstance(block, Block)
            block.attn.proj.weight.div_(math.sqrt(2 * layer))
            block.mlp.fc2.weight.div_(math.sqrt(2 * layer))
