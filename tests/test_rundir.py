"""The run folder: whose it is, and who may have it."""

import fcntl
import json
import os
import signal
import time
from pathlib import Path

import pytest
from test_parallel import TINY
from together import CONTEXT

from jepa_fast import cli, rundir, train
from jepa_fast.config import Config
from jepa_fast.errors import UsageError

pytestmark = pytest.mark.usefixtures("alone")


def go(*args):
    return train.main([*TINY, *args])


def test_a_restarted_worker_resumes_the_folder_of_its_own_job(monkeypatch, tmp_path):
    for number, owner in ((1, "mine"), (2, "other")):
        place = tmp_path / "runs" / f"demo-{number}"
        place.mkdir(parents=True)
        (place / rundir.LOCK).write_text(json.dumps({"pid": 1, "host": "here", "job": owner}))
    assert rundir.newest("demo").name == "demo-2" and cli.parse(["demo"]).resume == ""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert rundir.newest("demo").name == "demo-1" and cli.parse(["demo"]).resume == "auto"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a third that fell before it had a folder")
    assert rundir.newest("demo", own=True) is None and cli.parse(["demo"]).config.run.dir == ""


def holds_a_lock(place, told):
    lock = rundir.claim(Config(), Path(place), new=True)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    told.put((os.getpid(), child))
    time.sleep(60)
    lock.close()


def test_a_folder_in_use_is_refused_until_its_process_dies_whatever_children_it_leaves(capsys):
    told = CONTEXT.Queue()
    holder = CONTEXT.Process(target=holds_a_lock, args=(str(Path("x").absolute()), told))
    holder.start()
    pid, child = told.get(timeout=60)
    try:
        assert go("--run.dir", "x") == 2
        assert f"x is in use by process {pid} on" in capsys.readouterr().err
        holder.kill()
        holder.join()
        os.kill(child, 0)  # a worker of the killed run lives on
        rundir._refuse_used(Path("x"))
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_is_a_warning(monkeypatch, capsys, tmp_path):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    rundir.claim(Config(), tmp_path / "x", new=True).close()
    assert "cannot be locked" in capsys.readouterr().out


def test_a_folder_that_another_run_took_meanwhile_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UsageError, match="taken by another run just now"):
        rundir.claim(Config(), tmp_path / "x", new=True)
