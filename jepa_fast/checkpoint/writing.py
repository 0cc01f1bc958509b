"""Writing checkpoints in the background: beside and renamed, never half a state, for any number of processes."""

import json
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from jepa_fast.checkpoint import best as best_link
from jepa_fast.checkpoint import state as small
from jepa_fast.checkpoint import storage
from jepa_fast.checkpoint.errors import cause, digest, sync
from jepa_fast.checkpoint.reading import found
from jepa_fast.errors import UsageError


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

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], best: bool = False) -> None:
        """Begin to write checkpoints/step-N. `tensors` must not change before `staged` has returned.

        best: instead checkpoints/best-N, which checkpoints/best then names, and which `keep` does not count.
        state: numbers, strings and small plain tensors; the main process's is written.
        Raises UsageError if the checkpoint before could not be written, or this one's folder cannot be made; on
        processes other than the main one, which says it for all, SystemExit.
        """
        name = f"best-{step}" if best else f"step-{step}"
        partial, trouble = self.root / f".{name}.partial", self._written()
        if self.is_main and not trouble:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                small.write(state, partial)
            except (OSError, RuntimeError) as error:
                trouble = self._failed(name, error)
        self._agree(trouble)  # nobody writes into a folder that is not there
        begun: Any = dcp.async_save(
            tensors,
            storage_writer=storage.Writer(partial),
            process_group=self.group,
            async_stager=self._stager,
            no_dist=self.group is None,
        )
        self._staging = begun.staging_completion
        self._writing = self._finisher.submit(self._finish, step, name, begun.upload_completion)

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

    def _finish(self, step: int, name: str, upload: Future) -> str:
        try:
            upload.result()
            if self.is_main:
                self._commit(step, name)
        except (OSError, RuntimeError, CheckpointException) as error:
            return self._failed(name, error)
        return ""

    def _commit(self, step: int, name: str) -> None:
        """Everything on the disk, then the name, then the mark, and only then the old ones away."""
        partial, final = self.root / f".{name}.partial", self.root / name
        files = {f.name: {"bytes": f.stat().st_size, "sha256": digest(f)} for f in sorted(partial.iterdir())}
        (partial / "meta.json").write_text(
            json.dumps({"step": step, "files": files}, indent=1) + "\n", encoding="utf-8"
        )
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        if name.startswith("best-"):
            return best_link.put(partial, final)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _write_atomically(self.root / "latest", f"step-{step}\n")
        sync(self.root)
        if self.keep:
            for old in found(self.root.parent)[: -self.keep]:
                shutil.rmtree(self.root / f"step-{old}", ignore_errors=True)

    def _failed(self, name: str, error: BaseException) -> str:
        if self.is_main:
            shutil.rmtree(self.root / f".{name}.partial", ignore_errors=True)
        return f"cannot write checkpoint {self.root / name}: {cause(error)}; earlier checkpoints are intact"


def sweep(folder: Path) -> None:
    """Take away what a killed process left half written."""
    best_link.sweep(folder / "checkpoints")
    for partial in (folder / "checkpoints").glob(".*.partial"):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    beside.rename(path)
