"""Branches of a run: where they begin, what they differ in, and the table over seeds."""

import json
import math

import pytest
import torch

from jepa_fast import checkpoint, fork, train
from jepa_fast.config import replace
from jepa_fast.model.jepa import JEPA
from jepa_fast.presets import preset

TINY = ["--data.embedded", "sensor", "--train.steps", "6", "--log.every", "1", "--monitor.every", "2", "--monitor.probe_train", "20",
        "--monitor.probe_test", "20", "--checkpoint.every", "4", "--checkpoint.keep", "0", "--data.workers", "1",
        "--train.batch_size", "8", "--model.width", "16", "--model.depth", "1", "--model.predictor_width", "12",
        "--model.predictor_heads", "2", "--parallel.threads", "1"]  # fmt: skip


@pytest.fixture
def base(alone):
    assert train.main([*TINY, "--run.dir", "base"]) == 0
    return alone / "base"


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trains_here(monkeypatch):
    """Branches are trained in this process: starting others costs seconds each."""

    def here(self, name, folder):
        return train.main(["--run.dir", str(folder), "--resume", "auto", "--parallel.threads", "1"])

    monkeypatch.setattr(fork.Trainer, "train", here)
    monkeypatch.setattr(fork, "complete", lambda folder: 6 in checkpoint.found(folder))


def test_branches_share_the_past_and_differ_in_what_was_set(base, alone, monkeypatch):
    trains_here(monkeypatch)
    sets = [
        x
        for s in ("ema.decay=0.5,ema.final_decay=0.5", "target=sync", "target=freeze", "noise=drift")
        for x in ("--set", s)
    ]
    assert fork.main(["base", "--at", "4", *sets, "--dir", "out"]) == 0
    whole = metrics(base)
    for name in sets[1::2]:
        records = metrics(alone / "out" / f"{name},seed=0")
        assert [r["step"] for r in records] == list(range(7))
        assert records[:4] == whole[:4] and records[4]["loss"] == pytest.approx(whole[4]["loss"], rel=0.5)
        assert records[5]["loss"] != whole[5]["loss"]
    at = {name: metrics(alone / "out" / f"{name},seed=0")[4]["drift/total"] for name in sets[1::2]}
    assert at["target=sync"] == 0 and at["target=freeze"] == whole[4]["drift/total"]
    assert at["noise=drift"] == pytest.approx(math.sqrt(2) * whole[4]["drift/total"], rel=0.2)
    frozen = checkpoint.load(alone / "out/target=freeze,seed=0/checkpoints/step-6")["model"]
    before = checkpoint.load(base / "checkpoints/step-4")["model"]
    assert all(torch.equal(frozen[n], v) for n, v in before.items() if n.startswith("target_encoder."))
    assert (alone / "out/comparison.html").exists() and "noise=drift" in (alone / "out/fork.csv").read_text()


def test_a_branch_that_sets_nothing_new_is_the_run_itself(base, alone, monkeypatch):
    trains_here(monkeypatch)
    assert fork.main(["base", "--at", "4", "--set", "ema.decay=0.996", "--seeds", "2", "--dir", "out"]) == 0
    for seed, control in ((0, base), (1, alone / "out/control,seed=1")):
        own = checkpoint.load(alone / f"out/ema.decay=0.996,seed={seed}/checkpoints/step-6")["model"]
        other = checkpoint.load(control / "checkpoints/step-6")["model"]
        assert all(torch.equal(own[name], value) for name, value in other.items())


def test_noise_has_the_size_of_the_drift_and_sync_takes_it_away():
    config = replace(preset("demo"), {"data.series_length": 500, "data.channels": 1, "model.width": 16})
    jepa = JEPA(config)
    with torch.no_grad():
        for parameter in jepa.context_encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    pairs = list(zip(jepa.context_encoder.parameters(), jepa.target_encoder.parameters(), strict=True))
    before = [target.detach().clone() for _, target in pairs]
    fork.move_target(jepa, {"noise": "drift"}, seed=0)
    for (own, target), old in zip(pairs, before, strict=True):
        torch.testing.assert_close((target - old).norm(), (own - old).norm())
    fork.move_target(jepa, {"target": "sync"}, seed=0)
    assert all(torch.equal(own, target) for own, target in pairs)


def test_at_minimum_and_at_escape_come_from_the_log(tmp_path):
    losses = [1.0, 0.5, 0.1, 0.2, 0.3]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": 10 * i, "loss": v}) + "\n" for i, v in enumerate(losses)))  # fmt: skip
    assert fork.step_of(tmp_path, "minimum") == 20 and fork.step_of(tmp_path, "7") == 7
    (tmp_path / "events.jsonl").write_text(json.dumps({"kind": "collapse_phase", "step": 10, "end": 30}) + "\n")
    assert fork.step_of(tmp_path, "escape") == 30


def test_the_table_has_means_intervals_and_paired_differences(monkeypatch):
    held = {"a0": 1.0, "a1": 3.0, "a2": 5.0, "b0": 1.5, "b1": 3.5, "b2": 5.5}
    monkeypatch.setattr(fork, "outcome", lambda folder, since: {"final": held[folder]})
    own, other = fork.rows({"control": ["a0", "a1", "a2"], "b": ["b0", "b1", "b2"]}, 0)
    assert own["mean"] == 3 and own["+-"] == pytest.approx(4.303 * 2 / math.sqrt(3))
    assert other["less the control"] == 0.5 and other["+- of it"] == pytest.approx(0)


@pytest.mark.parametrize(("argv", "says"), [
    (["--at", "4", "--set", "model.width=32"], "changes the shapes of the model"),
    (["--at", "6", "--set", "ema.decay=0.5"], "base has 6 steps; give one between 0 and 6"),
    (["--at", "escape", "--set", "ema.decay=0.5"], "no collapse phase that ended"),
    (["--at", "sometime", "--set", "ema.decay=0.5"], "give a step, minimum or escape"),
    (["--at", "4", "--set", "ema.decy=0.5"], "did you mean --ema.decay?"),
    (["--at", "4", "--set", "target=synk"], "known is target=sync or target=freeze"),
    (["--at", "4", "--set", "train.seed=3"], "is not a branch's to change"),
    (["--at", "4", "--set", "ema.decay"], "write field=value"),
    (["--at", "4"], "at least one --set"),
])  # fmt: skip
def test_what_cannot_be_branched_is_one_line(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    config = replace(preset("demo"), {"data.series_length": 500, "data.channels": 1, "train.steps": 6})
    fork._write_config(config, tmp_path / "base")
    assert fork.main(["base", *argv, "--dir", "out"]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
