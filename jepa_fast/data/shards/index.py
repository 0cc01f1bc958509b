"""What lies where in one shard: made once by reading its headers, kept in a file, mapped into memory afterwards.

In: a tar file. Out: an Index. It is kept beside the shard as `.<shard>.idx`, or in the cache folder where the shard's
folder cannot be written, and made again when size or mtime of the shard change. Being mapped, one copy in memory
serves all processes of a machine.
"""

import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jepa_fast.data.cache import cache_folder
from jepa_fast.data.shards.open_files import READ
from jepa_fast.data.shards.samples import NO_LABEL, PAYLOADS, Samples, text
from jepa_fast.data.shards.tar import LONGEST_PADDING, TarDamage, Window, members
from jepa_fast.errors import UsageError

MAGIC = b"jepa-fast index 8\n"
ROW = np.dtype(
    [
        ("begin", "<i8"),  # byte of the first header of the sample
        ("offset", "<i8"),  # byte of the payload
        ("length", "<i8"),  # bytes of it
        ("label", "<i4"),  # class number, NO_LABEL: none
        ("name", "<i4"),  # class name, by its place in `names`
        ("key_end", "<u4"),  # where the key ends in `keys`; it begins where the one before ends
        ("payload", "<i4"),  # extension, by its place in PAYLOADS
    ]
)


@dataclass(frozen=True)
class Index:
    """The samples of one shard in file order."""

    stamp: tuple[int, int]  # size in bytes and mtime in ns of the shard
    rows: np.ndarray  # ROW [n]
    keys: np.ndarray  # uint8: all keys, one after the other
    raw_names: np.ndarray  # uint8: the class names (wnids) that occur, a line each, '' first
    end: int  # byte where the last sample ends
    digest: str  # of keys, lengths and labels: other samples, another digest
    damage: str = ""  # why reading stopped before the end, or ''
    lost: list[tuple[str, str]] = field(default_factory=list)  # (key, why) of samples that are there in part
    repeated: list[str] = field(default_factory=list)  # keys that occur more than once
    beside: int = 0  # payloads that are not used, as their sample has another before
    padding: int = 0  # zeros behind the last member
    expected: int = 0  # of a damaged shard: samples it held when it was whole, if it was indexed then; 0: unknown

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def offset(self) -> np.ndarray:
        """int64 [n], byte of each payload."""
        return self.rows["offset"]

    @cached_property
    def length(self) -> np.ndarray:
        """int64 [n], bytes of each payload."""
        return self.rows["length"]

    @property
    def doubt(self) -> str:
        """Why the shard may have held more, though it is a whole tar; or ''."""
        if self.damage or 0 < self.padding <= LONGEST_PADDING:
            return ""
        if not self.padding:
            return "ends without the mark that ends a tar: it may have been cut between two samples"
        return "ends in far more zeros than a tar needs: it may not have been copied whole"

    @property
    def names(self) -> list[str]:
        """Class names by number. Made anew: a thousand shards would hold the same thousand names."""
        return [sys.intern(name) for name in text(self.raw_names.tobytes()).split("\n")]

    def key(self, row: int) -> str:
        begin = int(self.rows["key_end"][row - 1]) if row else 0
        return text(self.keys[begin : int(self.rows["key_end"][row])].tobytes())


def index(file: Path) -> Index:
    """The kept index of a shard if it is of this very file, else a new one, which is kept where possible.

    Raises UsageError if the shard is not there or cannot be read; a damaged one gives what lies before the damage.
    """
    try:
        stat = file.stat()
        stamp = (stat.st_size, stat.st_mtime_ns)
        kept = _kept(file, stamp)
        if kept is not None:
            return kept
        made = _scan(file, stamp)
        if made.damage or made.doubt:
            made = _beside_the_earlier(made, file)
    except OSError as error:
        raise UsageError(f"shard {file}: {error.strerror}; give the right --data.path, or make it readable") from None
    _store(made, file)
    kept = _kept(file, stamp)
    return made if kept is None else kept  # mapped, where it could be kept: shared with other processes


# ---- making ---------------------------------------------------------------------------------------


def _scan(file: Path, stamp: tuple[int, int]) -> Index:
    descriptor = os.open(file, READ)
    try:
        window, samples, damage = Window(descriptor), Samples(), ""
        try:
            for member in members(window):
                samples.add(member, window)
            samples.finish()
        except TarDamage as error:
            damage = str(error)
            samples.finish(damage, error.member)
    finally:
        os.close(descriptor)
    return replace(_index_of(samples, stamp, damage), padding=window.padding)


def _index_of(samples: Samples, stamp: tuple[int, int], damage: str) -> Index:
    names = sorted({"", *samples.names})
    number = {name: i for i, name in enumerate(names)}
    rows = np.empty(len(samples.rows), ROW)
    for column, values in zip(("begin", "offset", "length", "payload"), zip(*samples.rows, strict=True), strict=False):
        rows[column] = values
    rows["label"], rows["name"] = samples.labels, [number[name] for name in samples.names]
    rows["key_end"] = np.cumsum([len(key) for key in samples.keys], dtype=np.int64)
    keys = b"".join(samples.keys)
    digest = hashlib.sha256(keys)
    for column in ("key_end", "length", "label", "name"):
        digest.update(np.ascontiguousarray(rows[column]).tobytes())
    lines = "\n".join(names).encode()
    digest.update(lines)
    return Index(
        stamp, rows, np.frombuffer(keys, np.uint8), np.frombuffer(lines, np.uint8), samples.end, digest.hexdigest(),
        damage, samples.lost, samples.repeated, samples.beside,
    )  # fmt: skip


