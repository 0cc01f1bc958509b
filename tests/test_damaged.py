"""Damaged data under a run: it goes on where that is safe, counts what it left out, and stops past a share."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import encoded, photograph, png_of

from jepa_fast import train
from jepa_fast.data.convert import verify
from jepa_fast.data.shards.reader import Shards
from jepa_fast.data.shards.writer import write_shards
from jepa_fast.log import read

IMAGES = ["--data.image_size", "32", "--model.patch", "8", "--masks.min_keep", "1"]
SMALL = ["--model.width", "16", "--model.depth", "1", "--model.heads", "2",
         "--model.predictor_width", "16", "--model.predictor_depth", "1", "--train.batch_size", "8", "--train.precision", "fp32", "--train.steps", "20",
         "--log.every", "5", "--monitor.every", "20", "--monitor.probe_train", "20", "--monitor.probe_test", "10", "--data.workers", "2"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("jepa_fast.report.write", lambda folder: folder / "report.html")  # it has its own tests
    return tmp_path


def image(i):
    return encoded(photograph(18, 20)[:, ::-1] if i % 2 else photograph(18, 20), "JPEG")


def sample(i, **changes):
    return {"__key__": f"{i:04}", "jpg": image(i), "cls": i % 2, **changes}


def cut(data):
    return data[: len(data) // 2]


def claims(width, height):
    data = bytearray(image(0))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


BAD = {  # sample: (what is in place of its image, why it is left out)
    3: (b"", "empty"), 8: (cut(image(0)), "undecodable"), 13: (b"not an image", "undecodable"),
    21: (claims(50_000, 50_000), "too_large"), 34: (png_of(50_000, 50_000), "too_large"),
}  # fmt: skip
FINE = {  # unusual, and used
    5: {"jpg": encoded(np.full((1, 1, 3), 9, np.uint8), "JPEG")},
    9: {"jpg": encoded(Image.fromarray(photograph(18, 20)).convert("CMYK"), "JPEG")},
    14: {"jpg": encoded(photograph(18, 20), "JPEG", progressive=True)},
    15: {"png": encoded(Image.fromarray(photograph(18, 20)[:, :, 0].astype(np.uint16) << 8), "PNG")},
    16: {"webp": encoded(photograph(18, 20), "WEBP")},
}


def written(folder, count=60, test=True):
    def samples():
        for i in range(count):
            if i in FINE:
                yield {"__key__": f"{i:04}", "cls": i % 2, **FINE[i]}
            else:
                yield sample(i, **({"jpg": BAD[i][0]} if i in BAD else {}))

    splits = {"train": samples()} | ({"test": (sample(i) for i in range(1000, 1012))} if test else {})
    return write_shards(folder, splits, "s", 20)


def go(path, *args):
    return train.main(["images", "--data.path", str(path), "--run.dir", "x", *IMAGES, *SMALL, *map(str, args)])


def bad_events():
    return [e for e in read(Path("x/events.jsonl")) if e["kind"] == "bad_sample"]


def test_a_run_on_damaged_shards_counts_what_it_left_out(tmp_path, capsys):
    folder = written(tmp_path / "d")
    shard = folder / "s-train-0002.tar"
    data = shard.read_bytes()
    held = Shards([shard])
    end = int(held.indexes[0].rows["offset"][15]) + 100  # in the middle of sample 55's image
    shard.write_bytes(data[:end])
    assert go(folder, "--data.max_bad_share", "0.3") == 0
    events = bad_events()
    assert len(events) == len({e["key"] for e in events}) == 5 + 5
    why = {e["key"].rpartition(":")[2]: e["why"] for e in events}
    assert {int(key): why[key] for key in why if key.isdigit() and int(key) in BAD} == {
        i: kind for i, (_, kind) in BAD.items()
    }
    lost = [e for e in events if e["why"] == "lost"]
    assert len(lost) == 5 and all(
        e["key"].startswith("s-train-0002.tar:") and "the shard ends" in e["reason"] for e in lost
    )
    assert lost[0]["key"] == "s-train-0002.tar:0055"
    out = capsys.readouterr().out
    assert "samples left out: 10 (1 empty, 5 lost, 2 too_large, 2 undecodable)" in out and "5 lost" in out
    assert read(Path("x/metrics.jsonl"))[-1]["data/bad"] == 5


def test_past_the_share_it_stops_with_one_line(tmp_path, capsys):
    folder = written(tmp_path / "d")
    assert go(folder) == 2
    err = capsys.readouterr().err
    assert (
        "cannot be read, more than --data.max_bad_share 0.01" in err and "s-train-000" in err and err.count("\n") == 1
    )
    for shard in folder.glob("s-train-000[12].tar"):
        shard.write_bytes(b"")
    assert go(folder, "--run.dir", "y") == 2
    err = capsys.readouterr().err
    assert "40 of 60 samples are lost" in err and "is empty (0 bytes)" in err and err.count("\n") == 1
    assert not Path("y").exists()


def test_what_the_probe_cannot_read_is_counted_too(tmp_path, capsys):
    def samples(start):
        for i in range(start, start + 30):
            yield sample(i, **({"jpg": b""} if i % 10 == 7 else {}))

    folder = write_shards(tmp_path / "d", {"train": samples(0), "test": samples(100)}, "s", 30)
    assert go(folder, "--data.max_bad_share", "0.1", "--monitor.probe_test", "30") == 0
    keys = {e["key"] for e in bad_events()}
    assert keys == {
        f"s-{split}-0000.tar:{i:04}" for split, b in (("train", 0), ("test", 100)) for i in (b + 7, b + 17, b + 27)
    }
    assert "samples left out: 6 (6 empty)" in capsys.readouterr().out


def test_a_run_that_ends_for_bad_samples_names_them_all(tmp_path):
    folder = write_shards(tmp_path / "d", {"train": (sample(i, jpg=b"") if i < 5 else sample(i) for i in range(60)), "test": (sample(i) for i in range(12))}, "s", 60)  # fmt: skip
    assert go(folder, "--log.every", "100") == 2
    assert len(bad_events()) >= 3


def test_a_shard_that_disappears_under_a_run(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "d", {"train": (sample(i) for i in range(60))}, "s", 20)
    real = train.show

    def show(r, record):
        if record["step"] == 5:  # its file, and what is open of it
            (folder / "s-train-0001.tar").unlink()
            r.dataset.train.source.read.__self__._open_files.close()
        real(r, record)

    monkeypatch.setattr(train, "show", show)
    assert go(folder, "--data.max_bad_share", "0.5", "--train.steps", "30", "--data.random_crop", "True") == 0
    events = bad_events()
    assert events and all(e["why"] == "shard_missing" and e["key"].startswith("s-train-0001.tar:") for e in events)
    assert len(events) == len(set(range(20, 40)) & set(kept_for_training(60)))
    assert 5 <= events[0]["step"] <= 30


def kept_for_training(count):
    """Samples that are not held out for the probe, as dataset.py draws them."""
    return np.setdiff1d(np.arange(count), np.random.default_rng(0).permutation(count)[: count // 5])


def test_samples_without_a_label_are_trained_on_and_kept_out_of_the_probe(tmp_path, capsys):
    def samples(start, count):
        for i in range(start, start + count):
            made = sample(i)
            if i in (4, 104):
                del made["cls"]
            yield made

    folder = write_shards(tmp_path / "d", {"train": samples(0, 40), "test": samples(100, 20)}, "s", 20)
    assert go(folder) == 0
    out = capsys.readouterr().out
    assert "1 samples without a label take no part in the probe: s-train-0000.tar:0004" in out
    assert "40 training and 19 test samples, 2 classes" in out and not bad_events()


def test_a_resumed_run_names_a_bad_sample_once(tmp_path, monkeypatch):
    folder = written(tmp_path / "d")
    real = train.save

    def killed(r, step):
        real(r, step)
        if step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "save", killed)
        go(folder, "--data.max_bad_share", "0.3", "--checkpoint.every", "10")
    assert go(folder, "--data.max_bad_share", "0.3", "--checkpoint.every", "10", "--resume") == 0
    keys = [e["key"] for e in bad_events()]
    assert len(keys) == len(set(keys)) == 5


def test_a_resumed_run_says_what_changed_in_its_data_and_may_follow_them(tmp_path, capsys):
    folder = write_shards(
        tmp_path / "d", {"train": (sample(i) for i in range(60)), "test": (sample(i) for i in range(12))}, "s", 20
    )
    assert go(folder, "--checkpoint.every", "10") == 0
    moved = folder.rename(tmp_path / "elsewhere")
    assert go(moved, "--train.steps", "25", "--resume") == 0  # the same data in another place
    info = json.loads((moved / "_info.json").read_text())
    write_shards(tmp_path / "other", {"train": (sample(i) for i in range(25))}, "s", 25)
    (tmp_path / "other" / "s-train-0000.tar").rename(moved / "s-train-0001.tar")
    info["splits"]["train"]["shard_lengths"][1] = 25
    info["splits"]["train"]["filenames"].pop()
    info["splits"]["train"]["shard_lengths"].pop()
    (moved / "_info.json").write_text(json.dumps(info))
    capsys.readouterr()
    assert go(moved, "--train.steps", "30", "--resume") == 2
    err = capsys.readouterr().err
    assert (
        "s-train-0001.tar held 20 samples" in err
        and "and holds 25 samples" in err
        and "s-train-0002.tar is gone" in err
    )
    assert err.count("\n") == 1


@pytest.mark.parametrize("keep_on", ["host", "device"])
def test_series_of_another_shape_in_shards_are_left_out(tmp_path, monkeypatch, keep_on):
    rng = np.random.default_rng(0)
    odd = {0: (1, 30), 7: (2, 40), 9: (1, 1, 40), 12: (1, 0), 15: ()}

    def samples(count):
        for i in range(count):
            yield {"__key__": f"{i:03}", "npy": rng.normal(size=odd.get(i, (1, 40)) if count > 20 else (1, 40)), "cls": i % 2}  # fmt: skip

    folder = write_shards(tmp_path / "d", {"train": samples(40), "test": samples(12)}, "s", 20)
    args = ["--data.path", str(folder), "--run.dir", "x", "--data.keep_on", keep_on, "--data.max_bad_share", "0.1"]
    assert train.main(["series", *SMALL, *args]) == 0
    kinds = {int(e["key"].rpartition(":")[2]): e["why"] for e in bad_events()}
    assert kinds == {0: "other_shape", 7: "other_shape", 9: "undecodable", 12: "undecodable", 15: "undecodable"}
    assert len(inspected(folder)) == 5


def inspected(folder):
    return [t for held in verify.open_splits(str(folder)).values() for t in verify.verify(held, 1, lambda *_: None)]


def test_series_with_gaps_are_left_out_and_do_not_spoil_the_rest(tmp_path):
    from jepa_fast.config import replace
    from jepa_fast.data.dataset import open_dataset
    from jepa_fast.data.loading.loader import Loader
    from jepa_fast.presets import preset

    rng = np.random.default_rng(0)
    rows = [[i % 2, *rng.normal(5, 2, 20)] for i in range(60)]
    rows[7][3] = rows[9][20] = float("nan")
    for name in ("TRAIN", "TEST"):
        (tmp_path / f"F_{name}.tsv").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    for norm in ("per_series", "train", "none"):
        config = replace(
            preset("series"),
            {"data.path": str(tmp_path), "data.series_norm": norm, "data.channels": 1, "data.series_length": 20},
        )
        data = open_dataset(config)
        loader = Loader(config, data.train, 0, 0, 1, 0, 4)
        batches = list(loader)
        loader.close()
        assert all(np.isfinite(b.inputs.numpy()).all() for b in batches)
        assert sorted(b.key for b in loader.bad) == ["F_TRAIN.tsv: series 7 from 0", "F_TRAIN.tsv: series 9 from 0"]
    assert {b.kind for b in loader.bad} == {"not_finite"}
