"""The run folder: which one, whether it may be used, and where a resumed run begins."""

from pathlib import Path

from jepa_fast import checkpoint
from jepa_fast.config import Config, flatten, from_json, replace, to_json
from jepa_fast.errors import UsageError

# What may differ when a run goes on: how long, how often it writes, and on how many devices.
MAY_CHANGE = ("train.steps", "train.epochs", "log.", "checkpoint.", "parallel.", "run.dir", "data.workers")


def next_free(preset: str, root: Path = Path("runs")) -> Path:
    """runs/<preset>-<n>, n the first number not taken."""
    taken = _numbers(preset, root)
    return root / f"{preset}-{max(taken, default=0) + 1}"


def newest(preset: str, root: Path = Path("runs")) -> Path | None:
    """The run folder of `preset` with the highest number, or None."""
    taken = _numbers(preset, root)
    return root / f"{preset}-{max(taken)}" if taken else None


def _numbers(preset: str, root: Path) -> list[int]:
    tails = (path.name.removeprefix(f"{preset}-") for path in root.glob(f"{preset}-*"))
    return [int(tail) for tail in tails if tail.isdigit()]


def saved_config(folder: Path) -> Config | None:
    """The configuration a run folder holds, or None. Raises UsageError if it cannot be read."""
    file = folder / "config.json"
    return from_json(file.read_text(), str(file)) if file.exists() else None


def find_start(config: Config, folder: Path, resume: str) -> int:
    """The step to begin at: 0, or that of the checkpoint to continue from. Changes nothing.

    resume: '' (a new run), 'must' (there must be a checkpoint), 'auto' (continue if there is one).
    Raises UsageError if the folder holds another configuration, another run, or no checkpoint that is due.
    """
    saved = saved_config(folder)
    if saved is not None:
        _refuse_other(saved, config, folder)
    if saved is not None and not resume:
        raise UsageError(f"{folder} already holds this run: --resume to continue it, or another --run.dir")
    if saved is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists, is not empty and holds no run: give another --run.dir")
    newest_state = checkpoint.load_newest(folder, fall_back=resume == "auto") if resume else None
    if resume == "must" and newest_state is None:
        raise UsageError(f"--resume: no checkpoint in {folder}; leave out --resume to start, or use --resume auto")
    return newest_state[0] if newest_state else 0


def claim(config: Config, folder: Path) -> None:
    """Make the folder and write config.json into it. Raises UsageError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".config.json.partial"
        partial.write_text(to_json(replace(config, {"run.dir": str(folder)})))
        partial.rename(folder / "config.json")
    except OSError as error:
        raise UsageError(
            f"cannot write to --run.dir {folder}: {error.strerror}; choose a folder that can be written"
        ) from None


def _refuse_other(saved: Config, config: Config, folder: Path) -> None:
    old, new = flatten(saved), flatten(config)
    changed = [name for name in new if old[name] != new[name] and not name.startswith(MAY_CHANGE)]
    if changed:
        name = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UsageError(
            f"{folder} holds another configuration: {name} is {old[name]!r} there and {new[name]!r} here{more}; give another --run.dir"
        )
