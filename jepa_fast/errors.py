"""Errors that are the user's to fix: printed as one line, exit code 2, no traceback."""

import argparse
import csv
import functools
import io
import os
import pickle
import struct
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn


class UsageError(ValueError):
    """Bad input. The message names the value, the place and the fix, on one line.

    Names in it may come from files: control characters and what is no text are written as escapes.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


# What reading a malformed file raises, whatever reads it.
MALFORMED = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError, EOFError, MemoryError,
    struct.error, zlib.error, csv.Error, pickle.PickleError,
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


class Outlet:
    """A stream of text that goes quiet when nobody reads it any more, so that the program goes on.

    `| head` has closed the pipe, the terminal is gone, the disk of a redirected output is full: a run of days does not end by
    it, what matters is in its files. Characters that the stream's encoding lacks are written as escapes.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, ValueError):  # ValueError: closed
            quiet = os.open(os.devnull, os.O_WRONLY)
            try:
                # What the buffer still holds must go somewhere, or the interpreter complains at its end.
                os.dup2(quiet, self._stream.fileno())
            except (OSError, ValueError):
                self._stream = io.StringIO()
            finally:
                os.close(quiet)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's main: a UsageError becomes one line on stderr and exit status 2; see `Outlet` for what it prints.

    JEPA_FAST_DEBUG=1 keeps the traceback.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (Outlet(stream) for stream in before)
        try:
            return main(*args, **kwargs) or 0
        except UsageError as error:
            if os.environ.get("JEPA_FAST_DEBUG") == "1":
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before

    return wrapped
