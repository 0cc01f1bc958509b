"""Headers of tar files, as every writer writes them, and where files break off."""

import gzip
import io
import os
import tarfile

import numpy as np
import pytest

from jepa_fast.data.shards import tar
from jepa_fast.data.shards.tar import TarDamage, Window, members
from jepa_fast.extension import extension

NAMES = ["a.jpg", "deep/er/b.cls", "../../out.jpg", "n" * 99 + ".jpg", "x" * 120 + "/" + "y" * 90 + ".jpg", "z" * 300 + ".json", "ärger.jpg", "a b.jpg"]  # fmt: skip


@pytest.fixture(params=["cpp", "python"], autouse=True)
def reader(request, monkeypatch):
    """Each test holds for the C++ reader and for the Python one that it leaves the rest to."""
    if request.param == "cpp" and extension() is None:
        pytest.skip("jepa_fast_C is not built")
    if request.param == "python":
        monkeypatch.setattr(tar, "extension", lambda: None)


def write(file, names=NAMES, format=tarfile.GNU_FORMAT, data=lambda i: bytes([i]) * (i * 700 % 2000)):
    with tarfile.open(file, "w", format=format) as made:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(data(i))
            made.addfile(info, io.BytesIO(data(i)))


def summed(content, at=0):
    """Puts the right sum into the header at byte `at` of a bytearray."""
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])


def scan(file):
    """(members, damage) of a file."""
    found = []
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for member in members(Window(descriptor)):
            found.append(member)
        return found, None
    except TarDamage as damage:
        return found, damage
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_members_are_those_that_tarfile_finds(tmp_path, format):
    write(tmp_path / "x.tar", format=format)
    found, damage = scan(tmp_path / "x.tar")
    assert damage is None
    with tarfile.open(tmp_path / "x.tar") as made:
        expected = [(m.name, m.offset_data, m.size) for m in made]
    assert [(m.name.decode(), m.data, m.size) for m in found] == expected


def test_names_of_ustar_may_have_a_prefix(tmp_path):
    names = ["p" * 100 + "/" + "q" * 60 + ".jpg", "short.jpg"]
    write(tmp_path / "x.tar", names, tarfile.USTAR_FORMAT)
    assert [m.name.decode() for m in scan(tmp_path / "x.tar")[0]] == names


def test_headers_of_unix_v7_are_known_by_their_sum(tmp_path):
    write(tmp_path / "x.tar", ["a.jpg", "b.jpg"])
    data = bytearray((tmp_path / "x.tar").read_bytes())
    for at in (0, 512):  # the first has no data
        data[at + 257 : at + 512] = bytes(255)
        summed(data, at)
    (tmp_path / "x.tar").write_bytes(data)
    assert [m.name for m in scan(tmp_path / "x.tar")[0]] == [b"a.jpg", b"b.jpg"]
    data[200] ^= 1
    (tmp_path / "x.tar").write_bytes(data)
    assert "is not a tar file" in str(scan(tmp_path / "x.tar")[1])


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_sizes_of_more_than_8_gib_are_read(tmp_path, format):
    info = tarfile.TarInfo("huge.npy")
    info.size = 9 * 2**30 + 5
    last = tarfile.TarInfo("last.npy")
    with (tmp_path / "x.tar").open("wb") as file:  # sparse: it takes no room
        header = info.tobuf(format)
        file.write(header)
        file.seek(len(header) + 9 * 2**30 + 512)
        file.write(last.tobuf(format) + bytes(1024))
    found, damage = scan(tmp_path / "x.tar")
    assert damage is None and [(m.name, m.size) for m in found] == [(b"huge.npy", info.size), (b"last.npy", 0)]


