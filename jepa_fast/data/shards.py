"""Tar shards, written as WebDataset writes them and read at random.

In: a folder of .tar, one .tar, or a brace pattern. Out: bytes and label of sample i. Every shard is
indexed once (offset and length of each sample's payload); the index is kept beside it as
`.<shard>.idx.npz` where the folder can be written.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import webdataset

from jepa_fast.errors import UsageError

PAYLOADS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "npy")
INDEX_VERSION = 1


class BadSample(Exception):
    """A sample that cannot be read or decoded: replaced, counted, reported."""


# ---- writing ------------------------------------------------------------------------------------


def write_shards(folder: Path, splits: Mapping[str, Iterable[dict]], name: str, samples_per_shard: int = 1000) -> Path:
    """Write {split: samples} as `folder`/<name>-<split>-0000.tar ... with `_info.json`; all of it or nothing.

    A sample is WebDataset's dict: `__key__` and payloads by extension ('png', 'npy', 'cls', ...; bytes, arrays and
    numbers). Same samples, same bytes. If `folder` appears meanwhile (another process), that one is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        info: dict[str, dict] = {}
        for split, samples in splits.items():
            info[split] = _write_split(partial, f"{name}-{split}", samples, samples_per_shard)
        (partial / "_info.json").write_text(json.dumps({"splits": info}, indent=1) + "\n")
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_split(folder: Path, stem: str, samples: Iterable[dict], per_shard: int) -> dict:
    rest = iter(samples)
    filenames: list[str] = []
    lengths: list[int] = []
    while chunk := list(islice(rest, per_shard)):
        filenames.append(f"{stem}-{len(filenames):04}.tar")
        lengths.append(len(chunk))
        with (folder / filenames[-1]).open("wb") as stream, webdataset.TarWriter(stream, mtime=0) as writer:
            for sample in chunk:
                writer.write(sample)
    return {
        "name": stem.rpartition("-")[2],
        "filenames": filenames,
        "shard_lengths": lengths,
        "num_samples": sum(lengths),
    }


# ---- finding ------------------------------------------------------------------------------------


def is_shards(path: str) -> bool:
    """Whether `path` names tar shards: a .tar, a pattern of them, or a folder that holds some."""
    return path.endswith(".tar") or (os.path.isdir(path) and any(f.endswith(".tar") for f in os.listdir(path)))


def find(path: str) -> dict[str, list[Path]]:
    """{'train': shards, 'test': shards, possibly none}.

    Splits come from `_info.json`, or from the file names: those with val or test in them are the test split.
    A pattern over training shards also finds the validation shards beside them.
    """
    if os.path.isdir(path):
        folder, files = Path(path), sorted(Path(path).glob("*.tar"))
        named = _splits_of_info(folder)
        if named:
            return named
    else:
        files = [Path(p) for p in webdataset.shardlists.expand_urls(path)]
        folder = files[0].parent
    missing = [f for f in files if not f.is_file()]
    if missing:
        raise UsageError(
            f"shard {missing[0]} does not exist ({len(missing)} of {len(files)} of --data.path {path} are missing); give the right range or put the file there"
        )
    test = [f for f in files if _is_test(f)]
    train = [f for f in files if f not in set(test)]
    if not train:
        return {"train": test, "test": []}
    if not test and not os.path.isdir(path):
        test = sorted(f for f in folder.glob("*.tar") if _is_test(f))
    return {"train": train, "test": test}


def _is_test(file: Path) -> bool:
    return re.search(r"(^|[^a-z])(val|valid|validation|test)([^a-z]|$)", file.name.lower()) is not None


def _splits_of_info(folder: Path) -> dict[str, list[Path]] | None:
    file = folder / "_info.json"
    if not file.is_file():
        return None
    try:
        splits = {
            name: [folder / f for f in split["filenames"]]
            for name, split in json.loads(file.read_text())["splits"].items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file} cannot be read ({error!r}); mend it, or delete it and the splits are taken from the file names"
        ) from None
    missing = [f for files in splits.values() for f in files if not f.is_file()]
    if missing:
        raise UsageError(
            f"shard {missing[0]} does not exist, and {file} names it; put it back, or delete {file.name} to use what is there"
        )
    held = next((splits[name] for name in ("validation", "val", "test") if name in splits), [])
    return {"train": splits.get("train", []), "test": held} if "train" in splits else None


# ---- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Index:
    """The samples of one shard."""

    keys: np.ndarray  # str [n]
    offset: np.ndarray  # int64 [n], where the payload begins in the file
    length: np.ndarray  # int64 [n], bytes
    payload: np.ndarray  # str [n], its extension
    label: np.ndarray  # int64 [n], -1: none
    name: np.ndarray  # str [n], class name (wnid) where the sample tells one, else ''


