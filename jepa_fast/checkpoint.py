"""Checkpoints: written beside and renamed, verified on the way back, never half a state, for any number of processes.

checkpoints/step-N/ holds the tensors (torch.distributed.checkpoint: every process writes its share, any number of
processes reads them back), state.pt (what is small) and meta.json, written last: the step, and size and SHA-256 of
every file. checkpoints/latest names the newest. Nothing in them is trusted: tensors are read with `weights_only`, and
of the index, which torch pickles, only the classes that an index is made of are built.
"""

import hashlib
import json
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from jepa_fast.errors import UsageError

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process alone is no accident


class Writer:
    """Writes the checkpoints of a run in the background; every process has one and calls it alike.

    group: a CPU process group of its own, or None for one process. keep: the newest so many stay (0: all).
    """

    def __init__(self, folder: Path, keep: int, group: dist.ProcessGroup | None = None):
        self.root, self.keep, self.group = folder / "checkpoints", keep, group
        self.is_main = group is None or dist.get_rank(group) == 0
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(cuda, False, True, cuda)
        )  # pinned, shared, asynchronous, non-blocking
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._staging: Future | None = None
        self._writing: Future | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to write checkpoints/step-N. `tensors` must not change before `staged` has returned.

        state: numbers, strings and small plain tensors; the main process's is written.
        Raises UsageError if the checkpoint before could not be written, or this one's folder cannot be made; on
        processes other than the main one, which says it for all, SystemExit.
        """
        partial, trouble = self.root / f".step-{step}.partial", self._written()
        if self.is_main and not trouble:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                torch.save(state, partial / "state.pt")
            except (OSError, RuntimeError) as error:
                trouble = self._failed(step, error)
        self._agree(trouble)  # nobody writes into a folder that is not there
        begun: Any = dcp.async_save(
            tensors,
            storage_writer=FileSystemWriter(partial, sync_files=False),  # synced with the rest, before the rename
            process_group=self.group,
            async_stager=self._stager,
            no_dist=self.group is None,
        )
        self._staging = begun.staging_completion
        self._writing = self._finisher.submit(self._finish, step, begun.upload_completion)

    def staged(self) -> None:
        """Wait until the tensors given to `save` are copied: from here on they may change."""
        if self._staging is not None:
            self._staging.result()
            self._staging = None

    def finish(self) -> None:
        """Wait until the checkpoint is written and in its place. Raises as `save` does if it could not be."""
        self._agree(self._written())

    def close(self) -> None:
        """Let what is being written be done, and stop the threads. Asks no other process, which may be gone."""
        trouble = self._written()
        if trouble and self.is_main:
            print(f"warning: {trouble}", file=sys.stderr, flush=True)
        self._finisher.shutdown()
        self._stager.close()

    def _written(self) -> str:
        """What kept this process's part of the checkpoint from being written; '' if nothing did."""
        writing, self._writing, self._staging = self._writing, None, None
        return writing.result() if writing is not None else ""

    def _agree(self, trouble: str) -> None:
        """What stops the main process stops all, at the same place."""
        said = [trouble]
        if self.group is not None:
            dist.broadcast_object_list(said, src=0, group=self.group)
        if said[0]:
            raise UsageError(said[0]) if self.is_main else SystemExit(2)

    def _finish(self, step: int, upload: Future) -> str:
        try:
            upload.result()
            if self.is_main:
                self._commit(step)
        except (OSError, RuntimeError, CheckpointException) as error:
            return self._failed(step, error)
        return ""

    def _commit(self, step: int) -> None:
        """Everything on the disk, then the name, then the mark, and only then the old ones away."""
        partial, final = self.root / f".step-{step}.partial", self.root / f"step-{step}"
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _digest(f)} for f in sorted(partial.iterdir())}
        (partial / "meta.json").write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n")
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _write_atomically(self.root / "latest", f"step-{step}\n")
        _sync(self.root)
        if self.keep:
            for old in found(self.root.parent)[: -self.keep]:
                shutil.rmtree(self.root / f"step-{old}", ignore_errors=True)

    def _failed(self, step: int, error: BaseException) -> str:
        if self.is_main:
            shutil.rmtree(self.root / f".step-{step}.partial", ignore_errors=True)
        return f"cannot write checkpoint {self.root / f'step-{step}'}: {_cause(error)}; earlier checkpoints are intact"


def sweep(folder: Path) -> None:
    """Take away what a killed process left half written."""
    for partial in (folder / "checkpoints").glob(".*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


# ---- reading --------------------------------------------------------------------------------------


def found(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run folder, oldest first."""
    steps = (path.parent.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*/meta.json"))
    return sorted(int(s) for s in steps if s.isdigit())


def verify(path: Path) -> None:
    """Raises UsageError, naming the file, if checkpoints/step-N is not what was written."""
    try:
        files = json.loads((path / "meta.json").read_text())["files"]
        for name, wrote in files.items():
            if (path / name).stat().st_size != wrote["bytes"] or _digest(path / name) != wrote["sha256"]:
                raise ValueError(f"{name} is not what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None


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
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(path, error) from None


def restore(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None, where: str) -> None:
    """Read the tensors of checkpoints/step-N into `tensors`, in place, however both are sharded. All processes call it.

    Raises UsageError if the checkpoint is damaged, or has other tensors: it is of another architecture then.
    """
    held = _index(path)
    check_fit({name: held[name].size for name in held}, {n: t.shape for n, t in tensors.items()}, where)
    _load(path, tensors, group)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint without its optimizer, whole tensors on the host: {'step', 'model': {name: tensor}, ...}.

    Raises UsageError if it is missing or damaged.
    """
    verify(path)
    weights = {name: meta for name, meta in _index(path).items() if name.startswith("model.")}
    tensors = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in weights.items()}
    _load(path, tensors, None)
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


def _load(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    try:
        dcp.load(tensors, storage_reader=_Reader(path), process_group=group, no_dist=group is None)
    except (OSError, RuntimeError, ValueError, AssertionError, CheckpointException) as error:
        raise _damaged(path, error) from None


def _index(path: Path) -> dict[str, TensorStorageMetadata]:
    try:
        entries = _Reader(path).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError) as error:
        raise _damaged(path, error) from None
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


class _Reader(FileSystemReader):
    """torch's reader, without its trust in the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _IndexUnpickler(stream).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_INDEX_IS_MADE_OF = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    """Builds the plain records of an index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_IS_MADE_OF.get(module, ()):
            raise pickle.UnpicklingError(f"its index asks for {module}.{name}")
        return super().find_class(module, name)


def _damaged(path: Path, error: BaseException) -> UsageError:
    return UsageError(f"checkpoint {path} is damaged or incomplete ({_cause(error)})")


def _cause(error: BaseException) -> str:
    """The first line of what really went wrong."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    reason = (getattr(inner, "strerror", None) or str(error) or type(error).__name__).strip().split("\n")[0]
    if "inline_container" in reason:  # torch's zip writer, of a write that came short
        reason = "a file could not be written whole; is the disk full?"
    return reason


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
