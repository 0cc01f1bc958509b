"""The monitor in somebody else's training loop: what it takes, what it writes, what it refuses."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_ema import FusedEMA
from jepa_fast.log import read
from jepa_fast.masks.packing import plan
from jepa_fast.masks.sample import sample_masks
from jepa_fast.model.jepa import JEPA
from jepa_fast.monitor import CollapseMonitor, Examination
from jepa_fast.presets import preset


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


class Loop:
    """A JEPA as people write it: one encoder, its copy, an optimizer, six tokens of which two are seen."""

    def __init__(self, decay=0.9):
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 8))
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictor, self.decay = nn.Linear(8, 8), decay
        self.optimizer = torch.optim.AdamW([*self.encoder.parameters(), *self.predictor.parameters()], lr=1e-2)
        self.seen, self.unseen = torch.tensor([[0, 3]] * 4), torch.tensor([[1, 2, 4, 5]] * 4)

    def forward(self, step):
        x = normal(4, 6, 5, seed=step)
        h, z = self.target(x), self.encoder(x[:, [0, 3]])
        loss = F.mse_loss(self.predictor(z).mean(1, keepdim=True).expand(4, 4, 8), h[:, [1, 2, 4, 5]])
        return loss, z, h

    def backward(self, loss, cheat=0.0):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.decay + cheat)

    def watch(self, monitor, steps=30, cheat=0.0):
        for step in range(steps):
            loss, z, h = self.forward(step)
            monitor.observe(loss, context=z, target=h, visible=self.seen, hidden=self.unseen)
            self.backward(loss, cheat)
            monitor.updated(self.decay)
        return monitor


# ---- three lines ----------------------------------------------------------------------------------


def test_three_lines_write_metrics_and_events(tmp_path):
    loop = Loop()
    monitor = CollapseMonitor(tmp_path / "run", (loop.encoder, loop.target), loss="l2", every=5)
    loop.watch(monitor)
    monitor.close()
    records = read(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 5, 10, 15, 20, 25]
    assert (tmp_path / "run" / "events.jsonl").exists()
    for record in records:
        assert {
            "loss",
            "discrepancy/visible",
            "discrepancy/relative",
            "spread",
            "skill",
            "drift/total",
        } <= record.keys()
        assert all(math.isfinite(v) for k, v in record.items() if k != "phase/state")
    assert records[0]["drift/total"] == 0 < records[1]["drift/total"]


def test_the_loss_alone_is_enough(tmp_path):
    with CollapseMonitor(tmp_path, every=2) as monitor:
        for step in range(7):
            monitor.observe(1.0 / (step + 1))
    records = read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 2, 4, 6] and records[1]["loss"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert "spread" not in records[0] and "drift/total" not in records[0]


def test_a_loop_that_hides_its_phase_is_told_of_it():
    said = []
    with CollapseMonitor(None, every=10, say=said.append) as monitor:
        for step in range(1001):
            monitor.observe(math.exp(-step / 100) + 0.02 + 0.3 * max(0, step - 400) / 600)
    assert "loss_minimum" in [e["kind"] for e in monitor.events]
    assert len([line for line in said if "loss minimum" in line]) == 1


# ---- what it measures -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numbers", "list", "rows", "bool", "same tokens"])
def test_tokens_may_be_named_in_every_usual_way(kind):
    loop = Loop()
    _, z, h = (part.detach() for part in loop.forward(0))
    h = h + 0.1 * normal(*h.shape, seed=3)
    rows = (loop.seen + 6 * torch.arange(4)[:, None]).flatten()
    seen = {"numbers": loop.seen, "list": [loop.seen[:, :1], loop.seen[:, 1:]], "rows": rows, "same tokens": None,
            "bool": torch.zeros(4, 6, dtype=torch.bool).scatter(1, loop.seen, True)}[kind]  # fmt: skip
    context = torch.cat([z[:, :1], z[:, 1:]]) if kind == "list" else z.flatten(0, 1) if kind in ("rows", "bool") else z
    target = h[:, [0, 3]] if kind == "same tokens" else h
    record = CollapseMonitor(None).observe(1.0, context, target, seen)
    assert record["discrepancy/visible"] == pytest.approx(float((z - h[:, [0, 3]]).norm(dim=-1).mean()), rel=1e-5)


def test_one_feature_an_image_will_do():
    z, h = normal(16, 8), normal(16, 8, seed=1)
    record = CollapseMonitor(None).observe(1.0, z, h)
    assert record["discrepancy/visible"] == pytest.approx(float((z - h).norm(dim=-1).mean()), rel=1e-5)
    assert record["spread"] == pytest.approx(float((h - h.mean(0)).norm(dim=-1).mean()) * (16 / 15) ** 0.5, rel=1e-5)


def test_a_common_offset_is_no_centred_discrepancy_and_a_scale_no_normed_one():
    z = normal(40, 8)
    moved = CollapseMonitor(None).observe(1.0, z, z + 3 * normal(1, 8, seed=1))
    assert moved["discrepancy/visible"] > 1 and moved["discrepancy/centred"] < 1e-5
    scaled = CollapseMonitor(None).observe(1.0, z, 3 * z)
    assert scaled["discrepancy/visible"] > 1 and scaled["discrepancy/normed"] < 1e-4
    assert scaled["norm/target"] == pytest.approx(3 * scaled["norm/context"], rel=1e-5)
    assert scaled["discrepancy/to_norm"] == pytest.approx(2 / 3, rel=1e-5)


def test_signals_are_the_definitions_on_a_training_step():
    config = preset("demo")
    jepa = JEPA(config)
    with torch.no_grad():
        for p in jepa.target_encoder.parameters():
            p.mul_(1.05)
    inputs = normal(8, 1, 500)
    masks = sample_masks(config.masks, config.grid, 0, 0, np.zeros(8, np.int64), np.arange(8))
    packed = plan(masks, 10)
    output = jepa(inputs, packed)
    monitor = CollapseMonitor(None, (jepa.context_encoder, jepa.target_encoder), loss="l2", target_norm="layer")
    record = monitor.observe(
        output.loss,
        output.context,
        output.target,
        packed.context_rows,
        packed.target_rows,
        hidden_weight=packed.target_weight,
    )
    by_hand = []
    with torch.no_grad():
        target = jepa.target_encoder(inputs)
        for row, visible in enumerate(np.split(masks.context, 8)):
            keep = torch.from_numpy(visible)[None]
            by_hand.append((jepa.context_encoder(inputs[row : row + 1], keep)[0] - target[row, keep[0]]).norm(dim=-1))
    assert record["discrepancy/visible"] == pytest.approx(float(torch.cat(by_hand).mean()), rel=1e-4)
    assert record["discrepancy/relative"] == pytest.approx(record["discrepancy/visible"] / record["spread"], rel=1e-5)
    squares = [
        (a - b).square().sum()
        for a, b in zip(jepa.context_encoder.parameters(), jepa.target_encoder.parameters(), strict=True)
    ]
    assert record["drift/total"] == pytest.approx(float(torch.stack(squares).sum().sqrt().detach()), rel=1e-5)
    assert record["skill"] < 1


@pytest.mark.parametrize("kind", ["modules", "pairs", "named", "fused"])
def test_weights_may_come_in_every_usual_way(kind):
    loop = Loop()
    fused = FusedEMA(loop.encoder, target=loop.target)
    pairs = list(zip(loop.encoder.parameters(), loop.target.parameters(), strict=True))
    names = [name for name, _ in loop.encoder.named_parameters()]
    weights = {"modules": (loop.encoder, loop.target), "pairs": pairs, "fused": fused,
               "named": dict(zip(names, pairs, strict=True))}[kind]  # fmt: skip
    monitor = CollapseMonitor(None, weights)
    with torch.no_grad():
        loop.encoder[0].weight += 0.5
    before = [p.clone() for p in loop.target.parameters()]
    record = monitor.observe(1.0)
    assert record["drift/total"] == pytest.approx(0.5 * 40**0.5, rel=1e-5)
    assert record["drift/0"] == pytest.approx(0.5 * 40**0.5, rel=1e-5)
    norms = torch.stack([p.detach().norm() for p in loop.encoder.parameters()]).norm()
    assert record["drift_relative/total"] == pytest.approx(0.5 * 40**0.5 / float(norms), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, loop.target.parameters(), strict=True))


def test_spectral_drift_tightens_to_the_largest_singular_value():
    loop = Loop()
    monitor = CollapseMonitor(None, (loop.encoder, loop.target), spectral_every=1, every=1)
    with torch.no_grad():
        loop.encoder[0].weight += normal(8, 5)
    for _ in range(60):
        record = monitor.observe(1.0)
    drift = loop.encoder[0].weight - loop.target[0].weight
    assert record["drift_spectral/0"] == pytest.approx(float(torch.linalg.matrix_norm(drift, 2).detach()), rel=1e-3)
    rank = float(drift.square().sum().detach()) / record["drift_spectral/0"] ** 2
    assert record["drift_rank/0"] == pytest.approx(rank, rel=1e-4) and record["drift_rank/2"] == 0


def test_a_monitor_changes_nothing_of_the_training():
    watched, alone = Loop(), Loop()
    examination = Examination(watched.encoder, watched.target, normal(4, 6, 5))
    watched.watch(CollapseMonitor(None, (watched.encoder, watched.target), every=1, examination=examination))
    for step in range(30):
        loss, _, _ = alone.forward(step)
        alone.backward(loss)
    for a, b in zip(watched.encoder.parameters(), alone.encoder.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- the identity ---------------------------------------------------------------------------------


def test_the_identity_of_theorem_4_2_holds_on_live_weights(tmp_path):
    loop = Loop()
    monitor = loop.watch(CollapseMonitor(tmp_path, (loop.encoder, loop.target), every=1))
    checked = [r["identity/residual"] for r in monitor.records if "identity/residual" in r]
    assert checked and max(checked) <= 1
    assert not [e for e in monitor.events if e["kind"] == "identity_violated"]


@pytest.mark.parametrize("cheat", [1e-3, -1e-3, 0.05])
def test_an_ema_that_is_not_the_one_it_claims_to_be_is_an_event(tmp_path, cheat):
    loop = Loop()
    said = []
    loop.watch(CollapseMonitor(tmp_path, (loop.encoder, loop.target), every=1, say=said.append), cheat=cheat)
    events = [e for e in read(tmp_path / "events.jsonl") if e["kind"] == "identity_violated"]
    assert events and events[0]["residual"] > 1 and any("identity violated" in line for line in said)


# ---- bad steps, resuming, refusals ----------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_left_out_and_a_skipped_step_is_counted(tmp_path):
    monitor = CollapseMonitor(tmp_path, every=4)
    for loss in (1.0, math.nan, 3.0, 2.0, 2.0):
        monitor.observe(loss)
        monitor.updated(finite=torch.tensor(math.isfinite(loss)))
    assert monitor.records[1]["loss"] == pytest.approx(7 / 3)
    assert [(e["kind"], e["count"]) for e in monitor.events] == [("skipped_step", 1)] and monitor.bad_in_a_row == 0


def test_a_log_goes_on_where_it_was_cut(tmp_path):
    first = CollapseMonitor(tmp_path, every=1)
    for step in range(6):
        first.observe(float(step))
    first.close()
    again = CollapseMonitor(tmp_path, every=1, start=4)
    again.load_state_dict(first.state_dict())
    again.observe(40.0)
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert again.records[-1]["loss"] == 40.0


def test_a_log_is_never_written_over(tmp_path):
    CollapseMonitor(tmp_path).observe(1.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="start="):
        CollapseMonitor(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("visible", "says"), [
    (torch.tensor([[0, 1, 2]] * 4), "8 context tokens"),
    (torch.tensor([[0, 1]] * 3), "batch of 4"),
    (torch.zeros(4, 2), "integers"),
    (torch.zeros(4, 5, dtype=torch.bool), "bool mask"),
])  # fmt: skip
def test_tokens_that_do_not_fit_are_refused(visible, says):
    _, z, h = Loop().forward(0)
    with pytest.raises((ValueError, TypeError), match=says):
        CollapseMonitor(None).observe(1.0, z, h, visible)


@pytest.mark.parametrize("weights", [3, [1, 2], (nn.Linear(2, 2), nn.Linear(3, 2))])
def test_weights_that_do_not_pair_up_are_refused(weights):
    with pytest.raises((ValueError, TypeError)):
        CollapseMonitor(None, weights)


def test_a_period_below_one_is_refused():
    with pytest.raises(ValueError, match="every is 0"):
        CollapseMonitor(None, every=0)
