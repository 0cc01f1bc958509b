"""CollapseMonitor in a plain PyTorch loop: a small JEPA on scikit-learn's digits, written without jepa-fast's trainer.

python examples/plain_loop.py [--steps N] [--out FOLDER]
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from jepa_fast.monitor import CollapseMonitor

PATCH, GRID, WIDTH = 2, 4, 64  # 8 x 8 pixels: 16 tokens


class Encoder(nn.Module):
    """Pixels [B, 1, 8, 8] -> features [B, N, D], of the kept tokens [B, K] only if they are given."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, GRID**2, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.blocks(x if keep is None else take(x, keep))


def take(x: Tensor, index: Tensor) -> Tensor:
    """[B, N, D] at token numbers [B, K] -> [B, K, D]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", default="runs/plain-loop")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    images = torch.as_tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # [1797, 1, 8, 8]
    encoder, predictor = Encoder(), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, GRID**2 * WIDTH))
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], lr=5e-4)

    monitor = CollapseMonitor(options.out, (encoder, target_encoder), loss="smooth_l1", target_norm="layer")  # 1
    for _ in range(options.steps):
        batch = images[torch.randint(len(images), (64,))]
        order = torch.rand(64, GRID**2).argsort(1)
        visible, hidden = order[:, :8], order[:, 8:]

        with torch.no_grad():
            target = target_encoder(batch)  # [B, N, D]
        context = encoder(batch, visible)  # [B, 8, D]
        predicted = predictor(context.mean(1)).view(64, GRID**2, WIDTH)
        loss = F.smooth_l1_loss(take(predicted, hidden), take(F.layer_norm(target, (WIDTH,)), hidden))

        monitor.observe(loss, context=context, target=target, visible=visible, hidden=hidden)  # 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for theta, theta_bar in zip(encoder.parameters(), target_encoder.parameters(), strict=True):
                theta_bar.lerp_(theta, 1 - 0.99)
    monitor.close()  # 3
    print(f"python -m jepa_fast.report {options.out}")


if __name__ == "__main__":
    main()
