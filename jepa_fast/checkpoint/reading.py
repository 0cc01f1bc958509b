"""Reading checkpoints: what is there, whether it is whole, and the tensors in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from jepa_fast.checkpoint import index, legacy, storage
from jepa_fast.checkpoint import state as small
from jepa_fast.checkpoint.errors import damaged, digest
from jepa_fast.checkpoint.index import Index
from jepa_fast.errors import UsageError

# What reading a damaged file raises; RecursionError is of JSON that is nested too deep.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError, SafetensorError)


def found(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run folder, oldest first."""
    steps = (path.parent.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*/meta.json"))
    return sorted(int(s) for s in steps if s.isascii() and s.isdecimal() and len(s) < 19)


def verify(path: Path) -> None:
    """Raises UsageError, naming the file, if checkpoints/step-N is not what was written."""
    try:
        files = json.loads((path / "meta.json").read_text(encoding="utf-8"))["files"]
        old = legacy.is_old(path)
        for name in (legacy.NAME, legacy.STATE) if old else (index.NAME, small.NAME):
            if name not in files:
                raise ValueError(f"meta.json lacks {name}")
        for name, wrote in files.items():
            file = path / index.plain_name(name)
            if not file.is_file() or file.stat().st_size != wrote["bytes"] or digest(file) != wrote["sha256"]:
                raise ValueError(f"{name} is not what was written")
    except UNREADABLE as error:
        raise damaged(path, error) from None


def newest(folder: Path, fall_back: bool) -> int | None:
    """Step of the newest good checkpoint, or None if there is none at all.

    A damaged one is an error that names the good one before it; with `fall_back` that one is taken, and said so.
    """
    trouble = ""
    for step in reversed(found(folder)):
        try:
            verify(folder / "checkpoints" / f"step-{step}")
        except UsageError as error:
            trouble = trouble or str(error)
            continue
        if trouble and not fall_back:
            raise UsageError(f"{trouble}; step-{step} is good: --resume auto takes it, or delete the damaged one")
        if trouble:
            print(f"warning: {trouble}; continuing from step-{step}", flush=True)
        return step
    if trouble:
        raise UsageError(f"{trouble}; no good checkpoint is left in {folder}: start again in a new --run.dir")
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The small part of checkpoints/step-N. Raises UsageError if it is missing or damaged."""
    try:
        return legacy.read_state(path) if legacy.is_old(path) else small.read(path)
    except UNREADABLE as error:
        raise damaged(path, error) from None


def restore(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None, where: str) -> None:
    """Read the tensors of checkpoints/step-N into `tensors`, in place, however both are sharded. All processes call it.

    Raises UsageError if the checkpoint is damaged, or has other tensors: it is of another architecture then.
    """
    held = _index(path)
    check_fit(index.shapes(held), {n: t.shape for n, t in tensors.items()}, where)
    _load(path, held, tensors, group)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint without its optimizer, whole tensors on the host: {'step', 'model': {name: tensor}, ...}.

    Raises UsageError if it is missing or damaged.
    """
    verify(path)
    held = _index(path)
    weights = {name: entry for name, entry in held.items() if name.startswith("model.")}
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in weights.items()}
    _load(path, held, tensors, None)
    return read_state(path) | {"model": {name.removeprefix("model."): value for name, value in tensors.items()}}


def load_newest(folder: Path, fall_back: bool) -> tuple[int, dict[str, Any]] | None:
    """(step, `load`ed checkpoint) of the newest good one, or None if there is none: see `newest`."""
    step = newest(folder, fall_back)
    return None if step is None else (step, load(folder / "checkpoints" / f"step-{step}"))


def weights_at(path: str) -> dict[str, Tensor]:
    """Model weights of a checkpoint folder, or of a run folder's newest checkpoint (`--init.from`)."""
    folder = Path(path)
    if (folder / "meta.json").exists():
        return load(folder)["model"]
    held = load_newest(folder, fall_back=False) if folder.is_dir() else None
    if held is None:
        raise UsageError(f"--init.from {path}: no checkpoint there; give a run folder or one of its checkpoints/step-N")
    return held[1]["model"]


def check_fit(held: Mapping[str, torch.Size], own: Mapping[str, torch.Size], where: str) -> None:
    """Raises UsageError unless names and shapes agree. Names may begin with 'model.'."""
    missing, unknown = sorted(own.keys() - held.keys()), sorted(held.keys() - own.keys())
    if missing or unknown:
        first = (missing or unknown)[0].removeprefix("model.")
        said = f"no {first}" if missing else first
        raise UsageError(f"{where} is another architecture: it has {said}; use the preset it was trained with")
    for name, shape in own.items():
        if held[name] != shape:
            raise UsageError(
                f"{where} is another architecture: {name.removeprefix('model.')} is {list(held[name])} there and {list(shape)} here"
            )


def _load(path: Path, held: Index, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    reader = storage.Reader(path, held)
    try:
        dcp.load(tensors, storage_reader=reader, planner=storage.Planner(), process_group=group, no_dist=group is None)
        wanted = sum(getattr(tensor, "_local_tensor", tensor).numel() for tensor in tensors.values())
        if reader.filled != wanted:
            raise ValueError(f"{reader.filled} of {wanted} elements were read")
    except (*UNREADABLE, AssertionError, CheckpointException) as error:
        raise damaged(path, error) from None


def _index(path: Path) -> Index:
    try:
        return legacy.read(path) if legacy.is_old(path) else index.read(path)
    except UNREADABLE as error:
        raise damaged(path, error) from None
