"""CollapseMonitor as a Lightning callback: copy `CollapseCallback` into your project.

python examples/lightning_callback.py [--steps N] [--out FOLDER]
"""

import argparse
import copy
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from plain_loop import GRID, WIDTH, Encoder, take
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from jepa_fast.monitor import CollapseMonitor


class CollapseCallback(lightning.Callback):
    """Watches a module that has `encoder` and `target_encoder`, and that leaves in `self.seen` what its training_step saw:
    any of context, target, visible and hidden (see CollapseMonitor.observe). Works under DDP: every rank calls.
    """

    def __init__(self, folder: str, **settings: Any):
        self.folder, self.settings = folder, settings
        self.monitor: CollapseMonitor | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        pair = (module.encoder, module.target_encoder)
        self.monitor = CollapseMonitor(self.folder, pair, start=trainer.global_step or None, **self.settings)
        self.last = -1

    def on_before_backward(self, trainer: lightning.Trainer, module: Any, loss: Tensor) -> None:
        """Between the forward and the optimizer: weights, features and loss belong to the same step."""
        assert self.monitor is not None
        if trainer.global_step != self.last:  # of accumulated batches the first
            self.last = trainer.global_step
            self.monitor.observe(loss * trainer.accumulate_grad_batches, **module.seen, step=self.last)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if self.monitor:
            self.monitor.close()


class TinyJEPA(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.predictor = nn.Linear(WIDTH, GRID**2 * WIDTH)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def training_step(self, images: Tensor, _: int) -> Tensor:
        order = torch.rand(len(images), GRID**2, device=images.device).argsort(1)
        visible, hidden = order[:, :8], order[:, 8:]
        target = self.target_encoder(images)
        context = self.encoder(images, visible)
        predicted = self.predictor(context.mean(1)).view(len(images), GRID**2, WIDTH)
        loss = F.smooth_l1_loss(take(predicted, hidden), take(F.layer_norm(target, (WIDTH,)), hidden))
        self.seen = {"context": context, "target": target, "visible": visible, "hidden": hidden}
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for theta, theta_bar in zip(self.encoder.parameters(), self.target_encoder.parameters(), strict=True):
                theta_bar.lerp_(theta, 1 - 0.99)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=5e-4)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", default="runs/lightning")
    options = parser.parse_args(argv)
    lightning.seed_everything(0, verbose=False)
    images = torch.as_tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    trainer = lightning.Trainer(
        max_steps=options.steps, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[CollapseCallback(options.out, loss="smooth_l1", target_norm="layer")],
    )  # fmt: skip
    trainer.fit(TinyJEPA(), DataLoader(images, batch_size=64, shuffle=True, drop_last=True))
    print(f"python -m jepa_fast.report {options.out}")


if __name__ == "__main__":
    main()
