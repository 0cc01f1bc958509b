"""A run that is stopped, killed or left alone loses nothing, and says what happened."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_parallel import TINY, agree, metrics
from together import free_port, together

from jepa_fast import checkpoint, cli, parallel, preemption, report, train
from jepa_fast.clock import Clock
from jepa_fast.errors import UsageError
from jepa_fast.log import RunLog, read
from jepa_fast.parallel import World

pytestmark = pytest.mark.usefixtures("alone")


def go(*args):
    return train.main([*TINY, *args])


def signalled_at(step, number, monkeypatch):
    """The process gets a signal while it is in that step."""
    real = Clock.begin

    def begin(self, now, waited):
        real(self, now, waited)
        if now == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Clock, "begin", begin)


# ---- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_at_the_step_boundary_and_the_run_goes_on_as_if_nothing_had_happened(
    number, monkeypatch, capsys
):
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        signalled_at(3, number, patched)
        assert go("--run.dir", "x") == preemption.PREEMPTED == 75
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said.startswith(
        f"stopped by {signal.Signals(number).name} after step 4, checkpoint x/checkpoints/step-4 is written"
    )
    assert said.endswith("python -m jepa_fast.train --resume --run.dir x")
    assert checkpoint.found(Path("x"))[-1] == 4 and signal.getsignal(number) is before
    if number == signal.SIGTERM:
        assert train.main(["--resume", "--run.dir", "x"]) == 0  # exactly as it said
        go("--run.dir", "whole")
        assert metrics("x") == metrics("whole")
        events = [e["kind"] for e in read(Path("x/events.jsonl"))]
        assert events.count("preempted") == events.count("resume") == 1


@pytest.mark.parametrize("where", ["assemble.warm_up", "assemble.ladder", "train.Clock.begin"])
def test_a_signal_before_the_first_step_is_made_ends_at_once_and_the_same_folder_can_be_used(
    where, monkeypatch, capsys
):
    """While blocks are compiled, or in the first step: nothing waits for the step boundary, which may be minutes away."""
    module = where.rsplit(".", 1)[0]

    def slow(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal came and went")

    with monkeypatch.context() as patched:
        patched.setattr("jepa_fast.assemble.compiles", lambda *_: module != "train.Clock")
        patched.setattr(f"jepa_fast.{where}" if module != "train.Clock" else "jepa_fast.clock.Clock.begin", slow)
        assert go("--run.dir", "x") == 75
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said.startswith("stopped by SIGTERM before a step was made: nothing was there to save; to go on: ")
    if module == "train.Clock":
        assert said.endswith("python -m jepa_fast.train --resume auto --run.dir x")
        assert train.main(["--resume", "auto", "--run.dir", "x"]) == 0  # exactly as it said
    else:
        assert said.endswith("the same command again") and not Path("x").exists()


def stopped_and_resumed(rank, cases):
    """Train case after case in this process; a case is (arguments, step at which rank 1 is signalled or None, status)."""
    report.write = lambda folder: folder
    real, port, returned = Clock.begin, int(os.environ["MASTER_PORT"]), []
    for i, (argv, step) in enumerate(cases):
        os.environ["MASTER_PORT"] = str(port + i)

        def begin(self, now, waited, step=step):
            real(self, now, waited)
            if now == step and rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

        Clock.begin = begin
        returned.append(train.main([*TINY, *argv]))
    return returned


@pytest.mark.dist
def test_two_processes_hear_a_signal_together_and_one_goes_on_then_two():
    """4 -> 2 -> 1 -> 2 is the slow test; every sample once is what equal losses of equal data mean."""
    go("--run.dir", "whole")
    fsdp = ["--run.dir", "x", "--parallel.mode", "fsdp"]
    assert together(2, stopped_and_resumed, [(fsdp, 1)]) == [[75], [75]]
    stopped = checkpoint.found(Path("x"))[-1]
    assert stopped in (2, 3)  # agreed on during the next step
    assert go("--resume", "--run.dir", "x", "--parallel.mode", "single", "--train.steps", "5") == 0
    assert together(2, stopped_and_resumed, [(["--resume", "--run.dir", "x", "--parallel.mode", "ddp"], None)]) == [
        [0],
        [0],
    ]
    agree("x", "whole")


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (2, False)])
def test_the_slurm_script_queues_again_what_was_stopped_and_nothing_else(status, requeued, tmp_path):
    """With stand-ins for SLURM's commands; the one for srun runs the task and notes what it was asked to start."""
    stubs = {
        "srun": f'shift; exec env SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_STEP_NUM_TASKS=4 STATUS={status} "$@"',
        "scontrol": 'echo "scontrol $*" >> told; [ "$1" = show ] && echo first && echo second; true',
        "python": 'echo "python $* $SLURM_PROCID $SLURM_LOCALID $SLURM_STEP_NUM_TASKS" >> told; exit $STATUS',
    }  # fmt: skip
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = Path(__file__).parent.parent / "docs" / "slurm.sbatch"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(["bash", str(script), "demo", "--run.dir", "a b"], env=environment, timeout=30)
    told = (tmp_path / "told").read_text()
    assert (
        "python -m jepa_fast.train demo --run.dir a b --resume auto 3 1 4" in told
    )  # its place, as SLURM says it (test_launch)
    assert ("scontrol requeue 7" in told) is requeued and done.returncode == (0 if requeued else status)


