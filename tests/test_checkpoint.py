"""Checkpoints are whole or not there; a damaged one is named; nothing in one is executed."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from together import together

from fused_ema.op import local
from jepa_fast import checkpoint, parallel
from jepa_fast.config import replace
from jepa_fast.errors import UsageError
from jepa_fast.presets import preset


@pytest.fixture
def writer(tmp_path):
    made = checkpoint.Writer(tmp_path, keep=2)
    yield made
    made.close()


def _tensors(step):
    return {"model.w": torch.arange(5.0) * step, "optimizer.w.exp_avg": torch.ones(5)}


def _write(writer, *steps):
    for step in steps:
        writer.save(step, _tensors(step), {"step": step, "note": "text"})
    writer.finish()


def _damage(folder, step, name):
    file = folder / "checkpoints" / f"step-{step}" / name
    blob = bytearray(file.read_bytes())
    blob[len(blob) // 2] ^= 0xFF
    file.write_bytes(blob)


def test_what_is_saved_comes_back_and_only_the_newest_are_kept(writer, tmp_path):
    _write(writer, 10, 20, 100)
    assert checkpoint.found(tmp_path) == [20, 100]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-100\n"
    step, state = checkpoint.load_newest(tmp_path, fall_back=False)
    assert step == state["step"] == 100 and state["note"] == "text"
    assert state["model"].keys() == {"w"} and torch.equal(state["model"]["w"], torch.arange(5.0) * 100)
    into = {name: torch.zeros_like(value) for name, value in _tensors(1).items()}
    checkpoint.restore(tmp_path / "checkpoints" / "step-20", into, None, "it")
    assert torch.equal(into["model.w"], torch.arange(5.0) * 20) and into["optimizer.w.exp_avg"].sum() == 5


def test_tensors_may_change_once_they_are_staged(writer, tmp_path):
    """As optimizer and EMA do, while the files are still being written."""
    tensors = {"model.w": torch.zeros(300_000)}
    for step in (1, 2, 3):
        writer.save(step, tensors, {})
        writer.staged()
        tensors["model.w"] += 1
    writer.finish()
    assert checkpoint.load(tmp_path / "checkpoints" / "step-3")["model"]["w"].unique().tolist() == [2.0]


def test_a_half_written_checkpoint_is_not_seen_and_is_swept_away(writer, tmp_path):
    _write(writer, 10)
    partial = tmp_path / "checkpoints" / ".step-20.partial"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"half")
    (tmp_path / "checkpoints" / "step-30").mkdir()
    assert checkpoint.found(tmp_path) == [10]
    checkpoint.sweep(tmp_path)
    assert not partial.exists() and checkpoint.found(tmp_path) == [10]


@pytest.mark.parametrize("name", ["tensors-0.safetensors", "index.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_good_one_offered(writer, tmp_path, capsys, name):
    _write(writer, 10, 20)
    _damage(tmp_path, 20, name)
    with pytest.raises(UsageError, match=rf"step-20 is damaged .*{name} is not.*step-10 is good: --resume auto"):
        checkpoint.newest(tmp_path, fall_back=False)
    assert checkpoint.newest(tmp_path, fall_back=True) == 10
    assert "continuing from step-10" in capsys.readouterr().out
    (tmp_path / "checkpoints" / "step-10" / name).unlink()
    with pytest.raises(UsageError, match="no good checkpoint is left"):
        checkpoint.newest(tmp_path, fall_back=True)


def test_another_architecture_is_named_by_its_first_difference(writer, tmp_path):
    _write(writer, 1)
    held = tmp_path / "checkpoints" / "step-1"
    own = _tensors(1)
    with pytest.raises(UsageError, match=r"it is another architecture: w is \[5\] there and \[4\] here"):
        checkpoint.restore(held, own | {"model.w": torch.zeros(4)}, None, "it")
    with pytest.raises(UsageError, match="it has no v"):
        checkpoint.restore(held, own | {"model.v": torch.zeros(4)}, None, "it")


def test_init_weights_come_from_a_run_or_a_checkpoint(writer, tmp_path):
    _write(writer, 3)
    for path in (tmp_path, tmp_path / "checkpoints" / "step-3"):
        assert torch.equal(checkpoint.weights_at(str(path))["w"], torch.arange(5.0) * 3)
    with pytest.raises(UsageError, match="no checkpoint there"):
        checkpoint.weights_at(str(tmp_path / "nothing"))


@pytest.mark.parametrize("where", ["tensors", "state"])
def test_a_disk_that_fills_up_keeps_the_old_checkpoint_and_leaves_no_half_one(writer, tmp_path, where):
    """A real short write: the limit on file sizes of this process."""
    _write(writer, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            UsageError,
            match=r"cannot write checkpoint .*step-2: .*(disk full|File too large).*; earlier checkpoints are intact",
        ):
            large = {"x": torch.zeros(100_000)}
            writer.save(2, _tensors(2) | (large if where == "tensors" else {}), large if where == "state" else {})
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.found(tmp_path) == [1] and not list((tmp_path / "checkpoints").glob(".*partial"))
    _write(writer, 3)  # and when there is room again it goes on
    assert checkpoint.found(tmp_path) == [1, 3]


def test_a_read_only_disk_is_one_clear_error(writer, tmp_path, monkeypatch):
    _write(writer, 1)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched, pytest.raises(UsageError, match="step-2: Read-only file system; earlier"):
        patched.setattr(Path, "mkdir", refuse)
        writer.save(2, _tensors(2), {})
    assert checkpoint.found(tmp_path) == [1]


def refused(rank, folder):
    """What stops each of two processes whose main one alone cannot write: the folder, then the last rename."""
    world, ends = parallel.join(replace(preset("demo"), {"parallel.threads": 1})), []
    for trouble in ("folder", "rename"):
        writer = checkpoint.Writer(Path(folder) / trouble, keep=2, group=world.files)
        if rank == 0 and trouble == "folder":
            Path(folder, "folder").write_text("in the way")
        if rank == 0 and trouble == "rename":
            writer._commit = refuse
        try:
            writer.save(1, {"model.w": torch.ones(3)}, {})
            writer.finish()
        except (UsageError, SystemExit) as end:
            ends.append(f"{type(end).__name__}: {end}")
        writer.close()
    parallel.leave()
    return ends


def refuse(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.dist
def test_what_keeps_the_main_process_from_writing_stops_all_and_one_says_so(tmp_path):
    main, other = together(2, refused, str(tmp_path))
    assert other == ["SystemExit: 2"] * 2
    assert "step-1: Not a directory; earlier checkpoints are intact" in main[0]
    assert "step-1: Read-only file system; earlier checkpoints are intact" in main[1]


def sharded(rank, folder):
    """Save a sharded, a replicated and an unevenly cut tensor from two processes; read them back on both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = parallel.join(replace(preset("demo"), {"parallel.threads": 1}))
    mesh = init_device_mesh("cpu", (world.size,))
    whole = {
        "model.w": torch.arange(15.0).reshape(5, 3),
        "model.r": torch.arange(4.0),
        "model.few": torch.ones(1, 2).bfloat16(),
    }
    placed = {"model.w": [Shard(0)], "model.r": [Replicate()], "model.few": [Shard(0)]}
    tensors = {name: distribute_tensor(value, mesh, placed[name]) for name, value in whole.items()} | {
        "plain": torch.ones(2)
    }
    writer = checkpoint.Writer(Path(folder), keep=0, group=world.files)
    writer.save(1, tensors, {"step": 1})
    writer.finish()
    into = {name: value * 0 for name, value in tensors.items()}
    checkpoint.restore(Path(folder) / "checkpoints" / "step-1", into, world.host, "it")
    same = [torch.equal(local(into[n]), local(tensors[n])) for n in tensors]
    writer.close()
    parallel.leave()
    return same


@pytest.mark.dist
def test_what_two_processes_saved_in_shards_both_read_back_and_one_too(tmp_path):
    assert together(2, sharded, str(tmp_path)) == [[True] * 4] * 2
    held = checkpoint.load(tmp_path / "checkpoints" / "step-1")["model"]
    assert held["w"].tolist() == torch.arange(15.0).reshape(5, 3).tolist() and held["r"].tolist() == [0, 1, 2, 3]
    assert held["few"].dtype == torch.bfloat16 and held["few"].shape == (1, 2)
    assert len(list((tmp_path / "checkpoints" / "step-1").glob("tensors-*.safetensors"))) == 2