# ---- keeping --------------------------------------------------------------------------------------


def _places(file: Path) -> tuple[Path, Path]:
    """Beside the shard, or in the cache folder."""
    elsewhere = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:24]
    return file.with_name(f".{file.name}.idx"), cache_folder() / "indexes" / f"{elsewhere}.idx"


def _kept(file: Path, stamp: tuple[int, int]) -> Index | None:
    return next((found for place in _places(file) if (found := _load(place, stamp)) is not None), None)


def _beside_the_earlier(made: Index, file: Path) -> Index:
    """The index of a shard without its end, and how many samples it held by its latest index, of whatever stamp."""
    earlier = next((found for place in _places(file) if (found := _load(place, None)) is not None), None)
    held = 0 if earlier is None else max(earlier.expected, len(earlier) + len(earlier.lost))
    if held <= len(made) + len(made.lost):
        return made
    return replace(
        made, expected=held, damage=made.damage or f"{made.doubt.partition(':')[0]}, and held more samples before"
    )


def _load(kept: Path, stamp: tuple[int, int] | None) -> Index | None:
    """A kept index, mapped, if it is whole and of the shard of that stamp."""
    try:
        size = kept.stat().st_size
        with kept.open("rb") as stream:
            if stream.readline(64) != MAGIC:
                return None
            head = json.loads(stream.readline())
            begin = stream.tell()
        count, keys, names = head.pop("count"), head.pop("key_bytes"), head.pop("name_bytes")
        if not all(type(n) is int and n >= 0 for n in (count, keys, names)):
            return None
        rows_end = begin + count * ROW.itemsize
        if stamp not in (None, tuple(head["stamp"])) or begin % 8 or size != rows_end + keys + names:
            return None
        # torch.from_file keeps no descriptor open; np.memmap keeps one for every shard.
        raw = torch.from_file(str(kept), shared=False, size=size, dtype=torch.uint8).numpy()
        rows = raw[begin:rows_end].view(ROW)
        if not _plausible(rows, keys, raw[rows_end + keys :], head):
            return None
        head["stamp"], head["lost"] = tuple(head["stamp"]), [(key, why) for key, why in head["lost"]]
        return Index(rows=rows, keys=raw[rows_end : rows_end + keys], raw_names=raw[rows_end + keys :], **head)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError):
        return None


def _plausible(rows: np.ndarray, num_keys: int, names: np.ndarray, head: dict[str, Any]) -> bool:
    """Whether every number of a kept index leads to a place that is there: the file may be somebody else's."""
    size = head["stamp"][0]
    kinds = {"end": int, "beside": int, "padding": int, "expected": int, "digest": str, "damage": str}
    if not all(type(head[name]) is kind for name, kind in kinds.items()) or not head["end"] >= 0:
        return False
    if not all(isinstance(key, str) and isinstance(why, str) for key, why in head["lost"]):
        return False
    if not all(isinstance(key, str) for key in head["repeated"]) or head["expected"] < 0:
        return False
    if not len(rows):
        return True
    ends = rows["key_end"]
    return bool(
        (rows["begin"] >= 0).all()
        and (rows["offset"] >= rows["begin"]).all()
        and (rows["length"] >= 0).all()
        and (rows["length"] <= size - rows["offset"]).all()
        and (np.diff(rows["begin"]) >= 0).all()
        and (ends[1:] >= ends[:-1]).all()
        and ends[-1] <= num_keys
        and (rows["label"] >= NO_LABEL).all()
        and ((rows["name"] >= 0) & (rows["name"] <= np.count_nonzero(names == ord("\n")))).all()
        and ((rows["payload"] >= 0) & (rows["payload"] < len(PAYLOADS))).all()
    )


def _store(made: Index, file: Path) -> None:
    """Beside the shard, else in the cache folder, else not at all: data often lie where nobody may write."""
    head = {
        "stamp": made.stamp, "count": len(made), "key_bytes": len(made.keys), "name_bytes": len(made.raw_names),
        "end": made.end, "digest": made.digest, "damage": made.damage, "lost": made.lost, "repeated": made.repeated,
        "beside": made.beside, "padding": made.padding, "expected": made.expected,
    }  # fmt: skip
    line = json.dumps(head).encode()
    line += b" " * (-(len(MAGIC) + len(line) + 1) % 8) + b"\n"  # the rows are aligned
    for place in _places(file):
        try:
            if place.parent != file.parent:
                place.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(prefix=place.name, dir=place.parent)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(MAGIC + line + made.rows.tobytes() + made.keys.tobytes() + made.raw_names.tobytes())
            os.chmod(partial, 0o644)
            os.replace(partial, place)
            return
        except OSError:
            continue