def test_links_folders_and_devices_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as made:
        for name, kind in (
            ("d", tarfile.DIRTYPE),
            ("l.jpg", tarfile.SYMTYPE),
            ("h.jpg", tarfile.LNKTYPE),
            ("f", tarfile.FIFOTYPE),
            ("r.jpg", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "r.jpg"
            made.addfile(info)
    assert [m.name for m in scan(tmp_path / "x.tar")[0]] == [b"r.jpg"]


def test_wherever_a_file_is_cut_what_lies_before_is_found_and_the_rest_named(tmp_path):
    names = ["a.jpg", "b" * 150 + ".jpg", "c.jpg"]
    write(tmp_path / "whole.tar", names, data=lambda i: bytes([65 + i]) * 700)
    data = (tmp_path / "whole.tar").read_bytes()
    whole, _ = scan(tmp_path / "whole.tar")
    ends = [m.data + m.size for m in whole]
    for cut in range(1, whole[-1].data + 1024, 101):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        found, damage = scan(tmp_path / "cut.tar")
        assert found == whole[: sum(end <= cut for end in ends)], cut
        if damage is not None and damage.member:
            assert damage.member.decode() == names[len(found)], cut
        within = any(m.begin < cut < m.data + m.size for m in whole)
        assert (damage is not None) >= within, cut


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100, b"\x1f\x8b" + bytes(2000), bytes([255]) * 2048])
def test_what_is_no_tar_is_damage_from_the_start(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    found, damage = scan(tmp_path / "x.tar")
    assert not found and damage is not None


def test_what_comes_after_members_with_holes_is_found(tmp_path):
    """As `tar --sparse` writes them: in the old format the map of many holes stands between header and data."""
    info = tarfile.TarInfo("holes.npy")
    info.size, info.type = 700, tarfile.GNUTYPE_SPARSE
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[482] = 1  # the map goes on in further blocks, and the last of them says so
    summed(head)
    maps = bytearray(1024)
    maps[504] = 1
    after = tarfile.TarInfo("after.jpg")
    pax = tarfile.TarInfo("GNUSparseFile.1/more.npy")
    pax.size = 512
    pax.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "more.npy", "GNU.sparse.realsize": "9999"}
    blocks = bytes(head) + maps + bytes(1024) + pax.tobuf(tarfile.PAX_FORMAT) + bytes(512) + after.tobuf()
    (tmp_path / "x.tar").write_bytes(blocks + bytes(1024))
    found, damage = scan(tmp_path / "x.tar")
    assert damage is None and [(m.name, m.size) for m in found] == [
        (b"holes.npy", 0),
        (b"more.npy", 0),
        (b"after.jpg", 0),
    ]


def test_a_compressed_tar_is_named_so(tmp_path):
    write(tmp_path / "x.tar")
    (tmp_path / "y.tar").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    assert "compressed (gzip)" in str(scan(tmp_path / "y.tar")[1])


def test_garbage_in_the_middle_ends_the_scan_there(tmp_path):
    write(tmp_path / "x.tar", ["a.jpg", "b.jpg", "c.jpg"], data=lambda i: bytes(600))
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[1536 : 1536 + 512] = os.urandom(512)
    (tmp_path / "x.tar").write_bytes(data)
    found, damage = scan(tmp_path / "x.tar")
    assert [m.name for m in found] == [b"a.jpg"] and "byte 1536" in str(damage)


def test_small_payloads_come_with_their_headers_if_they_come_at_all(tmp_path):
    sizes = [0, 1, 511, 512, 513, 5000, 3, 100_000, 7]
    write(tmp_path / "x.tar", [f"{i}.cls" for i in range(len(sizes))], data=lambda i: bytes([65 + i]) * sizes[i])
    found, _ = scan(tmp_path / "x.tar")
    assert [m.size for m in found] == sizes
    for i, member in enumerate(found):
        assert member.content in (None, bytes([65 + i]) * sizes[i])


