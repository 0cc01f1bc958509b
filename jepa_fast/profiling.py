"""A trace on request: `--profile.steps N` records N steps with torch.profiler, on every process."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from jepa_fast.config import Profile
from jepa_fast.parallel import World

WARMUP = 5  # steps before the trace: compiling and first touches are no steady state
T = TypeVar("T")


def profiled(steps: Iterable[T], config: Profile, folder: Path, world: World) -> Iterator[T]:
    """The same steps; the first after the warm-up are traced to profile/rank<r>.json, and summed up in kernels.txt."""
    if not config.steps:
        yield from steps
        return
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])

    def write(trace: profile) -> None:
        place = folder / "profile"
        place.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(place / f"rank{world.rank}.json"))
        if world.is_main:
            by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            (place / "kernels.txt").write_text(
                trace.key_averages().table(sort_by=by, row_limit=30) + "\n", encoding="utf-8"
            )

    plan = schedule(wait=0, warmup=WARMUP, active=config.steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as trace:
        for step in steps:
            yield step
            trace.step()
