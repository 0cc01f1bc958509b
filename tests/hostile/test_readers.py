"""Every reader, on files that were damaged on purpose: each is one clear error, a counted skip, or read.

The files are the reader's own format with bytes flipped, cut out, doubled, or put in place of others, and with numbers made
huge. The same ones in every run. Memory is bounded by the system, so a file that asks for terabytes ends the test.
"""

import io
import json
import resource
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from jepa_fast import checkpoint, log
from jepa_fast.checkpoint import index, state
from jepa_fast.config import Config, from_json, to_json
from jepa_fast.data.readers import cifar, images, series
from jepa_fast.data.sample import BadSample
from jepa_fast.data.shards import paths
from jepa_fast.data.shards.reader import Shards
from jepa_fast.diagnose import tables
from jepa_fast.errors import UsageError
from jepa_fast.interop import files, hf

EACH = 40
ROOM = 6 * 2**30  # bytes of address space beyond what torch takes; nothing here needs a hundredth
WORDS = [
    b"",
    b"\0",
    b"\xff" * 8,
    b"-1",
    b"1e400",
    b"9" * 400,
    b"nan",
    b"null",
    b"[" * 3000,
    b"\x80\x04.",
    b"\n",
    b"../",
    b'"',
]


@pytest.fixture(autouse=True)
def bounded_memory():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as stream:
        used = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def damaged(data, seed):
    """`data` with one to four things wrong."""
    rng = np.random.default_rng(seed)
    made = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, max(1, len(made))))
        kind = rng.integers(6)
        if kind == 0:
            del made[at:]
        elif kind == 1:
            del made[at : at + int(rng.integers(1, 64))]
        elif kind == 2:
            made[at:at] = made[max(0, at - 64) : at] * int(rng.integers(1, 20))
        elif kind == 3:
            word = WORDS[rng.integers(len(WORDS))]
            made[at : at + len(word)] = word
        else:
            made[at : at + 1] = bytes([rng.integers(256)])
    return bytes(made)


def written(folder, name, data):
    (folder / name).write_bytes(data)
    return folder / name


def buffer(save):
    made = io.BytesIO()
    save(made)
    return made.getvalue()


def picture(kind, **options):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    return buffer(lambda to: Image.fromarray(pixels).save(to, kind, **options))


