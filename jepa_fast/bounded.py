"""Reading files that somebody else made: regular files only, and no more of them than is meant.

A named pipe would be waited for, a device read for ever.
"""

import errno
import os
import stat
from pathlib import Path

MOST_BYTES = 2**30  # of an image, a series, a table, a log


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """All of a regular file. Raises OSError, its strerror for people, also if it is none or has more than `most` bytes."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    with os.fdopen(descriptor, "rb") as stream:
        held = os.fstat(stream.fileno())
        if not stat.S_ISREG(held.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if held.st_size > most:
            raise OSError(errno.EFBIG, f"it has {held.st_size} bytes, more than {most}", str(path))
        return stream.read(held.st_size)


def read_text(path: Path, encoding: str = "utf-8", most: int = MOST_BYTES) -> str:
    """Likewise, of a text. Raises OSError, UnicodeDecodeError."""
    return read_bytes(path, most).decode(encoding)


def shown(name: str | Path) -> str:
    """A name from a file or a disk as it may be printed: no control characters, no bytes that are no text."""
    text = os.fsencode(str(name)).decode(errors="replace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
