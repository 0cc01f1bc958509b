"""The generated set at ImageNet's scale: valid shards, and a loader that keeps its promises on many of them."""

import json
import tarfile

import numpy as np
import pytest

from benchmarks.imagenet_scale import generate, measure, processes
from jepa_fast.data.loading.order import Order
from jepa_fast.data.readers import images
from jepa_fast.data.shards.paths import find
from jepa_fast.data.shards.reader import Shards


def test_the_shards_are_what_tarfile_reads(tmp_path):
    generate(tmp_path, 50, 3)
    found = find(str(tmp_path))["train"]
    held = Shards(found.files, found.lengths)
    assert len(held) == 50 and not held.lost and [len(part) for part in held.indexes] == found.lengths == [16, 17, 17]
    with tarfile.open(tmp_path / "imagenet1k-train-0001.tar") as tar:
        about = json.load(tar.extractfile("00000020.json"))
        assert int(tar.extractfile("00000020.cls").read()) == about["label"] == held.labels[20]
        assert tar.extractfile("00000020.jpg").read() == held.read(20)
    assert images.decode(held.read(49), 3)[0].shape == (16, 16, 3)


@pytest.mark.slow
def test_twenty_thousand_samples_in_128_shards_by_one_process_and_four(tmp_path):
    generate(tmp_path, 20_000, 128)
    cold = measure(tmp_path, 0)
    assert cold["open_files"] <= 128 and len(list(tmp_path.glob(".*.idx"))) == 128
    found = find(str(tmp_path))["train"]
    held = Shards(found.files, found.lengths)
    numbers = Order(len(held), 256, 0, 2048).permutation(0)
    assert sorted(numbers) == list(range(20_000))
    keys = {held.key(int(i)) for i in numbers}
    assert len(keys) == 20_000
    np.testing.assert_array_equal(held.labels, np.arange(20_000) * 7919 % 1000)
    for kept in tmp_path.glob(".*.idx"):
        kept.unlink()
    answers = processes(tmp_path, 4)
    assert len(answers) == 4 and all(answer["private_bytes"] < 64e6 for answer in answers)
