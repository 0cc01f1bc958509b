"""Shards from an Inputs: several at a time, each whole or not there, so that an interrupted conversion goes on.

Which samples a shard holds, and so its bytes, follow from the inputs and the options alone.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jepa_fast import cores
from jepa_fast.data.convert.inputs import Inputs
from jepa_fast.data.random import shuffled
from jepa_fast.data.sample import BadSample
from jepa_fast.data.shards.writer import PLAN, write_info, write_tar
from jepa_fast.errors import UsageError


@dataclass(frozen=True)
class Options:
    name: str = ""  # of the shards; empty: the folder's
    samples_per_shard: int = 1000
    seed: int | None = 0  # of the order of the samples; None: as they come
    workers: int = 0  # 0: one a core


@dataclass
class Result:
    shards: dict[str, dict[str, int]]  # {split: {shard: samples}}
    made: int = 0  # shards of this call; the others were there
    left_out: list[str] = field(default_factory=list)  # samples that cannot be read, and why


@dataclass(frozen=True)
class _Task:
    split: str
    filename: str
    samples: np.ndarray


def convert(inputs: Inputs, folder: Path, options: Options, progress: Callable[[int, int, int], None]) -> Result:
    """Write `folder`. `progress(done, shards, bytes)` is called after every shard. Raises UsageError."""
    tasks = _tasks(inputs, options, options.name or folder.resolve().name)
    _claim(folder, inputs, options)
    with _alone(folder):
        return _convert(inputs, folder, options, tasks, progress)


def _convert(
    inputs: Inputs, folder: Path, options: Options, tasks: list[_Task], progress: Callable[[int, int, int], None]
) -> Result:
    known = _known(folder)
    lengths: dict[str, dict[str, int]] = {split: {} for split in inputs.splits}
    result, written = Result(lengths, left_out=list(inputs.lost)), 0
    todo = [task for task in tasks if task.filename not in known]
    with ThreadPoolExecutor(options.workers or cores.usable()) as pool:
        for done, (task, entry) in enumerate(
            zip(todo, pool.map(lambda t: _write(t, inputs, folder), todo), strict=True), start=1
        ):
            known[task.filename] = entry
            written += entry["bytes"]
            progress(len(tasks) - len(todo) + done, len(tasks), written)
    for task in tasks:
        entry = known[task.filename]
        if entry["samples"]:
            lengths[task.split][task.filename] = entry["samples"]
        result.left_out += entry["left_out"]
    result.made = len(todo)
    classes = {"classes": inputs.classes} if inputs.classes else {}
    write_info(folder, lengths, **classes)
    return result


def _tasks(inputs: Inputs, options: Options, name: str) -> list[_Task]:
    tasks = []
    for split, count in inputs.splits.items():
        order = np.arange(count) if options.seed is None else shuffled(count, options.seed, 0)
        cuts = range(0, count, options.samples_per_shard)
        digits = max(4, len(str(len(cuts) - 1)))
        tasks += [
            _Task(split, f"{name}-{split}-{i:0{digits}}.tar", order[cut : cut + options.samples_per_shard])
            for i, cut in enumerate(cuts)
        ]
    return tasks


def _claim(folder: Path, inputs: Inputs, options: Options) -> None:
    """Make the folder this conversion's, or find that it is. Raises UsageError if it is another's."""
    plan = {
        "contents": inputs.contents, "name": options.name, "samples_per_shard": options.samples_per_shard,
        "seed": options.seed, "splits": inputs.splits,
    }  # fmt: skip
    file = folder / PLAN
    try:
        if file.is_file():
            if json.loads(file.read_text(encoding="utf-8")) != plan:
                raise UsageError(f"{folder} holds shards of other data or options; give another folder, or delete it")
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} exists and is not empty; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{PLAN}.{os.getpid()}.partial"
        partial.write_text(json.dumps(plan), encoding="utf-8")
        partial.rename(file)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose a folder that can be written") from None
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{file} cannot be read; delete {folder} and convert again") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises UsageError if another process does."""
    try:
        file = (folder / ".lock").open("a", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose a folder that can be written") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder} is being written by another conversion; wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass
        yield


def _known(folder: Path) -> dict[str, dict]:
    """Shards that an earlier call finished: whole, and of the size it wrote."""
    known = {}
    for note in folder.glob(".*.done"):
        try:
            entry = json.loads(note.read_text(encoding="utf-8"))
            shard = folder / note.name[1 : -len(".done")]
            if not entry["samples"] or shard.stat().st_size == entry["bytes"]:
                known[shard.name] = entry
        except (OSError, ValueError, KeyError):
            continue
    return known


def _write(task: _Task, inputs: Inputs, folder: Path) -> dict:
    left_out: list[str] = []
    keys: set[str] = set()

    def samples() -> Iterator[dict]:
        for number in task.samples.tolist():
            try:
                made = inputs.sample[task.split](number)
            except BadSample as error:
                left_out.append(f"{task.split} sample {number}: {error}")
                continue
            while made["__key__"] in keys:  # source shards may number theirs alike
                made["__key__"] += f"-{number}"
            keys.add(made["__key__"])
            yield made

    partial, file = folder / f".{task.filename}.partial", folder / task.filename
    try:
        write_tar(partial, samples())
        entry = {"samples": len(keys), "bytes": partial.stat().st_size, "left_out": left_out}
        if keys:
            partial.replace(file)
        else:
            partial.unlink()
        (folder / f".{task.filename}.done").write_text(json.dumps(entry), encoding="utf-8")
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(
            f"cannot write {file}: {error.strerror}; make room, and call again: what is done stays"
        ) from None
    return entry
