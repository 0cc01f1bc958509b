"""`doctor` says what is there and what follows, tests every kernel against its reference, and names no place or person."""

import getpass
import socket
from pathlib import Path

import pytest
import torch

from jepa_fast import doctor
from jepa_fast.__main__ import main


def test_it_can_be_pasted_into_an_issue(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in (
        torch.__version__,
        "memory",
        "EMA kernel",
        "ragged attention",
        "mask sampler",
        "JPEG decoder",
        "self-test",
        "ok:",
    ):
        assert word in said, word
    assert "FAILED" not in said
    for private in (str(Path.home()), str(Path.cwd()), socket.gethostname(), getpass.getuser()):
        assert private not in said or private in ("/", "root"), private


def test_a_kernel_that_is_wrong_fails_the_test(monkeypatch, capsys):
    def off_by_a_little(targets, sources, decay, backend="torch", **rest):
        stats = honest(targets, sources, decay, backend="torch", **rest)
        if backend != "torch":
            targets[2].add_(1e-4)
        return stats

    if not {"cpp", "triton"} & set(doctor.available_backends()):
        pytest.skip("no compiled EMA kernel here")
    honest = doctor.ema_update_
    monkeypatch.setattr(doctor, "ema_update_", off_by_a_little)
    assert main(["doctor"]) == 1
    assert "FAILED: weights differ by 1.0e-04" in capsys.readouterr().out


def test_a_kernel_that_crashes_fails_in_its_own_words(monkeypatch):
    def crash(*_, **__):
        raise RuntimeError("no such instruction\nmore")

    monkeypatch.setattr(doctor, "ema_update_", crash)
    told = {name: (good, said) for name, good, said in doctor.self_test(torch.device("cpu"))}
    if "EMA cpp" in told:
        assert told["EMA cpp"][0] is False and told["EMA cpp"][1].startswith("RuntimeError: no such instruction (")
    assert told["training step"][0]
