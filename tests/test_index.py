"""What an index knows of a shard: whole samples, half ones, doubled ones, and where it is kept."""

import io
import itertools
import tarfile

import pytest

from jepa_fast.data.shards import index as indexing
from jepa_fast.data.shards.index import index
from jepa_fast.data.shards.reader import Shards
from jepa_fast.data.shards.samples import NO_LABEL
from jepa_fast.errors import UsageError


def write(file, *named):
    """A tar of (name, bytes)."""
    with tarfile.open(file, "w") as tar:
        for name, data in named:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def labels(held):
    return held.rows["label"].tolist()


def keys(held):
    return [held.key(i) for i in range(len(held))]


def test_members_of_a_key_are_a_sample_whatever_their_order(tmp_path):
    held = index(
        write(
            tmp_path / "x.tar",
            ("a.cls", b"3"),
            ("a.jpg", b"A"),
            ("b.jpg", b"BB"),
            ("b.json", b'{"filename": "n01440764_1.JPEG"}'),
            ("b.cls", b"5\n"),
        )
    )
    assert keys(held) == ["a", "b"] and labels(held) == [3, 5] and held.rows["length"].tolist() == [1, 2]
    assert [held.names[i] for i in held.rows["name"]] == ["", "n01440764"] and not held.lost and not held.repeated


def test_payloads_and_classes_in_separate_stretches_find_each_other(tmp_path):
    held = index(
        write(
            tmp_path / "x.tar",
            ("a.jpg", b"A"),
            ("b.jpg", b"B"),
            ("b.cls", b"1"),
            ("a.cls", b"2"),
            ("c.cls", b"3"),
            ("c.jpg", b"C"),
        )
    )
    assert labels(held) == [2, 1, 3]


def test_doubled_keys_are_two_samples_with_their_own_classes(tmp_path):
    held = index(
        write(
            tmp_path / "x.tar",
            ("a.jpg", b"A"),
            ("a.cls", b"1"),
            ("a.jpg", b"B"),
            ("a.cls", b"2"),
            ("b.cls", b"3"),
            ("b.jpg", b"C"),
            ("b.cls", b"4"),
            ("b.jpg", b"D"),
        )
    )
    assert labels(held) == [1, 2, 3, 4] and held.repeated == ["a", "b"]


def test_a_sample_has_one_payload_the_first(tmp_path):
    held = index(write(tmp_path / "x.tar", ("a.png", b"A"), ("a.jpg", b"BB"), ("a.seg.png", b"CCC"), ("a.cls", b"1")))
    assert len(held) == 1 and held.rows["length"][0] == 1


def test_a_payload_may_have_a_dotted_extension_if_no_plain_one_is_there(tmp_path):
    held = index(
        write(
            tmp_path / "x.tar",
            ("a.v1.jpg", b"A"),
            ("a.cls", b"1"),
            ("b.depth.png", b"BBB"),
            ("b.jpg", b"BB"),
            ("b.cls", b"2"),
            ("c.1.jpg", b"C"),
            ("c.2.jpg", b"CC"),
        )
    )
    assert keys(held) == ["a", "b", "c"] and labels(held) == [1, 2, NO_LABEL]
    assert held.rows["length"].tolist() == [1, 2, 1] and held.beside == 2


def test_hidden_files_are_no_samples(tmp_path):
    held = index(write(tmp_path / "x.tar", ("d/._a.jpg", b"mac"), ("d/a.jpg", b"A"), (".DS_Store", b"x"), ("a", b"")))
    assert keys(held) == ["d/a"] and not held.lost and not held.beside


def test_half_samples_are_named(tmp_path):
    held = index(
        write(
            tmp_path / "x.tar",
            ("a.jpg", b"A"),
            ("a.cls", b"1"),
            ("b.jpg", b"B"),
            ("c.cls", b"2"),
            ("d.txt", b"D"),
            ("d.cls", b"0"),
        )
    )
    assert labels(held) == [1, NO_LABEL] and held.lost == [("c", "no payload"), ("d", "no payload")]


def test_class_names_and_numbers_below_zero_are_names(tmp_path):
    held = index(
        write(
            tmp_path / "x.tar",
            ("a.jpg", b"A"),
            ("a.cls", b"tench\n"),
            ("b.jpg", b"B"),
            ("b.cls", b"-1"),
            ("c.jpg", b"C"),
            ("c.cls", b"n01440764"),
        )
    )
    assert labels(held) == [NO_LABEL] * 3 and [held.names[i] for i in held.rows["name"]] == ["tench", "-1", "n01440764"]


def classes(tmp_path, *members):
    held = index(write(tmp_path / "x.tar", *members))
    return list(zip(labels(held), [held.names[i] for i in held.rows["name"]], strict=True))


@pytest.mark.parametrize(
    "key", ["train00000007", "collection20230102/7", "xn01440764_1", "n014407641", "n01440764x/1", "an01440764"]
)
def test_digits_somewhere_in_a_key_are_no_class(tmp_path, key):
    assert classes(tmp_path, (f"{key}.jpg", b"A")) == [(NO_LABEL, "")]


@pytest.mark.parametrize(
    "key", ["n01440764/7", "train/n01440764/7", "n01440764_10026", "val/n01440764_10026", "n01440764/n01440764_1"]
)
def test_an_imagenet_class_that_stands_alone_is_one(tmp_path, key):
    assert classes(tmp_path, (f"{key}.jpg", b"A")) == [(NO_LABEL, "n01440764")]


