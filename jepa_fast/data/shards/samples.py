"""Members of a tar put together to samples, as WebDataset groups them: by key.

In: members in file order. Out: Samples: where each payload lies, its key, its class, and what is there in part.
"""

import re

from jepa_fast.data.shards.tar import BLOCK, Member, Window

PAYLOADS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "pbm", "pnm", "tif", "tiff", "gif", "npy")
NO_LABEL = -1
WNID = re.compile(rb"n\d{8}")
MOST_TEXT = 1 << 16  # bytes of a .cls or .json that are looked at
_CODES = {name.encode(): code for code, name in enumerate(PAYLOADS)}


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

    def finish(self, damage: str = "", member: bytes = b"") -> None:
        """There are no more members, or the file breaks off in one: its sample is lost, unless its payload came before."""
        self._end_run()
        key, _ = split_name(member)
        if key and key not in self._row_of:
            self._early.pop(key, None)
            self.lost.append((text(key), "the shard ends in the middle of it"))
        why = "the shard ends before its payload" if damage else "no payload"
        self.lost += [(text(key), why) for key in self._early]


def _class_of(content: bytes) -> tuple[int, str]:
    """A class number, or a class name where it is none."""
    try:
        label = int(content)
        if 0 <= label < 2**31:
            return label, ""
    except ValueError:
        pass
    return NO_LABEL, " ".join(text(content[:100]).split())


def _wnid(content: bytes) -> str:
    found = WNID.search(content)
    return found.group().decode() if found else ""


def text(raw: bytes) -> str:
    return raw.decode(errors="replace")
