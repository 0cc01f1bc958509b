"""Theorem 4.2 and proposition 4.4 in their own setting, over whole trainings."""

import numpy as np
import pytest
import torch

from jepa_fast import theorem
from jepa_fast.log import read


def tokens(n=256):
    return torch.from_numpy(np.random.default_rng(0).normal(size=(n, 6, 12))).float()


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.996, 1.0])
def test_the_bound_holds_on_every_input_at_every_step_of_a_training(decay, activation):
    records = theorem.run(tokens(), None, decay=decay, activation=activation, steps=80, width=16, lr=1e-2, every=1)
    assert len(records) == 81 and sum(r["bound/violations"] for r in records) == 0
    for r in records:
        assert 0 < r["bound/measured"] <= r["bound/gamma"]
        assert r["bound/gamma"] == pytest.approx(r["bound/mask_term"] + r["bound/ema_term"], rel=1e-5)
    assert records[-1]["loss"] != records[0]["loss"]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.996, 0.9999, 1.0])
def test_the_bracket_is_the_distance_of_the_weights(decay):
    """beta Delta_t - (1 - beta) sum beta^{t-l} Delta_l = theta_t - theta_bar_t, on weights that are trained."""
    records = theorem.run(tokens(), None, decay=decay, steps=60, width=16, lr=1e-2, every=1)
    for r in records:
        assert r["bound/bracket"] == pytest.approx(r["bound/drift"], rel=2e-3, abs=1e-6)
    assert all(r["identity/residual"] <= 1 for r in records if "identity/residual" in r)
    assert (records[-1]["bound/drift"] == 0) == (decay == 0)


def test_a_broken_bound_would_be_seen():
    encoder, target = (theorem.OneLayer(12, 16, "relu") for _ in range(2))
    x = tokens(8)
    hidden = torch.zeros(8, 6, dtype=torch.bool)
    broken = theorem.gamma(x, hidden, encoder, encoder, torch.zeros(16, 12))
    assert broken["bound/measured"] == broken["bound/gamma"] == 0
    encoder.activation = lambda v: 5 * v  # not 1-Lipschitz
    target.activation = encoder.activation
    assert theorem.gamma(x, hidden, encoder, target, torch.zeros(16, 12))["bound/violations"] > 0


def test_the_command_writes_a_run_and_never_over_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(theorem, "tokens", tokens)
    assert theorem.main(["--steps", "10", "--run.dir", "t"]) == 0
    assert "held on every input" in capsys.readouterr().out
    assert read(tmp_path / "t" / "metrics.jsonl")[-1]["step"] == 10
    for refused in (["--run.dir", "t"], ["--decay", "1.5"], ["--ratio", "1"]):
        assert theorem.main(refused) == 2
        assert capsys.readouterr().err.count("\n") == 1
