"""Records reach every sink of a run, and a sink that cannot be opened is one line."""

import sys
from types import SimpleNamespace

import pytest

from jepa_fast import sinks
from jepa_fast.config import Config, replace
from jepa_fast.errors import UsageError
from jepa_fast.log import RunLog, Sink, read
from jepa_fast.monitor import CollapseMonitor


class Memory(Sink):
    def __init__(self):
        self.seen = []

    def record(self, record):
        self.seen.append(record["step"])

    def event(self, event):
        self.seen.append(event["kind"])

    def close(self):
        self.seen.append("closed")


def tracker(fail=None):
    """A package with the interface of wandb that keeps what it is called with."""
    calls = []

    def init(**arguments):
        if fail:
            raise RuntimeError(fail)
        calls.append(("init", arguments))
        log = lambda values, step: calls.append(("log", step, values))  # noqa: E731
        return SimpleNamespace(id="abc", log=log, finish=lambda: calls.append(("finish",)))

    return SimpleNamespace(init=init), calls


def test_a_log_hands_everything_to_every_sink(tmp_path):
    first, second = Memory(), Memory()
    log = RunLog(tmp_path, 0, [first, second])
    log.record({"step": 3, "loss": 1.0})
    log.event("resume", 4)
    log.close()
    assert first.seen == second.seen == [3, "resume", "closed"]
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [3]
    assert [e["kind"] for e in read(tmp_path / "events.jsonl")] == ["resume"]


def test_a_monitor_writes_through_a_log_it_is_given_and_leaves_it_open(tmp_path):
    sink = Memory()
    log = RunLog(tmp_path, 0, [sink])
    with CollapseMonitor(log, every=1, say=None) as monitor:
        monitor.observe(1.0)
    log.event("resume", 1)  # still open
    assert sink.seen == [0, "resume"] and monitor.records is log.records


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_numbers_of_each_record_under_its_step(name, tmp_path, monkeypatch):
    package, calls = tracker()
    monkeypatch.setitem(sys.modules, name, package)
    config = replace(Config(), {f"log.{name}": "project"})
    sinks.check(config)
    log = RunLog(tmp_path, 0, sinks.opened(config, tmp_path, 0))
    log.record({"step": 7, "loss": 0.5, "phase/state": "collapse"})
    log.close()
    (_, arguments), logged, finished = calls
    assert arguments["project"] == "project" and arguments["name"] == tmp_path.name
    assert arguments["config"]["train.seed"] == 0
    assert logged == ("log", 7, {"loss": 0.5}) and finished == ("finish",)


def test_a_resumed_run_goes_on_in_its_own_entry_of_wandb(tmp_path, monkeypatch):
    package, calls = tracker()
    monkeypatch.setitem(sys.modules, "wandb", package)
    config = replace(Config(), {"log.wandb": "project"})
    for start in (0, 20):
        sinks.opened(config, tmp_path, start)
    assert "id" not in calls[0][1]
    assert calls[1][1]["id"] == "abc" and calls[1][1]["resume"] == "allow"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_there_or_refuses_is_one_line(name, tmp_path, monkeypatch):
    config = replace(Config(), {f"log.{name}": "project"})
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=rf"--log.{name} needs a package: pip install {name}"):
        sinks.check(config)
    monkeypatch.setitem(sys.modules, name, tracker(fail="no API key\nand more")[0])
    with pytest.raises(UsageError, match=rf"--log.{name} project: no API key; fix that") as raised:
        sinks.opened(config, tmp_path, 0)
    assert "\n" not in str(raised.value)
