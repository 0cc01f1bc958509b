"""Checkpoints are whole or not there; a damaged one is named."""

import pytest
import torch

from jepa_fast import checkpoint
from jepa_fast.errors import UsageError


def _state(step):
    return {"step": step, "model": {"w": torch.arange(5) * step}, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}


def _damage(folder, step):
    file = folder / "checkpoints" / f"step-{step}" / "state.pt"
    blob = bytearray(file.read_bytes())
    blob[len(blob) // 2] ^= 0xFF
    file.write_bytes(blob)


def test_what_is_saved_comes_back_and_only_the_newest_are_kept(tmp_path):
    for step in (10, 20, 100):
        checkpoint.save(tmp_path, step, _state(step), keep=2)
    assert checkpoint.found(tmp_path) == [20, 100]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-100\n"
    step, state = checkpoint.load_newest(tmp_path, fall_back=False)
    assert step == 100 and torch.equal(state["model"]["w"], torch.arange(5) * 100)


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    checkpoint.save(tmp_path, 10, _state(10), keep=0)
    (tmp_path / "checkpoints" / ".step-20.partial").mkdir()
    (tmp_path / "checkpoints" / ".step-20.partial" / "state.pt").write_bytes(b"half")
    (tmp_path / "checkpoints" / "step-30").mkdir()
    assert checkpoint.found(tmp_path) == [10]


def test_a_damaged_checkpoint_is_named_and_the_good_one_offered(tmp_path, capsys):
    for step in (10, 20):
        checkpoint.save(tmp_path, step, _state(step), keep=0)
    _damage(tmp_path, 20)
    with pytest.raises(UsageError, match=r"step-20 is damaged.*step-10 is good: --resume auto"):
        checkpoint.load_newest(tmp_path, fall_back=False)
    assert checkpoint.load_newest(tmp_path, fall_back=True)[0] == 10
    assert "continuing from step-10" in capsys.readouterr().out
    _damage(tmp_path, 10)
    with pytest.raises(UsageError, match="no good checkpoint is left"):
        checkpoint.load_newest(tmp_path, fall_back=True)


def test_weights_with_code_in_them_are_refused(tmp_path):
    checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(1)}, "evil": print}, keep=0)
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(tmp_path / "checkpoints" / "step-1")


def test_init_weights_come_from_a_run_or_a_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 3, _state(3), keep=0)
    for path in (tmp_path, tmp_path / "checkpoints" / "step-3"):
        assert torch.equal(checkpoint.weights_at(str(path))["w"], torch.arange(5) * 3)
    with pytest.raises(UsageError, match="no checkpoint there"):
        checkpoint.weights_at(str(tmp_path / "nothing"))


def test_saving_where_nothing_can_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, _state(1), keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UsageError, match=r"step-2: No space left on device; earlier checkpoints are intact"):
        checkpoint.save(tmp_path, 2, _state(2), keep=1)
    assert checkpoint.found(tmp_path) == [1]
    assert not list((tmp_path / "checkpoints").glob(".*partial"))
