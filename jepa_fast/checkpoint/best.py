"""checkpoints/best: a link to the folder best-N of the best weights so far, at every moment a complete one or none.

A new one lies there whole under its own name before the link is replaced, in one rename; the old one goes after that.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from jepa_fast.checkpoint.errors import sync
from jepa_fast.checkpoint.reading import read_state
from jepa_fast.errors import UsageError

NAME = "best"


def put(partial: Path, final: Path) -> None:
    """Make `partial`, which is written and on the disk, the best: as `final`, or beside one that has this name already."""
    root, number = final.parent, 2
    while final.exists():  # the same step, before the run was resumed
        final, number = root / f"{final.name.split('.')[0]}.{number}", number + 1
    partial.rename(final)
    link, beside = root / NAME, root / f".{NAME}.partial"
    if link.is_dir() and not link.is_symlink():  # the run folder was copied and its links were followed
        link.rename(root / f"{NAME}-copied")
    beside.unlink(missing_ok=True)
    beside.symlink_to(final.name)
    beside.rename(link)
    sync(root)
    sweep(root)


def sweep(root: Path) -> None:
    """Take away the folders that the link does not name: an older best, or one that was not yet linked."""
    if not (root / NAME).exists():
        return
    named = os.path.realpath(root / NAME)
    for folder in root.glob(f"{NAME}-*"):
        if os.path.realpath(folder) != named:
            shutil.rmtree(folder, ignore_errors=True)


def kept(run: Path) -> dict[str, Any]:
    """What is known of the best checkpoint of a run folder, as its state says; {} if there is none that can be read."""
    path = run / "checkpoints" / NAME
    try:
        known = read_state(path).get("best") if (path / "meta.json").is_file() else None
    except UsageError:
        return {}
    return known if isinstance(known, dict) else {}
