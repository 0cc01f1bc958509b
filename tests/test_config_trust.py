"""A configuration that a file holds is checked like one that the user types, and the checkpoint's own is the truth."""

import json
import shutil

import pytest
from test_checkpoint_trust import sign

from jepa_fast import api, checkpoint, probe, train
from jepa_fast.checkpoint import state as small
from jepa_fast.config import Config, flatten, from_json, to_json
from jepa_fast.errors import UsageError


@pytest.fixture
def run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run[0], tmp_path / "run")


def edit(run, changes, in_checkpoint=False):
    """Change fields of config.json, or of the configuration in the newest checkpoint."""
    step = run / "checkpoints" / "step-6"
    state = small.read(step)
    held = json.loads(state["config"] if in_checkpoint else (run / "config.json").read_text())
    for name, value in changes.items():
        section, _, field = name.partition(".")
        held[section][field] = value
    if in_checkpoint:
        small.write(state | {"config": json.dumps(held)}, step)
        sign(step)
    else:
        (run / "config.json").write_text(json.dumps(held))


def resume(run, *more):
    return train.main(["--resume", "--run.dir", str(run), "--train.steps", "8", *more])


def test_a_config_json_that_was_edited_is_not_resumed(run, capsys):
    edit(run, {"train.seed": 7})
    assert resume(run) == 2
    said = capsys.readouterr().err
    assert "step-6 was made with another configuration than config.json says: train.seed is 0 there and 7 here" in said


def test_fewer_steps_than_were_made_are_refused_and_no_record_is_dropped(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert resume(run, "--train.steps", "5") == 2
    assert "has made 6 steps, and --train.steps asks for 5" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


HUGE = {"model.depth": 10**6, "model.width": 2**40, "model.predictor_width": 2**30, "model.num_patches": 2**31}


@pytest.mark.parametrize("name", HUGE)
def test_a_configuration_too_large_for_its_weights_takes_no_memory(run, name):
    edit(run, {name: HUGE[name]}, in_checkpoint=True)
    for load in (api.load_encoder, probe.load):
        with pytest.raises(UsageError, match=rf"configuration in .*--{name} is .*at most"):
            load(run)
    edit(run, {name: 64}, in_checkpoint=True)  # plausible, and not what the weights are
    if name != "model.num_patches":  # which leaves no trace in them
        with pytest.raises(UsageError, match=r"another architecture|, and should be"):
            probe.load(run)


@pytest.mark.parametrize("name, value", [
    ("train.seed", "0"), ("train.seed", 0.5), ("train.seed", True), ("train.seed", 2**70), ("data.mean", 3), ("data.mean", ["x"]),
    ("data.crop_scale", [0.1]), ("masks.mode", "none"), ("masks.mode", []), ("optim.lr", None), ("optim.lr", 10**400),
    ("data.path", 3), ("train.deterministic", 1), ("optim.betas", {}),
])  # fmt: skip
def test_a_value_of_the_wrong_type_is_named(name, value):
    held = json.loads(to_json(Config()))
    section, field = name.split(".")
    held[section][field] = value
    with pytest.raises(UsageError, match=rf"here is not a configuration .*{field} is") as raised:
        from_json(json.dumps(held), "here")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", "{", '{"model": 3}', '{"model": null}', "[" * 100_000, '{"a": ' * 50_000]
)
def test_what_is_no_configuration_is_one_line(text):
    with pytest.raises(UsageError, match="here is not a configuration"):
        from_json(text, "here")


def test_every_configuration_comes_back_from_its_json():
    from jepa_fast.presets import PRESETS, preset

    for name in PRESETS:
        assert flatten(from_json(to_json(preset(name)))) == flatten(preset(name))


def test_a_target_norm_of_the_first_version_still_loads():
    held = json.loads(to_json(Config()))
    for old, new in ((True, "layer"), (False, "none")):
        held["objective"]["target_norm"] = old
        assert from_json(json.dumps(held)).objective.target_norm == new


def test_a_checkpoint_without_its_configuration_is_one_line(run):
    step = run / "checkpoints" / "step-6"
    for config in (None, 3, "x"):
        small.write(small.read(step) | {"config": config}, step)
        sign(step)
        assert checkpoint.load(step)["step"] == 6
        with pytest.raises(UsageError, match="is not a configuration"):
            api.load_encoder(run)
