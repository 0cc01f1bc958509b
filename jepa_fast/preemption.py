"""Being stopped, and being left alone: signals, silence, and processes that die."""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from jepa_fast.clock import Clock
from jepa_fast.parallel import World

PREEMPTED = 75  # exit status of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h
LOST = (
    "Connection closed by peer",
    "Connection reset",
    "Timed out",
    "timed out",
    "Broken pipe",
    "Socket",
    "NCCL",
    "gloo",
)


class Preempted(BaseException):
    """The run was asked to stop, and what there was to save is saved. The message is the line that tells how to go on.

    No Exception: it passes through a compiler that wraps the errors of what it compiles.
    """


class Preemption:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a wish that every process hears at the same step boundary.

    Before the first step is made (set-up, compiling, the first examination) there is nothing to save: a signal then
    ends the process where it stands, with Preempted. A second SIGINT interrupts at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, world: World):
        self.world = world
        self.folder: Path | None = None  # of the run, once it is ours
        self.moving = False  # the first step is made
        self.signal = 0
        self._before: dict[int, Any] = {}
        self._agreed = torch.zeros(1, dtype=torch.int64)
        self._agreeing: dist.Work | None = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal:
            raise KeyboardInterrupt
        again, self.signal = bool(self.signal), number
        if not (self.moving or again):
            raise Preempted(_unmoved(number, self.folder))

    def asked(self) -> int:
        """The signal to stop for, or 0; the same on all processes. Called by all at every step boundary.

        The answer is that of the boundary before: the processes agree while the step computes, on the host, and no
        step waits for it.
        """
        if self.world.size == 1:
            return self.signal
        if self._agreeing is not None:
            self._agreeing.wait()
        answer = int(self._agreed)
        self._agreed = torch.tensor([self.signal])
        self._agreeing = dist.all_reduce(self._agreed, dist.ReduceOp.MAX, group=self.world.host, async_op=True)
        return answer


def farewell(number: int, step: int, folder: Path) -> Preempted:
    """The line printed by a run that was stopped."""
    return Preempted(
        f"stopped by {signal.Signals(number).name} after step {step}, checkpoint {folder / 'checkpoints' / f'step-{step}'} "
        f"is written; to go on: {_start()} --resume --run.dir {folder}"
    )


def _unmoved(number: int, folder: Path | None) -> str:
    said = f"stopped by {signal.Signals(number).name} before a step was made: nothing was there to save"
    on = "the same command again" if folder is None else f"{_start()} --resume auto --run.dir {folder}"
    return f"{said}; to go on: {on}"


def _start() -> str:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launcher = f"torchrun --nproc_per_node={processes}" if "TORCHELASTIC_RUN_ID" in os.environ else "python"
    return f"{launcher} -m jepa_fast.train"


class Watchdog:
    """Says which process is where when no step has ended for `seconds`. Says it once a silence, and ends nothing.

    Every process tells the common store its step and phase; whoever waits reads what the others told last.
    """

    def __init__(self, world: World, clock: Clock, seconds: float):
        self.world, self.clock, self.seconds = world, clock, seconds
        self._store = dist.distributed_c10d._get_default_store().clone() if world.size > 1 else None  # type: ignore[attr-defined]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(1.0)

    def _watch(self) -> None:
        told = -1
        while not self._over.wait(min(5.0, self.seconds / 4)):
            step, silence = self.clock.step, time.monotonic() - self.clock.began
            try:
                self._tell()
                if silence > self.seconds and told != step:
                    told = step
                    print(self._sentence(silence), file=sys.stderr, flush=True)
            except (RuntimeError, OSError):
                return  # the store is gone with the process that held it

    def _tell(self) -> None:
        if self._store is not None:
            self._store.set(f"watchdog/{self.world.rank}", f"{self.clock.step} {self.clock.phase_now}")

    def _sentence(self, silence: float) -> str:
        said = f"watchdog: rank {self.world.rank} has been at step {self.clock.step} for {silence:.0f} s, in {self.clock.phase_now}"
        if self._store is None:
            return said
        keys = [f"watchdog/{rank}" for rank in range(self.world.size)]
        known = {
            rank: self._store.get(key).decode().split(" ") for rank, key in enumerate(keys) if self._store.check([key])
        }
        behind = min(int(step) for step, _ in known.values())
        late = [f"rank {rank} in {phase}" for rank, (step, phase) in known.items() if int(step) == behind]
        return f"{said}; furthest behind, at step {behind}: {', '.join(late)}"


def end_if_alone(error: BaseException, world: World, where: str) -> None:
    """End the process with one line if another process's death or silence explains the error; else return."""
    reason = str(error).strip().split("\n")[0]
    if world.size == 1 or not isinstance(error, RuntimeError) or not any(sign in str(error) for sign in LOST):
        return
    print(
        f"error: rank {world.rank} of {world.size} lost contact with another process in {where} "
        f"({reason[:160]}): the first process that failed says why, above or in errors-rank*.jsonl of the run folder",
        flush=True,
    )
    os._exit(1)  # threads that wait for the lost process would hold up a normal exit


@contextmanager
def in_company(world: World) -> Iterator[None]:
    """Around the set-up, in which processes wait for one another too."""
    try:
        yield
    except RuntimeError as error:
        end_if_alone(error, world, "set-up")
        raise


def note_error(folder: Path, world: World, clock: Clock, error: BaseException) -> None:
    """Append the error to errors-rank<r>.jsonl; every process has its own file, and only for this."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"), "rank": world.rank, "step": clock.step, "phase": clock.phase_now,
        "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exception(error),
    }  # fmt: skip
    try:
        with (folder / f"errors-rank{world.rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError:
        return  # the error itself is about to be told