def dialects(rng):
    """A tar of everything that writers do, some of it more than once, in any order."""
    blocks = []
    for i in range(int(rng.integers(1, 12))):
        info = tarfile.TarInfo(
            ("p" * 90 + "/") * int(rng.integers(0, 3)) + f"{i}." + str(rng.choice(["jpg", "cls", "json"]))
        )
        info.size = int(rng.choice([0, 1, 511, 512, 600, 5000]))
        info.mtime = float(rng.choice([0, 1.5]))
        info.type = bytes(rng.choice([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE]))  # fmt: skip
        if info.type in (tarfile.DIRTYPE, tarfile.SYMTYPE):
            info.size = 0
        if rng.random() < 0.2:
            info.pax_headers = {
                str(rng.choice(["comment", "path", "LIBARCHIVE.creationtime"])): "ä" * int(rng.integers(1, 900))
            }
        format = int(rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
        blocks.append(info.tobuf(format, "utf-8", "surrogateescape") + rng.bytes(info.size) + bytes(-info.size % 512))
    return b"".join(blocks) + bytes(1024)


def damaged(rng, content):
    """With some bytes of its headers changed: of name, size, sum, kind, magic or prefix."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.choice([0, 50, *range(124, 136), 150, 156, 257, 262, 263, 345, 400]))
        block = int(rng.integers(len(content) // 512)) * 512
        content[block + place] = int(rng.choice([0, 32, 48, 55, 56, 95, 0x80, 120, int(rng.integers(256))]))
        if rng.random() < 0.7:
            summed(content, block)
    return bytes(content)


@pytest.mark.skipif(extension() is None, reason="jepa_fast_C is not built")
@pytest.mark.parametrize("reader", ["both"])
def test_both_readers_tell_the_same_of_whole_cut_and_damaged_files(tmp_path, reader, monkeypatch):
    rng = np.random.default_rng(0)
    for _ in range(30):
        whole = dialects(rng)
        cut = [whole[: int(rng.integers(len(whole)))] for _ in range(10)]
        for content in [whole, *cut, *(damaged(rng, whole) for _ in range(40))]:
            (tmp_path / "x.tar").write_bytes(content)
            monkeypatch.setattr(tar, "AT_ONCE", int(rng.choice([1, 2, 4096])))
            by_cpp, its_damage = scan(tmp_path / "x.tar")
            with monkeypatch.context() as patch:
                patch.setattr(tar, "extension", lambda: None)
                by_python, damage = scan(tmp_path / "x.tar")
            assert [m[:4] for m in by_cpp] == [m[:4] for m in by_python]
            assert all(m.content in (None, content[m.data : m.data + m.size]) for m in by_cpp)
            assert (repr(its_damage), getattr(its_damage, "member", b"")) == (
                repr(damage),
                getattr(damage, "member", b""),
            )


@pytest.mark.parametrize(
    "size", [b"-0000001000\0", b"-0000000012\0", b"+0000001000\0", b"0000_001000\0", b"0o000001000\0", b"00000000009\0"]
)
def test_a_size_that_is_no_octal_number_is_damage(tmp_path, size):
    write(tmp_path / "x.tar", ["a.jpg", "b.jpg", "c.jpg"], data=lambda i: bytes([65 + i]) * 600)
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[1536 + 124 : 1536 + 136] = size
    summed(data, 1536)
    (tmp_path / "x.tar").write_bytes(data)
    found, damage = scan(tmp_path / "x.tar")
    assert [m.name for m in found] == [b"a.jpg"] and "is no number, at byte 1536" in str(damage)


def test_attributes_may_come_in_two_headers(tmp_path):
    one, two = tarfile.TarInfo("a.jpg"), tarfile.TarInfo("a.jpg")
    one.pax_headers, two.pax_headers = {"size": "700"}, {"comment": "x"}
    headers = one.tobuf(tarfile.PAX_FORMAT)[:-512] + two.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "x.tar").write_bytes(headers + bytes([7]) * 700 + bytes(324 + 1024))
    found, damage = scan(tmp_path / "x.tar")
    assert damage is None and [(m.name, m.size) for m in found] == [(b"a.jpg", 700)]


def test_a_size_of_thousands_of_digits_is_damage(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": "9" * 5000}
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    assert "a size of" in str(scan(tmp_path / "x.tar")[1])


def test_a_flipped_bit_in_a_header_is_damage_and_signed_sums_are_not(tmp_path):
    write(tmp_path / "x.tar", ["a.jpg", "ä.jpg", "c.jpg"], data=lambda i: bytes([65 + i]) * 600)
    whole = (tmp_path / "x.tar").read_bytes()
    for at in (0, 3, 100, 124, 130, 156, 300, 345):
        data = bytearray(whole)
        data[1536 + at] ^= 2
        (tmp_path / "x.tar").write_bytes(data)
        found, damage = scan(tmp_path / "x.tar")
        assert [m.name for m in found] == [b"a.jpg"] and "than a tar header at byte 1536" in str(damage), at
    data = bytearray(whole)
    data[1536 + 148 : 1536 + 156] = b"%06o\0 " % (int(data[1536 + 148 : 1536 + 154], 8) - 2 * 256)
    (tmp_path / "x.tar").write_bytes(data)
    assert [len(scan(tmp_path / "x.tar")[0]), scan(tmp_path / "x.tar")[1]] == [3, None]


def test_what_goes_on_behind_an_end_mark_is_damage_and_zeros_are_counted(tmp_path):
    write(tmp_path / "x.tar", ["a.jpg", "b.jpg"], data=lambda i: bytes([65 + i]) * 600)
    data = (tmp_path / "x.tar").read_bytes()
    for content, at in (
        (data + data, len(data)),
        (data[:1536] + bytes(512) + data[2048:], 2048),
        (data + b"x", len(data)),
    ):
        (tmp_path / "x.tar").write_bytes(content)
        found, damage = scan(tmp_path / "x.tar")
        assert found and f"goes on at byte {at}" in str(damage)
    (tmp_path / "x.tar").write_bytes(data + bytes(3_000_000))
    with (tmp_path / "x.tar").open("rb") as file:
        window = Window(file.fileno())
        assert len(list(members(window))) == 2 and window.padding == len(data) - 3072 + 3_000_000


@pytest.mark.skipif(extension() is None, reason="jepa_fast_C is not built")
def test_positions_that_no_file_has_are_harmless(tmp_path):
    write(tmp_path / "x.tar")
    with (tmp_path / "x.tar").open("rb") as file:
        for at in (2**63 - 1, 2**63 - 512, -1, -(2**63), 2**40):
            assert extension().plain_members(file.fileno(), at, 2**63 - 1, 10) == ([], at)
    assert extension().plain_members(-1, 0, 10**6, 10) == ([], 0)
