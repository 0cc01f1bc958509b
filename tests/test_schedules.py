"""Levers: what is asked for at the start, at the end and between, and only that."""

import json
import re
from pathlib import Path

import pytest
import torch

from jepa_fast import schedules
from jepa_fast.config import EMA, Config, Perturb, check, flatten, replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.loading.loader import Loader
from jepa_fast.errors import UsageError
from jepa_fast.model.jepa import JEPA
from jepa_fast.perturb import perturb
from jepa_fast.presets import preset
from jepa_fast.rundir import saved_config
from jepa_fast.train import main


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0.996, 1.0), (0.9999, 0.996), (0.0, 1.0)])
def test_the_ema_decay_goes_up_or_down(schedule, start, end):
    config = EMA(decay=start, final_decay=end, schedule=schedule, scale=0.5)
    values = [schedules.ema_decay(config, step, 1000) for step in range(0, 1001, 50)]
    assert values[0] == start and values[5] == pytest.approx((start + end) / 2)
    assert all(v == pytest.approx(end) for v in values[10:])
    assert values == sorted(values, reverse=end < start)
    assert {schedules.ema_decay(EMA(decay=start, schedule="constant"), s, 10) for s in range(11)} == {start}


def test_the_masking_ratio_goes_where_it_is_told_and_the_loader_follows(tmp_path):
    config = replace(preset("demo"), {"masks.ratio": 0.3, "masks.final_ratio": 0.9, "masks.schedule": "linear"})
    loader = Loader(config, open_dataset(config).train, 0, 0, 1, 0, 11)
    hidden = [10 - sum(int(plan.context_cu[-1]) for plan in batch.plans) / 32 for batch in loader]
    loader.close()
    assert hidden == [int(10 * (0.3 + 0.06 * step) + 1e-9) for step in range(11)]
    blocks = replace(preset("textures"), {"masks.final_target_scale": (0.05, 0.1), "masks.schedule": "cosine"}).masks
    assert schedules.masks(blocks, 0, 10).target_scale == blocks.target_scale
    assert schedules.masks(blocks, 10, 10).target_scale == pytest.approx((0.05, 0.1))
    assert schedules.masks(preset("textures").masks, 5, 10) == preset("textures").masks


def test_a_scheduled_ratio_stands_in_the_log(tmp_path):
    levers = ["--masks.schedule", "linear", "--masks.ratio", "0.3", "--masks.final_ratio", "0.9"]
    assert main(["demo", "--run.dir", str(tmp_path / "run"), "--train.steps", "3", "--log.every", "1", *levers]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["schedule/ratio"] for r in records] == pytest.approx([0.3, 0.5, 0.7, 0.9])
    assert not any("schedule/target_scale" in r for r in records)  # there are no blocks


@pytest.mark.parametrize("changes", [
    {"masks.final_ratio": 1.5}, {"masks.schedule": "linear", "masks.final_ratio": 0.05},
    {"masks.final_target_scale": (0.5, 0.1)}, {"perturb.noise": -0.1}, {"perturb.every": 0},
])  # fmt: skip
def test_levers_out_of_range_are_refused(changes):
    with pytest.raises(UsageError):
        check(replace(preset("demo"), changes))


def test_a_perturbation_is_as_large_as_asked_on_matrices_alone_and_the_same_again():
    encoders = [JEPA(preset("demo")).context_encoder for _ in range(2)]
    encoders[1].load_state_dict(encoders[0].state_dict())
    before = {name: p.clone() for name, p in encoders[0].named_parameters()}
    for encoder in encoders:
        perturb(encoder, Perturb(noise=0.1, every=5, until=20), seed=3, step=10)
        for step in (1, 20, 25):
            perturb(encoder, Perturb(noise=0.1, every=5, until=20), seed=3, step=step)
    for (name, a), b in zip(encoders[0].named_parameters(), encoders[1].parameters(), strict=True):
        assert torch.equal(a, b)
        moved = (a - before[name]).detach()
        if a.ndim == 1:
            assert not moved.any()
        else:
            assert float(moved.std() / before[name].detach().std()) == pytest.approx(0.1, rel=0.05)


def test_every_lever_that_is_documented_is_a_field():
    table = (Path(__file__).parent.parent / "docs" / "diagnosis.md").read_text().split("## Levers")[1]
    named = re.findall(r"`([a-z_]+\.[a-z_]+)`", table)
    assert len(named) > 10 and set(named) <= set(flatten(Config()))


def test_a_run_logs_what_its_next_update_is_made_with(tiny_run, tiny_image_run):
    for folder, records in (tiny_run, tiny_image_run):
        config = saved_config(folder)
        for record in records:
            step = record["step"]
            assert record["schedule/lr"] == schedules.learning_rate(config.optim, step, 6, 0)
            assert record["schedule/weight_decay"] == schedules.weight_decay(config.optim, step, 6)
            assert record["schedule/ema_decay"] == schedules.ema_decay(config.ema, step, 6)
    assert [r["schedule/ema_decay"] for r in records] == pytest.approx([0.996 + 0.004 * t / 6 for t in range(7)])
