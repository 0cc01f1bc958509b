"""loss/heldout: the training objective on fixed inputs and masks, the same at every look, and no part of the training."""

import json

import numpy as np
import pytest
import torch

from jepa_fast.config import replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.sources import fixed_draw
from jepa_fast.interop import load_jepa
from jepa_fast.model.jepa import JEPA
from jepa_fast.monitor import Examination
from jepa_fast.monitor.heldout import CHUNK, HeldOut
from jepa_fast.presets import preset


def small(**changes):
    config = replace(
        preset("demo"),
        {"model.width": 16, "model.predictor_width": 16, "data.channels": 1, "data.series_length": 60}
        | {name.replace("__", "."): value for name, value in changes.items()},
    )
    torch.manual_seed(0)
    return config, JEPA(config)


def series(count):
    return torch.randn(count, 1, 60, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", ["layer", "batch", "position", "centre", "none"])
@pytest.mark.parametrize("loss", ["l2", "smooth_l1", "l1"])
def test_it_is_the_loss_that_training_would_have_on_these_inputs_and_masks(norm, loss):
    config, jepa = small(objective__target_norm=norm, objective__loss=loss)
    heldout, inputs = HeldOut(jepa, config), series(100)
    parts = inputs.tensor_split(2)
    assert all(len(part) <= CHUNK for part in parts)
    with torch.no_grad():
        want = sum(
            float(jepa(part, heldout.masks.plan(len(part), view)).loss) * len(part) for view, part in enumerate(parts)
        )
    assert heldout(inputs) == pytest.approx(want / len(inputs), rel=1e-6)


@pytest.mark.parametrize("stats", ["batch", "running"])
def test_looking_changes_nothing_and_always_sees_the_same(stats):
    config, jepa = small(objective__target_norm="position", objective__target_stats=stats)
    heldout, inputs = HeldOut(jepa, config), series(20)
    first = heldout(inputs)  # before the first step, when nothing is averaged yet
    jepa(series(8), heldout.masks.plan(8, 0))
    jepa.targets.update(torch.tensor(True))
    state = {name: value.clone() for name, value in (*jepa.state_dict().items(), *jepa.named_buffers())}
    random, numpy_random = torch.get_rng_state(), np.random.get_state()[1].copy()
    looks = [heldout(inputs) for _ in range(2)] + [HeldOut(jepa, config)(inputs)]
    assert looks[0] == looks[1] == looks[2] and np.isfinite([first, *looks]).all()
    assert (looks[0] == first) == (stats == "batch")
    assert torch.equal(torch.get_rng_state(), random) and (np.random.get_state()[1] == numpy_random).all()
    after = dict((*jepa.state_dict().items(), *jepa.named_buffers()))
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert all(p.grad is None for p in jepa.parameters()) and jepa.training


def test_a_run_logs_it_of_the_probes_test_inputs_at_every_look(tiny_run):
    run, records = tiny_run
    looks = {r["step"]: r["loss/heldout"] for r in records if "loss/heldout" in r}
    assert list(looks) == [r["step"] for r in records if "probe/target" in r] == [0, 3, 6]
    for step in (3, 6):
        jepa, config, _ = load_jepa(run, step)
        dataset = open_dataset(config)
        assert dataset.held_out
        inputs = torch.from_numpy(fixed_draw(dataset.probe_test, config.monitor.probe_test)[0][:256])
        assert looks[step] == pytest.approx(HeldOut(jepa, config)(inputs), rel=1e-6)


def test_it_is_absent_where_nothing_is_held_out(tmp_path):
    from jepa_fast.train import main

    np.savetxt(tmp_path / "plain_TRAIN.tsv", np.column_stack([np.ones(40), series(40)[:, 0]]), delimiter="\t")
    sizes = ("--model.width", 16, "--model.heads", 2, "--model.predictor_width", 16, "--train.batch_size", 8)
    steps = ("--train.steps", 1, "--data.workers", 1, "--optim.warmup_epochs", 0, "--train.precision", "fp32")
    asked = ("series", "--data.path", tmp_path / "plain_TRAIN.tsv", "--run.dir", tmp_path / "run", *steps, *sizes)
    assert main(list(map(str, asked))) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("discrepancy/full" in r and "loss/heldout" not in r for r in records)


def test_of_several_sets_without_a_test_part_nothing_is_held_out(tmp_path):
    for name in ("a", "b"):
        labelled = np.column_stack([np.arange(40) % 2, series(40)[:, 0]])
        np.savetxt(tmp_path / f"{name}_TRAIN.tsv", labelled, delimiter="\t")
    config = replace(preset("series"), {"data.series_length": 60, "data.channels": 1})
    one, other = (str(tmp_path / f"{name}_TRAIN.tsv") for name in ("a", "b"))
    assert open_dataset(replace(config, {"data.path": one})).held_out
    both = open_dataset(replace(config, {"data.path": f"{one}::{other}"}))
    assert both.probe_test is not None and not both.held_out


def test_without_a_probe_set_or_an_objective_an_examination_has_no_such_key():
    config, jepa = small()
    looked = Examination(jepa.context_encoder, jepa.target_encoder, series(8), objective=HeldOut(jepa, config)).look()
    assert "loss/heldout" not in looked
