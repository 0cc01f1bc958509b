"""CIFAR's pickles are read without running them, whoever wrote them."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from jepa_fast.data.readers import cifar
from jepa_fast.errors import UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)


def archive(folder, blob):
    for name in ("train", "test"):
        (folder / name).write_bytes(blob)
    return folder


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("labels", [[0, 7, 99], np.array([0, 7, 99]), np.array([0, 7, 99], ">i4")])
def test_batches_of_every_protocol_hold_what_was_pickled(tmp_path, protocol, labels):
    for pixels in (PIXELS, np.asfortranarray(PIXELS)):
        folder = archive(tmp_path, pickle.dumps({"data": pixels, "fine_labels": labels, "x": None}, protocol))
        got, its_labels = cifar.load(folder)["train"]
        assert got.shape == (3, 32, 32, 3) and its_labels.tolist() == [0, 7, 99]
        np.testing.assert_array_equal(got.transpose(0, 3, 1, 2).reshape(3, 3072), PIXELS)


def test_batches_as_python_2_wrote_them(tmp_path):
    """Protocol 2 with byte strings, which is what the published archives hold."""

    def text(raw):
        return b"T" + len(raw).to_bytes(4, "little") + raw

    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    state = b"(K\x01K\x03M\x00\x0c\x86" + dtype + b"\x89" + text(PIXELS.tobytes()) + b"tb"
    labels = b"](K\x00K\x07Kce"
    archive(tmp_path, b"\x80\x02}(" + text(b"data") + array + state + text(b"fine_labels") + labels + b"u.")
    got, its_labels = cifar.load(tmp_path)["test"]
    assert its_labels.tolist() == [0, 7, 99]
    np.testing.assert_array_equal(got.transpose(0, 3, 1, 2).reshape(3, 3072), PIXELS)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def objects(code):
    """An array whose dtype says that its bytes are pointers."""
    blob = pickle.dumps({"data": PIXELS, "fine_labels": [0, 1, 2]}, 2)
    return blob.replace(b"X\x02\x00\x00\x00u1", b"X\x02\x00\x00\x00" + code)


HOSTILE = {
    "code": pickle.dumps({"data": Evil(), "fine_labels": [0]}),
    "labels of code": pickle.dumps({"data": PIXELS, "fine_labels": Evil()}),
    "pointers": objects(b"O8"),
    "floats": objects(b"f8"),
    "no dict": pickle.dumps([1]),
    "no data": pickle.dumps({}),
    "objects": pickle.dumps({"data": np.array([{}, []], object), "fine_labels": [0]}),
    "structured": pickle.dumps({"data": np.zeros(3, "u1,O"), "fine_labels": [0]}),
    "another shape": pickle.dumps({"data": PIXELS[:, :-1], "fine_labels": [0, 1, 2]}),
    "wider": pickle.dumps({"data": PIXELS.astype(np.int64), "fine_labels": [0, 1, 2]}),
    "huge label": pickle.dumps({"data": PIXELS, "fine_labels": [2**80, 1, 2]}),
    "module": b"\x80\x02}(X\x04\x00\x00\x00datacnumpy.f2py.f2py2e\nmain\n)RX\x0b\x00\x00\x00fine_labels]u.",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_anything_else_is_refused_and_nothing_is_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="train is not a CIFAR batch"):
        cifar.load(archive(tmp_path, HOSTILE[name]))
    assert not Path("executed").exists()


def test_a_cut_or_flipped_batch_is_one_error_or_other_pixels(tmp_path):
    blob = pickle.dumps({"data": PIXELS[:1], "fine_labels": [5]}, 2)
    rng = np.random.default_rng(1)
    for _ in range(150):
        changed = bytearray(blob[: rng.integers(1, len(blob))] if rng.random() < 0.5 else blob)
        for at in rng.integers(0, min(300, len(changed)), 3):
            changed[at] = rng.integers(256)
        try:
            cifar.load(archive(tmp_path, bytes(changed)))
        except UsageError as error:
            assert "\n" not in str(error)