@pytest.mark.dist
@pytest.mark.slow
def test_four_processes_then_two_then_one_then_two_see_every_sample_once():
    longer = ["--run.dir", "x", "--train.steps", "16"]
    go("--run.dir", "whole", "--train.steps", "16")
    legs = [(4, [*longer, "--parallel.mode", "fsdp"], 3), (2, [*longer, "--resume", "--parallel.mode", "hsdp", "--parallel.shards", "1"], 7),
            (2, [*longer, "--resume", "--parallel.mode", "fsdp"], None)]  # fmt: skip
    assert together(4, stopped_and_resumed, [legs[0][1:]]) == [[75]] * 4
    assert together(2, stopped_and_resumed, [legs[1][1:]]) == [[75]] * 2
    with pytest.MonkeyPatch.context() as patched:
        signalled_at(11, signal.SIGTERM, patched)
        assert go(*longer, "--resume", "--parallel.mode", "single") == 75
    assert together(2, stopped_and_resumed, [legs[2][1:]]) == [[0]] * 2
    agree("x", "whole", tolerance=1e-3)
    assert [e["processes"] for e in read(Path("x/events.jsonl")) if e["kind"] == "resume"] == [2, 1, 2]


# ---- restarts ----------------------------------------------------------------------------------------


FALLS_ONCE = """
import os, sys
from jepa_fast import train
from jepa_fast.clock import Clock

real = Clock.begin
def begin(self, step, waited):
    real(self, step, waited)
    if step == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(9)
Clock.begin = begin
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.dist
@pytest.mark.slow
def test_torchrun_starts_a_fallen_job_again_and_it_goes_on_in_its_own_folder(tmp_path):
    (tmp_path / "falls.py").write_text(FALLS_ONCE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ddp = ["--parallel.mode", "ddp", "--checkpoint.background", "False"]  # or step 4 may come before the file of step 3
    done = subprocess.run(
        [*launcher, "falls.py", *TINY, *ddp], capture_output=True, text=True, env=environment, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert [f.name for f in Path("runs").iterdir()] == ["demo-1"]
    assert [e["step"] for e in read(Path("runs/demo-1/events.jsonl")) if e["kind"] == "resume"] == [3]
    go("--run.dir", "whole")
    agree("runs/demo-1", "whole")


# ---- bad company ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "args", "says"), [
    (3, [], "3 processes do not divide it; give 6 or 9"),
    (2, ["--parallel.mode", "single"], "2 processes were started; use auto, ddp, fsdp or hsdp"),
    (4, ["--parallel.mode", "hsdp", "--parallel.shards", "3"], "4 processes are not so many times 3"),
    (2, [], "MASTER_ADDR is not set: start with torchrun"),
])  # fmt: skip
def test_a_job_that_cannot_be_is_refused(size, args, says, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert go(*args) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_port_in_use_is_named(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        assert go() == 2
    assert f"port 127.0.0.1:{port} is in use" in capsys.readouterr().err


def test_missing_nccl_is_named(monkeypatch, capsys):
    for name, value in {"is_available": True, "device_count": 1}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda v=value: v)
    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    assert train.main(["demo", "--parallel.mode", "fsdp"]) == 2
    assert "this torch has no NCCL" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_record_that_the_disk_does_not_take_is_one_line(tmp_path):
    log = RunLog(tmp_path, 0)
    log.record({"step": 0, "loss": 1.0})
    log.sinks[0]._metrics = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UsageError, match="cannot write /dev/full: No space left on device; fix that, then --resume"):
        log.record({"step": 1, "loss": 1.0})
    log.close()
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [0]


def dies(rank, *args):
    """Rank 1 dies in step 2 without a word; what rank 0 prints goes to a file."""
    report.write = lambda folder: folder
    real = Clock.begin

    def begin(self, now, waited):
        real(self, now, waited)
        if now == 2 and rank == 1:
            os._exit(9)

    Clock.begin = begin
    sys.stdout = open(f"said-{rank}", "w", buffering=1)  # noqa: SIM115
    train.main([*TINY, *args])


@pytest.mark.dist
def test_a_process_that_dies_takes_the_job_down_with_a_clear_line():
    began = time.monotonic()
    statuses = together(2, dies, "--run.dir", "x", "--parallel.mode", "fsdp", statuses=True)
    assert statuses == [1, 9] and time.monotonic() - began < 120
    said = Path("said-0").read_text().strip().splitlines()[-1]
    assert re.match(r"error: rank 0 of 2 lost contact with another process in \w+ of step 2 \(", said)
    noted = read(Path("x/errors-rank0.jsonl"))
    assert noted[0]["rank"] == 0 and noted[0]["step"] == 2 and noted[0]["traceback"]


def dies_early(rank):
    """Rank 1 dies while rank 0 opens the data and waits for it."""
    sys.stdout = open(f"said-{rank}", "w", buffering=1)  # noqa: SIM115
    if rank == 1:
        parallel.join(cli.parse(["demo", *TINY]).config)
        os._exit(9)
    train.main(["demo", *TINY])


@pytest.mark.dist
def test_a_process_that_dies_in_set_up_takes_the_job_down_too():
    assert together(2, dies_early, statuses=True) == [1, 9]
    said = Path("said-0").read_text().strip().splitlines()[-1]
    assert said.startswith("error: rank 0 of 2 lost contact with another process in set-up (")


def test_the_watchdog_names_the_phase_once_a_silence(capsys):
    world = World(0, 1, torch.device("cpu"))
    clock = Clock(world)
    clock.begin(7)
    with clock.phase("backward"):
        dog = preemption.Watchdog(world, clock, 0.05)
        time.sleep(0.5)
        dog.close()
    assert re.fullmatch(r"watchdog: rank 0 has been at step 7 for \d+ s, in backward\n", capsys.readouterr().err)


def test_free_ports_are_free():
    assert free_port() != free_port()
