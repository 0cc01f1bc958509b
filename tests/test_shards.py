"""Tar shards: what is written comes back, at random, and what is wrong is said."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset

from jepa_fast.data import shards
from jepa_fast.data.shards import BadSample, Shards, find, write_shards
from jepa_fast.errors import UsageError


def samples(count, start=0):
    rng = np.random.default_rng(start)
    for i in range(start, start + count):
        yield {"__key__": f"{i:06}", "npy": rng.normal(size=(1, 5 + i % 3)).astype(np.float32), "cls": i % 4}


@pytest.fixture
def folder(tmp_path):
    return write_shards(
        tmp_path / "a set", {"train": samples(25), "test": samples(7, 100)}, "toy", samples_per_shard=10
    )


def test_written_samples_come_back_in_any_order(folder):
    held = Shards(find(str(folder))["train"])
    expected = list(samples(25))
    assert len(held) == 25 and held.labels.tolist() == [s["cls"] for s in expected]
    for i in (24, 0, 10, 9, 3):
        np.testing.assert_array_equal(np.load(io.BytesIO(held.read(i))), expected[i]["npy"])
    assert held.key(10) == "toy-train-0001.tar:000010"


def test_webdataset_itself_reads_them(folder):
    stream = webdataset.WebDataset(str(folder / "toy-train-{0000..0002}.tar"), shardshuffle=False).decode()
    for got, expected in zip(stream, samples(25), strict=True):
        np.testing.assert_array_equal(got["npy"], expected["npy"])
        assert got["cls"] == expected["cls"]


def test_the_same_samples_give_the_same_bytes(folder, tmp_path):
    again = write_shards(
        tmp_path / "again", {"train": samples(25), "test": samples(7, 100)}, "toy", samples_per_shard=10
    )
    for file in sorted(folder.glob("*.tar")):
        assert file.read_bytes() == (again / file.name).read_bytes()
    assert Shards(find(str(again))["train"]).fingerprint() == Shards(find(str(folder))["train"]).fingerprint()


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    def failing():
        yield from samples(3)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_shards(tmp_path / "set", {"train": failing()}, "toy")
    assert not list(tmp_path.iterdir())


def test_a_set_written_meanwhile_by_another_process_is_kept(tmp_path, folder):
    before = (folder / "_info.json").stat().st_mtime_ns
    assert write_shards(folder, {"train": samples(3)}, "toy") == folder
    assert (folder / "_info.json").stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == ["a set"]


def test_the_index_is_kept_and_renewed_when_the_shard_changes(folder, monkeypatch):
    files = find(str(folder))["train"]
    Shards(files)
    monkeypatch.setattr(shards, "_scan", lambda file: pytest.fail("indexed again"))
    Shards(files)
    monkeypatch.undo()
    with webdataset.TarWriter(str(files[0]), mtime=0) as writer:
        for sample in samples(4):
            writer.write(sample)
    assert len(Shards(files)) == 4 + 15


def test_a_damaged_index_is_made_again(folder):
    files = find(str(folder))["train"]
    Shards(files)
    files[0].with_name(f".{files[0].name}.idx.npz").write_bytes(b"rubbish")
    assert len(Shards(files)) == 25


def test_splits_come_from_info_or_names_or_the_neighbours(folder, tmp_path):
    assert [len(v) for v in find(str(folder)).values()] == [3, 1]
    (folder / "_info.json").unlink()
    assert [len(v) for v in find(str(folder)).values()] == [3, 1]
    pattern = find(str(folder / "toy-train-{0000..0001}.tar"))
    assert [f.name for f in pattern["train"]] == ["toy-train-0000.tar", "toy-train-0001.tar"]
    assert [f.name for f in pattern["test"]] == ["toy-test-0000.tar"]


def test_images_of_imagenet_shards_know_their_class(tmp_path):
    file = tmp_path / "imagenet1k-train-0000.tar"
    with tarfile.open(file, "w") as tar:
        for key, extension, data in [
            ("n01440764_10026", "jpg", b"\xff\xd8x"), ("n01440764_10026", "cls", b"0"),
            ("n01440764_10026", "json", json.dumps({"filename": "n01440764_10026.JPEG"}).encode()),
            ("deep/000002", "JPEG", b"\xff\xd8yy"), ("deep/000002", "cls", b"7\n"), ("deep/000002", "json", b'{"filename": "n02102040_3.JPEG"}'),
        ]:  # fmt: skip
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    held = Shards([file])
    assert held.labels.tolist() == [0, 7] and held.names.tolist() == ["n01440764", "n02102040"]
    assert [held.read(i) for i in (0, 1)] == [b"\xff\xd8x", b"\xff\xd8yy"]


def test_a_truncated_shard_is_a_bad_sample_not_a_crash(folder):
    files = find(str(folder))["train"]
    held = Shards(files)
    files[2].write_bytes(files[2].read_bytes()[:2000])
    with pytest.raises(BadSample, match="bytes early"):
        held.read(24)


def test_missing_and_empty_shards_are_refused_by_name(folder, tmp_path):
    with pytest.raises(UsageError, match=r"toy-train-0003.tar does not exist \(7 of 10"):
        find(str(folder / "toy-train-{0000..0009}.tar"))
    (folder / "toy-train-0001.tar").unlink()
    with pytest.raises(UsageError, match=r"toy-train-0001.tar does not exist"):
        find(str(folder))
    zero = tmp_path / "zero.tar"
    zero.touch()
    with pytest.raises(UsageError, match=r"zero.tar .*(empty|damaged)"):
        Shards([zero])
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    with pytest.raises(UsageError, match=r"none.tar holds no sample"):
        Shards([tmp_path / "none.tar"])
    rubbish = tmp_path / "rubbish.tar"
    rubbish.write_bytes(b"not a tar file" * 100)
    with pytest.raises(UsageError, match=r"rubbish.tar is not a tar file"):
        Shards([rubbish])
