"""What went wrong with a checkpoint, in a line."""

import hashlib
import os
from pathlib import Path

from torch.distributed.checkpoint import CheckpointException

from jepa_fast.errors import UsageError


def damaged(path: Path, error: BaseException) -> UsageError:
    return UsageError(f"checkpoint {path} is damaged or incomplete ({cause(error)})")


def cause(error: BaseException) -> str:
    """The first line of what really went wrong."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    reason = (getattr(inner, "strerror", None) or str(error) or type(error).__name__).strip().split("\n")[0]
    return reason


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
