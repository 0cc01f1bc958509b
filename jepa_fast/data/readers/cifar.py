"""CIFAR-10 and CIFAR-100 as their archives hold them, pickled or binary. Out: uint8 [n, 32, 32, 3] and labels."""

import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jepa_fast.errors import UsageError

ARCHIVES = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")


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


class _ArraysOnly(pickle.Unpickler):
    """CIFAR's pickles hold lists, dicts and NumPy arrays; nothing else is let in."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_pickle(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        held = _ArraysOnly(io.BytesIO(_bytes_of(file)), encoding="latin1").load()
        labels = held["labels"] if "labels" in held else held["fine_labels"]
        return np.asarray(held["data"], dtype=np.uint8).reshape(-1, 3072), np.asarray(labels, dtype=np.int64)
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UsageError(f"{file} is not a CIFAR batch ({error}); unpack the archive again") from None


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; unpack the whole CIFAR archive there") from None
