"""Our training step on given images and masks, as train.py makes it, and its parts, for bench_step.py."""

import torch
from torch import Tensor, nn

from jepa_fast import optim
from jepa_fast.config import Config, replace
from jepa_fast.ema import TargetEMA
from jepa_fast.masks.ladder import ladder
from jepa_fast.masks.packing import MaskPlan, plan
from jepa_fast.masks.sample import MaskBatch
from jepa_fast.model.attention import choose_backend
from jepa_fast.model.compile import compile_blocks
from jepa_fast.model.jepa import JEPA
from jepa_fast.model.targets import regress


class OurStep:
    """precision: "fp32", "bf16", or "bf16 residual", which keeps the residual stream in bf16 too."""

    def __init__(
        self, config: Config, masks: MaskBatch, images: Tensor, precision: str, compiled: bool, rate: float, decay: float
    ):  # fmt: skip
        changes = {"train.precision": precision[:4], "model.residual": "bf16" if "residual" in precision else "fp32"}
        self.half, self.decay, self.images = precision != "fp32", decay, images
        config, device = replace(config, changes), images.device
        torch.manual_seed(0)
        self.jepa = JEPA(config).to(device)
        choose_backend(device, self.half)
        if compiled:
            compile_blocks(self.jepa)
        steps = ladder(config, len(images)) if compiled and device.type == "cuda" else None
        self.plan: MaskPlan = plan(masks, config.num_tokens, steps).to(device)
        self.optimizer = optim.build(self.jepa, config.optim)
        optim.set_rates(self.optimizer, rate, 0.04)
        self.ema = TargetEMA(self.jepa, config)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def take(self, source: JEPA) -> None:
        self.jepa.load_state_dict(source.state_dict())

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.jepa.parameters() if p.requires_grad]

    @torch.no_grad()
    def hidden(self) -> Tensor:
        jepa = self.jepa
        features = jepa.target_encoder.encode(jepa.context_encoder.tokenizer(self.images))
        return regress(features, jepa.target_norm).flatten(0, 1).index_select(0, self.plan.target_rows)

    def encode(self) -> Tensor:
        encoder, chosen = self.jepa.context_encoder, self.plan
        visible = encoder.tokenizer(self.images).flatten(0, 1).index_select(0, chosen.context_rows)
        return encoder.encode_packed(
            visible,
            chosen.context_index,
            chosen.context_cu,
            chosen.context_max,
            chosen.context_bucket,
            chosen.context_spare,
        )

    def predict(self, features: Tensor) -> Tensor:
        return self.jepa.predictor.packed(features, self.plan)

    def forward(self) -> Tensor:
        return self.jepa(self.images, self.plan).loss

    def update(self, loss: Tensor) -> None:
        """The optimizer's part, gradients given."""
        self.finite = optim.step_if_finite(self.optimizer, loss)

    def average(self) -> None:
        self.ema.update(self.decay, gate=self.finite)

    def finish(self, loss: Tensor) -> None:
        """Nothing is read back."""
