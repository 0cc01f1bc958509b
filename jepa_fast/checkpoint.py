"""Checkpoints: written beside and renamed, verified on the way back, never half a state.

checkpoints/step-N/ holds state.pt (everything the run needs, plain tensors and numbers) and meta.json
(step, size and SHA-256 of state.pt); checkpoints/latest names the newest.
"""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from jepa_fast.errors import UsageError


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoints/step-N atomically, point `latest` at it, drop all but the newest `keep` (0: none dropped)."""
    root = folder / "checkpoints"
    final, temporary = root / f"step-{step}", root / f".step-{step}.partial"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        torch.save(state, temporary / "state.pt")
        meta = {
            "step": step,
            "bytes": (temporary / "state.pt").stat().st_size,
            "sha256": _digest(temporary / "state.pt"),
        }
        (temporary / "meta.json").write_text(json.dumps(meta) + "\n")
        for file in temporary.iterdir():
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _write_atomically(root / "latest", f"step-{step}\n")
        _sync(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UsageError(
            f"cannot write checkpoint {final}: {error.strerror or error}; earlier checkpoints are intact"
        ) from None
    if keep:
        for old in found(folder)[:-keep]:
            shutil.rmtree(root / f"step-{old}", ignore_errors=True)
    return final


def found(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run folder, oldest first."""
    steps = (path.parent.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*/meta.json"))
    return sorted(int(s) for s in steps if s.isdigit())


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """The state of checkpoints/step-N. Raises UsageError if it is missing or damaged."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        file = path / "state.pt"
        if file.stat().st_size != meta["bytes"] or _digest(file) != meta["sha256"]:
            raise ValueError("state.pt is not what was written")
        return torch.load(file, map_location=device, weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"checkpoint {path} is damaged or incomplete ({reason})") from None


def load_newest(folder: Path, fall_back: bool) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint, or None if there is none.

    A damaged one is an error that names the previous good one; with `fall_back` that one is taken.
    """
    trouble = ""
    for step in reversed(found(folder)):
        path = folder / "checkpoints" / f"step-{step}"
        try:
            state = load(path)
        except UsageError as error:
            trouble = trouble or str(error)
            continue
        if trouble and not fall_back:
            raise UsageError(f"{trouble}; step-{step} is good: --resume auto takes it, or delete the damaged one")
        if trouble:
            print(f"warning: {trouble}; continuing from step-{step}", flush=True)
        return step, state
    if trouble:
        raise UsageError(f"{trouble}; no good checkpoint is left in {folder}: start again in a new --run.dir")
    return None


def weights_at(path: str) -> dict[str, Any]:
    """Model weights of a checkpoint folder, or of a run folder's newest checkpoint (`--init.from`)."""
    folder = Path(path)
    if (folder / "meta.json").exists():
        return load(folder)["model"]
    newest = load_newest(folder, fall_back=False) if folder.is_dir() else None
    if newest is None:
        raise UsageError(f"--init.from {path}: no checkpoint there; give a run folder or one of its checkpoints/step-N")
    return newest[1]["model"]


def _write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text)
    _sync(beside)
    beside.rename(path)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
