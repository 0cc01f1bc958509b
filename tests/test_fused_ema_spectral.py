"""Spectral norm of the drift, by warm-started power iteration."""

import math

import pytest
import torch
from torch import nn

from fused_ema import FusedEMA


def test_spectral_distances_converge_to_the_largest_singular_value():
    model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 9), nn.Linear(9, 9), nn.Conv2d(2, 3, 2))
    ema = FusedEMA(model, decay=0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    ema.update()
    for _ in range(60):
        values = ema.spectral_distances()
    assert list(values) == ["0.weight", "1.weight", "2.weight", "3.weight"]
    for name, value in values.items():
        drift = (model.get_parameter(name) - ema.module.get_parameter(name)).detach().flatten(1)
        assert value == pytest.approx(torch.linalg.matrix_norm(drift, 2).item(), rel=1e-3)
        assert value <= ema.distances()[name] * (1 + 1e-5)


def test_spectral_distance_of_equal_modules_is_zero():
    assert set(FusedEMA(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))).spectral_distances().values()) == {0.0}


def test_a_spectral_distance_that_is_not_finite_shows_and_does_not_last():
    model = nn.Linear(4, 4, bias=False)
    ema = FusedEMA(model)
    own = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(math.inf)
    assert not math.isfinite(ema.spectral_distances()["weight"])
    with torch.no_grad():
        model.weight.copy_(own + torch.eye(4))
    assert ema.spectral_distances(iterations=20)["weight"] == pytest.approx(1.0, rel=1e-3)
