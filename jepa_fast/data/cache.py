"""Where things are kept that can be made again: generated data, and indexes of shards that lie where nobody may write."""

import os
import tempfile
from pathlib import Path

from jepa_fast.errors import UsageError


def cache_folder() -> Path:
    """$JEPA_FAST_CACHE, else jepa_fast under the user's cache folder, else a folder of this user's own for temporary files.

    The last is for a user without a home, or with one that cannot be written (containers). Raises UsageError if that folder
    belongs to somebody else.
    """
    if os.environ.get("JEPA_FAST_CACHE"):
        return Path(os.environ["JEPA_FAST_CACHE"])
    folder = _in_home()
    return folder if folder and _can_write(folder) else _temporary()


def _in_home() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "jepa_fast"
    except RuntimeError:  # no HOME, and no entry in the list of users
        return None


def _can_write(folder: Path) -> bool:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return os.access(there, os.W_OK | os.X_OK)


def _temporary() -> Path:
    """Nobody else may write there: what it holds is believed."""
    folder = Path(tempfile.gettempdir()) / f"jepa_fast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    held = folder.lstat()
    if held.st_uid != os.getuid() or held.st_mode & 0o077 or not folder.is_dir() or folder.is_symlink():
        raise UsageError(f"{folder} can be written by others: set JEPA_FAST_CACHE to a folder of your own")
    return folder
