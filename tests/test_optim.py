"""Schedules are functions of the step; a step with a non-finite value changes nothing."""

import math

import pytest
import torch

from jepa_fast import optim, schedules
from jepa_fast.config import EMA, Optim
from jepa_fast.presets import preset


def test_learning_rate_warms_up_linearly_then_follows_a_cosine():
    config = preset("in1k-vitb16").optim
    rate = [schedules.learning_rate(config, t, 1000, 100) for t in range(1001)]
    assert rate[0] == config.start_lr == 2e-4
    assert rate[50] == pytest.approx(6e-4)
    assert rate[100] == pytest.approx(1e-3) == max(rate)
    assert rate[550] == pytest.approx((1e-3 + 1e-6) / 2)
    assert rate[1000] == pytest.approx(1e-6)


def test_constant_schedules_are_constant():
    config = preset("demo")
    for step in (0, 700, 1800):
        assert schedules.learning_rate(config.optim, step, 1800, 0) == 1e-4
        assert schedules.weight_decay(config.optim, step, 1800) == 0.01
        assert schedules.ema_decay(config.ema, step, 1800) == 0.996


def test_weight_decay_rises_on_a_cosine():
    config = preset("in1k-vith14").optim
    assert schedules.weight_decay(config, 0, 10) == pytest.approx(0.04)
    assert schedules.weight_decay(config, 5, 10) == pytest.approx(0.22)
    assert schedules.weight_decay(config, 10, 10) == pytest.approx(0.4)


def test_ema_decay_is_linear_in_the_step_and_may_stretch_beyond_the_run():
    assert schedules.ema_decay(EMA(0.996, 1.0, "linear"), 250, 1000) == pytest.approx(0.997)
    assert schedules.ema_decay(EMA(0.998, 1.0, "linear", scale=1.25), 1000, 1000) == pytest.approx(0.9996)
    assert schedules.ema_decay(EMA(0.9, 1.0, "cosine"), 500, 1000) == pytest.approx(0.95)


def test_biases_and_vectors_are_not_decayed_unless_asked():
    model = torch.nn.Linear(3, 3)
    groups = {g["decays"]: len(g["params"]) for g in optim.build(model, Optim()).param_groups}
    assert groups == {True: 1, False: 1}
    assert [g["decays"] for g in optim.build(model, Optim(decay_vectors=True)).param_groups] == [True]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_non_finite_step_leaves_weights_moments_and_counters_bit_identical(poison, where, clip):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = optim.build(model, Optim())
    optim.set_rates(optimizer, 0.1, 0.1)
    model(torch.randn(2, 4)).square().mean().backward()
    assert optim.step_if_finite(optimizer, torch.tensor(1.0), clip)

    before = [p.clone() for p in model.parameters()]
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    model(torch.randn(2, 4)).square().mean().backward()
    if where == "gradient":
        model.weight.grad[1, 2] = poison
    assert not optim.step_if_finite(optimizer, torch.tensor(poison if where == "loss" else 1.0), clip)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for p, kept in zip(model.parameters(), moments, strict=True):
        assert all(torch.equal(kept[k], v) for k, v in optimizer.state[p].items())

    model(torch.randn(2, 4)).square().mean().backward()
    assert optim.step_if_finite(optimizer, torch.tensor(1.0), clip)
    assert not torch.equal(before[0], model.weight)


def test_clipping_bounds_the_gradient_norm():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    before = model.weight.clone()
    model.weight.grad = torch.tensor([[30.0, 40.0]])
    optim.step_if_finite(optimizer, torch.tensor(1.0), clip=1.0)
    torch.testing.assert_close(before - model.weight, torch.tensor([[0.6, 0.8]]), rtol=1e-4, atol=1e-5)
