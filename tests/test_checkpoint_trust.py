"""Nothing in a checkpoint is executed, and nothing in it is used that was not accounted for."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, StorageMeta

from jepa_fast import checkpoint, pickles
from jepa_fast.errors import UsageError

TENSORS = {"model.w": torch.arange(6.0).reshape(2, 3), "model.n": torch.tensor(7), "model.h": torch.ones(3).bfloat16(),
           "optimizer.w.exp_avg": torch.ones(2, 3)}  # fmt: skip
STATE = {"step": 4, "config": "{}", "processes": [{"rng": torch.get_rng_state(), "nan": float("nan"), "none": None}]}


@pytest.fixture
def held(tmp_path):
    """checkpoints/step-4 of this version."""
    writer = checkpoint.Writer(tmp_path, keep=0)
    writer.save(4, TENSORS, STATE)
    writer.finish()
    writer.close()
    return tmp_path / "checkpoints" / "step-4"


@pytest.fixture
def old(tmp_path):
    """checkpoints/step-4 as earlier versions wrote it: by torch's own writer."""
    folder = tmp_path / "old" / "checkpoints" / "step-4"
    dcp.save(TENSORS, storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save(STATE, folder / "state.pt")
    sign(folder)
    return folder


def sign(folder):
    """meta.json anew: a forger of a file forges its digest."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in folder.iterdir()
        if file.is_file() and file.name != "meta.json"
    }
    (folder / "meta.json").write_text(json.dumps({"step": 4, "files": files}))


def same(state):
    assert state["step"] == 4 and state["processes"][0]["none"] is None
    assert torch.equal(state["processes"][0]["rng"], STATE["processes"][0]["rng"])
    for name, value in state["model"].items():
        assert torch.equal(value, TENSORS[f"model.{name}"]) and value.dtype == TENSORS[f"model.{name}"].dtype
    return state["model"].keys() == {"w", "n", "h"}


# ---- code -----------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("executed").exists()


def poisoned(folder):
    """A .metadata that sets attributes of torch's own classes, so that who unpickles it twice reads a poisoned one.

    The poisoned one says that the weights are byte objects, which torch's planner unpickles.
    """
    true = pickle.loads((folder / ".metadata").read_bytes())
    torch.save({"x": Evil()}, folder / "evil.bin")
    place = _StorageInfo("evil.bin", 0, (folder / "evil.bin").stat().st_size)
    attributes = {
        "state_dict_metadata": {name: BytesStorageMetadata() for name in true.state_dict_metadata},
        "storage_data": {MetadataIndex(name): place for name in true.state_dict_metadata},
        "planner_data": {name: (name,) for name in true.state_dict_metadata},
        "storage_meta": true.storage_meta, "version": None, "__setstate__": StorageMeta,
    }  # fmt: skip

    def body(value):
        return pickle.dumps(value, 2)[2:-1]

    metadata = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    built = metadata + b")\x81" + body(vars(true)) + b"b"
    (folder / ".metadata").write_bytes(b"\x80\x02" + built + metadata + b"N" + body(attributes) + b"\x86b0.")
    sign(folder)


def test_an_index_that_poisons_the_classes_it_is_made_of_is_refused(old, nothing_runs):
    poisoned(old)
    before = dict(vars(dcp.metadata.Metadata))
    for read in (checkpoint.load, lambda path: checkpoint.restore(path, dict(TENSORS), None, "it")):
        for _ in range(2):
            with pytest.raises(UsageError, match=r"damaged.*it sets attributes of .*Metadata"):
                read(old)
    assert dict(vars(dcp.metadata.Metadata)) == before


@pytest.mark.parametrize("name", [".metadata", "state.pt", "__0_0.distcp"])
def test_a_pickle_of_code_in_an_old_checkpoint_is_refused(old, name, nothing_runs):
    with (old / name).open("wb") as file:
        pickle.dump(Evil(), file) if name == ".metadata" else torch.save({"x": Evil()}, file)
    sign(old)
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(old)


def test_an_old_index_with_byte_objects_is_refused(tmp_path, nothing_runs):
    folder = tmp_path / "checkpoints" / "step-4"
    dcp.save({"model.w": Evil()}, storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save(STATE, folder / "state.pt")
    sign(folder)
    with pytest.raises(UsageError, match="is not an index"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["index.json", "state.safetensors", "tensors-0.safetensors"])
def test_a_pickle_in_the_place_of_data_is_refused_or_read_as_bytes(held, name, nothing_runs):
    (held / name).write_bytes(pickle.dumps(Evil()))
    sign(held)
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(held)


def test_our_own_checkpoints_hold_no_pickle(held):
    for file in held.iterdir():
        assert file.suffix in (".json", ".safetensors")
        with pytest.raises(pickles.PickleError):
            pickles.read(file.read_bytes())
    assert torch.equal(load_file(held / "tensors-0.safetensors")["model.w"], TENSORS["model.w"])


def test_checkpoints_of_both_formats_come_back_whole(held, old):
    for folder in (held, old):
        assert same(checkpoint.load(folder))
        into = {name: torch.full_like(value, 9) for name, value in TENSORS.items()}
        checkpoint.restore(folder, into, None, "it")
        assert all(torch.equal(into[name], value) for name, value in TENSORS.items())


# ---- accounting -----------------------------------------------------------------------------------


def edited(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index["tensors"]["model.w"], index)
    (folder / "index.json").write_text(json.dumps(index))
    sign(folder)


def cut_in_two(w, second):
    piece = w["pieces"][0]
    half = piece["bytes"] // 2
    w["pieces"] = [piece | {"shape": [1, 3], "bytes": half}, piece | {"shape": [1, 3], "bytes": half} | second]


EDITS = {
    "no pieces": (lambda w, _: w.update(pieces=[]), "0 of the 6 elements of model.w are there"),
    "half": (lambda w, _: w["pieces"][0].update(shape=[1, 3], bytes=12), "3 of the 6 elements"),
    "twice the same": (lambda w, _: cut_in_two(w, {}), "are missing, others are there twice"),
    "outside": (lambda w, _: w["pieces"][0].update(offsets=[1, 0]), "lies outside"),
    "other rank": (lambda w, _: w["pieces"][0].update(offsets=[0]), "lies outside"),
    "larger": (lambda w, _: w.update(shape=[2, 10**15], pieces=[w["pieces"][0] | {"shape": [2, 10**15]}]), "needs"),
    "much larger": (
        lambda w, _: w.update(shape=[2**40], pieces=[w["pieces"][0] | {"offsets": [0], "shape": [2**40], "bytes": 2**42}]),
        "and the index",
    ),
    "other bytes": (lambda w, _: w["pieces"][0].update(bytes=10), "needs 24 bytes"),
    "behind the end": (lambda w, _: w["pieces"][0].update(begin=10**6), "ends behind its file"),
    "another folder": (lambda w, _: w["pieces"][0].update(file="../step-4/index.json"), "no plain file name"),
    "no file": (lambda w, _: w["pieces"][0].update(file="x"), "x is missing"),
    "negative": (lambda w, _: w["pieces"][0].update(begin=-8), "is no list of sizes"),
    "huge": (lambda w, _: w.update(shape=[2**70]), "is no list of sizes"),
    "no numbers": (lambda w, _: w.update(shape="23"), "is no list of sizes"),
    "other type": (lambda w, _: w.update(dtype="object"), "of type 'object'"),
    "a bool": (lambda w, _: w["pieces"][0].update(begin=True), "is no list of sizes"),
    "malformed": (lambda w, _: w.pop("pieces"), "malformed"),
    "a list": (lambda _, index: index.update(tensors=[1]), "malformed"),
    "format": (lambda _, index: index.update(format="x"), "is not of the format"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_index_that_does_not_account_for_every_element_is_refused(held, name):
    change, said = EDITS[name]
    edited(held, change)
    for read in (checkpoint.load, lambda path: checkpoint.restore(path, dict(TENSORS), None, "it")):
        with pytest.raises(UsageError, match=f"damaged or incomplete.*{said}"):
            read(held)


def test_many_tensors_cannot_share_the_same_bytes(held):
    """Or a small file would become a terabyte."""

    def change(w, index):
        index["tensors"] |= {f"model.w{i}": w for i in range(100)}

    edited(held, change)
    with pytest.raises(UsageError, match="bytes and the index"):
        checkpoint.load(held)


def test_pieces_may_lie_anywhere_as_long_as_they_tile_the_tensor(held):
    edited(held, lambda w, _: cut_in_two(w, {"offsets": [1, 0], "begin": w["pieces"][0]["begin"] + 12}))
    assert same(checkpoint.load(held))


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "null", '{"files": 3}', '{"files": {"../x": {}}}', '{"files": {}}']
)
def test_a_meta_json_of_junk_is_one_error(held, text):
    (held / "meta.json").write_text(text)
    with pytest.raises(UsageError, match="damaged or incomplete"):
        checkpoint.load(held)


def test_a_device_in_the_place_of_a_file_is_not_read(held):
    (held / "state.safetensors").unlink()
    (held / "state.safetensors").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"state\.safetensors is not what was written"):
        checkpoint.load(held)


# ---- the reader of pickles ------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_reads_as_pickle_reads_it(protocol):
    value = {
        "a": [1, -(2**70), 2.5, None, True, False],
        "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "c": {3: "\u00fc"},
    }
    value["shared"] = [value["a"], value["a"]]
    assert pickles.read(pickle.dumps(value, protocol)) == value


HOSTILE = {
    "code": pickle.dumps(Evil()),
    "attributes of a global": b"\x80\x02cos\nsystem\nN}\x86b.",
    "attributes twice": b"\x80\x02cos\nsystem\n)\x81}b}b.",
    "persistent id": b"\x80\x02Pabc\n.",
    "extension": b"\x80\x02\x82\x01.",
    "huge memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "huge bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"abc.",
    "huge bytearray": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f" + b"abc.",
    "key that hashes for ever": b"\x80\x02}" + b")2\x86" + b"2\x86" * 60 + b"Ns.",
    "no end": b"\x80\x02N",
    "empty": b"",
    "mark as value": b"(.",
    "two values": b"NN.",
    "underflow": b"\x80\x02\x87.",
    "call of a call": b"\x80\x02cos\nsystem\n)R)R.",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_or_comes_back_inert(name, nothing_runs):
    try:
        read = pickles.read(HOSTILE[name])
    except pickles.PickleError:
        return
    assert name in ("code", "huge memo") and (read is None or isinstance(read, pickles.Record))
