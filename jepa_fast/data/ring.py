"""Host buffers of batches, pinned and used again, so that the copy to the device runs beside the computation.

Pinning memory costs more than filling it, so the buffers are made once. One is filled again only when the device has
finished copying from it: the loop may be many steps ahead of the device.
"""

import queue
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    def synchronize(self) -> None: ...


class Ring:
    """`count` buffers like `make()`. `mark()` gives an event that has passed when the device is done with all it was
    given so far."""

    def __init__(self, count: int, make: Callable[[], Tensor], mark: Callable[[], Event]):
        self._mark = mark
        self._free: queue.Queue[tuple[Tensor, Event | None]] = queue.Queue()
        for _ in range(count):
            self._free.put((make(), None))

    def take(self, timeout: float) -> Tensor | None:
        """A buffer that nobody reads any more, or None if none becomes free in `timeout` seconds."""
        try:
            buffer, event = self._free.get(timeout=timeout)
        except queue.Empty:
            return None
        if event is not None:
            event.synchronize()
        return buffer

    def give_back(self, buffer: Tensor) -> None:
        """The loop has given the device its copy of `buffer`."""
        self._free.put((buffer, self._mark()))


def cuda_mark() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
