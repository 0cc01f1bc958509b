"""Counted work against torch's own counter, and what is made of it."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_fast import flops
from jepa_fast.config import replace
from jepa_fast.flops import Flops, predicted_rate, state_bytes, step_flops
from jepa_fast.masks.packing import plan
from jepa_fast.masks.sample import sample_masks
from jepa_fast.model.jepa import JEPA
from jepa_fast.presets import preset


def _plan(config, batch, seed=0):
    samples = np.arange(batch)
    return plan(sample_masks(config.masks, config.grid, seed, 0, np.zeros_like(samples), samples), config.num_tokens)


@pytest.mark.parametrize("name, mode", [("demo", "random"), ("digits", "reference"), ("textures", "fixed")])
def test_work_is_what_torch_counts_where_sequences_are_equally_long(name, mode):
    changes = {"masks.mode": mode, "model.width": 24, "model.predictor_width": 16, "model.heads": 2, "masks.group": 8}
    config = replace(preset(name), changes | {"model.predictor_mlp_ratio": 2.0})
    jepa, chosen = JEPA(config), _plan(config, 8)
    shape = (1, 500) if name == "demo" else (1, config.data.image_size, config.data.image_size)
    inputs = torch.randn(8, *shape)
    work = step_flops(config, chosen)
    with sdpa_kernel(SDPBackend.MATH):  # flash counts what it recomputes
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            jepa.target_encoder(inputs)
        assert counted.get_total_flops() == work.target
        with FlopCounterMode(display=False) as counted:
            jepa(inputs, chosen).loss.backward()
    assert counted.get_total_flops() == work.total


def test_ragged_work_is_the_sum_over_images():
    config = preset("digits")
    samples = np.arange(6)
    whole = step_flops(config, _plan(config, 6))
    rows = []
    for row in samples:
        masks = sample_masks(config.masks, config.grid, 0, 0, np.zeros_like(samples), samples, row, row + 1)
        rows.append(step_flops(config, plan(masks, config.num_tokens)))
    for part in ("target", "context", "predictor"):
        assert getattr(whole, part) == pytest.approx(sum(getattr(r, part) for r in rows))


def test_the_published_b16_recipe_is_84_gflop_an_image_less_the_trim():
    config = replace(preset("in1k-vitb16"), {"masks.mode": "reference", "train.batch_size": 128})
    work = [step_flops(config, p) for p in flops.usual_plan(config, 128)]
    mean = Flops(*(sum(getattr(w, part) for w in work) / 8 / 128 / 1e9 for part in ("target", "context", "predictor")))
    assert mean.target == pytest.approx(34.9, rel=0.01)
    assert mean.context == pytest.approx(26.5, rel=0.05)
    assert 0.88 < mean.predictor / 22.4 < 0.97  # the last block's context rows are not computed


def test_state_is_16_bytes_a_trained_parameter_and_4_an_averaged_one():
    config = preset("demo")
    jepa = JEPA(config)
    trained = sum(p.numel() for p in jepa.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in jepa.target_encoder.parameters())
    assert state_bytes(config) == 16 * trained + 4 * averaged


def test_activations_are_estimated_within_a_third_of_what_autograd_keeps():
    config = replace(preset("digits"), {"model.width": 64, "model.depth": 4, "train.precision": "bf16"})
    jepa, chosen, kept = JEPA(config), _plan(config, 8), {}

    def note(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        loss = jepa(torch.randn(8, 1, 32, 32), chosen).loss
    weights = 2 * sum(p.numel() for p in jepa.parameters() if p.requires_grad)  # autocast's bf16 copies
    estimate = flops.activation_bytes(config, *flops.batch_rows(chosen))
    assert 0.66 < estimate / (sum(kept.values()) - weights) < 1.5
    del loss


def test_predictions_fall_short_of_the_datasheet_and_rise_with_it():
    config = replace(preset("in1k-vitb16"), {"train.precision": "bf16"})
    plans = flops.usual_plan(config, 32, 2)
    work = sum(step_flops(config, p).total for p in plans) / 64
    rates = {name: predicted_rate(config, plans, card) for name, card in flops.CARDS.items()}
    assert rates["A100"] < rates["H100"] < rates["H200"]
    for name, rate in rates.items():
        assert 0.3 < rate * work / flops.CARDS[name].flops < flops.ATTAINED
    half = replace(config, {"model.residual": "bf16"})
    assert predicted_rate(half, plans, flops.CARDS["H100"]) > rates["H100"]


def test_rates_are_labelled_by_what_they_are_a_share_of(monkeypatch):
    assert flops.utilisation(5e9, torch.device("cpu"), False) == {"flops_per_s": 5e9}
    monkeypatch.setattr(flops, "matmul_rate", lambda device, dtype: {torch.bfloat16: 8e14, torch.float32: 4e14}[dtype])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    cuda = torch.device("cuda")
    assert flops.utilisation(4e14, cuda, True) == {
        "flops_per_s": 4e14,
        "mfu/measured": 0.5,
        "mfu/datasheet": 4e14 / 989e12,
    }
    assert flops.utilisation(1e14, cuda, False) == {"flops_per_s": 1e14, "mfu/measured": 0.25}


def test_the_measured_rate_is_measured_once():
    first = flops.matmul_rate(torch.device("cpu"), torch.float32)
    assert first > 1e8 and flops.matmul_rate(torch.device("cpu"), torch.float32) == first


def test_the_page_says_that_predictions_are_predictions(capsys):
    assert flops.main(["textures", "--share", "8"]) == 0
    out = capsys.readouterr().out
    assert "PREDICTIONS, not measurements" in out and all(name in out for name in flops.CARDS)
    assert flops.main(["series", "--share", "8"]) == 0


@pytest.mark.parametrize("argv", [["spiral"], [], ["textures", "--share", "0"], ["textures", "--masks.mode", "random"]])
def test_its_errors_are_one_line(argv, capsys):
    capsys.readouterr()
    assert flops.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
