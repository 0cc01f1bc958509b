"""Host memory of batches that is used again: fresh pages cost a fifteenth of a batch's decoding, pinning them more.

`PinnedBuffers` holds pinned buffers, so that the copy to the device runs beside the computation. One is filled again only when the
device has finished copying from it: the loop may be many steps ahead of the device. `PageableBuffers` is for a run without a device.
"""

import queue
import weakref
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class CopyEvent(Protocol):
    def synchronize(self) -> None: ...


class PinnedBuffers:
    """`count` buffers like `make()`. `mark()` gives an event that has passed when the device is done with all it was
    given so far."""

    def __init__(self, count: int, make: Callable[[], Tensor], mark: Callable[[], CopyEvent]):
        self._mark = mark
        self._free: queue.Queue[tuple[Tensor, CopyEvent | None]] = queue.Queue()
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


class PageableBuffers:
    """Tensors of one shape and dtype. What lay under one is given out again when nothing refers to it any more."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self._make = lambda: np.empty(shape, dtype)
        self._free: deque[np.ndarray] = deque()

    def take(self) -> Tensor:
        memory = self._free.pop() if self._free else self._make()
        seen = memory.view()  # torch holds it as long as a tensor, or a part of one, has its storage
        weakref.finalize(seen, self._free.append, memory).atexit = False
        return torch.from_numpy(seen)


def cuda_mark() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
