"""The index of a checkpoint: which tensors it holds, and where in which file each piece of them lies.

index.json is data: names, shapes and byte ranges. It is checked before anything is allocated or read: every element of
every tensor lies in exactly one piece, and every piece lies in a file that is there.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAME = "index.json"
FORMAT = "jepa-fast checkpoint 2"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and the bytes of a file that hold it, row by row."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    begin: int
    bytes: int


@dataclass(frozen=True)
class Entry:
    """A tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


Index = dict[str, Entry]


def write(index: Index, folder: Path) -> None:
    tensors = {
        name: {
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": entry.shape,
            "pieces": [asdict(piece) for piece in entry.pieces],
        }
        for name, entry in index.items()
    }
    (folder / NAME).write_text(json.dumps({"format": FORMAT, "tensors": tensors}) + "\n", encoding="utf-8")


def read(folder: Path) -> Index:
    """The checked index of checkpoints/step-N. Raises OSError, ValueError."""
    held = json.loads((folder / NAME).read_text(encoding="utf-8"))
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise ValueError(f"{NAME} is not of the format {FORMAT!r}")
    try:
        index = {name: _entry(entry) for name, entry in held["tensors"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{NAME} is malformed ({type(error).__name__}: {error})") from None
    return check(index, folder)


def _entry(held: dict[str, Any]) -> Entry:
    dtype = DTYPES.get(held["dtype"])
    if dtype is None:
        raise ValueError(f"{NAME} has a tensor of type {held['dtype']!r}")
    pieces = tuple(
        Piece(_numbers(p["offsets"]), _numbers(p["shape"]), _text(p["file"]), *_numbers([p["begin"], p["bytes"]]))
        for p in held["pieces"]
    )
    return Entry(dtype, _numbers(held["shape"]), pieces)


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**62 for v in values):
        raise ValueError(f"{NAME}: {str(values)[:80]} is no list of sizes")
    return tuple(values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{NAME}: {str(value)[:80]} is no file name")
    return value


def check(index: Index, folder: Path, overhead: bool = False) -> Index:
    """The index itself. Raises ValueError unless every element of every tensor lies in exactly one piece, in a file there.

    overhead: pieces are longer than their elements (the old format).
    """
    used: dict[str, int] = {}
    for name, entry in index.items():
        for piece in entry.pieces:
            need = math.prod(piece.shape) * entry.dtype.itemsize
            if piece.bytes < need or (piece.bytes > need and not overhead):
                raise ValueError(f"{name} needs {need} bytes and its index gives {piece.bytes}")
            used[piece.file] = used.get(piece.file, 0) + piece.bytes
        _check_cover(name, entry)
    sizes = {file: _size(folder, file) for file in used}
    for file, size in sizes.items():
        if used[file] > size:
            raise ValueError(f"{file} has {size} bytes and the index {used[file]}")
    for name, entry in index.items():
        if any(piece.begin + piece.bytes > sizes[piece.file] for piece in entry.pieces):
            raise ValueError(f"{name} ends behind its file")
    return index


def _check_cover(name: str, entry: Entry) -> None:
    total = math.prod(entry.shape)
    for piece in entry.pieces:
        inside = len(piece.offsets) == len(piece.shape) == len(entry.shape) and all(
            begin + size <= whole for begin, size, whole in zip(piece.offsets, piece.shape, entry.shape, strict=True)
        )
        if not inside or not math.prod(piece.shape):
            raise ValueError(f"a piece of {name} lies outside it, or is empty")
    held = sum(math.prod(piece.shape) for piece in entry.pieces)
    if held != total:
        raise ValueError(f"{held} of the {total} elements of {name} are there")
    if len(entry.pieces) > 1:  # as many elements as there should be: a hole means that two pieces overlap
        seen = np.zeros(entry.shape, bool)
        for piece in entry.pieces:
            seen[tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.shape, strict=True))] = True
        if not seen.all():
            raise ValueError(f"elements of {name} are missing, others are there twice")


def _size(folder: Path, file: str) -> int:
    path = folder / plain_name(file)
    if not path.is_file():
        raise ValueError(f"{file} is missing")
    return path.stat().st_size


def plain_name(file: str) -> str:
    """The name itself. Raises ValueError if it could lead out of the folder."""
    if not file or file in (".", "..") or "/" in file or "\0" in file:
        raise ValueError(f"{file!r} is no plain file name")
    return file


def shapes(index: Index) -> Mapping[str, torch.Size]:
    return {name: torch.Size(entry.shape) for name, entry in index.items()}
