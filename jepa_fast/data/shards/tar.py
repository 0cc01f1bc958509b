"""The headers of a tar file, read by hand and skipping the payloads.

In: an open file. Out: its regular members (name, where the data begin, size), up to the end or to the first damage.
Knows what GNU tar, Python and WebDataset write: ustar with prefix, GNU long names and base-256 sizes, pax headers,
the headers of Unix V7, and how to get past a member that is stored with holes (tar --sparse). Runs of everyday headers
are read in C++, where that was built.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from jepa_fast.extension import extension

BLOCK = 512
AT_ONCE = 4096  # members that C++ reads before it hands them over
SMALL, LARGE = 4096, 1 << 20  # bytes of one read: among large payloads, and among small ones
ZEROS = bytes(BLOCK)
LONGEST_PADDING = 20 * BLOCK + BLOCK  # of zeros behind a tar, as nearly all programs write it
REGULAR = b"\x0007"
LONG_NAME, PAX = ord("L"), ord("x")
SPARSE = ord("S")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
ABOUT_NEXT = b"LKxg"  # headers that describe what follows; K is a link's target, g what holds for all


class TarDamage(Exception):
    """The file stops being a tar. `member` is the name of the one it breaks off in, where that is known."""

    def __init__(self, why: str, member: bytes = b""):
        super().__init__(why)
        self.member = member


class Member(NamedTuple):
    name: bytes
    begin: int  # byte of its first header
    data: int  # byte of its first data
    size: int  # 0: also of one that is stored with holes
    content: bytes | None = None  # all of a small one, where it was read along with the header


class Window:
    """Bytes of a file by position. Reads little where reads are far apart, much where they follow one another."""

    def __init__(self, descriptor: int):
        self.descriptor, self.size = descriptor, os.fstat(descriptor).st_size
        self.start, self.bytes, self.reach = 0, b"", SMALL
        self.padding = 0  # zeros behind the last member, once they were seen

    def get(self, at: int, count: int) -> bytes:
        """`count` bytes from `at`, fewer where the file ends."""
        offset = at - self.start
        if offset < 0 or offset + count > len(self.bytes):
            near = 0 <= offset <= len(self.bytes) + BLOCK
            self.reach = min(LARGE, 4 * self.reach) if near else SMALL
            self.start, self.bytes = at, os.pread(self.descriptor, max(count, self.reach), at)
            offset = 0
        return self.bytes[offset : offset + count]


class InMemory(Window):
    """The same of a tar that was read already."""

    def __init__(self, data: bytes):
        self.descriptor, self.size, self.bytes, self.padding = -1, len(data), data, 0

    def get(self, at: int, count: int) -> bytes:
        return self.bytes[at : at + count]


def members(window: Window) -> Iterator[Member]:
    """The regular members in file order. Raises TarDamage after the last that is whole."""
    at, begin, size = 0, 0, window.size
    long_name: bytes | None = None
    long_size: int | None = None
    sparse = False
    if size == 0:
        raise TarDamage("is empty (0 bytes)")
    packed = next((name for magic, name in COMPRESSED.items() if window.get(0, 8).startswith(magic)), "")
    if packed:
        raise TarDamage(f"is compressed ({packed}) and has to be unpacked")
    fast = extension() if window.descriptor >= 0 else None
    while True:
        if fast and at == begin:  # between two members
            found, begin = fast.plain_members(window.descriptor, at, size, AT_ONCE)
            yield from map(Member._make, found)
            at = begin
            if len(found) == AT_ONCE:
                continue
        header = window.get(at, BLOCK)
        if len(header) < BLOCK:
            if at == size:  # no end-of-archive mark: some writers leave it out
                return
            if at > size:
                raise TarDamage(f"ends in the middle of a member's padding, at byte {size}")
            raise TarDamage(f"ends in the middle of a header, at byte {size}", long_name or b"")
        if not header[0] and header == ZEROS:
            _check_behind(window, at)
            return
        _check_sum(header, at)
        data, kind = at + BLOCK, header[156]
        if kind == SPARSE:
            data = _behind_the_map(window, header, data)
        about_next = kind in ABOUT_NEXT
        length = _number(header[124:136], at) if long_size is None or about_next else long_size
        if data + length > size:
            raise TarDamage(
                f"ends {data + length - size} bytes early, at byte {size}",
                long_name or (b"" if about_next else _name(header)),
            )
        if about_next and length > LARGE:
            raise TarDamage(f"is damaged: a name or attributes of {length} bytes, at byte {at}")
        at = data + (length + BLOCK - 1) // BLOCK * BLOCK
        if kind == LONG_NAME:
            long_name = window.get(data, length).rstrip(b"\0")
        elif kind == PAX:
            held = _pax(window.get(data, length), data)
            long_name = held.get(b"path", long_name)
            long_size = _decimal(held[b"size"], data) if b"size" in held else long_size
            sparse = any(name.startswith(b"GNU.sparse.") for name in held)
            long_name = held.get(b"GNU.sparse.name", long_name)
        elif not about_next:
            if sparse or kind == SPARSE:
                yield Member(long_name or _name(header), begin, data, 0)
            elif kind in REGULAR:
                yield Member(long_name or _name(header), begin, data, length)
            begin, long_name, long_size, sparse = at, None, None, False


def _behind_the_map(window: Window, header: bytes, at: int) -> int:
    """Where the data of a member with holes begin: behind the blocks that say where the holes are."""
    more = header[482]
    while more:
        block = window.get(at, BLOCK)
        more, at = len(block) == BLOCK and block[504], at + BLOCK
    return at


def _check_behind(window: Window, mark: int) -> None:
    """Behind the mark that ends a tar there are zeros only: else a part of it was overwritten, or another tar follows."""
    at = mark
    while chunk := window.get(at, LARGE):
        if chunk.strip(b"\0"):
            place = at + len(chunk) - len(chunk.lstrip(b"\0"))
            raise TarDamage(f"has zeros at byte {mark}, where a tar ends, and goes on at byte {place}")
        at += len(chunk)
    window.padding = at - mark


def _check_sum(header: bytes, at: int) -> None:
    """The sum of all bytes, its own counted as blanks; some old programs took the bytes for signed."""
    try:
        told = _number(header[148:156], at)
    except TarDamage:
        told = -1
    summed = header[:148] + header[156:]
    unsigned = sum(summed) + 8 * 32
    if not header[0] or told not in (unsigned, unsigned - 256 * sum(byte > 127 for byte in summed)):
        raise TarDamage(f"holds something else than a tar header at byte {at}" if at else "is not a tar file")


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _number(field: bytes, at: int) -> int:
    """Octal digits, or base 256 where the first bit is set (sizes of 8 GiB and more)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") + ((field[0] & 0x7F) << (8 * (len(field) - 1)))
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:  # int() takes signs and underscores too
        raise TarDamage(f"is damaged: {field!r} is no number, at byte {at}")
    return int(digits, 8)


def _decimal(text: bytes, at: int) -> int:
    if not text.isdigit() or len(text) > 19:
        raise TarDamage(f"is damaged: a size of {text[:20]!r}, at byte {at}")
    return int(text)


def _pax(block: bytes, at: int) -> dict[bytes, bytes]:
    """Records 'length key=value\\n'."""
    held, place = {}, 0
    while place < len(block):
        digits, space, _ = block[place : place + 20].partition(b" ")
        if not space or not digits.isdigit() or not 0 < int(digits) <= len(block) - place:
            raise TarDamage(f"is damaged: unreadable attributes at byte {at}")
        key, _, value = block[place + len(digits) + 1 : place + int(digits) - 1].partition(b"=")
        held[key] = value
        place += int(digits)
    return held
