"""Files of torch.save with tensors and NumPy arrays, read without running their pickle.

torch's weights_only reader knows tensors; allowing it NumPy's classes too would let a file build arrays of pointers. Here
the pickle is read by `jepa_fast.pickles`, and of what it asks for only plain tensors and plain arrays of numbers are built,
never larger than the bytes that the file holds for them.
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_fast import pickles
from jepa_fast.pickles import PickleError, Record

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
ARRAYS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


def load(file: Path) -> Any:
    """The dict, list, ... in a file of torch.save, with tensors and arrays. Raises OSError, ValueError."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
                raise ValueError("a record in it is compressed, as torch never does")
            held = pickles.read(archive.read(records["data.pkl"]))
            return _built(held, _Storages(archive, records, file.stat().st_size), 0)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"no whole file of torch.save ({error})") from None


class _Storages:
    def __init__(self, archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], size: int):
        self.archive, self.records = archive, records
        self.left = 2 * size  # bytes that may still be built: a pickle can name one list or tensor a million times
        self.order = archive.read(records["byteorder"]) if "byteorder" in records else b"little"
        self.held: dict[str, bytes] = {}

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise PickleError("it holds more than the file has bytes for")

    def get(self, name: Any) -> bytes:
        if not isinstance(name, str) or self.order != b"little":
            raise PickleError("storage in another byte order")
        if name not in self.held:
            self.held[name] = self.archive.read(self.records[f"data/{name}"])
        return self.held[name]


def _built(held: Any, storages: _Storages, depth: int) -> Any:
    """Dicts, lists and tuples a few levels deep, with what their records stand for."""
    if depth > 4:
        raise PickleError("it is nested too deep")
    if isinstance(held, dict):
        return {key: _built(value, storages, depth + 1) for key, value in held.items() if isinstance(key, (str, int))}
    if isinstance(held, (list, tuple)):
        if any(isinstance(value, (list, tuple, dict)) for value in held) and depth > 1:
            raise PickleError("it is nested too deep")
        storages.spend(len(held))
        return [_built(value, storages, depth + 1) for value in held]
    if not isinstance(held, Record):
        return held
    if held.name == "torch._utils._rebuild_tensor_v2":
        return _tensor(held, storages)
    if held.name == "torch._utils._rebuild_parameter" and held.args:
        return _built(held.args[0], storages, depth + 1)
    made = array(held)
    storages.spend(made.nbytes)
    return made


def _tensor(held: Record, storages: _Storages) -> Tensor:
    try:
        storage, offset, size, stride = held.args[:4]
        _, kind, name, _, _ = storage.args[0]
        type_name = kind.name.rpartition(".")[2]
    except (TypeError, ValueError, AttributeError, IndexError):
        raise PickleError("a tensor of unknown layout") from None
    dtype = STORAGES.get(type_name)
    if dtype is None:
        raise PickleError(f"a tensor of {type_name.removesuffix('Storage').lower()[:20]} numbers")
    data = storages.get(name)
    count = len(data) // dtype.itemsize
    whole = all(isinstance(t, tuple) and all(type(n) is int and n >= 0 for n in t) for t in (size, stride))
    if not whole or len(size) != len(stride) or type(offset) is not int or offset < 0 or math.prod(size) > count:
        raise PickleError("a tensor that is larger than what the file holds of it")
    if not math.prod(size):
        return torch.empty(size, dtype=dtype)
    if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= count:
        raise PickleError("a tensor that reaches behind what the file holds of it")
    storages.spend(math.prod(size) * dtype.itemsize)
    flat = torch.frombuffer(bytearray(data), dtype=dtype, count=count)
    return flat.as_strided(size, stride, offset).clone()


def array(held: Any, kinds: tuple[str, ...] = ARRAYS) -> np.ndarray:
    """A pickled NumPy array of numbers, of one of these types. Raises PickleError."""
    if not isinstance(held, Record):
        raise PickleError(f"a {type(held).__name__} is in the place of an array")
    what = held.name.replace("numpy._core", "numpy.core")
    try:
        if what == "numpy.core.multiarray._reconstruct":
            _, shape, dtype, column_major, raw = held.state
        elif what == "numpy.core.numeric._frombuffer":
            raw, dtype, shape, order = held.args
            column_major = order == "F"
        else:
            raise PickleError(f"it asks for {held.name}")
        if isinstance(raw, Record) and raw.name == "_codecs.encode":  # bytes, in a protocol that has none
            raw = raw.args[0]
        code, swapped = dtype.args[0], dtype.state[1] == ">"
    except (TypeError, IndexError, AttributeError):
        raise PickleError("an array of unknown layout") from None
    if code not in kinds or not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise PickleError(f"an array of type {code!r} and shape {str(shape)[:80]}")
    data = raw.encode("latin-1") if isinstance(raw, str) else bytes(raw) if isinstance(raw, (bytes, bytearray)) else b""
    kind = np.dtype(code).newbyteorder(">" if swapped else "<")
    if math.prod(shape) * kind.itemsize != len(data):
        raise PickleError(f"an array of shape {shape} with {len(data)} bytes")
    return np.frombuffer(data, kind).reshape(shape, order="F" if column_major else "C")
