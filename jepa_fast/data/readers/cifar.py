"""CIFAR-10 and CIFAR-100 as their archives hold them, pickled or binary. Out: uint8 [n, 32, 32, 3] and labels."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jepa_fast import pickles
from jepa_fast.bounded import read_bytes
from jepa_fast.data.readers import torch_file
from jepa_fast.errors import UsageError

ARCHIVES = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")
WHOLE = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")  # NumPy's names of whole numbers


def find(folder: Path) -> Path | None:
    """`folder`, or an archive's folder inside it, if that holds CIFAR batches."""
    for place in (folder, *(folder / name for name in ARCHIVES)):
        for suffix in ("", ".bin"):
            if (place / f"data_batch_1{suffix}").is_file() or all(
                (place / f"{n}{suffix}").is_file() for n in ("train", "test")
            ):
                return place
    return None


def load(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{'train', 'test'}: (uint8 [n, 32, 32, 3], labels int64 [n]); the fine labels of CIFAR-100. Raises UsageError."""
    binary = any((folder / name).is_file() for name in ("data_batch_1.bin", "train.bin"))
    ten = any(folder.glob("data_batch_*"))
    train, test = ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]) if ten else (["train"], ["test"])
    read = partial(_read_binary, label_bytes=1 if ten else 2) if binary else _read_pickle
    splits = {}
    for split, names in (("train", train), ("test", test)):
        parts = [read(folder / (name + ".bin" * binary)) for name in names]
        for name, (pixels, labels) in zip(names, parts, strict=True):
            if len(pixels) != len(labels):
                raise UsageError(
                    f"{folder / name} holds {len(pixels)} images and {len(labels)} labels; unpack it again"
                )
            if labels.min(initial=0) < 0 or labels.max(initial=0) >= (10 if ten else 100):
                raise UsageError(
                    f"{folder / name} has labels from {labels.min()} to {labels.max()}, and CIFAR-{10 if ten else 100} no "
                    "such class; unpack it again"
                )
        pixels, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        splits[split] = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels
    return splits


def _read_binary(file: Path, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of 1 (CIFAR-100: coarse and fine) label bytes and 3,072 planar pixels."""
    raw = np.frombuffer(_bytes_of(file), dtype=np.uint8)
    size = label_bytes + 3072
    if len(raw) == 0 or len(raw) % size:
        raise UsageError(f"{file} has {len(raw)} bytes, not a multiple of {size}; copy it again")
    records = raw.reshape(-1, size)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


def _read_pickle(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pickle is read without running it; of what it could hold, we know lists of numbers and plain arrays."""
    try:
        held = pickles.read(_bytes_of(file))
        if not isinstance(held, dict):
            raise ValueError("it holds no dict")
        labels = next((held[name] for name in ("labels", "fine_labels") if name in held), None)
        return _array(held.get("data")).astype(np.uint8, casting="safe").reshape(-1, 3072), _array(labels).reshape(
            -1
        ).astype(np.int64)
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file} is not a CIFAR batch ({error}); unpack the archive again") from None


def _array(held: Any) -> np.ndarray:
    """A list of whole numbers, or a pickled NumPy array of them. Raises ValueError."""
    if isinstance(held, list) and all(type(n) is int and abs(n) < 2**62 for n in held):
        return np.array(held, np.int64)
    return torch_file.array(held, WHOLE)


def _bytes_of(file: Path) -> bytes:
    try:
        return read_bytes(file)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; unpack the whole CIFAR archive there") from None
