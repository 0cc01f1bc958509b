"""Open files, kept: opening a shard for every sample costs more than reading the sample.

A bounded number stays open, the one used longest ago is closed first; one in use is never closed. Any number of
threads may read; a read names its place, so there is no shared position. The bound is of the process, so all that read
share one set of files (`shared`).
"""

import functools
import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path

MOST = 1024  # of one process; less where the system allows fewer
Stamp = tuple[int, int]  # size, mtime in ns
File = tuple[Path, Stamp]  # another stamp, another file


class Descriptors:
    """pread by path, through a bounded set of open files."""

    def __init__(self, most: int = 0):
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most = most or max(8, MOST if allowed == resource.RLIM_INFINITY else min(MOST, allowed // 2))
        self._open: OrderedDict[File, int] = OrderedDict()  # least recently used first
        self._users: dict[File, int] = {}
        self._lock = threading.Lock()

    def pread(self, path: Path, length: int, offset: int, stamp: Stamp) -> bytes | None:
        """`length` bytes at `offset`, fewer where the file ends; None if the file is not that of `stamp`. One that was
        deleted or replaced is read on while it is open. Raises OSError.
        """
        file = (path, stamp)
        descriptor = self._take(file)
        try:
            data = os.pread(descriptor, length, offset)
            return data if _stamp(descriptor) == stamp else None  # looked at last: it holds for what was read
        finally:
            self._give_back(file)

    def will_need(self, path: Path, pieces: list[tuple[int, int]], stamp: Stamp) -> None:
        """Let the system read ahead the (offset, length) that will be asked for. Never fails: the read itself will tell."""
        file = (path, stamp)
        try:
            descriptor = self._take(file)
        except OSError:
            return
        try:
            if hasattr(os, "posix_fadvise"):
                for offset, length in pieces:
                    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass
        finally:
            self._give_back(file)

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Close what nobody is reading."""
        with self._lock:
            self._close_down_to(0)

    def _take(self, file: File) -> int:
        with self._lock:
            if file in self._open:
                self._open.move_to_end(file)
            else:
                self._close_down_to(self.most - 1)
                self._open[file] = os.open(file[0], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._users[file] = self._users.get(file, 0) + 1
            return self._open[file]

    def _give_back(self, file: File) -> None:
        with self._lock:
            self._users[file] -= 1
            self._close_down_to(self.most)

    def _close_down_to(self, count: int) -> None:
        while len(self._open) > count:
            idle = next((file for file in self._open if not self._users.get(file)), None)
            if idle is None:
                return
            os.close(self._open.pop(idle))
            self._users.pop(idle, None)


@functools.cache
def shared() -> Descriptors:
    """Those of this process."""
    return Descriptors()


def _stamp(descriptor: int) -> Stamp:
    stat = os.fstat(descriptor)
    return stat.st_size, stat.st_mtime_ns
