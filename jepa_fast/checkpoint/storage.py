"""Where torch.distributed.checkpoint puts tensors: one .safetensors file per process, and index.json.

torch plans which process writes or reads which piece, whatever the sharding; this stores the bytes. torch's own storage
would pickle the index and every tensor.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from jepa_fast.checkpoint import index, legacy
from jepa_fast.checkpoint.index import DTYPES, Entry, Index, Piece

SAFETENSORS = dict(zip(DTYPES, ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"), strict=True))


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


class Writer(StorageWriter):
    """Writes the pieces of this process; the coordinator writes the index. Not synced to the disk."""

    def __init__(self, folder: Path):
        self.folder = folder

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        names = (f"tensors-{rank}.safetensors" for rank in range(len(plans)))
        return [dataclasses.replace(plan, storage_data=name) for plan, name in zip(plans, names, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = [item for item in plan.items if _volume(item)]
        items.sort(key=lambda item: -_dtype(item).itemsize)  # so that every tensor is aligned
        head, at = {}, 0
        for item in items:
            size = _volume(item) * _dtype(item).itemsize
            kind = SAFETENSORS[str(_dtype(item)).removeprefix("torch.")]
            head[_label(item)] = {"dtype": kind, "shape": list(_chunk(item).sizes), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)
        results, at = [], 8 + len(text)
        with (self.folder / plan.storage_data).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for item in items:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                stream.write(data.data)
                results.append(WriteResult(item.index, len(data), (plan.storage_data, at)))
                at += len(data)
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        where = {r.index: (*r.storage_data, r.size_in_bytes) for part in results for r in part}
        held: Index = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            pieces = [
                Piece(tuple(c.offsets), tuple(c.sizes), *where[MetadataIndex(name, c.offsets, i)])
                for i, c in enumerate(entry.chunks)
                if c.sizes.numel()
            ]
            held[name] = Entry(entry.properties.dtype, tuple(entry.size), tuple(pieces))
        index.write(held, self.folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
    return item.tensor_data.chunk


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype


def _volume(item: WriteItem) -> int:
    return _chunk(item).sizes.numel()


def _label(item: WriteItem) -> str:
    """The tensor's name; with the place of the piece, if it is one of several."""
    assert item.tensor_data is not None
    whole, chunk = item.tensor_data.size, _chunk(item)
    return item.index.fqn if chunk.sizes == whole else f"{item.index.fqn}@{','.join(map(str, chunk.offsets))}"


class Reader(StorageReader):
    """Reads the pieces that torch's plan asks for. Counts the elements that it filled in."""

    def __init__(self, folder: Path, held: Index):
        self.folder, self.held, self.filled = folder, held, 0

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """torch's view of the index, in memory."""
        return Metadata({
            name: TensorStorageMetadata(
                TensorProperties(entry.dtype),
                torch.Size(entry.shape),
                [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.shape)) for p in entry.pieces],
            )
            for name, entry in self.held.items()
        })  # fmt: skip

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_piece: dict[tuple[str, int], list[ReadItem]] = {}
        for item in plan.items:
            place = item.storage_index.index
            assert place is not None
            by_piece.setdefault((item.storage_index.fqn, place), []).append(item)
        for (name, place), items in by_piece.items():
            entry = self.held[name]
            tensor = self._piece(entry, entry.pieces[place])
            for item in items:
                ranges = zip(item.storage_offsets, item.lengths, strict=True)
                part = tensor[tuple(slice(begin, begin + length) for begin, length in ranges)]
                into = planner.resolve_tensor(item).detach()
                if into.shape != part.shape:
                    raise ValueError(f"{name}: a piece of {list(part.shape)} for {list(into.shape)}")
                into.copy_(part)
                planner.commit_tensor(item, into)
                self.filled += part.numel()
        return _done(None)

    def _piece(self, entry: Entry, piece: Piece) -> Tensor:
        data = bytearray(piece.bytes)
        with (self.folder / piece.file).open("rb") as stream:
            stream.seek(piece.begin)
            if stream.readinto(data) != piece.bytes:
                raise ValueError(f"{piece.file} ends early")
        if legacy.is_old(self.folder):
            return legacy.tensor(data, entry, piece)
        return torch.frombuffer(data, dtype=entry.dtype).reshape(piece.shape)


class Planner(DefaultLoadPlanner):
    """torch's planner, which would unpickle what is no tensor: there is nothing else in our checkpoints."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor")
