"""facebookresearch/ijepa's training step, put together from a checkout's own parts, for bench_step.py.

None of its code is in this tree: a checkout is given by path. `patched` is what its users could make of it in an
afternoon: SDPA, compiled blocks, a foreach EMA, no statistics, nothing read back. What patching relies on: an attention
module has `qkv`, `proj`, `num_heads`, `scale` and returns (output, weights); its block ignores the weights; an encoder
keeps its blocks in `blocks`, the predictor in `predictor_blocks`.
"""

import logging
import sys
import tempfile
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast.config import Config
from jepa_fast.interop import save_official
from jepa_fast.masks.sample import MaskBatch
from jepa_fast.model.jepa import JEPA


class PeerStep:
    """Its modules, optimizer groups and gradient statistics, in its own order; without DDP, which one process needs not."""

    def __init__(
        self, checkout: Path, name: str, config: Config, masks: MaskBatch, images: Tensor, half: bool, patched: bool,
        rate: float, decay: float,
    ):  # fmt: skip
        """name: of its encoder, as in `vit_base`. masks: of one context length, for it takes no others."""
        if not (checkout / "src" / "helper.py").is_file():
            raise SystemExit(f"error: {checkout} is no checkout of facebookresearch/ijepa: it has no src/helper.py")
        sys.path.append(str(checkout))
        import src.helper as helper

        logging.getLogger().setLevel(logging.WARNING)  # it prints its modules
        from src.masks.utils import apply_masks
        from src.utils.logging import grad_logger

        self.apply_masks, self.grad_logger = apply_masks, grad_logger
        self.half, self.patched, self.decay, self.images = half, patched, decay, images
        device, model = images.device, config.model
        size = (device, model.patch, name, images.shape[-1])
        self.encoder, self.predictor = helper.init_model(*size, model.predictor_depth, model.predictor_width)
        self.target, _ = helper.init_model(*size)
        self.target.requires_grad_(False)
        if patched:
            patch(self.encoder, self.target, self.predictor, compiled=device.type == "cuda")
        self.optimizer, *_ = helper.init_opt(self.encoder, self.predictor, 100, 0.0, rate, 1, 10)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate, 0.0 if group.get("WD_exclude") else 0.04
        context = torch.from_numpy(masks.context).view(len(images), -1)
        targets = torch.from_numpy(masks.targets).view(len(images), masks.num_targets, -1)
        self.context, self.targets = [context.to(device)], [t.contiguous().to(device) for t in targets.unbind(1)]

    def take(self, source: JEPA) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_official(source, Path(folder) / "weights.pth.tar")
            state = torch.load(Path(folder) / "weights.pth.tar")
        for name, module in (("encoder", self.encoder), ("predictor", self.predictor), ("target_encoder", self.target)):
            module.load_state_dict({key.removeprefix("module."): value for key, value in state[name].items()})

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for module in (self.encoder, self.predictor) for p in module.parameters() if p.requires_grad]

    @torch.no_grad()
    def hidden(self) -> Tensor:
        features = self.target(self.images)
        return self.apply_masks(F.layer_norm(features, features.shape[-1:]), self.targets)

    def encode(self) -> Tensor:
        return self.encoder(self.images, self.context)

    def predict(self, features: Tensor) -> Tensor:
        return self.predictor(features, self.context, self.targets)

    def forward(self) -> Tensor:
        hidden = self.hidden()
        return F.smooth_l1_loss(self.predict(self.encode()), hidden)

    def update(self, loss: Tensor) -> None:
        """The optimizer's part, gradients given."""
        self.optimizer.step()
        if not self.patched:
            self.grad_logger(self.encoder.named_parameters())  # reads a norm of every gradient back
        self.optimizer.zero_grad()

    @torch.no_grad()
    def average(self) -> None:
        if self.patched:
            torch._foreach_lerp_(list(self.target.parameters()), list(self.encoder.parameters()), 1 - self.decay)
            return
        for source, target in zip(self.encoder.parameters(), self.target.parameters(), strict=True):
            target.data.mul_(self.decay).add_((1.0 - self.decay) * source.detach().data)

    def finish(self, loss: Tensor) -> None:
        """What it does with the loss at the end of a step."""
        if not self.patched:
            float(loss.detach())


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
