"""Tar shards: what is written comes back, at random, and what is wrong is said."""

import errno
import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import webdataset

from jepa_fast.data.convert import verify as inspection
from jepa_fast.data.sample import BadSample
from jepa_fast.data.shards import index
from jepa_fast.data.shards.paths import find
from jepa_fast.data.shards.reader import Shards
from jepa_fast.data.shards.writer import write_shards
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
    held = Shards(find(str(folder))["train"].files)
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
    assert (
        Shards(find(str(again))["train"].files).fingerprint() == Shards(find(str(folder))["train"].files).fingerprint()
    )


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
    files = find(str(folder))["train"].files
    Shards(files)
    monkeypatch.setattr(index, "_scan", lambda file, stamp: pytest.fail("indexed again"))
    Shards(files)
    monkeypatch.undo()
    with webdataset.TarWriter(str(files[0]), mtime=0) as writer:
        for sample in samples(4):
            writer.write(sample)
    assert len(Shards(files)) == 4 + 15


def test_a_damaged_index_is_made_again(folder):
    files = find(str(folder))["train"].files
    Shards(files)
    files[0].with_name(f".{files[0].name}.idx").write_bytes(b"rubbish")
    assert len(Shards(files)) == 25


def test_splits_come_from_info_or_names_or_the_neighbours(folder, tmp_path):
    assert [len(v.files) for v in find(str(folder)).values()] == [3, 1]
    (folder / "_info.json").write_text('{"author": "of another program"}')
    assert [len(v.files) for v in find(str(folder)).values()] == [3, 1]
    (folder / "_info.json").unlink()
    assert [len(v.files) for v in find(str(folder)).values()] == [3, 1]
    pattern = find(str(folder / "toy-train-{0000..0001}.tar"))
    assert [f.name for f in pattern["train"].files] == ["toy-train-0000.tar", "toy-train-0001.tar"]
    assert [f.name for f in pattern["test"].files] == ["toy-test-0000.tar"]


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
    assert held.labels.tolist() == [0, 7] and held.names == ["n01440764", "n02102040"]
    assert [held.read(i) for i in (0, 1)] == [b"\xff\xd8x", b"\xff\xd8yy"]


def test_a_shard_that_changes_under_a_run_is_a_bad_sample_not_a_crash(folder):
    files = find(str(folder))["train"].files
    held = Shards(files)
    files[2].write_bytes(files[2].read_bytes()[:2000])
    with pytest.raises(BadSample, match="changed after it was indexed"):
        held.read(24)


def test_a_shard_that_was_only_touched_or_lost_its_end_gives_what_it_still_holds(folder):
    held = Shards(find(str(folder))["train"].files)
    expected = [held.read(i) for i in range(25)]
    first, second, third = held.files
    os.utime(first)
    second.write_bytes(second.read_bytes())  # the same bytes, written again where they are
    os.truncate(third, int(held.indexes[2].rows["begin"][3]) + 100)
    assert [held.read(i) for i in range(23)] == expected[:23]
    for sample in (23, 24):
        with pytest.raises(BadSample, match="changed after it was indexed") as raised:
            held.read(sample)
        assert raised.value.kind == "shard_changed"


def test_a_shard_overwritten_under_a_run_is_not_taken_for_what_it_was(folder, tmp_path):
    held = Shards(find(str(folder))["train"].files)
    held.read(0)  # its file is open
    held.files[0].write_bytes(held.files[1].read_bytes())
    for sample in range(10):
        with pytest.raises(BadSample, match="changed"):
            held.read(sample)
    assert held.read(10)


def test_every_sample_has_a_name_of_its_own(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.jpg", "b.jpg", "a.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes())
    held = Shards([tmp_path / "x.tar", tmp_path / "deep" / "x.tar"])
    names = [held.key(i) for i in range(len(held))]
    assert len(set(names)) == 6 and names[1] == "x.tar:b" and names[4] == "deep/x.tar:b"


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


