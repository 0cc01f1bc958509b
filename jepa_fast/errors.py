"""Errors that are the user's to mend: printed as one line, exit code 2, no traceback."""

import argparse
import functools
import os
import struct
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn


class UsageError(ValueError):
    """Bad input. The message names the value, the place and the fix, on one line.

    Names in it may come from files: control characters and what is no text are written as escapes.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


# What reading a malformed file raises, whatever reads it.
MALFORMED = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError, EOFError, MemoryError,
    struct.error, zlib.error,
)  # fmt: skip


@contextmanager
def reading(file: Path | str, kind: str) -> Iterator[None]:
    """Around everything that reads and believes `file`: any failure is one UsageError with its name.

    kind: what it should be, as in 'a checkpoint'. JEPA_FAST_DEBUG=1 shows where it failed.
    """
    try:
        yield
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    except MALFORMED as error:
        said = (str(error).strip() or "-").splitlines()[0][:200]
        raise UsageError(f"{file} is not {kind} that can be read ({type(error).__name__}: {said})") from error


class Arguments(argparse.ArgumentParser):
    """argparse whose complaints are UsageErrors; no abbreviated options, the description as it is written."""

    def __init__(self, verb: str, description: str):
        super().__init__(
            prog=f"python -m jepa_fast.{verb}", description=description, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help shows the options")


def suggest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest known name, or ''."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's main: a UsageError becomes one line on stderr and exit status 2.

    JEPA_FAST_DEBUG=1 keeps the traceback.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UsageError as error:
            if os.environ.get("JEPA_FAST_DEBUG") == "1":
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            return 2

    return wrapped
