"""Small files that claim to be large are refused, in terms of what a file can really hold."""

import io
import json
import os
import struct
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_fast.bounded import read_bytes, shown
from jepa_fast.config import replace
from jepa_fast.data.convert import inputs
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.readers import images, series, torch_file
from jepa_fast.data.sample import BadSample
from jepa_fast.data.shards import index as indexes
from jepa_fast.data.shards import streams
from jepa_fast.data.shards.reader import Shards
from jepa_fast.data.shards.writer import write_shards
from jepa_fast.errors import UsageError
from jepa_fast.interop import files
from jepa_fast.presets import preset


@pytest.fixture
def shard(tmp_path):
    samples = ({"__key__": f"{i}", "npy": np.full((1, 20), i, np.float32)} for i in range(12))
    return write_shards(tmp_path / "set", {"train": samples}, "s", 12) / "s-train-0000.tar"


def opened(path):
    sizes = {"data.channels": 1, "data.series_length": 20}
    return open_dataset(replace(preset("series"), {"data.path": str(path), **sizes}))


# ---- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10**9, 10**18, 1e400, "12", None, [12]])
def test_an_info_that_counts_more_samples_than_fit_is_refused(shard, count):
    info = shard.parent / "_info.json"
    held = json.loads(info.read_text())
    held["splits"]["train"]["shard_lengths"] = [count]
    info.write_text(json.dumps(held))
    if count == "12":
        return opened(shard.parent)
    with pytest.raises(UsageError, match=r"hold .* at most|cannot be read"):
        opened(shard.parent)


def test_a_kept_index_is_believed_only_where_it_leads_to_places_that_are_there(shard):
    made = indexes.index(shard)
    kept = shard.with_name(f".{shard.name}.idx")
    whole, true_rows = kept.read_bytes(), made.rows.tobytes()
    head_end = whole.index(b"\n", len(indexes.MAGIC)) + 1
    for column, value in (("offset", 2**60), ("offset", -1), ("length", 2**62), ("length", -5), ("begin", -1), ("payload", 99),
                          ("payload", -1), ("name", 7), ("key_end", 2**32 - 1), ("label", -9)):  # fmt: skip
        rows = np.frombuffer(whole[head_end:], indexes.ROW, len(made)).copy()
        rows[column][-1] = value
        kept.unlink()  # it is mapped
        kept.write_bytes(whole[:head_end] + rows.tobytes() + whole[head_end + rows.nbytes :])
        assert indexes._load(kept, made.stamp) is None, column
        assert indexes.index(shard).rows.tobytes() == true_rows
    for change in (
        {"expected": -1},
        {"expected": "1"},
        {"damage": 3},
        {"lost": [[1, 2]]},
        {"repeated": [1]},
        {"count": -1},
        {"end": None},
    ):
        head = json.dumps(json.loads(whole[len(indexes.MAGIC) : head_end]) | change).encode()
        head += b" " * (-(len(indexes.MAGIC) + len(head) + 1) % 8) + b"\n"
        kept.unlink()
        kept.write_bytes(indexes.MAGIC + head + whole[head_end:])
        assert indexes._load(kept, made.stamp) is None, change


def test_an_index_that_expects_a_billion_samples_is_refused(shard):
    data = shard.read_bytes()
    shard.write_bytes(data[:9000])
    made = indexes.index(shard)
    indexes._store(indexes.replace(made, expected=10**9), shard)
    with pytest.raises(UsageError, match="should have 1,000,000,000 samples"):
        Shards([shard])


