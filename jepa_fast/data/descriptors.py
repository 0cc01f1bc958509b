"""Open files, kept: opening a shard for every sample costs more than reading the sample.

A bounded number stays open, the one used longest ago is closed first; one in use is never closed. Any number of
threads may read; a read names its place, so there is no shared position.
"""

import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path

MOST = 1024  # of one process; less where the system allows fewer


class Descriptors:
    """pread by path, through a bounded set of open files."""

    def __init__(self, most: int = 0):
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most = most or max(8, MOST if allowed == resource.RLIM_INFINITY else min(MOST, allowed // 2))
        self._open: OrderedDict[Path, int] = OrderedDict()  # least recently used first
        self._users: dict[Path, int] = {}
        self._lock = threading.Lock()

    def pread(self, file: Path, length: int, offset: int, stamp: tuple[int, int]) -> bytes:
        """`length` bytes at `offset`, fewer where the file ends.

        Raises OSError, and ValueError where the file on disk is not that of `stamp` (size, mtime in ns).
        """
        descriptor = self._take(file, stamp)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            self._give_back(file)

    def will_need(self, file: Path, length: int, offset: int, stamp: tuple[int, int]) -> None:
        """Let the system read ahead what will be asked for. Never fails: the read itself will tell."""
        try:
            descriptor = self._take(file, stamp)
        except (OSError, ValueError):
            return
        try:
            if hasattr(os, "posix_fadvise"):
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

    def __del__(self) -> None:
        self.close()

    def _take(self, file: Path, stamp: tuple[int, int]) -> int:
        with self._lock:
            if file in self._open:
                self._open.move_to_end(file)
            else:
                self._close_down_to(self.most - 1)
                self._open[file] = _opened(file, stamp)
            self._users[file] = self._users.get(file, 0) + 1
            return self._open[file]

    def _give_back(self, file: Path) -> None:
        with self._lock:
            self._users[file] -= 1
            self._close_down_to(self.most)

    def _close_down_to(self, count: int) -> None:
        for file in list(self._open):
            if len(self._open) <= count:
                return
            if not self._users.get(file):
                os.close(self._open.pop(file))
                self._users.pop(file, None)


def _opened(file: Path, stamp: tuple[int, int]) -> int:
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    stat = os.fstat(descriptor)
    if (stat.st_size, stat.st_mtime_ns) != stamp:
        os.close(descriptor)
        raise ValueError("the file was changed after it was indexed")
    return descriptor
