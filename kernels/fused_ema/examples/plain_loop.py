"""A training loop with a float32 average, its distances per layer and an evaluation with the averaged weights."""

import torch
from torch import nn

from fused_ema import FusedEMA, warmup

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
ema = FusedEMA(model, decay=warmup(0.99))

for step in range(201):
    x = torch.randn(256, 16)
    loss = (model(x) - x[:, :1].sin()).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update(gate=loss.detach().isfinite())  # a bad step changes nothing, and nobody waits for the device
    if step % 50 == 0:
        drift = " ".join(f"{name} {distance:.4f}" for name, distance in ema.distances(group_by="block").items())
        print(f"step {step} loss {loss.item():.4f} drift {drift}")

with ema.swap() as averaged, torch.no_grad():
    x = torch.randn(1000, 16)
    print(f"averaged weights: {(averaged(x) - x[:, :1].sin()).square().mean().item():.4f}")