@pytest.mark.parametrize(("json", "found"), [
    (b'{"label": 3, "width": 7}', (3, "")), (b'{"Class_ID": "12"}', (12, "")), (b'{"cls": "tench"}', (NO_LABEL, "tench")),
    (b'{"label": 3, "class_name": "tench"}', (3, "tench")), (b'{"filename": "n01440764_1.JPEG"}', (NO_LABEL, "n01440764")),
    (b'{"path": "train/n01440764/1.JPEG"}', (NO_LABEL, "n01440764")), (b'{"url": "https://x.org/n01440764/1.jpg"}', (NO_LABEL, "")),
    (b'{"path": "https://x.org/n01440764/1.jpg"}', (NO_LABEL, "")), (b'{"caption": "n01440764"}', (NO_LABEL, "")),
    (b'{"label": true}', (NO_LABEL, "")), (b'{"label": 1.5}', (NO_LABEL, "")), (b'{"label": null}', (NO_LABEL, "")),
    (b'{"label": -1}', (NO_LABEL, "-1")), (b"[3]", (NO_LABEL, "")), (b"{", (NO_LABEL, "")), (b"[" * 9999, (NO_LABEL, "")),
    ('{"label": "\u00b2"}'.encode(), (NO_LABEL, "\u00b2")),
])  # fmt: skip
def test_a_json_names_the_class_in_a_field_for_it(tmp_path, json, found):
    assert classes(tmp_path, ("a.jpg", b"A"), ("a.json", json)) == [found]
    assert classes(tmp_path, ("a.json", json), ("a.jpg", b"A")) == [found]


def test_a_cls_goes_before_a_json_in_any_order(tmp_path):
    members = [("a.jpg", b"A"), ("a.json", b'{"label": 3, "class_name": "tench"}'), ("a.cls", b"5")]
    for order in itertools.permutations(members):
        assert classes(tmp_path, *order) == [(5, "tench")], order


@pytest.mark.parametrize("cls_first", [False, True])
def test_a_cut_shard_loses_the_sample_it_breaks_off_in_once(tmp_path, cls_first):
    pair = lambda k: ((f"{k}.cls", b"1"), (f"{k}.jpg", k.encode() * 600))  # noqa: E731
    named = [part for k in "abc" for part in (pair(k) if cls_first else reversed(pair(k)))]
    data = write(tmp_path / "x.tar", *named).read_bytes()
    payload_end = 2 * (1024 + 1536) + (1024 if cls_first else 0) + 512 + 600
    for cut in range(2 * (1024 + 1536) + 1, payload_end, 60):
        (tmp_path / "x.tar").write_bytes(data[:cut])
        held = index(tmp_path / "x.tar")
        assert keys(held) == ["a", "b"] and held.damage
        assert [key for key, _ in held.lost] in (["c"], []), cut  # unknown where not even the header is whole
    (tmp_path / "x.tar").write_bytes(data[: payload_end + 500])
    assert keys(index(tmp_path / "x.tar")) == ["a", "b", "c"]


def test_an_index_is_kept_in_the_cache_where_the_folder_takes_none(tmp_path, monkeypatch):
    file = write(tmp_path / "x.tar", ("a.jpg", b"A"))
    (tmp_path / ".x.tar.idx").mkdir()  # in the way
    made = index(file)
    monkeypatch.setattr(indexing, "_scan", lambda *_: pytest.fail("indexed again"))
    kept = index(file)
    assert kept.rows.tolist() == made.rows.tolist() and kept.digest == made.digest


def test_a_kept_index_is_the_same_and_holds_no_file_open(tmp_path):
    import os

    file = write(tmp_path / "x.tar", ("a.jpg", b"A"), ("a.cls", b"1"), ("ü.jpg", b"B"), ("d.cls", b"0"))
    made, before = index(file), len(os.listdir("/proc/self/fd"))
    kept = [index(file) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    for other in kept:
        assert (other.rows == made.rows).all() and keys(other) == ["a", "ü"] == keys(made)
        assert (other.lost, other.names, other.end, other.stamp) == (made.lost, made.names, made.end, made.stamp)


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"", lambda d: d.replace(b"index 4", b"index 1"), lambda d: d.replace(b"{", b"(", 1)])  # fmt: skip
def test_a_damaged_index_is_made_again(tmp_path, damage):
    file = write(tmp_path / "x.tar", ("a.jpg", b"A"), ("a.cls", b"1"))
    index(file)
    kept = tmp_path / ".x.tar.idx"
    kept.write_bytes(damage(kept.read_bytes()))
    assert labels(index(file)) == [1]


def test_names_that_lead_out_of_the_folder_are_just_names(tmp_path):
    held = Shards([write(tmp_path / "x.tar", ("../../evil.jpg", b"A"), ("/etc/passwd.jpg", b"B"))])
    assert [held.key(i) for i in (0, 1)] == ["x.tar:../../evil", "x.tar:/etc/passwd"] and held.read(1) == b"B"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.tar.idx", "x.tar"]


def test_a_shard_that_cannot_be_opened_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"gone.tar: No such file"):
        index(tmp_path / "gone.tar")
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(UsageError, match=r"folder.tar: Is a directory"):
        index(tmp_path / "folder.tar")