def test_shards_in_part_damaged_tell_what_is_lost(folder):
    train = find(str(folder))["train"]
    data = train.files[1].read_bytes()
    train.files[1].write_bytes(data[: len(data) // 3 + 100])
    train.files[2].write_bytes(b"")
    held = Shards(train.files, train.lengths)
    assert len(held) + len(held.lost) == 25 and len(held.lost) == sum(train.lengths) - len(held)
    assert all(where.startswith(("toy-train-0001.tar:", "toy-train-0002.tar:")) for where, _ in held.lost)
    assert sum("is empty (0 bytes)" in why for _, why in held.lost) == 5
    assert len(Shards(train.files).lost) == 2  # without _info.json: the cut sample, and that the other shard is nothing


def test_what_a_shard_held_before_it_was_cut_is_known_if_it_was_indexed_then(folder):
    files = find(str(folder))["train"].files
    whole = Shards(files)
    (folder / "_info.json").unlink()
    data = files[1].read_bytes()
    for share in (3, 5):  # cut behind a sample, and cut again inside one: the count of the whole one is kept
        files[1].write_bytes(data[: len(data) // share])
        held = Shards(files)
        assert len(held) + len(held.lost) == len(whole) == 25 and len(held) < 25 and held.told == [0, 10, 0]
    assert Shards(files).told == [0, 10, 0], "kept in the index"
    files[2].write_bytes(files[0].read_bytes())  # another shard, and whole: nothing is missing
    assert Shards(files).told[2] == 0


def test_a_shard_with_less_than_info_counts_is_noticed(folder):
    (folder / "_info.json").write_text((folder / "_info.json").read_text().replace("5\n", "6\n", 1))
    train = find(str(folder))["train"]
    assert train.lengths[-1] == 6
    assert [where for where, _ in Shards(train.files, train.lengths).lost] == ["toy-train-0002.tar:sample 5"]


def test_lists_globs_braces_and_files_of_names(folder, tmp_path):
    every = [f"toy-train-{i:04}.tar" for i in range(3)]
    (tmp_path / "list.txt").write_text("# mine\na set/toy-train-0000.tar\na set/toy-train-000[12].tar\n")
    for path in (
        folder / "toy-train-*.tar",
        folder / "toy-train-{0000..0002}.tar",
        f"{folder}/toy-train-0000.tar::{folder}/toy-train-000{{1,2}}.tar",
        tmp_path / "list.txt",
    ):
        assert [f.name for f in find(str(path))["train"].files] == every, path
    with pytest.raises(UsageError, match="twice"):
        find(f"{folder}/toy-train-0000.tar::{folder}/toy-train-*.tar")
    with pytest.raises(UsageError, match="matches no file"):
        find(str(folder / "nothing-*.tar"))
    with pytest.raises(UsageError, match="empty entry"):
        find(f"{folder}::")


def test_a_folder_for_each_split_and_shards_of_one_name_in_two(folder, tmp_path):
    for split, name in (("train", "toy-train-0000.tar"), ("val", "toy-test-0000.tar")):
        (tmp_path / "in" / split).mkdir(parents=True)
        (tmp_path / "in" / split / "0000.tar").write_bytes((folder / name).read_bytes())
    found = find(str(tmp_path / "in"))
    assert [len(Shards(found[split].files)) for split in ("train", "test")] == [10, 7]
    two = Shards([*found["train"].files, *found["test"].files])
    assert len(two.parts()) == 2


def test_few_files_stay_open_and_threads_may_share_them(folder):
    from concurrent.futures import ThreadPoolExecutor

    from jepa_fast.data.shards.open_files import OpenFiles

    held = Shards(find(str(folder))["train"].files)
    held._open_files = OpenFiles(most=2)
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 25, 400)
    expected = [held.read(i) for i in range(25)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(held.read, numbers.tolist())) == [expected[i] for i in numbers]
    held.prepare(numbers)
    assert len(held._open_files) <= 2
    held._open_files.close()
    assert len(held._open_files) == 0 and held.read(3) == expected[3]


def test_sets_share_the_bound_on_open_files_which_is_the_process_s(folder, tmp_path):
    """As a limit of 64 open files leaves 32 for shards, and eight sets of 12 each would want 96."""
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
import io, tarfile
from pathlib import Path
from jepa_fast.data.shards.reader import Shards
sets = []
for s in range(8):
    for i in range(12):
        with tarfile.open(Path({str(tmp_path)!r}) / f"{{s}}-{{i:02}}.tar", "w") as tar:
            info = tarfile.TarInfo("a.jpg")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    sets.append(Shards(sorted(Path({str(tmp_path)!r}).glob(f"{{s}}-*.tar"))))
assert all(one.read(i) == b"abc" for _ in range(2) for one in sets for i in range(12))
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "JEPA_FAST_CACHE": str(tmp_path / "c")}
    )


def test_verify_says_that_more_may_be_missing_behind_a_damage(folder, tmp_path):
    from jepa_fast.data.convert.verify import verify

    file = find(str(folder))["train"].files[0]
    middle = int(Shards([file]).indexes[0].rows["offset"][4]) + 20
    (tmp_path / "cut.tar").write_bytes(file.read_bytes()[:middle])
    found = list(verify(Shards([tmp_path / "cut.tar"]), 1, lambda done, of: None))
    assert any(t.fatal and "in the middle of it" in t.what for t in found)
    assert any("how many samples came after is unknown" in t.what for t in found)


def test_a_shard_that_is_replaced_is_another_file_to_a_set_opened_since(folder):
    files = find(str(folder))["train"].files
    before = Shards(files)
    assert before.read(0)
    content = files[0].read_bytes()
    files[0].unlink()
    files[0].write_bytes(content.replace(b"00000", b"00007"))
    os.utime(files[0], ns=(1, 1))
    after = Shards(files)
    assert after.key(0) != before.key(0) and after.read(0) and before.read(0)  # by the file that is still open


def test_a_shard_that_disappears_is_a_bad_sample(folder):
    held = Shards(find(str(folder))["train"].files)
    held.files[1].unlink()
    held.prepare(np.arange(25))
    with pytest.raises(BadSample, match="no longer there") as raised:
        held.read(12)
    assert raised.value.kind == "shard_missing" and held.read(3)


def test_a_shard_that_may_not_be_read_stops_the_start_and_is_a_bad_sample_later(folder, monkeypatch):
    """As another user sees files of mode 600, and a disk that fails; whoever tests as root may read everything."""
    files, system_open = find(str(folder))["train"].files, os.open
    held = Shards(files)

    def refuse(path, *args, **kwargs):
        if str(path) == str(files[1]):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return system_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BadSample, match=r"the shard cannot be read \(Permission denied\)") as raised:
        held.read(12)
    assert raised.value.kind == "shard_unreadable" and held.read(3)
    files[1].with_name(f".{files[1].name}.idx").unlink()
    with pytest.raises(
        UsageError, match=rf"shard {files[1]}: Permission denied; give the right --data.path, or make it"
    ):
        Shards(files)


