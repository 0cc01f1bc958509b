"""What a measurement was taken on. The machine is described and watched, never changed: no clock, power or governor."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# Vendor datasheets, dense: (name as the driver gives it, bf16 FLOP/s, bytes/s of memory). The first that fits.
DATASHEETS = (("H200", 989e12, 4.8e12), ("H100", 989e12, 3.35e12), ("A100", 312e12, 2.0e12))


def environment(device: torch.device) -> dict[str, str]:
    """The columns of a row that say where it comes from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).partition("\n")[0]
    else:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name, driver = f"{_cpu_name()}, {torch.get_num_threads()} of {usable} threads", ""
    try:  # not imported: TRITON_INTERPRET would no longer take effect
        triton_version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton_version = ""
    return {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
    }


def commit() -> str:
    """Short hash of HEAD, with a + where tracked files (results apart) differ from it; JEPA_FAST_COMMIT where there is no git."""
    head = output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    if not head:
        return os.environ.get("JEPA_FAST_COMMIT", "unknown")
    changed = output(["git", "-C", str(ROOT), "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"])
    return head + "+" * bool(changed)


def datasheet(device: torch.device) -> tuple[float, float] | None:
    """(bf16 FLOP/s, bytes/s) that the vendor names for this device; None for one that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next(((flops, moved) for part, flops, moved in DATASHEETS if part in name), None)


def state(device: torch.device) -> dict[str, tuple[str, float]]:
    """{metric: (unit, value)} at this moment: clock, power and temperature of a GPU, the load average beside a CPU."""
    found = {"load_average": ("1", os.getloadavg()[0])} if hasattr(os, "getloadavg") else {}
    if device.type == "cuda":
        query = ["nvidia-smi", f"--id={device.index or 0}", "--format=csv,noheader,nounits"]
        answer = output([*query, "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu"]).split(",")
        for (metric, unit), text in zip(
            (("sm_clock", "MHz"), ("memory_clock", "MHz"), ("power", "W"), ("temperature", "C")), answer, strict=False
        ):
            try:
                found[metric] = (unit, float(text))
            except ValueError:  # "[N/A]" on some machines
                continue
    return found


def output(command: list[str]) -> str:
    """Standard output of a command, empty if it cannot run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
