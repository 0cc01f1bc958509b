"""Who started a process, and how many cores it may use."""

import os
import subprocess
import sys

import pytest

from jepa_fast import cores
from jepa_fast.errors import UsageError
from jepa_fast.parallel import launch
from jepa_fast.rundir import saved_config


@pytest.fixture(autouse=True)
def alone():
    """No launcher's variables, and none left behind."""
    before = dict(os.environ)
    for name in (
        *launch.NUMBERS,
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
        "TORCHELASTIC_RUN_ID",
        "SLURM_STEP_NUM_TASKS",
    ):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


def set_all(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


SRUN = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_JOB_ID": "40001",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),3", "SLURM_STEP_NODELIST": "gpu[07-08,12],login"}  # fmt: skip


def test_tasks_of_srun_find_one_another_without_torchrun(monkeypatch):
    set_all(monkeypatch, **SRUN)
    launch.launched()
    held = {name: os.environ[name] for name in (*launch.NUMBERS, "MASTER_ADDR", "MASTER_PORT")}
    assert held == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu07",
                    "MASTER_PORT": "20001"}  # fmt: skip


def test_torchrun_inside_srun_and_a_single_task_are_left_as_they_are(monkeypatch):
    set_all(monkeypatch, **SRUN, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
    launch.launched()
    assert os.environ["WORLD_SIZE"] == "2" and "MASTER_ADDR" not in os.environ
    for name in launch.NUMBERS:
        monkeypatch.delenv(name)
    set_all(monkeypatch, SLURM_STEP_NUM_TASKS="1", SLURM_NTASKS="7")  # a shell of salloc
    launch.launched()
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.parametrize(("variables", "says"), [
    ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE not set"), ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK not set"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2"), ({"RANK": "one", "WORLD_SIZE": "2"}, "'one', not a number"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE 0"), ({"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
])  # fmt: skip
def test_variables_of_a_launcher_that_are_set_by_half_are_one_line(monkeypatch, variables, says):
    set_all(monkeypatch, **variables)
    with pytest.raises(UsageError, match="torchrun") as error:
        launch.launched()
    assert says in str(error.value)


def test_two_tasks_of_srun_train_together(tmp_path, monkeypatch):
    steps = "demo --data.embedded sensor --train.steps 2 --log.every 1 --monitor.every 2 --monitor.probe_train 20 --monitor.probe_test 20 --monitor.lidar_views 0 --parallel.threads 1 --log.report False --run.dir x"
    tasks = []
    for rank in "01":
        set_all(monkeypatch, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_STEP_NODELIST="127.0.0.1",
                SLURM_STEP_TASKS_PER_NODE="2", SLURM_JOB_ID="12345", CUDA_VISIBLE_DEVICES="")  # fmt: skip
        tasks.append(subprocess.Popen([sys.executable, "-m", "jepa_fast.train", *steps.split()], cwd=tmp_path, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT))  # fmt: skip
    said = [task.communicate(timeout=300)[0].decode() for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert saved_config(tmp_path / "x").train.steps == 2 and not said[1].count("step ")


# ---- cores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("files", "cores_granted"), [
    ({"cpu.max": "150000 100000"}, 2), ({"cpu.max": "50000 100000"}, 1), ({"cpu.max": "max 100000"}, 8), ({}, 8),
    ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8), ({"cpu.max": "junk"}, 8),
])  # fmt: skip
def test_a_containers_quota_counts(tmp_path, monkeypatch, files, cores_granted):
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.usable() == cores_granted


def test_threads_are_the_users_wish_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(cores, "usable", lambda: 8)
    assert cores.threads(2) == 4 and cores.threads(16) == 1
    set_all(monkeypatch, OMP_NUM_THREADS="3")
    assert cores.threads(2) == 3
    set_all(monkeypatch, OMP_NUM_THREADS="1", TORCHELASTIC_RUN_ID="none")
    assert cores.threads(2) == 4
