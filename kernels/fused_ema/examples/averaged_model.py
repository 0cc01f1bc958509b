"""torch.optim.swa_utils.AveragedModel with the fused pass in place of its own; the model may be bfloat16."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fused_ema import multi_avg_fn

torch.manual_seed(0)
model = nn.Linear(8, 8).bfloat16()
averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn(0.9)).float()
for _ in range(20):
    with torch.no_grad():
        model.weight.add_(0.1)
    averaged.update_parameters(model)
print(f"model {model.weight.mean().item():.3f}, average {next(averaged.parameters()).mean().item():.3f}")