class Shards:
    """Random access to the samples of several tar files, in file order."""

    def __init__(self, files: list[Path]):
        self.files = files
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(_index, files))
        empty = [f for f, part in zip(files, parts, strict=True) if len(part.keys) == 0]
        if empty:
            raise UsageError(
                f"shard {empty[0]} holds no sample with a payload ({', '.join(PAYLOADS)}); write it again or take it out"
            )
        self._file = np.repeat(np.arange(len(parts)), [len(p.keys) for p in parts])
        self._all = _Index(*(np.concatenate([getattr(p, f) for p in parts]) for f in _Index.__dataclass_fields__))

    @property
    def labels(self) -> np.ndarray | None:
        """Class numbers int64 [n], or None where a sample has none."""
        return self._all.label if (self._all.label >= 0).all() else None

    @property
    def names(self) -> np.ndarray:
        """Class names str [n], '' where a sample tells none."""
        return self._all.name

    def __len__(self) -> int:
        return len(self._file)

    def key(self, index: int) -> str:
        """Where sample `index` lies: <shard>:<key>."""
        return f"{self.files[self._file[index]].name}:{self._all.keys[index]}"

    def payload(self, index: int) -> str:
        """Extension of the sample's payload."""
        return str(self._all.payload[index])

    def read(self, index: int) -> bytes:
        """The payload of sample `index`. Raises BadSample if the file no longer has it."""
        offset, length = int(self._all.offset[index]), int(self._all.length[index])
        try:
            descriptor = os.open(self.files[self._file[index]], os.O_RDONLY)
            try:
                data = os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BadSample(f"cannot be read ({error.strerror})") from None
        if len(data) != length:
            raise BadSample(f"the shard ends {length - len(data)} bytes early")
        return data

    def fingerprint(self) -> str:
        """Names, sizes, keys and labels of everything, hashed; not the payloads."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for values in (self._all.keys, self._all.length, self._all.label):
            digest.update(repr(values.shape).encode() + np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


def _index(file: Path) -> _Index:
    """The index of a shard: its stored one if that is of this very file, else made (and stored if possible)."""
    try:
        stat = file.stat()
    except OSError as error:
        raise UsageError(f"shard {file}: {error.strerror}; give the right --data.path") from None
    stamp = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns])
    stored = file.with_name(f".{file.name}.idx.npz")
    try:
        with np.load(stored) as saved:
            if np.array_equal(saved["stamp"], stamp):
                return _Index(*(saved[f] for f in _Index.__dataclass_fields__))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        pass
    index = _scan(file)
    _store(stored, stamp, index)
    return index


def _store(file: Path, stamp: np.ndarray, index: _Index) -> None:
    """Best effort: data often lie where nobody may write."""
    buffer = io.BytesIO()
    np.savez(buffer, stamp=stamp, **{f: getattr(index, f) for f in _Index.__dataclass_fields__})
    try:
        descriptor, partial = tempfile.mkstemp(prefix=file.name, dir=file.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(buffer.getvalue())
        os.replace(partial, file)
    except OSError:
        pass


def _scan(file: Path) -> _Index:
    rows: list[tuple[str, int, int, str]] = []
    labels: dict[str, int] = {}
    names: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")  # WebDataset: the key ends at the first dot of the base name
                key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
                if extension in PAYLOADS:
                    rows.append((key, member.offset_data, member.size, extension))
                elif extension in ("cls", "json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    text = content.read().decode(errors="replace")
                    if extension == "cls":
                        labels[key] = _label(text, file, key)
                    names[key] = names.get(key) or _wnid(text)
    except tarfile.TarError as error:
        raise UsageError(f"shard {file} is not a tar file, or is damaged ({error}); copy it again") from None
    if file.stat().st_size == 0:
        raise UsageError(f"shard {file} is empty (0 bytes); copy it again")
    return _Index(
        np.array([r[0] for r in rows], dtype=str), np.array([r[1] for r in rows], dtype=np.int64),
        np.array([r[2] for r in rows], dtype=np.int64), np.array([r[3] for r in rows], dtype=str),
        np.array([labels.get(r[0], -1) for r in rows], dtype=np.int64),
        np.array([names.get(r[0], "") or _wnid(r[0]) for r in rows], dtype=str),
    )  # fmt: skip


def _label(text: str, file: Path, key: str) -> int:
    try:
        return int(text)
    except ValueError:
        if re.fullmatch(r"n\d{8}", text.strip()):
            return -1
        raise UsageError(
            f"shard {file}: {key}.cls holds {text[:20]!r}, not a class number; write class numbers from 0"
        ) from None


def _wnid(text: str) -> str:
    found = re.search(r"n\d{8}", text)
    return found.group() if found else ""
