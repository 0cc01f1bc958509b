"""Machines as people have them: a reader that goes away, a locale without UTF-8, no home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_fast.data import cache
from jepa_fast.errors import Outlet, UsageError

ROOT = Path(__file__).parent.parent
SHORT = "--data.embedded sensor --train.steps 6 --log.every 1 --monitor.every 3 --monitor.probe_train 20 --monitor.probe_test 20 --monitor.lidar_views 0 --parallel.threads 1"  # fmt: skip


def started(arguments, folder, **variables):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTHONUNBUFFERED": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments.split()], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip


def test_a_run_whose_output_nobody_reads_goes_on_to_its_end(tmp_path):
    run = started(f"jepa_fast.train demo --run.dir x {SHORT}", tmp_path)
    run.stdout.readline()
    run.stdout.close()
    assert b"Traceback" not in run.stderr.read() and run.wait() == 0
    assert (tmp_path / "x/checkpoints/step-6").is_dir() and (tmp_path / "x/report.html").is_file()


def test_the_first_line_of_a_long_answer_is_no_error(tmp_path):
    run = started("jepa_fast.train demo --print-config", tmp_path)
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 0


def test_a_terminal_without_the_characters_of_a_message_gets_escapes(tmp_path):
    run = started(
        f"jepa_fast.train demo --run.dir x {SHORT}", tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="POSIX"
    )
    out, complaints = run.communicate()
    assert run.returncode == 0 and b"Traceback" not in complaints and out.isascii()
    # What is written is UTF-8 everywhere, so that a run can be read on another machine.
    assert not [line for line in complaints.splitlines() if b"EncodingWarning" in line and b"/jepa_fast/" in line]
    assert "−" in (tmp_path / "x/report.html").read_text(encoding="utf-8")


def test_a_full_disk_behind_the_output_ends_nothing():
    with open("/dev/full", "w") as full:
        outlet = Outlet(full)
        assert outlet.write("x" * 100_000) == 100_000
        outlet.flush()
        outlet.write("more")


def test_a_user_without_a_home_has_a_cache_of_their_own(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "JEPA_FAST_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", no_home)
    folder = cache.cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)
    with pytest.raises(UsageError, match="JEPA_FAST_CACHE"):
        cache.cache_folder()


def test_a_home_that_cannot_be_written_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.delenv("JEPA_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache.cache_folder() == tmp_path / "home/jepa_fast"
    monkeypatch.setattr(cache.os, "access", lambda *_: False)  # as root, permissions of a real folder say nothing
    assert cache.cache_folder().parent == tmp_path
