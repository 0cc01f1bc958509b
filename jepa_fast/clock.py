"""Where the time of a step goes. On CUDA by events on the stream, read when a record is written; else by the host's clock."""

import resource
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from jepa_fast import parallel
from jepa_fast.flops import utilisation
from jepa_fast.parallel import World

PHASES = ("target", "context", "backward", "optimizer", "ema", "checkpoint")


SEES_THE_HOST = ("examine", "checkpoint")  # phases that must read from the device


class Clock:
    """Seconds by phase since the last report; and which step and phase this process is in, for the watchdog."""

    def __init__(self, world: World, half: bool = False):
        self.world, self.cuda, self.half = world, world.device.type == "cuda", half
        self.step, self.phase_now, self.began = 0, "set-up", time.monotonic()
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []
        self._graphs: int | None = None
        self._syncs = HostSyncs() if self.cuda else None
        self._since, self._num_steps, self._num_tokens, self._flops = time.monotonic(), 0, 0, 0.0

    def begin(self, step: int, waited: float = 0.0) -> None:
        """A step starts; its data were waited for so long, in seconds."""
        self.step, self.phase_now, self.began = step, "step", time.monotonic()
        if self._syncs and not self._num_steps:  # writing the last record has read from the device
            self._syncs.count = 0
        self._num_steps += 1
        self._seconds["data_wait"] += waited

    def count(self, num_tokens: int, flops: float = 0.0) -> None:
        """So many tokens went through the encoders; so many operations that took, as `flops` counts them."""
        self._num_tokens += num_tokens
        self._flops += flops

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer, self.phase_now = self.phase_now, name
        began, syncs = self._now(), self._syncs.count if self._syncs else 0
        try:
            yield
        finally:
            self._add(name, began)
            self.phase_now = outer
            if self._syncs and name in SEES_THE_HOST:
                self._syncs.count = syncs

    @contextmanager
    def phase_of_forward(self, name: str) -> Iterator[None]:
        """A phase of that name where a training step's forward runs; nothing elsewhere."""
        with self.phase(name) if self.phase_now == "forward" else nullcontext():
            yield

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, name: str, began: Any) -> None:
        if self.cuda:
            self._events.append((name, began, self._now()))
        else:
            self._seconds[name] += time.perf_counter() - began

    def report(self) -> dict[str, float]:
        """Keys of metrics.jsonl: seconds a step by phase (means over processes), tokens a second, memory, recompiles.

        All processes call it. Synchronises.
        """
        syncs = (
            {"host_syncs": float(self._syncs.count)} if self._syncs else {}
        )  # before this report reads from the device
        steps, own = max(1, self._num_steps), self._read()
        ranks = parallel.gather(own, self.world)
        alone = [r["data_wait"] + r["target"] + r["context"] for r in ranks]  # before a process first waits for another
        took = max(1e-9, time.monotonic() - self._since - own["examine"])
        record = {f"time/{name}": sum(r[name] for r in ranks) / len(ranks) / steps for name in PHASES}
        record["time/other"] = max(0.0, took - sum(own[name] for name in ("data_wait", *PHASES))) / steps
        record["time/skew"] = (max(alone) - sum(alone) / len(alone)) / steps
        record["tokens_per_s"] = self._num_tokens * self.world.size / took
        record |= utilisation(self._flops / took, self.world.device, self.half)
        self._since, self._num_steps, self._num_tokens, self._flops = time.monotonic(), 0, 0, 0.0
        return record | syncs | self._health()

    def _read(self) -> dict[str, float]:
        """Seconds in all by phase; `context` is the forward without the target encoder."""
        if self._events:
            torch.cuda.synchronize()
            for name, began, ended in self._events:
                self._seconds[name] += began.elapsed_time(ended) / 1e3
            self._events.clear()
        seconds, self._seconds = self._seconds, defaultdict(float)
        seconds["context"] = seconds["forward"] - seconds["target"]
        return {name: seconds[name] for name in ("data_wait", "examine", *PHASES)}

    def _health(self) -> dict[str, float]:
        """Peak memory of this process so far, allocator retries, and graphs compiled after the first call."""
        values: dict[str, float] = {"memory/peak_gb": _peak_bytes(self.cuda) / 1e9}
        if self.cuda:
            values["memory/retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        graphs = _num_graphs()
        self._graphs = graphs if self._graphs is None else self._graphs
        return values | {"recompiles": graphs - self._graphs}


class HostSyncs:
    """Counts the calls in which this thread waited for the device. torch warns of them when asked to; that costs nothing."""

    SAID = "called a synchronizing CUDA operation"

    def __init__(self) -> None:
        self.count = 0
        torch.cuda.set_sync_debug_mode("warn")
        warnings.filterwarnings("always", message=self.SAID)
        self._show, warnings.showwarning = warnings.showwarning, self._hear

    def _hear(self, message: Warning | str, *args: Any, **more: Any) -> None:
        if self.SAID not in str(message):
            self._show(message, *args, **more)
        elif threading.current_thread() is threading.main_thread():
            self.count += 1


def _peak_bytes(cuda: bool) -> float:
    if cuda:
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _num_graphs() -> int:
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it costs seconds, and who does not compile has not
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
