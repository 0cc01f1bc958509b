"""Members of a tar put together to samples, as WebDataset groups them: by key.

In: members in file order. Out: Samples: where each payload lies, its key, its class, and what is there in part.
"""

import json
import re
from typing import NamedTuple

from jepa_fast.data.shards.tar import BLOCK, Member, Window

PAYLOADS = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bmp",
    "ppm",
    "pgm",
    "pbm",
    "pnm",
    "tif",
    "tiff",
    "gif",
    "npy",
    "jpe",
    "jfif",
    "dib",
    "apng",
)
NO_LABEL = -1
# An ImageNet class stands alone: a folder of its name, or before the number of an image (n01440764_10026).
WNID = re.compile(r"(?:^|[/\\])(n\d{8})(?=$|[/\\_.])")
LABEL_FIELDS = ("label", "cls", "class", "target", "class_id", "class_idx", "class_index", "label_id", "label_idx", "category", "category_id",
                "wnid", "synset", "synset_id", "class_name", "label_name", "category_name")  # fmt: skip
NAME_FIELDS = (
    "filename",
    "file_name",
    "file",
    "path",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "key",
    "__key__",
)
MOST_TEXT = 1 << 16  # bytes of a .cls or .json that are looked at
_CODES = {name.encode(): code for code, name in enumerate(PAYLOADS)}


class Class(NamedTuple):
    """What a member says of a sample's class: a number or a name."""

    label: int = NO_LABEL
    name: str = ""
    sure: bool = False  # a .cls says it: it goes before a .json

    def over(self, other: "Class") -> "Class":
        """This, and what the other knows more; the surer number."""
        first, second = (self, other) if self.sure or not other.sure else (other, self)
        label = first.label if first.label != NO_LABEL else second.label
        return Class(label, first.name or second.name, first.sure or second.sure)


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """(key, extension in lower case) of a member; as WebDataset has it, the key ends at the base name's first dot, and
    a name that begins with one (`._1.jpg`, as macOS adds them) has none."""
    begin = name.rfind(b"/") + 1
    dot = name.find(b".", begin)
    return (name, b"") if dot in (-1, begin) else (name[:dot], name[dot + 1 :].lower())


class Samples:
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
        self._early: dict[bytes, Class] = {}  # classes whose payload is still to come
        self._sure: set[int] = set()  # rows whose number a .cls gave
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
            content = member.content
            if content is None:
                content = window.get(member.data, min(member.size, MOST_TEXT))
            self._class(key, kind == b"cls", content)

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
            self.repeated.append(text(key))
        known = self._early.pop(key, Class())
        if known.sure:
            self._sure.add(len(self.rows))
        self._row_of[key] = len(self.rows)
        self.rows.append((self._begin, member.data, member.size, code))
        self.keys.append(key)
        self.labels.append(known.label)
        wnid = _wnid(text(key))
        self.names.append((known.name or wnid) if known.sure else (wnid or known.name))

    def _class(self, key: bytes, is_cls: bool, content: bytes) -> None:
        said = _of_cls(content) if is_cls else _of_json(content)
        row = self._row_of.get(key)
        if row is None or (is_cls and row in self._sure):  # of a sample still to come, perhaps another of the same key
            self._early[key] = said.over(self._early.get(key, Class()))
            return
        held = Class(self.labels[row], self.names[row], row in self._sure)
        known = said.over(held) if is_cls else held.over(said)
        self.labels[row], self.names[row] = known.label, known.name
        if known.sure and known.label != NO_LABEL:
            self._sure.add(row)

    def finish(self, damage: str = "", member: bytes = b"") -> None:
        """There are no more members, or the file breaks off in one: its sample is lost, unless its payload came before."""
        self._end_run()
        key, _ = split_name(member)
        if key and key not in self._row_of:
            self._early.pop(key, None)
            self.lost.append((text(key), "the shard ends in the middle of it"))
        why = "the shard ends before its payload" if damage else "no payload"
        self.lost += [(text(key), why) for key in self._early]


def _of_cls(content: bytes) -> Class:
    """A class number, or a class name where it is none."""
    label = _number(content)
    return Class(label, "" if label != NO_LABEL else " ".join(text(content[:100]).split()), True)


def _of_json(content: bytes) -> Class:
    """The class that a field with such a name holds, or the ImageNet class in the name of a file. Never digits from elsewhere."""
    try:
        held = json.loads(content)
    except (ValueError, RecursionError):
        return Class()
    if not isinstance(held, dict):
        return Class()
    fields = {str(key).lower(): value for key, value in held.items()}
    found = Class()
    for name in LABEL_FIELDS:
        value = fields.get(name)
        if isinstance(value, int | str) and not isinstance(value, bool):
            label = _number(str(value).encode())
            found = found.over(Class(label, "" if label != NO_LABEL else " ".join(str(value)[:100].split())))
    files = (value for name in NAME_FIELDS if isinstance(value := fields.get(name), str))
    wnids = (_wnid(value) for value in files if "://" not in value)
    return found.over(Class(name=next(filter(None, wnids), "")))


def _number(content: bytes) -> int:
    """A class number, or NO_LABEL. Only plain digits: int() takes more."""
    stripped = content.strip()
    return int(stripped) if stripped.isdigit() and len(stripped) <= 10 and int(stripped) < 2**31 else NO_LABEL


def _wnid(name: str) -> str:
    """The ImageNet class in the name of a file or a sample, or ''."""
    found = WNID.search(name)
    return found.group(1) if found else ""


def text(raw: bytes) -> str:
    return raw.decode(errors="replace")
