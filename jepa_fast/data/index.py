"""What lies where in one shard: made once by reading its headers, kept in a file, mapped into memory afterwards.

In: a tar file. Out: an Index. It is kept beside the shard as `.<shard>.idx`, or in the cache folder where the shard's
folder cannot be written, and made again when size or mtime of the shard change. Being mapped, one copy in memory
serves all processes of a machine.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from jepa_fast.data.cache import cache_folder
from jepa_fast.data.tar import BLOCK, Member, TarDamage, Window, members
from jepa_fast.errors import UsageError

PAYLOADS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "pbm", "pnm", "tif", "tiff", "gif", "npy")
MAGIC = b"jepa-fast index 5\n"
NO_LABEL = -1
MOST_TEXT = 1 << 16  # bytes of a .cls or .json that are looked at
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
    expected: int = 0  # of a damaged shard: samples it held when it was whole, if it was indexed then; 0: unknown

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def unmarked(self) -> bool:
        """Whether the shard ends right behind a sample, without the mark that ends a tar."""
        return not self.damage and self.end >= self.stamp[0]

    @property
    def names(self) -> list[str]:
        """Class names by number. Made anew: a thousand shards would hold the same thousand names."""
        return [sys.intern(name) for name in _text(self.raw_names.tobytes()).split("\n")]

    def key(self, row: int) -> str:
        begin = int(self.rows["key_end"][row - 1]) if row else 0
        return _text(self.keys[begin : int(self.rows["key_end"][row])].tobytes())


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
        if made.damage or made.end >= stat.st_size:  # cut, possibly right behind a sample
            made = _beside_the_earlier(made, file)
    except OSError as error:
        raise UsageError(f"shard {file}: {error.strerror}; give the right --data.path, or make it readable") from None
    _store(made, file)
    kept = _kept(file, stamp)
    return made if kept is None else kept  # mapped, where it could be kept: shared with other processes


# ---- making ---------------------------------------------------------------------------------------


def _scan(file: Path, stamp: tuple[int, int]) -> Index:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        window, samples, damage = Window(descriptor), _Samples(), ""
        try:
            for member in members(window):
                samples.add(member, window)
        except TarDamage as error:
            damage = str(error)
            samples.cut(error.member)
    finally:
        os.close(descriptor)
    return samples.index(stamp, damage)


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """(key, extension in lower case) of a member; as WebDataset has it, the key ends at the base name's first dot, and
    a name that begins with one (`._1.jpg`, as macOS adds them) has none."""
    begin = name.rfind(b"/") + 1
    dot = name.find(b".", begin)
    return (name, b"") if dot in (-1, begin) else (name[:dot], name[dot + 1 :].lower())


class _Samples:
    """Members put together to samples. The first payload of a run of members of one key is the sample's, one whose
    extension has no dot before one like `left.jpg`; its class is sought next to it first, and by its key wherever it
    stands."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int]] = []  # begin, offset, length, payload
        self.keys: list[bytes] = []
        self.labels: list[int] = []
        self.names: list[str] = []
        self.lost: list[tuple[str, str]] = []
        self.repeated: list[str] = []
        self.end = 0
        self._row_of: dict[bytes, int] = {}
        self._early: dict[bytes, tuple[int, str]] = {}  # classes whose payload is still to come
        self.beside = 0
        self._key, self._begin, self._extensions = b"", 0, set[bytes]()  # the run of members that this one belongs to
        self._has_payload = False
        self._spare: tuple[Member, int] | None = None  # the payload of the run if no better one comes

    def add(self, member: Member, window: Window) -> None:
        key, extension = split_name(member.name)
        if key != self._key or extension in self._extensions:
            self._end_run()
            self._key, self._begin, self._extensions, self._has_payload = key, member.begin, set(), False
        self._extensions.add(extension)
        self.end = member.data + (member.size + BLOCK - 1) // BLOCK * BLOCK
        before, _, kind = extension.rpartition(b".")
        if kind in _CODES:
            if self._has_payload or (before and self._spare):
                self.beside += 1
            elif before:
                self._spare = member, _CODES[kind]
            else:
                self._payload(key, member, _CODES[kind])
        elif kind in (b"cls", b"json"):
            self._class(key, kind == b"cls", window.get(member.data, min(member.size, MOST_TEXT)))

    def _end_run(self) -> None:
        if self._spare is not None:
            if self._has_payload:
                self.beside += 1
            else:
                self._payload(self._key, *self._spare)
        self._spare = None

    def _payload(self, key: bytes, member: Member, code: int) -> None:
        self._has_payload = True
        if key in self._row_of:
            self.repeated.append(_text(key))
        label, name = self._early.pop(key, (NO_LABEL, ""))
        self._row_of[key] = len(self.rows)
        self.rows.append((self._begin, member.data, member.size, code))
        self.keys.append(key)
        self.labels.append(label)
        self.names.append(name or _wnid(key))

    def _class(self, key: bytes, is_cls: bool, content: bytes) -> None:
        label, name = _class_of(content) if is_cls else (NO_LABEL, _wnid(content))
        row = self._row_of.get(key)
        if row is None or (is_cls and self.labels[row] != NO_LABEL):
            known = self._early.get(key, (NO_LABEL, ""))
            self._early[key] = (label if label != NO_LABEL else known[0], known[1] or name)
        else:
            self.labels[row] = label if is_cls else self.labels[row]
            self.names[row] = self.names[row] or name

    def cut(self, member: bytes) -> None:
        """The file breaks off in `member`: its sample is lost, unless its payload came before."""
        self._end_run()
        key, _ = split_name(member)
        if key and key not in self._row_of:
            self._early.pop(key, None)
            self.lost.append((_text(key), "the shard ends in the middle of it"))

    def index(self, stamp: tuple[int, int], damage: str) -> Index:
        self._end_run()
        lost = self.lost + [(_text(key), "no payload") for key in self._early]
        names = sorted({"", *self.names})
        number = {name: i for i, name in enumerate(names)}
        rows = np.empty(len(self.rows), ROW)
        for column, values in zip(("begin", "offset", "length", "payload"), zip(*self.rows, strict=True), strict=False):
            rows[column] = values
        rows["label"], rows["name"] = self.labels, [number[name] for name in self.names]
        rows["key_end"] = np.cumsum([len(key) for key in self.keys], dtype=np.int64)
        keys = b"".join(self.keys)
        digest = hashlib.sha256(keys)
        for column in ("key_end", "length", "label", "name"):
            digest.update(np.ascontiguousarray(rows[column]).tobytes())
        lines = "\n".join(names).encode()
        digest.update(lines)
        return Index(
            stamp, rows, np.frombuffer(keys, np.uint8), np.frombuffer(lines, np.uint8), self.end, digest.hexdigest(),
            damage, lost, self.repeated, self.beside,
        )  # fmt: skip


