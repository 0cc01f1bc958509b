"""How many cores and threads this process may use: what a scheduler, `taskset` or a container left it."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable() -> int:
    """Cores, at least 1: of the affinity mask, and of the container's quota, rounded up."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return own if quota is None else max(1, min(own, math.ceil(quota)))


def threads(local_size: int) -> int:
    """Threads of torch in one of `local_size` processes on this machine: OMP_NUM_THREADS, or a share of the cores.

    The 1 that torchrun sets where the user set nothing is no wish of the user's.
    """
    wished = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    by_torchrun = wished == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    if wished.isdecimal() and int(wished) and not by_torchrun:
        return int(wished)
    return max(1, usable() // local_size)


def _quota() -> float | None:
    """Cores that the control group grants (version 2, then 1); None without a limit."""
    try:
        limit, period = (CGROUP / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        try:
            limit, period = (
                (CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period")
            )
        except OSError:
            return None
    try:
        return int(limit) / int(period) if int(limit) > 0 and int(period) > 0 else None
    except ValueError:  # "max"
        return None
