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
from dataclasses import dataclass

READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe in a file's place is no wait
MOST = 1024  # of one process; less where the system allows fewer
Stamp = tuple[int, int]  # size, mtime in ns
File = tuple[str, Stamp]  # path; another stamp, another file


@dataclass(slots=True)
class _Open:
    descriptor: int
    users: int = 0


class OpenFiles:
    """pread by path, through a bounded set of open files."""

    def __init__(self, most: int = 0):
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most = most or max(8, MOST if allowed == resource.RLIM_INFINITY else min(MOST, allowed // 2))
        self._open: OrderedDict[File, _Open] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def pread(self, file: File, length: int, offset: int) -> bytes | None:
        """`length` bytes at `offset`, fewer where the file ends; None if what lies there has another stamp. A file that was
        deleted or replaced is read on while it is open. Raises OSError.
        """
        held = self._take(file)
        try:
            data = os.pread(held.descriptor, length, offset)
            now = os.fstat(held.descriptor)  # looked at last: it holds for what was read
            return data if (now.st_size, now.st_mtime_ns) == file[1] else None
        finally:
            self._give_back(held)

    def will_need(self, file: File, pieces: list[tuple[int, int]]) -> None:
        """Let the system read ahead the (offset, length) that will be asked for. Never fails: the read itself will tell."""
        try:
            held = self._take(file)
        except OSError:
            return
        try:
            if hasattr(os, "posix_fadvise"):
                for offset, length in pieces:
                    os.posix_fadvise(held.descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass
        finally:
            self._give_back(held)

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Close what nobody is reading."""
        with self._lock:
            self._close_down_to(0)

    def _take(self, file: File) -> _Open:
        with self._lock:
            held = self._open.get(file)
            if held is None:
                self._close_down_to(self.most - 1)
                held = self._open[file] = _Open(os.open(file[0], READ))
            else:
                self._open.move_to_end(file)
            held.users += 1
            return held

    def _give_back(self, held: _Open) -> None:
        with self._lock:
            held.users -= 1
            self._close_down_to(self.most)

    def _close_down_to(self, count: int) -> None:
        while len(self._open) > count:
            idle = next((file for file, held in self._open.items() if not held.users), None)
            if idle is None:
                return
            os.close(self._open.pop(idle).descriptor)


@functools.cache
def shared() -> OpenFiles:
    """Those of this process."""
    return OpenFiles()
