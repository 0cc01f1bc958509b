"""Scalars of TensorBoard event files, without TensorBoard: TFRecord frames around protocol buffers.

A frame is length (uint64), its masked CRC-32C (4 bytes), data, their CRC (4 bytes), little-endian. Only the fields a
scalar needs are read: Event 1 wall_time, 2 step, 5 summary; Summary 1 value; Value 1 tag, 2 simple_value, 8 tensor;
TensorProto 1 dtype, 4 tensor_content, 5 float_val, 6 double_val.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from jepa_fast.bounded import read_bytes
from jepa_fast.errors import UsageError

FLOAT, DOUBLE = 1, 2  # TensorProto's dtype


def looks_like(data: bytes) -> bool:
    """Whether the bytes begin as an event file does: a short first frame that names the file version."""
    return len(data) > 12 and b"brain.Event:" in data[12:64]


def began(file: Path) -> float:
    """Wall time of the first entry; 0 if there is none."""
    head = read_bytes(file)[:4096]
    frame = next(_frames(head), b"")
    return next((struct.unpack("<d", v)[0] for n, v in _fields(frame) if n == 1 and isinstance(v, bytes)), 0.0)


def scalars(file: Path) -> tuple[list[tuple[int, str, float]], bool]:
    """((step, tag, value) in the order written, whether the file ends with a whole entry). Raises UsageError."""
    data = read_bytes(file)
    out: list[tuple[int, str, float]] = []
    used = 0
    try:
        for frame in _frames(data):
            used += len(frame) + 16
            out += _event(frame)
    except (struct.error, IndexError, UnicodeDecodeError):
        raise UsageError(f"{file} is damaged at byte {used}; give another copy of the event file") from None
    return out, used == len(data)


def _frames(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 16 + length > len(data):
            return
        if struct.unpack_from("<I", data, at + 8)[0] != _masked_crc(data[at : at + 8]):
            raise IndexError("a length that is not what was written")
        yield data[at + 12 : at + 12 + length]
        at += 16 + length


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CRC32C = _crc_table()


def _masked_crc(data: bytes) -> int:
    """CRC-32C as TFRecord stores it. Of the lengths only: of the data it would take Python too long."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC32C[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: varints as int, everything else as its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise IndexError("not a protocol buffer")
        if at + size > len(data):
            raise IndexError("cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if shift > 63:
            raise IndexError("a number without an end")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _event(frame: bytes) -> Iterator[tuple[int, str, float]]:
    step, summaries = 0, []
    for field, value in _fields(frame):
        if field == 2 and isinstance(value, int):
            step = value
        elif field == 5 and isinstance(value, bytes):
            summaries.append(value)
    for summary in summaries:
        for field, entry in _fields(summary):
            if field == 1 and isinstance(entry, bytes) and (scalar := _scalar(entry)):
                yield step, *scalar


def _scalar(entry: bytes) -> tuple[str, float] | None:
    tag, number = "", None
    for field, value in _fields(entry):
        if field == 1 and isinstance(value, bytes):
            tag = value.decode()
        elif field == 2 and isinstance(value, bytes) and len(value) == 4:
            number = struct.unpack("<f", value)[0]
        elif field == 8 and isinstance(value, bytes):
            number = _tensor(value)
    return (tag, number) if tag and number is not None else None


def _tensor(data: bytes) -> float | None:
    """The number in a TensorProto of one float or double; None of any other."""
    held = dict(_fields(data))
    form, size = ("<d", 8) if held.get(1) == DOUBLE else ("<f", 4)
    for field in (4, 5, 6):
        value = held.get(field)
        if held.get(1) in (FLOAT, DOUBLE) and isinstance(value, bytes) and len(value) == size:
            return struct.unpack(form, value)[0]
    return None
