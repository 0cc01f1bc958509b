"""Checkpoints from before index.json: torch's pickled .metadata, .distcp files and state.pt.

The index is read by an interpreter that calls and imports nothing (`jepa_fast.pickles`). Every tensor in a .distcp file
is a small file of torch.save; like state.pt it is read by torch's weights_only reader, after its sizes were checked.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_fast import pickles
from jepa_fast.checkpoint.index import DTYPES, Entry, Index, Piece, check
from jepa_fast.pickles import Record

NAME, STATE = ".metadata", "state.pt"
_METADATA = "torch.distributed.checkpoint.metadata."


def is_old(folder: Path) -> bool:
    return (folder / NAME).is_file() and not (folder / "index.json").exists()


def read(folder: Path) -> Index:
    """The checked index of an old checkpoint. Raises OSError, ValueError."""
    held = pickles.read((folder / NAME).read_bytes())
    try:
        fields = _state(held, _METADATA + "Metadata")
        places = {}
        for key, value in fields["storage_data"].items():
            at, info = _state(key, _METADATA + "MetadataIndex"), _storage(value)
            places[at["fqn"], _size(at["offset"])] = info
        return check({name: _entry(name, e, places) for name, e in fields["state_dict_metadata"].items()}, folder, True)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{NAME} is not an index ({type(error).__name__}: {error})") from None


def _entry(name: Any, held: Any, places: dict[Any, tuple[str, int, int]]) -> Entry:
    fields = _state(held, _METADATA + "TensorStorageMetadata")
    dtype = fields["properties"].state[0]
    if not isinstance(name, str) or not isinstance(dtype, Record):
        raise ValueError(f"{NAME} has an entry that is no tensor")
    chunks = [_state(chunk, _METADATA + "ChunkStorageMetadata") for chunk in fields["chunks"]]
    boxes = [(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks]
    pieces = [Piece(offsets, shape, *places[name, offsets]) for offsets, shape in boxes if 0 not in shape]
    return Entry(DTYPES[dtype.name.removeprefix("torch.")], _size(fields["size"]), tuple(pieces))


def _state(held: Any, name: str) -> dict[str, Any]:
    if not isinstance(held, Record) or held.name != name or not isinstance(held.state, dict):
        raise ValueError(f"{NAME} holds no {name} where one belongs")
    return held.state


def _storage(held: Any) -> tuple[str, int, int]:
    fields = _state(held, "torch.distributed.checkpoint.filesystem._StorageInfo")
    if fields.get("transform_descriptors"):
        raise ValueError(f"{NAME} asks for a transformation of the stored tensors")
    file, begin, length = fields["relative_path"], fields["offset"], fields["length"]
    if not isinstance(file, str) or not all(type(n) is int and n >= 0 for n in (begin, length)):
        raise ValueError(f"{NAME} has a place that is none")
    return file, begin, length


def _size(held: Any) -> tuple[int, ...]:
    """Of a torch.Size."""
    if not isinstance(held, Record) or held.name != "torch.Size" or len(held.args or ()) != 1:
        raise ValueError(f"{NAME} holds no torch.Size where one belongs")
    sizes = held.args[0] if held.args else ()
    if not isinstance(sizes, (tuple, list)) or not all(type(n) is int and 0 <= n < 2**62 for n in sizes):
        raise ValueError(f"{NAME} has a size that is none")
    return tuple(sizes)


def tensor(data: bytearray, entry: Entry, piece: Piece) -> Tensor:
    """A piece from the bytes that torch.save wrote for it. Raises ValueError."""
    held = load_torch(io.BytesIO(data))
    if not isinstance(held, Tensor) or held.dtype != entry.dtype or tuple(held.shape) != piece.shape:
        raise ValueError(f"a piece in {piece.file} is not the tensor that the index gives")
    return held


def read_state(folder: Path) -> dict[str, Any]:
    """What state.pt holds. Raises OSError, ValueError."""
    state = load_torch(io.BytesIO((folder / STATE).read_bytes()))
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} holds no dict")
    return state


def load_torch(stream: io.BytesIO) -> Any:
    """What torch.save wrote: plain data and tensors, nothing packed. Raises ValueError."""
    try:
        with zipfile.ZipFile(stream) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("a compressed record")
        stream.seek(0)
        return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # the zip and weights_only readers raise nearly anything on damaged bytes
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
