"""Who started this process: torchrun, srun, or nobody. In: the environment. Out: torchrun's variables, whole and sound.

Everything else reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT and need not know.
"""

import os
import re

from jepa_fast.errors import UsageError

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
FIRST_PORT, PORTS = 20_000, 20_000  # of jobs: one for each, as two may share a machine


def launched() -> None:
    """Fill in torchrun's variables where `srun` started several tasks without torchrun; check them where they are set.

    Raises UsageError on variables that are set by half or contradict each other.
    """
    if not any(name in os.environ for name in NUMBERS) and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        os.environ.update(_of_slurm())
    for name in NUMBERS:
        if name in os.environ and not os.environ[name].isdecimal():
            raise UsageError(f"{name} is {os.environ[name]!r}, not a number: unset it, or start with torchrun")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size < 1 or rank >= size:
        held = f"RANK is {rank} and WORLD_SIZE {os.environ.get('WORLD_SIZE', 'not set')}"
        raise UsageError(f"{held}: start with torchrun, or unset both for one process")
    if size > 1 and "RANK" not in os.environ:
        raise UsageError(
            f"WORLD_SIZE is {size} and RANK not set: start with torchrun --nproc_per_node={size} -m jepa_fast.train ..."
        )


def _of_slurm() -> dict[str, str]:
    """One process a task of the step."""
    held = os.environ
    node, job = int(held.get("SLURM_NODEID", 0)), int(held.get("SLURM_JOB_ID", 0))
    tasks = _tasks_per_node(held.get("SLURM_STEP_TASKS_PER_NODE", held["SLURM_STEP_NUM_TASKS"]))
    return {
        "RANK": held.get("SLURM_PROCID", "0"), "WORLD_SIZE": held["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": held.get("SLURM_LOCALID", "0"), "LOCAL_WORLD_SIZE": str(tasks[min(node, len(tasks) - 1)]),
        "MASTER_ADDR": held.get("MASTER_ADDR") or _first_host(held.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        "MASTER_PORT": held.get("MASTER_PORT") or str(FIRST_PORT + job % PORTS),
    }  # fmt: skip


def _tasks_per_node(text: str) -> list[int]:
    """'4(x2),3' -> [4, 4, 3]."""
    found: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(count)] * int(times or 1)
    return found or [1]


def _first_host(nodes: str) -> str:
    """'gpu[07-09,12],login' -> 'gpu07'."""
    found = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    return found.group(1) + (found.group(2) or "") if found else nodes