_CODES = {name.encode(): code for code, name in enumerate(PAYLOADS)}


def _class_of(content: bytes) -> tuple[int, str]:
    """A class number, or a class name where it is none."""
    try:
        label = int(content)
        if 0 <= label < 2**31:
            return label, ""
    except ValueError:
        pass
    return NO_LABEL, " ".join(_text(content[:100]).split())


def _wnid(content: bytes) -> str:
    found = re.search(rb"n\d{8}", content)
    return found.group().decode() if found else ""


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")


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
    return replace(made, expected=held, damage=made.damage or "ends without its end mark, and held more samples before")


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
        rows_end = begin + count * ROW.itemsize
        if stamp not in (None, tuple(head["stamp"])) or begin % 8 or size != rows_end + keys + names:
            return None
        # torch.from_file keeps no descriptor open; np.memmap keeps one for every shard.
        raw = torch.from_file(str(kept), shared=False, size=size, dtype=torch.uint8).numpy()
        rows = raw[begin:rows_end].view(ROW)
        head["stamp"], head["lost"] = tuple(head["stamp"]), [(key, why) for key, why in head["lost"]]
        return Index(rows=rows, keys=raw[rows_end : rows_end + keys], raw_names=raw[rows_end + keys :], **head)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def _store(made: Index, file: Path) -> None:
    """Beside the shard, else in the cache folder, else not at all: data often lie where nobody may write."""
    head = {
        "stamp": made.stamp, "count": len(made), "key_bytes": len(made.keys), "name_bytes": len(made.raw_names),
        "end": made.end, "digest": made.digest, "damage": made.damage, "lost": made.lost, "repeated": made.repeated,
        "beside": made.beside, "expected": made.expected,
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
