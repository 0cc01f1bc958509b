"""Converting data sets to shards and back: nothing lost, same bytes, resumable, and the verb's answers."""

import io
import json
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_fast import shards as verb
from jepa_fast.config import replace
from jepa_fast.data.convert import to_shards as converting
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.shards import paths
from jepa_fast.data.shards.reader import Shards
from jepa_fast.presets import preset


def jpeg(seed, size=(30, 40)):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path):
    """An ImageNet layout: 2 classes, 11 training and 4 validation images."""
    for split, count in (("train", 11), ("val", 4)):
        for i in range(count):
            folder = tmp_path / "in" / split / ("n01440764", "n02102040")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.JPEG").write_bytes(jpeg(100 * (split == "val") + i))
    return tmp_path / "in"


def read(folder):
    """{split: {payload: label}} of shards."""
    found = {}
    for split, part in paths.find(str(folder)).items():
        if part.files:
            held = Shards(part.files, part.lengths)
            assert not held.lost
            labels = held.labels.tolist() if held.labels is not None else [None] * len(held)
            found[split] = {held.read(i): labels[i] for i in range(len(held))}
    return found


def everything(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == ".tar" or f.name == "_info.json"}


def go(*args):
    return verb.main([str(a) for a in args])


def test_an_image_folder_round_trips_byte_by_byte(images, tmp_path, capsys):
    assert go(images, tmp_path / "out", "--samples-per-shard", 4, "--name", "in") == 0
    names = sorted(f.name for f in (tmp_path / "out").glob("*.tar"))
    assert names == ["in-test-0000.tar", *(f"in-train-{i:04}.tar" for i in range(3))]
    info = json.loads((tmp_path / "out" / "_info.json").read_text())
    assert info["splits"]["train"]["shard_lengths"] == [4, 4, 3] and info["classes"] == ["n01440764", "n02102040"]
    held = read(tmp_path / "out")
    for split, folder in (("train", "train"), ("test", "val")):
        expected = {
            f.read_bytes(): ["n01440764", "n02102040"].index(f.parent.name) for f in (images / folder).rglob("*.JPEG")
        }
        assert held[split] == expected
    assert "15 samples in 4 shards" in capsys.readouterr().out
    with tarfile.open(tmp_path / "out" / "in-train-0000.tar") as tar:
        about = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    assert all(a["filename"].startswith(("n01440764/", "n02102040/")) for a in about)


def test_same_source_same_bytes_however_many_threads_and_interruptions(images, tmp_path, monkeypatch):
    go(images, tmp_path / "a", "--samples-per-shard", 2, "--workers", 1, "--name", "x")
    real, calls = converting.write_tar, []

    def failing(file, samples):
        calls.append(file)
        if len(calls) == 4:
            file.write_bytes(b"half a sha")
            raise OSError(28, "No space left on device")
        real(file, samples)

    monkeypatch.setattr(converting, "write_tar", failing)
    assert go(images, tmp_path / "b", "--samples-per-shard", 2, "--workers", 1, "--name", "x") == 2
    assert not (tmp_path / "b" / "_info.json").exists()
    done = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "b").glob("*.tar")}
    assert 3 <= len(done) < 8
    monkeypatch.setattr(converting, "write_tar", real)
    assert go(images, tmp_path / "b", "--samples-per-shard", 2, "--workers", 3, "--name", "x") == 0
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert all((tmp_path / "b" / name).stat().st_mtime_ns == when for name, when in done.items())
    assert not list((tmp_path / "b").glob(".*.partial"))


def test_a_folder_of_other_shards_is_not_written_over(images, tmp_path, capsys):
    go(images, tmp_path / "out", "--samples-per-shard", 4)
    before = everything(tmp_path / "out")
    assert go(images, tmp_path / "out", "--samples-per-shard", 5) == 2
    assert "holds shards of other data or options" in capsys.readouterr().err
    (images / "train" / "n01440764" / "0.JPEG").write_bytes(jpeg(7, (50, 50)))
    assert go(images, tmp_path / "out", "--samples-per-shard", 4) == 2
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "years.txt").write_text("of work")
    assert go(images, tmp_path / "thesis") == 2 and "not empty" in capsys.readouterr().err
    assert everything(tmp_path / "out") == before


def test_what_cannot_be_read_is_left_out_and_named(images, tmp_path, capsys):
    (images / "train" / "n01440764" / "0.JPEG").write_bytes(b"")
    assert go(images, tmp_path / "out", "--samples-per-shard", 4) == 1
    assert "left out: train sample 0:" in capsys.readouterr().out
    assert len(read(tmp_path / "out")["train"]) == 10


