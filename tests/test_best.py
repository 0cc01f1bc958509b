"""checkpoints/best: the best look so far, whole at every moment, however the process ends, and taken wherever a checkpoint is."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import jepa_fast
from jepa_fast import checkpoint
from jepa_fast.checkpoint import best
from jepa_fast.export import export
from jepa_fast.monitor.best import Best
from jepa_fast.probe import main as probe_main
from jepa_fast.train import main

# ---- which look it is -----------------------------------------------------------------------------


def chosen(looks, known=None):
    """Steps whose weights are kept, of records given as {step: what it says}."""
    followed = Best(known or {})
    return [step for step, said in looks.items() if followed.add({"step": step} | said)]


def probed(context, target, num_test=400):
    return {"probe/context": context, "probe/target": target, "probe/num_test": num_test}


def useful(context, target=None):
    return {"phase/useful/context": context} | ({} if target is None else {"phase/useful/target": target})


def test_by_the_probe_of_the_better_encoder_and_only_by_more_than_its_noise():
    noise = 0.025  # sqrt(.5 * .5 / 400)
    looks = {0: probed(0.9, 0.9), 10: probed(0.5, 0.4), 20: probed(0.5 + 0.9 * noise, 0.3), 30: probed(0.4, 0.5 + 1.1 * noise),
             40: {"loss": 0.1}, 50: probed(float("nan"), 0.5), 60: probed(0.7, None)}  # fmt: skip
    assert chosen(looks) == [10, 30, 60]
    many = {10: probed(0.5, 0.4, 40_000), 20: probed(0.5 + 0.9 * noise, 0.3, 40_000)}
    assert chosen(many) == [10, 20]


def test_without_probes_by_the_probability_and_of_equal_ones_a_later_one():
    looks = {
        10: useful(0.1),
        20: useful(0.1, 0.5),
        30: useful(0.51),
        31: useful(0.1),
        32: useful(None),
        60: useful(0.49),
    }
    assert chosen(looks) == [10, 20, 30, 60]
    plateau = {step: useful(0.97) for step in range(10, 10_000, 10)}
    kept = chosen(plateau)
    assert len(kept) < 80 and kept[-1] > 9_000
    sinking = {10 * 2**i: useful(0.9 - 0.015 * i) for i in range(8)}
    assert chosen(sinking) == [10, 20], "it cannot sink step by step"


def test_what_is_known_from_the_checkpoint_goes_on():
    first = Best({})
    assert first.add({"step": 10} | probed(0.6, 0.5))
    later = {10: probed(0.6, 0.5), 20: probed(0.61, 0.5), 30: probed(0.7, 0.5)}
    assert chosen(later, first.state()) == [30]
    assert chosen({10: probed(0.1, 0.1)}, {"step": "damaged"}) == [10]


# ---- a kill at every moment -----------------------------------------------------------------------


class Killed(BaseException):
    """As SIGKILL: nothing that would clean up catches it."""


def keep(folder, step, value):
    writer = checkpoint.Writer(folder, keep=1)
    try:
        writer.save(step, {"model.w": torch.full((5,), value)}, {"step": step, "best": {"step": step}}, best=True)
        writer.finish()
    finally:
        writer.close()


def value(folder):
    state = checkpoint.load(folder / "checkpoints" / "best")
    assert state["step"] == checkpoint.kept(folder)["step"]
    return float(state["model"]["w"][0])


def killed_at(operation, monkeypatch, folder, final):
    """Put the folder `final` in its place as the best, and die before that file operation (0: the first); whether it died."""
    left = [operation]

    def dying(call):
        def operate(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return call(*args, **kwargs)

        return operate

    with monkeypatch.context() as patched:
        for owner, names in ((Path, ("rename", "symlink_to", "unlink")), (os, ("rmdir", "unlink")), (best, ("sync",))):
            for name in names:
                patched.setattr(owner, name, dying(getattr(owner, name)))
        try:
            best.put(folder / ".best-20.partial", final)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("step", [20, 10], ids=["another step", "the same step again"])
def test_killed_before_any_file_operation_the_old_best_or_the_new_one_is_there_whole(tmp_path, monkeypatch, step):
    spare = tmp_path / "spare"
    keep(spare, step, 2.0)
    written = (spare / "checkpoints" / "best").resolve()
    for operation in range(100):
        run = tmp_path / f"run-{operation}"
        keep(run, 10, 1.0)
        root = run / "checkpoints"
        shutil.copytree(written, root / ".best-20.partial")
        died = killed_at(operation, monkeypatch, root, root / f"best-{step}")
        assert value(run) in (1.0, 2.0)
        checkpoint.sweep(run)  # as the next process does
        seen = value(run)
        assert seen == 2.0 or died
        assert sorted(f.name.split("-")[0] for f in root.iterdir()) == ["best", "best"], "the link and its folder"
        keep(run, 30, 3.0)
        assert value(run) == 3.0 and len(list(root.iterdir())) == 2
        if not died:
            break
    assert operation > 6  # it was killed at each of them


def test_a_run_folder_that_was_copied_without_links_goes_on(tmp_path):
    keep(tmp_path / "run", 10, 1.0)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert not (tmp_path / "copy" / "checkpoints" / "best").is_symlink() and value(tmp_path / "copy") == 1.0
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "best-10")
    keep(tmp_path / "copy", 20, 2.0)
    assert value(tmp_path / "copy") == 2.0


# ---- of a run -------------------------------------------------------------------------------------


def steps_of(run):
    return sorted(f.name for f in (run / "checkpoints").iterdir() if f.name.startswith(("step", "best-")))


def test_a_run_keeps_its_best_look_beside_the_newest_checkpoints_and_over_a_resume(tiny_run, tmp_path):
    shutil.copytree(tiny_run[0], run := tmp_path / "waves", symlinks=True)
    config = json.loads((run / "config.json").read_text())
    path = config["data"]["path"]
    # Its probe reads 1.0 from the first look on, so that the first trained look stays the best.
    assert steps_of(run) == ["best-3", "step-3", "step-6"]
    known = checkpoint.kept(run)
    assert (known["step"], known["score"]) == (3, 1.0) and known["by"].startswith("probe/")
    sizes = ("--train.steps", 8, "--train.batch_size", 8, "--checkpoint.every", 1, "--checkpoint.keep", 1, "--log.every", 1,
             "--optim.warmup_epochs", 0, "--monitor.every", 3, "--data.workers", 1, "--train.precision", "fp32")  # fmt: skip
    before = (run / "checkpoints" / "best" / "meta.json").read_bytes()
    asked = ("series", "--data.path", path, "--run.dir", run, "--resume", *sizes)
    assert main(list(map(str, asked))) == 0
    assert steps_of(run) == ["best-3", "step-8"]
    assert (run / "checkpoints" / "best" / "meta.json").read_bytes() == before
    assert "optimizer" not in "".join(checkpoint.load(run / "checkpoints" / "best")["model"])


def test_the_best_checkpoint_is_taken_wherever_a_checkpoint_is(tiny_run, tmp_path, capsys):
    run, _ = tiny_run
    place, same = run / "checkpoints" / "best", run / "checkpoints" / "step-3"
    found, want = jepa_fast.load_encoder(place), jepa_fast.load_encoder(same)
    assert found.step == 3
    assert all(torch.equal(v, want.encoder.state_dict()[k]) for k, v in found.encoder.state_dict().items())
    assert jepa_fast.predictor_skill(place) == jepa_fast.predictor_skill(same)
    weights = checkpoint.weights_at(str(place))
    assert weights.keys() == checkpoint.weights_at(str(same)).keys()
    assert (export(place, "safetensors", out=tmp_path / "out") / "model.safetensors").exists()
    shutil.copytree(run, copy := tmp_path / "copy", symlinks=True)
    assert probe_main([str(copy / "checkpoints" / "best"), "--num_train", "20", "--num_test", "20"]) == 0
    assert "best-3" in capsys.readouterr().out
    assert json.loads((copy / "probe.json").read_text())[0]["checkpoint"] == "best-3"
    assert probe_main([str(copy / "checkpoints" / "best"), "--step", "3"]) == 2
    assert "is one checkpoint already" in capsys.readouterr().err


def test_it_is_not_kept_where_nobody_wants_it(tiny_run, tmp_path):
    path = json.loads((tiny_run[0] / "config.json").read_text())["data"]["path"]
    asked = ("series", "--data.path", path, "--run.dir", tmp_path / "run", "--train.steps", 2, "--train.batch_size", 8,
             "--monitor.every", 1, "--data.workers", 1, "--optim.warmup_epochs", 0, "--train.precision", "fp32",
             "--checkpoint.keep_best", "False")  # fmt: skip
    assert main(list(map(str, asked))) == 0
    assert steps_of(tmp_path / "run") == ["step-2"]
