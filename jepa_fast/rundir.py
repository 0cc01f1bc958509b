"""The run folder: which one, whose, whether it may be used, and where a resumed run begins."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO

from jepa_fast import checkpoint
from jepa_fast.bounded import read_text
from jepa_fast.config import Config, flatten, from_json, replace, to_json
from jepa_fast.errors import UsageError, reading

# What may differ when a run goes on: how long, how often it writes, on how many devices, and where the data lie (what
# they are is compared by itself).
MAY_CHANGE = (
    "train.steps", "train.epochs", "log.", "checkpoint.", "parallel.", "profile.", "run.dir",
    "data.workers", "data.path", "data.max_bad_share",
)  # fmt: skip
LOCK, PARTIAL = ".lock", ".config.json.partial"


def next_free(preset: str, root: Path = Path("runs")) -> Path:
    """runs/<preset>-<n>, n the first number not taken."""
    taken = _numbers(preset, root)
    return root / f"{preset}-{max(taken, default=0) + 1}"


def newest(preset: str, root: Path = Path("runs"), own: bool = False) -> Path | None:
    """The run folder of `preset` to continue, or None: that of this torchrun job; else the newest, unless only `own` will do."""
    folders = [root / f"{preset}-{n}" for n in sorted(_numbers(preset, root), reverse=True)]
    mine = [f for f in folders if job() and _holder(f).get("job") == job()]
    return next(iter(mine or ([] if own else folders)), None)


def _numbers(preset: str, root: Path) -> list[int]:
    tails = (path.name.removeprefix(f"{preset}-") for path in root.glob(f"{preset}-*"))
    return [int(tail) for tail in tails if tail.isdecimal() and tail.isascii()]


def saved_config(folder: Path) -> Config | None:
    """The configuration a run folder holds, or None. Raises UsageError if it cannot be read."""
    file = folder / "config.json"
    if not file.exists():
        return None
    with reading(file, "a configuration"):
        return from_json(read_text(file), str(file))


def find_start(config: Config, folder: Path, resume: str) -> int:
    """The step to begin at: 0, or that of the checkpoint to continue from. Changes nothing.

    resume: '' (a new run), 'must' (there must be a checkpoint), 'auto' (continue if there is one).
    Raises UsageError if the folder is in use, or holds another configuration, another run, or no checkpoint that is due.
    """
    _refuse_used(folder)
    saved = saved_config(folder)
    if saved is not None:
        _refuse_other(saved, config, f"{folder} holds another configuration")
    if saved is not None and not resume:
        raise UsageError(f"{folder} already holds a run: --resume auto to go on with it, or another --run.dir")
    if saved is None and folder.exists() and (not folder.is_dir() or set(os.listdir(folder)) - {LOCK, PARTIAL}):
        raise UsageError(f"{folder} exists, is not empty and holds no run: give another --run.dir")
    step = checkpoint.newest(folder, fall_back=resume == "auto") if resume else None
    if resume == "must" and step is None:
        raise UsageError(f"--resume: no checkpoint in {folder}; --resume auto starts from the beginning")
    if step:  # the checkpoint's own configuration is the truth: config.json may have been edited since
        held = folder / "checkpoints" / f"step-{step}"
        made_with = from_json(str(checkpoint.read_state(held).get("config")), f"the configuration in {held}")
        _refuse_other(made_with, config, f"{held} was made with another configuration than config.json says")
    return step or 0


def claim(config: Config, folder: Path, new: bool) -> IO[str]:
    """Make the folder, lock it and write config.json into it. The folder is ours until the returned file is closed.

    new: the name was chosen for being free, so it must still be. Raises UsageError if the folder cannot be had.
    """
    try:
        folder.mkdir(parents=True, exist_ok=not new)
        lock = _lock(folder)
        checkpoint.sweep(folder)
        partial = folder / PARTIAL
        try:
            partial.write_text(to_json(replace(config, {"run.dir": str(folder)})), encoding="utf-8")
            partial.rename(folder / "config.json")
        except OSError:  # a full disk: leave nothing half written behind
            partial.unlink(missing_ok=True)
            lock.close()
            raise
        return lock
    except FileExistsError:
        raise UsageError(f"{folder} was taken by another run just now; start again, or give a --run.dir") from None
    except OSError as error:
        raise UsageError(
            f"cannot write to --run.dir {folder}: {error.strerror}; choose a folder that can be written"
        ) from None


# ---- the lock -------------------------------------------------------------------------------------
# A POSIX record lock: gone with its process however that ends, not inherited by children, honoured on NFS.


def job() -> str:
    """What torchrun calls this job: the same on all its processes and over restarts; '' outside torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def _lock(folder: Path) -> IO[str]:
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder) from None
    except OSError as error:  # a file system without locks: better to train without one than not at all
        print(f"warning: {folder} cannot be locked ({error.strerror}); see that no other run uses it", flush=True)
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "job": job()}, file)
    file.flush()
    return file


def _refuse_used(folder: Path) -> None:
    try:
        with (folder / LOCK).open("r+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder) from None
    except OSError:  # no lock there, or a folder that cannot be written: `claim` will say so
        return


def _in_use(folder: Path) -> UsageError:
    holder = _holder(folder)
    who = f"process {holder['pid']} on {holder['host']}" if "pid" in holder else "another process"
    return UsageError(f"{folder} is in use by {who}: wait for it, stop it, or give another --run.dir")


def _holder(folder: Path) -> dict:
    try:
        return json.loads((folder / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _refuse_other(saved: Config, config: Config, trouble: str) -> None:
    old, new = flatten(saved), flatten(config)
    changed = [name for name in new if old[name] != new[name] and not name.startswith(MAY_CHANGE)]
    if changed:
        name = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UsageError(
            f"{trouble}: {name} is {old[name]!r} there and {new[name]!r} here{more}; "
            "only "
            + ", ".join(m if "." in m.rstrip(".") else f"{m}*" for m in MAY_CHANGE)
            + " may change; give another --run.dir"
        )