def test_a_sample_of_gigabytes_is_a_bad_sample(tmp_path):
    """A tar with a hole, which takes no room on the disk."""
    file = tmp_path / "x.tar"
    small, large = tarfile.TarInfo("a.npy"), tarfile.TarInfo("b.npy")
    body = io.BytesIO()
    np.save(body, np.zeros((1, 20), np.float32))
    small.size, large.size = len(body.getvalue()), 20 * 2**30
    with file.open("wb") as stream:
        stream.write(small.tobuf() + body.getvalue().ljust(-(-small.size // 512) * 512, b"\0") + large.tobuf())
        stream.truncate(stream.tell() + large.size + 1024)
    with pytest.raises(BadSample, match="more than 1073741824"):
        Shards([file]).read(1)


def sparse_tar(file, records):
    """A member whose PAX records say that its few bytes are a gigabyte with holes."""
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for key in ("a", "b"):
            info = tarfile.TarInfo(f"{key}.jpg")
            data = b"1\n1\n3\n".ljust(512, b"\0") + b"abc"
            info.size = len(data)
            info.pax_headers = records if key == "b" else {}
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("records", [
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**30)},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b.jpg", "GNU.sparse.realsize": str(2**30)},
    {"GNU.sparse.size": str(2**30), "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,3"},
])  # fmt: skip
def test_a_member_with_holes_is_empty_in_training_and_in_conversion(tmp_path, records):
    sparse_tar(tmp_path / "x.tar", records)
    held = Shards([tmp_path / "x.tar"])
    for read in (held.read, inputs.open_inputs(str(tmp_path / "x.tar")).sample["train"]):
        with pytest.raises(BadSample, match="is empty"):
            read(1)
    assert held.read(0).endswith(b"abc")


def test_what_a_killed_fetch_left_is_swept_once_it_is_old(tmp_path):
    old, young, other = tmp_path / "x.tar.temp123", tmp_path / "y.tar.temp124", tmp_path / "z.tar"
    for file in (old, young, other):
        file.write_bytes(b"x")
    for file in (old, other):
        os.utime(file, (time.time() - 7200,) * 2)
    streams.sweep(tmp_path)
    assert not old.exists() and young.exists() and other.exists()


# ---- images ---------------------------------------------------------------------------------------


def jpeg(size=16, **options):
    made = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(
        made, "JPEG", **options
    )
    return made.getvalue()


def with_scans(count, size=16):
    """A progressive JPEG whose last scan is there many times."""
    data = jpeg(size, progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:last] + data[last:end] * count + data[end:]


def test_a_jpeg_of_too_many_scans_is_a_bad_sample():
    assert images.decode(jpeg(progressive=True), 3)[0].shape == (16, 16, 3)
    for count in (101, 5000):
        with pytest.raises(BadSample, match=r"progressive JPEG of \d+ scans, more than 100") as raised:
            images.decode(with_scans(count), 3)
        assert raised.value.kind == "too_large"
    with pytest.raises(BadSample, match="more than 16"):
        images._refuse_scans(with_scans(30), 2**26)


def test_scan_marks_inside_headers_are_no_scans():
    """A thumbnail or a colour profile may hold any bytes."""
    data = jpeg(progressive=True)
    profile = b"\xff\xda" * 500
    data = data[:2] + b"\xff\xe2" + struct.pack(">H", len(profile) + 2) + profile + data[2:]
    assert images.decode(data, 3)[0].shape == (16, 16, 3)


def test_an_image_of_an_extreme_side_is_a_bad_sample():
    made = io.BytesIO()
    Image.new("L", (70_000, 1)).save(made, "PNG")
    with pytest.raises(BadSample, match="more than 65536 on a side"):
        images.decode(made.getvalue(), 3)


# ---- series and weights ---------------------------------------------------------------------------


def repeated(depth, width):
    held = [1.0] * width
    for _ in range(depth):
        held = [held] * width
    return held


@pytest.mark.parametrize("samples", [
    repeated(9, 10), [[0.0] * 5000] * 5000, [torch.zeros(50_000)] * 5000, [np.zeros(50_000)] * 5000, torch.zeros(1).expand(10**9, 10**3),
])  # fmt: skip
def test_a_file_that_names_one_list_or_tensor_many_times_is_refused(tmp_path, samples):
    torch.save({"samples": samples}, tmp_path / "train.pt")
    with pytest.raises(UsageError, match=r"nested too deep|than the file has|than what the file holds"):
        series.load(tmp_path / "train.pt")


def test_what_torch_saves_comes_back(tmp_path):
    x = torch.arange(24.0).reshape(4, 6)
    held = {"samples": x[::2, 1:5], "half": x.bfloat16(), "array": x.numpy().T, "big": x.numpy().astype(">f8"), "param": torch.nn.Parameter(x),
            "list": [x[0], x[1]], "none": None, "name": "ü", "empty": torch.zeros(0, 3), "bool": x > 3, "scalar": x[1, 1]}  # fmt: skip
    torch.save(held, tmp_path / "x.pt")
    back = torch_file.load(tmp_path / "x.pt")
    for name in ("samples", "half", "param", "bool", "empty", "scalar"):
        assert torch.equal(back[name], held[name].detach()) and back[name].dtype == held[name].dtype
    for name in ("array", "big"):
        np.testing.assert_array_equal(back[name], held[name])
    assert [t.tolist() for t in back["list"]] == [t.tolist() for t in held["list"]]
    assert back["name"] == "ü" and back["none"] is None


def test_a_compressed_record_is_no_file_of_torch(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02N." + bytes(10**7))
    with pytest.raises(UsageError, match="compressed"):
        series.load(tmp_path / "train.pt")


def test_an_array_whose_type_has_forged_flags_or_pointers_is_refused(tmp_path):
    torch.save({"samples": np.zeros((3, 8), object)}, tmp_path / "train.pt")
    with pytest.raises(UsageError, match="cannot be read"):
        series.load(tmp_path / "train.pt")


def test_weights_that_one_number_stands_for_are_refused(tmp_path):
    torch.save({"encoder": {"w": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="larger than the file"):
        files.load(tmp_path / "x.pt")


# ---- files that are none --------------------------------------------------------------------------


def test_pipes_devices_and_folders_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError):
            read_bytes(path)
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**31)
    with pytest.raises(OSError, match="more than"):
        read_bytes(tmp_path / "large")


def test_an_image_folder_with_a_pipe_a_device_and_a_latin_1_name(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg())
    with open(os.fsencode(tmp_path) + b"/caf\xe9\x1b[2J.jpg", "wb") as stream:
        stream.write(jpeg())
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    data = open_dataset(
        replace(preset("images"), {"data.path": str(tmp_path), "data.image_size": 16, "model.patch": 8})
    )
    source, bad, keys = data.train, 0, []
    for i in range(len(source)):
        keys.append(source.key(i))
        try:
            source.load(i, None)
        except BadSample:
            bad += 1
    assert len(source) == 15 and bad == 2 and all(key.isprintable() and key.encode() for key in keys)


def test_an_npz_named_npy_is_one_line_or_a_bad_sample(tmp_path):
    np.savez(tmp_path / "x", a=np.zeros(3), b=np.zeros(3))
    data = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "train.npy").write_bytes(data)
    with pytest.raises(UsageError, match="several arrays"):
        series.load(tmp_path / "train.npy")
    with pytest.raises(BadSample, match="several arrays"):
        series.array(data)


def test_messages_are_one_line_without_control_characters():
    assert str(UsageError("a\nb\x1b[31m\udce9é")) == "a\\nb\\x1b[31m\\udce9é"
    assert shown("a\x1b[31m/\u202eb") == "a\\x1b[31m/\\u202eb" and shown("größe 1") == "größe 1"