def test_a_disk_that_fails_costs_what_lies_there_and_no_more(folder, monkeypatch):
    held, system_pread = Shards(find(str(folder))["train"].files), os.pread
    broken = int(held.indexes[0].rows["offset"][4])

    def fail(descriptor, length, offset):
        if offset == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return system_pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(BadSample, match=r"the shard cannot be read \(Input/output error\)"):
        held.read(4)
    assert held.read(3) and held.read(5)


def test_a_shard_whose_end_is_zeros_is_doubted_and_what_it_held_is_known(folder):
    """As an interrupted download into a file of the right size leaves it."""
    files = find(str(folder))["train"].files
    Shards(files)
    (folder / "_info.json").unlink()
    for name, known in (("again", 10), ("new", 0)):
        data = files[1].read_bytes()
        begin = int(Shards(files).indexes[1].rows["begin"][3])
        if name == "new":
            files[1].with_name(f".{files[1].name}.idx").unlink()
        files[1].write_bytes(data[:begin] + bytes(60_000))
        held = Shards(files)
        assert len(held.indexes[1]) == 3 and held.told[1] == known
        if known:
            assert len(held.lost) == 7 and "zeros" in held.lost[0][1]
        else:
            assert "ends in far more zeros than a tar needs" in held.indexes[1].doubt
            assert any("more zeros" in trouble.what for trouble in inspection.verify(held, 1, lambda *_: None))
        files[1].write_bytes(data)


def test_a_pipe_in_the_place_of_a_shard_is_no_wait(folder):
    files = find(str(folder))["train"].files
    held = Shards(files)
    held._open_files.close()
    files[1].unlink()
    os.mkfifo(files[1])
    with pytest.raises(BadSample):
        held.read(12)
    with pytest.raises(UsageError):
        Shards(files[1:2])