@pytest.mark.parametrize(
    "archive", ["cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary"]
)
def test_cifar_round_trips(tmp_path, archive):
    rng = np.random.default_rng(0)
    ten, binary = "-10-" in archive, "bin" in archive
    names = [*(f"data_batch_{j}" for j in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    pixels, labels = rng.integers(0, 256, (len(names), 4, 3072), dtype=np.uint8), rng.integers(0, 10, (len(names), 4))
    folder = tmp_path / archive
    folder.mkdir()
    for i, name in enumerate(names):
        if binary:
            columns = [labels[i][:, None]] if ten else [labels[i][:, None] // 5, labels[i][:, None]]
            (folder / f"{name}.bin").write_bytes(np.concatenate([*columns, pixels[i]], 1).astype(np.uint8).tobytes())
        else:
            key = (
                {"labels": labels[i].tolist()} if ten else {"fine_labels": labels[i].tolist(), "coarse_labels": [0] * 4}
            )
            (folder / name).write_bytes(pickle.dumps({"data": pixels[i], **key}, protocol=2))
    assert go(tmp_path, tmp_path / "out", "--keep-order") == 0
    small = {"data.random_crop": False, "data.channels": 3}
    direct, shards = (
        open_dataset(replace(preset("cifar10-vitb"), {"data.path": str(p), **small}))
        for p in (folder, tmp_path / "out")
    )
    for part in ("train", "probe_test"):
        a, b = getattr(direct, part), getattr(shards, part)
        assert a.labels.tolist() == b.labels.tolist()
        for i in range(len(a)):
            np.testing.assert_array_equal(a.load(i, None), b.load(i, None))


@pytest.mark.parametrize("kind", ["tsv", "ts", "pt2", "pt3", "npy", "csv", "files"])
def test_series_round_trip(tmp_path, kind):
    rng = np.random.default_rng(0)
    channels = 2 if kind in ("ts", "pt3", "npy", "files") else 1
    for name, count in (("TRAIN", 12), ("TEST", 6)):
        x, y = rng.normal(3, 2, (count, channels, 8)).astype(np.float32), rng.integers(0, 2, count) * 2 - 1
        y[:2] = (-1, 1)
        rows = [":".join(",".join(repr(float(v)) for v in c) for c in s) for s in x]
        if kind == "tsv":
            (tmp_path / f"F_{name}.tsv").write_text(
                "".join(f"{c}\t" + r.replace(",", "\t") + "\n" for c, r in zip(y, rows, strict=True))
            )
        elif kind == "csv":
            (tmp_path / f"F_{name}.csv").write_text("".join(f"{c},{r}\n" for c, r in zip(y, rows, strict=True)))
        elif kind == "ts":
            (tmp_path / f"F_{name}.ts").write_text(
                "@classLabel true -1 1\n@data\n" + "".join(f"{r}:{c}\n" for c, r in zip(y, rows, strict=True))
            )
        elif kind == "npy":
            np.save(tmp_path / f"F_{name}.npy", x)
            np.save(tmp_path / f"F_{name}_labels.npy", y)
        elif kind == "files":
            for i, (s, c) in enumerate(zip(x, y, strict=True)):
                (tmp_path / name.lower() / str(c)).mkdir(parents=True, exist_ok=True)
                np.save(tmp_path / name.lower() / str(c) / f"{i}.npy", s)
        else:
            torch.save(
                {"samples": torch.from_numpy(x if kind == "pt3" else x[:, 0]).double(), "labels": torch.from_numpy(y)},
                tmp_path / f"{name.lower()}.pt",
            )
    assert go(tmp_path, tmp_path / "out", "--keep-order", "--samples-per-shard", 5) == 0
    direct, shards = (
        open_dataset(replace(preset("series"), {"data.path": str(p)})) for p in (tmp_path, tmp_path / "out")
    )
    assert direct.shape == shards.shape == (channels, 8)
    for part in ("train", "probe_test"):
        a, b = getattr(direct, part), getattr(shards, part)
        assert a.labels.tolist() == b.labels.tolist() and len(a) == (12 if part == "train" else 6)
        for i in range(len(a)):
            np.testing.assert_allclose(a.load(i, None), b.load(i, None), rtol=1e-5, atol=1e-6)


def test_faultdetection_keeps_its_validation_part(tmp_path):
    for name, count in (("train", 6), ("val", 3), ("test", 4)):
        torch.save(
            {"samples": torch.randn(count, 20, dtype=torch.float64), "labels": torch.arange(count) % 3},
            tmp_path / f"{name}.pt",
        )
    assert go(tmp_path / "train.pt", tmp_path / "out") == 0
    info = json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]
    assert {name: split["num_samples"] for name, split in info.items()} == {"train": 6, "validation": 3, "test": 4}


@pytest.mark.parametrize("words", ["n01440764", "0"])
def test_shards_of_some_classes_keep_their_members(tmp_path, images, words):
    go(images, tmp_path / "all", "--samples-per-shard", 4)
    (tmp_path / "list.txt").write_text(words + "\n")
    assert go(tmp_path / "all", tmp_path / "some", "--label-filter", tmp_path / "list.txt") == 0
    held = read(tmp_path / "some")
    expected = {f.read_bytes(): 0 for f in (images / "train" / "n01440764").iterdir()}
    assert held["train"] == expected and set(held["test"].values()) == {0}
    (tmp_path / "list.txt").write_text("n02102040\n")
    go(tmp_path / "all", tmp_path / "other", "--label-filter", tmp_path / "list.txt")
    assert set(read(tmp_path / "other")["train"].values()) == {0}  # numbered anew
    with tarfile.open(next((tmp_path / "other").glob("*train*.tar"))) as tar:
        assert json.load(tar.extractfile(next(m for m in tar if m.name.endswith(".json"))))["label"] == 1


def test_shards_from_urls(tmp_path, images, monkeypatch):
    monkeypatch.setenv("JEPA_FAST_CACHE", str(tmp_path / "cache"))
    go(images, tmp_path / "all", "--samples-per-shard", 4, "--name", "x")
    assert go(f"pipe:cat '{tmp_path}/all/x-train-000{{0..2}}.tar'", tmp_path / "copy") == 0
    assert read(tmp_path / "copy")["train"] == read(tmp_path / "all")["train"]


def test_a_name_that_leads_out_of_the_folder_stays_inside(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("../../evil.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert go(tmp_path / "x.tar", tmp_path / "out") == 0
    with tarfile.open(tmp_path / "out" / "out-train-0000.tar") as tar:
        assert tar.getnames() == ["evil.jpg"]


def test_members_of_nobody_and_dotted_names_pass_through(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.v1.jpg", "a.v1.cls", "README", ".hidden.jpg", "b.jpg", "b.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))
    (tmp_path / "classes").write_text("1")
    assert go(tmp_path / "x.tar", tmp_path / "out", "--label-filter", tmp_path / "classes", "--keep-order") == 0
    with tarfile.open(tmp_path / "out" / "out-train-0000.tar") as tar:
        assert tar.getnames() == ["a.cls", "a.v1.jpg", "b.cls", "b.jpg"]


@pytest.mark.parametrize("verb", ["--verify", "--stats"])
def test_nothing_to_look_at_is_an_error(tmp_path, capsys, verb):
    assert go(verb, tmp_path) == 2
    assert "holds no shard (.tar)" in capsys.readouterr().err
    assert go(verb, "https://example.org/{0..9}.tar") == 2
    assert "is not on this machine; copy it first" in capsys.readouterr().err


def test_what_damaged_shards_lost_is_named_and_empty_payloads_are_left_out(tmp_path, capsys):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, size in (("a.jpg", 5), ("b.jpg", 0), ("c.cls", 1), ("d.jpg", 5), ("e.jpg", 900)):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[: data.index(b"e.jpg") + 600])
    assert go(tmp_path / "x.tar", tmp_path / "out") == 1
    out = capsys.readouterr().out
    assert "x.tar:c: " in out and "x.tar:e: the shard ends in the middle of it" in out and "x.tar:b is empty" in out
    assert "2 samples in 1 shards" in out and len(Shards([tmp_path / "out" / "out-train-0000.tar"])) == 2


def test_keys_that_two_shards_share_become_different(tmp_path):
    (tmp_path / "in").mkdir()
    for shard in "ab":
        with tarfile.open(tmp_path / "in" / f"{shard}.tar", "w") as tar:
            for key in "xy":
                info = tarfile.TarInfo(f"{key}.jpg")
                info.size = 2
                tar.addfile(info, io.BytesIO((shard + key).encode()))
    assert go(tmp_path / "in", tmp_path / "out", "--keep-order") == 0
    held = Shards([tmp_path / "out" / "out-train-0000.tar"])
    assert [held.read(i) for i in range(4)] == [b"ax", b"ay", b"bx", b"by"] and not held.repeated


def test_an_interruption_by_hand_is_one_line_and_what_is_done_stays(images, tmp_path, monkeypatch, capsys):
    real = converting._write

    def write(task, *args):
        if task.filename.endswith("0002.tar"):
            raise KeyboardInterrupt
        return real(task, *args)

    with monkeypatch.context() as patched:
        patched.setattr(converting, "_write", write)
        assert go(images, tmp_path / "out", "--samples-per-shard", 2, "--workers", 1) == 130
    err = capsys.readouterr().err
    assert "the same command goes on" in err and err.strip().count("\n") == 0
    assert go(images, tmp_path / "out", "--samples-per-shard", 2) == 0
    assert " of them from before" in capsys.readouterr().out


def test_verify_names_every_bad_sample_and_stats_describe(tmp_path, images, capsys):
    go(images, tmp_path / "out", "--samples-per-shard", 4, "--name", "x")
    assert go("--verify", tmp_path / "out") == 0
    assert "11 samples in 3 shards read; 0 bad, 0 notes" in capsys.readouterr().out
    assert go("--stats", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert (
        "11 samples in 3 shards of 3 to 4" in out
        and "2 classes: 5 (class 1) to 6 samples (class 0), the most common has 54.5%" in out
    )
    file = tmp_path / "out" / "x-train-0001.tar"
    data = bytearray(file.read_bytes())
    at = data.index(b"\xff\xd8\xff")
    data[at : at + 50] = bytes(50)
    file.write_bytes(data)
    last = tmp_path / "out" / "x-train-0002.tar"
    last.write_bytes(last.read_bytes()[:3000])
    assert go("--verify", tmp_path / "out") == 1
    lines = capsys.readouterr().out.splitlines()
    bad = [line for line in lines if line.startswith("bad: ")]
    assert sum("x-train-0001.tar:" in line and "no image" in line for line in bad) == 1
    assert any(line.startswith("train: ") and f"{len(bad)} bad" in line for line in lines)


@pytest.mark.parametrize(("args", "says"), [
    (["nowhere", "out"], "nowhere does not exist"), (["--verify"], "expected one argument"), (["a"], "give SOURCE and FOLDER"),
    (["a", "b", "--samples-per-shard", "0"], "--samples-per-shard is 0"), (["a", "b", "--nonsense"], "--nonsense"),
    (["a", "b", "--name", "x/y"], "holds no /"), (["--stats", "gone.tar"], "gone.tar does not exist"),
])  # fmt: skip
def test_wrong_usage_is_one_line(tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    assert go(*args) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_key_made_different_is_not_one_that_was_there(tmp_path):
    """The second `a` becomes a-2, which is taken."""
    (tmp_path / "in").mkdir()
    for shard, keys in (("a", ["a-2", "a"]), ("b", ["a", "b"])):
        with tarfile.open(tmp_path / "in" / f"{shard}.tar", "w") as tar:
            for key in keys:
                info = tarfile.TarInfo(f"{key}.jpg")
                info.size = 2
                tar.addfile(info, io.BytesIO(f"{shard}{key[0]}".encode()))
    assert go(tmp_path / "in", tmp_path / "out", "--keep-order") == 0
    assert json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]["train"]["num_samples"] == 4
    held = Shards([tmp_path / "out" / "out-train-0000.tar"])
    assert len(held) == 4 and not held.repeated


def test_a_conversion_that_has_not_ended_is_told(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert go(images, out, "--samples-per-shard", 2) == 0
    assert go("--verify", out) == 0
    (out / "_info.json").unlink()
    (out / "out-train-0003.tar").unlink()
    capsys.readouterr()
    assert go("--verify", out) == 1
    assert f"bad: {out}: its conversion has not ended: run it again" in capsys.readouterr().out
    config = replace(preset("images"), {"data.path": str(out)})
    assert any("has not ended" in note for note in open_dataset(config).notes)


def test_a_folder_that_another_process_converts_into_is_refused(images, tmp_path, capsys):
    assert go(images, tmp_path / "out", "--samples-per-shard", 2) == 0
    program = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "out" / ".lock"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        capsys.readouterr()
        assert go(images, tmp_path / "out", "--samples-per-shard", 2) == 2
        err = capsys.readouterr().err
        assert "is being written by another conversion; wait for it" in err and err.count("\n") == 1
        other.kill()
    assert go(images, tmp_path / "out", "--samples-per-shard", 2) == 0


def test_a_shard_cut_in_the_padding_of_a_whole_payload_loses_nothing(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key in "ab":
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size = 700
            tar.addfile(info, io.BytesIO(key.encode() * 700))
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[: data.rindex(b"b" * 700) + 710])
    go(tmp_path / "x.tar", tmp_path / "out", "--keep-order")
    held = Shards([tmp_path / "out" / "out-train-0000.tar"])
    assert [held.read(i) for i in range(2)] == [b"a" * 700, b"b" * 700]