def shard():
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(6):
            for name, data in ((f"{i:03}.npy", series_of(3)), (f"{i:03}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(data), {"mtime": "1.5"}
                tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def series_of(length):
    return buffer(lambda to: np.save(to, np.ones((1, length), np.float32)))


def read_shard(folder, data):
    held = Shards([written(folder, "x.tar", data)])
    for i in range(min(len(held), 20)):
        series.array(held.read(i))


def read_info(folder, data):
    written(folder, "s-train-0.tar", shard())
    written(folder, "_info.json", data)
    found = paths.find(str(folder))
    Shards(found["train"].files, found["train"].lengths)


def read_list(folder, data):
    paths.find(str(written(folder, "list.txt", data)))


def read_cifar(folder, data):
    written(folder, "train", data)
    written(folder, "test", data)
    cifar.load(folder)


TENSORS = {"model.w": torch.ones(3, 4), "model.b": torch.ones(4)}


def a_checkpoint(folder):
    writer = checkpoint.Writer(folder, keep=0)
    writer.save(1, TENSORS, {"step": 1, "list": [1, 2.5, None], "rng": torch.get_rng_state()})
    writer.finish()
    writer.close()
    return folder / "checkpoints" / "step-1"


def part_of_checkpoint(name):
    def read(folder, data):
        held = folder / "checkpoints" / "step-1"
        held = held if held.exists() else a_checkpoint(folder)
        good = (held / name).read_bytes()
        try:
            (held / name).write_bytes(data)
            if name == "meta.json":
                checkpoint.verify(held)
            checkpoint.read_state(held)
            into = {key: torch.full_like(value, torch.nan) for key, value in TENSORS.items()}
            checkpoint.restore(held, into, None, "it")
            assert not any(value.isnan().any() for value in into.values()) or name.startswith("tensors")
        finally:
            (held / name).write_bytes(good)

    return read


def json_of_checkpoint(folder, name):
    return (a_checkpoint(folder) / name).read_bytes()


LOG = "".join(json.dumps({"step": i, "loss": 1 / (i + 1), "drift/blocks.0": 0.5}) + "\n" for i in range(12)).encode()
TABLE = b"epoch,itr,loss,mask-A,mask-B\n" + b"".join(b"1,%d,0.%d,3,4\n" % (i, 9 - i % 9) for i in range(12))
HF = json.dumps({"model_type": "ijepa", "num_attention_heads": 2, "layer_norm_eps": 1e-6, "hidden_size": 8}).encode()
RECORDS = {"data": np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072), "fine_labels": [1, 2]}


def read_hf(folder, data):
    written(folder, "config.json", data)
    hf.settings(folder)


def pickled(value, protocol=2):
    import pickle

    return pickle.dumps(value, protocol)


# name: (a good file, how it is read)
READERS = {
    "tar": (shard(), read_shard),
    "info": (b'{"splits": {"train": {"filenames": ["s-train-0.tar"], "shard_lengths": [6]}}}', read_info),
    "list": (b"a-{0..3}.tar\nb*.tar\nhttps://x/y.tar\n", read_list),
    "jpeg": (picture("JPEG"), lambda folder, data: images.decode(data, 3)),
    "progressive": (picture("JPEG", progressive=True), lambda folder, data: images.decode(data, 3)),
    "png": (picture("PNG"), lambda folder, data: images.decode(data, 3)),
    "webp": (picture("WEBP"), lambda folder, data: images.decode(data, 3)),
    "tiff": (picture("TIFF"), lambda folder, data: images.decode(data, 3)),
    "gif": (picture("GIF"), lambda folder, data: images.decode(data, 3)),
    "npy": (series_of(40), lambda folder, data: series.array(data)),
    "tsv": (b"1\t2\t3\t4\n2\t5\t6\t7\n", lambda folder, data: series.load(written(folder, "x.tsv", data))),
    "ts": (
        b"@classlabel true\n@data\n1,2,3:4,5,6:a\n",
        lambda folder, data: series.load(written(folder, "x.ts", data)),
    ),
    "pt": (
        buffer(lambda to: torch.save({"samples": torch.ones(3, 9), "labels": np.arange(3)}, to)),
        lambda folder, data: series.load(written(folder, "x.pt", data)),
    ),
    "cifar": (pickled(RECORDS), read_cifar),
    "safetensors": (None, lambda folder, data: files.load(written(folder, "x.safetensors", data))),
    "pth": (
        buffer(lambda to: torch.save({"encoder": {"w": torch.ones(3)}, "epoch": 3}, to)),
        lambda folder, data: files.load(written(folder, "x.pth", data)),
    ),
    "hf": (HF, read_hf),
    "csv": (TABLE, lambda folder, data: tables.read(written(folder, "x.csv", data))),
    "jsonl": (LOG, lambda folder, data: tables.read(written(folder, "x.jsonl", data))),
    "metrics": (LOG, lambda folder, data: log.read(written(folder, "metrics.jsonl", data))),
    "config": (to_json(Config()).encode(), lambda folder, data: from_json(data.decode(errors="replace"), "x")),
    "meta.json": (None, part_of_checkpoint("meta.json")),
    "index.json": (None, part_of_checkpoint("index.json")),
    "state.safetensors": (None, part_of_checkpoint("state.safetensors")),
    "tensors-0.safetensors": (None, part_of_checkpoint("tensors-0.safetensors")),
}


def test_the_state_and_index_of_a_checkpoint_have_the_names_that_are_tried():
    assert {index.NAME, state.NAME} <= READERS.keys()


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_one_error_or_a_skip(tmp_path, name, capsys):
    good, read = READERS[name]
    if good is None and name == "safetensors":
        save_file({"w": torch.ones(4)}, tmp_path / "good")
        good = (tmp_path / "good").read_bytes()
    elif good is None:
        good = json_of_checkpoint(tmp_path, name)
    if name != "list":
        read(tmp_path, good)
    for seed in range(EACH):
        folder = tmp_path if name.endswith((".json", ".safetensors")) else tmp_path / str(seed)
        folder.mkdir(exist_ok=True)
        try:
            read(folder, damaged(good, seed))
        except (UsageError, BadSample) as error:
            said = str(error)
            assert said and said.isprintable(), f"seed {seed}: {said!r}"
