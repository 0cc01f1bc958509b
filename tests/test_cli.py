"""The command line: a preset and fields over it; what is wrong is said in one line."""

import json

import pytest

from jepa_fast import cli
from jepa_fast.config import Config, check, flatten, from_json, replace, to_json
from jepa_fast.errors import UsageError
from jepa_fast.presets import PRESETS, preset
from jepa_fast.train import main


def test_without_arguments_a_cpu_trains_the_demo(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.parse([]).config == preset("demo")


def test_without_arguments_cuda_trains_imagenet_or_generated_textures(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("JEPA_FAST_DATA", raising=False)
    generated = cli.parse([]).config
    assert (generated.preset, generated.data.embedded) == ("in1k-vitb16", "textures224")
    monkeypatch.setenv("JEPA_FAST_DATA", "/data/in1k")
    assert cli.parse([]).config.data.path == "/data/in1k"


def test_fields_go_over_the_preset():
    config = cli.parse(
        ["textures", "--train.steps", "7", "--data.crop_scale", "0.2", "0.9", "--ema.decay=0.5", "--init.from", "x"]
    ).config
    assert (config.train.steps, config.data.crop_scale, config.ema.decay, config.init.from_) == (
        7,
        (0.2, 0.9),
        0.5,
        "x",
    )
    assert config.model == preset("textures").model
    for said, meant in (("False", "none"), ("True", "layer"), ("batch", "batch")):
        assert cli.parse(["--objective.target_norm", said]).config.objective.target_norm == meant
        assert cli.parse([f"--objective.target_norm={said}"]).config.objective.target_norm == meant


@pytest.mark.parametrize(("argv", "says"), [
    (["txtures"], "unknown preset 'txtures' (did you mean textures?)"),
    (["--train.stps", "3"], "unknown option --train.stps (did you mean --train.steps?)"),
    (["--train.steps", "abc"], "--train.steps: invalid literal for int() with base 10: 'abc'; give --train.steps INT\n"),
    (["--masks.mode", "foo"], "invalid choice 'foo' for argument '--masks.mode'. Expected one of ('reference',"),
    (["--masks.target_scale", "1"], "Missing value for argument '--masks.target_scale'. Expected 2 values"),
    (["--optim.betas", "1", "x"], "give --optim.betas FLOAT FLOAT"),
    (["--data.path", "x", "images"], "the preset comes first: python -m jepa_fast.train images"),
    (["--ema.decay", "1.5"], "--ema.decay is 1.5: give a number from 0 to 1"),
    (["--ema.decay", "nan"], "--ema.decay is nan"),
    (["--train.batch_size", "0"], "--train.batch_size is 0"),
    (["--model.heads", "3"], "--model.heads 3 must divide it"),
    (["textures", "--data.image_size", "50"], "--model.patch 8 must divide it"),
    (["--data.series_length", "5"], "--data.series_length is 5"),
    (["--masks.ratio", "0.01"], "hides 0 of 10 tokens"),
    (["--train.steps"], "Missing value for argument '--train.steps'"),
    (["--optim.lr", "nan"], "--optim.lr is nan: give a finite number"),
    (["--masks.ratio", "1"], "give a number between 0 and 1"),
    (["--resume=yes"], "--resume=yes"),
    (["-x"], "unknown option -x"),
    (["demo", "extra"], "extra"),
])  # fmt: skip
def test_bad_input_is_one_line_and_status_2(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert says in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert "--- " not in err and "help" not in err.replace("--help", "")
    assert not list(tmp_path.iterdir())


def test_debug_keeps_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("JEPA_FAST_DEBUG", "1")
    assert main(["nope"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_list_names_every_preset_and_print_config_prints_what_would_run(capsys):
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PRESETS)
    assert main(["textures", "--train.seed", "3", "--print-config"]) == 0
    assert from_json(capsys.readouterr().out) == replace(preset("textures"), {"train.seed": 3})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_valid_documented_and_survives_json(name):
    config = check(preset(name))
    assert config.preset == name
    assert from_json(to_json(config)) == config
    doc = PRESETS[name].__doc__
    assert "Source:" in doc and f"jepa_fast.train{'' if name == 'demo' else ' ' + name}" in doc


def test_presets_without_data_say_what_to_put_where():
    for name, make in PRESETS.items():
        data = make().data
        assert data.embedded or data.hint, name


def test_a_configuration_of_an_earlier_version_is_read_and_of_another_refused():
    config = preset("forda")
    earlier = json.loads(to_json(config))
    del earlier["optim"]["clip"], earlier["perturb"]
    assert from_json(json.dumps(earlier)) == config
    with pytest.raises(UsageError, match="unknown field surprise"):
        from_json('{"preset": "demo", "surprise": 1}')
    with pytest.raises(UsageError, match="not a configuration"):
        from_json("[1, 2")


def test_flatten_and_replace_are_inverse():
    config = preset("forda")
    assert replace(Config(), flatten(config)) == config
