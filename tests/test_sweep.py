"""A sweep plans before it runs, finishes what it began, and ends in a table and a figure."""

import csv
import json
import os
import signal
import threading
from contextlib import redirect_stdout

import pytest

from jepa_fast import sweep, train
from jepa_fast.errors import UsageError
from jepa_fast.log import read

TINY = ["--train.steps", "2", "--log.every", "1", "--monitor.every", "2", "--monitor.probe_train", "40", "--monitor.probe_test", "40"]  # fmt: skip


def test_every_combination_is_a_run_and_zero_and_one_are_values():
    plan = sweep.parse(["demo", "--ema.decay", "0,.9,1", "--train.seed=0,1", "--train.steps", "5"])
    runs = plan.runs()
    assert len(runs) == 6 and plan.fixed == ["--train.steps", "5"]
    assert runs["ema.decay=0,train.seed=1"] == ["--ema.decay", "0", "--train.seed", "1"]
    assert str(plan.folder) == "sweeps/demo-ema.decay-train.seed"


def test_the_papers_sweep_is_one_line():
    plan = sweep.parse(["demo", "--ema.decay", "0,.9,.99,.996,.999,.9999,1"])
    assert len(plan.runs()) == 7 and 1 <= plan.jobs <= 2


def test_fields_of_several_numbers_are_no_axes():
    plan = sweep.parse(["textures", "--masks.target_scale", "0.1", "0.2", "--masks.mode", "packed,fixed"])
    assert list(plan.axes) == ["masks.mode"] and plan.fixed == ["--masks.target_scale", "0.1", "0.2"]


@pytest.mark.parametrize(("arguments", "says"), [
    (["demo"], "nothing to sweep over"),
    (["demo", "--ema.decay", "0.9,1.5"], "ema.decay"),
    (["demo", "--ema.decai", "0.9,1"], "unknown option"),
    (["dema", "--ema.decay", "0.9,1"], "did you mean demo"),
    (["demo", "--ema.decay", "0.9,0.9"], "stands twice"),
    (["demo", "--ema.decay", "0.9,1", "--run.dir", "x"], "--dir"),
    (["demo", "--ema.decay", "0.9,1", "--jobs", "0"], "--jobs 0"),
    (["demo", "--ema.decay", "0.9,1", "--jobs", "two"], "--jobs two"),
])  # fmt: skip
def test_what_cannot_run_is_refused_before_anything_runs(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sweep.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_dry_run_names_the_runs_and_starts_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sweep.main(["demo", "--ema.decay", "0.9,1", "--dry-run"]) == 0
    assert "ema.decay=0.9\nema.decay=1\n" in capsys.readouterr().out and not list(tmp_path.iterdir())


class Ended:
    """A process that is over."""

    def __init__(self, status):
        self.status = status

    def wait(self):
        return self.status


def in_this_process(command, stdout, stderr, env):
    """What the sweep's child processes do, without the seconds that each takes to start."""
    assert command[1:3] == ["-m", "jepa_fast.train"]
    with redirect_stdout(stdout):
        return Ended(train.main(command[3:]))


def test_a_sweep_runs_goes_on_and_concludes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.subprocess, "Popen", in_this_process)
    first = ["demo", "--ema.decay", "0.9,1", *TINY, "--dir", "s", "--jobs", "1"]
    assert sweep.main(first) == 0
    written = (tmp_path / "s/ema.decay=1/metrics.jsonl").read_bytes()
    assert [r["step"] for r in read(tmp_path / "s/ema.decay=0.9/metrics.jsonl")] == [0, 1, 2]
    rows = list(csv.DictReader((tmp_path / "s/sweep.csv").open()))
    assert (
        [row["ema.decay"] for row in rows] == ["0.9", "1.0"]
        and all(0 < float(rows[0][name]) <= 1 for name in ("untrained", "best probe", "final probe"))
        and float(rows[0]["final loss"]) > 0
    )
    assert (tmp_path / "s/figure-5.png").exists() and (tmp_path / "s/figure-5.svg").exists()
    assert sweep.main(first) == 0  # nothing is left to do
    assert (tmp_path / "s/ema.decay=1/metrics.jsonl").read_bytes() == written
    capsys.readouterr()
    assert sweep.main(["demo", "--optim.lr", "1e-4,1e-3", *TINY, "--dir", "s"]) == 2
    assert "holds another sweep" in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def fake(command, stdout, stderr, env):
        name = command[command.index("--run.dir") + 1]
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        if name.endswith("=1"):
            stdout.write("error: the disk is full\n")
            return Ended(2)
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n")
        return Ended(0)

    monkeypatch.setattr(sweep.subprocess, "Popen", fake)
    assert sweep.main(["demo", "--ema.decay", "0.9,1", "--dir", "s"]) == 1
    out = capsys.readouterr().out
    assert "failed: ema.decay=1: error: the disk is full" in out and "figure-5.png" in out


def test_a_sweep_that_is_stopped_stops_its_run_and_starts_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    started, ended, before = [], threading.Event(), signal.getsignal(signal.SIGTERM)

    class Running:
        def __init__(self, command, **_):
            started.append(command)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

        def wait(self):
            return -signal.SIGTERM if ended.wait(20) else 0

        def terminate(self):
            ended.set()

    monkeypatch.setattr(sweep.subprocess, "Popen", Running)
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["demo", "--ema.decay", "0.9,1", "--dir", "s", "--jobs", "1"])
    assert stopped.value.code == 128 + signal.SIGTERM and ended.is_set() and len(started) == 1
    assert "goes on from here" in capsys.readouterr().out and signal.getsignal(signal.SIGTERM) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds no sweep"):
        sweep.execute(sweep.parse(["demo", "--ema.decay", "0.9,1", "--dir", str(tmp_path)]))
