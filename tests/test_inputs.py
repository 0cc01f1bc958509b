"""A kind of input is one record: a third one, said in this file alone, trains."""

from pathlib import Path

import numpy as np
import pytest
import torch

from jepa_fast import inputs, train
from jepa_fast.config import Config, check, replace
from jepa_fast.data.by_kind import READERS, KindReader
from jepa_fast.data.opened import Opened
from jepa_fast.data.readers.series import SeriesSource
from jepa_fast.errors import UsageError
from jepa_fast.log import read


class Spectrograms(inputs.Kind):
    """float32 [1, frequencies, times], cut into squares: neither an image (no uint8) nor a series (a 2-D grid)."""

    name, method = "spectrograms", "SG-JEPA"
    mask_modes = ("packed", "random")
    dtype, augmented = torch.float32, False

    def grid(self, config):
        return 6, config.data.series_length // config.model.patch

    def patch_dim(self, config):
        return config.model.patch**2

    def patch_size(self, config):
        return config.model.patch

    def shape(self, config):
        return 1, 6 * config.model.patch, config.data.series_length

    def check(self, config, require):
        require(config.data.channels == 1, "data.channels", config.data.channels, "a spectrogram has one channel")

    def grid_of(self, inputs, size):
        return inputs.shape[2] // size, inputs.shape[3] // size

    def cut(self, inputs, size, mean, std, keep=None):
        b, _, f, t = inputs.shape
        patches = inputs.reshape(b, f // size, size, t // size, size).transpose(2, 3).reshape(b, -1, size**2)
        return patches if keep is None else patches.gather(1, keep[..., None].expand(-1, -1, size**2))

    def misfit(self, shape, size, patch_dim, num_tokens):
        return ""

    def preprocessing(self, config):
        return "Spectrograms as they are."


def open_generated(path, data):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(64, 1, 24, data.series_length)).astype(np.float32)
    labels = np.arange(64) % 2
    values[labels == 1, :, :8] *= 3
    return Opened(SeriesSource(values.__getitem__, str, 64, labels), None, {path: "64 spectrograms"})


@pytest.fixture
def third_kind(monkeypatch):
    monkeypatch.setitem(inputs.KINDS, "spectrograms", Spectrograms())
    monkeypatch.setitem(READERS, "spectrograms", KindReader(("npz",), open_generated, lambda first, data: None))


ARGUMENTS = [
    "--data.kind", "spectrograms", "--data.path", ".", "--data.channels", "1", "--data.series_length", "32",
    "--model.patch", "4", "--model.width", "16", "--model.predictor_width", "16", "--masks.mode", "packed",
    "--masks.min_keep", "4", "--train.steps", "5", "--train.batch_size", "8", "--log.every", "1",
    "--monitor.every", "5", "--run.dir", "x",
]  # fmt: skip


@pytest.mark.usefixtures("third_kind")
def test_a_third_kind_trains_without_a_change_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(ARGUMENTS) == 0
    records = read(Path("x/metrics.jsonl"))
    losses = [r["loss"] for r in records if "loss" in r and r["step"]]
    assert len(losses) == 5 and np.isfinite(losses).all() and losses[-1] < losses[0]
    assert 0 < records[-1]["probe/target"] <= 1


@pytest.mark.usefixtures("third_kind")
def test_a_third_kind_has_its_own_grid_masks_and_checks():
    config = replace(Config(), {"data.kind": "spectrograms", "data.channels": 1, "data.series_length": 32})
    config = replace(config, {"model.patch": 4, "masks.mode": "packed"})
    assert check(config).grid == (6, 8) and config.num_tokens == 48 and config.patch_dim == 16
    with pytest.raises(UsageError, match=r"--masks.mode is 'bernoulli': spectrograms take packed, random"):
        check(replace(config, {"masks.mode": "bernoulli"}))
    with pytest.raises(UsageError, match="one channel"):
        check(replace(config, {"data.channels": 3}))


def test_a_kind_that_is_not_known_is_named_with_those_that_are():
    with pytest.raises(
        UsageError, match=r"--data.kind is 'image' \(did you mean images\?\): give one of images, series"
    ):
        check(replace(Config(), {"data.kind": "image"}))


@pytest.mark.parametrize("name", sorted(inputs.KINDS))
def test_examples_are_cut_into_the_tokens_that_the_configuration_counts(name):
    changes = {"data.kind": name, "data.image_size": 32, "data.channels": 3, "masks.mode": "random"}
    kind, config = inputs.find(name), check(replace(Config(), changes))
    for example in (kind.example(config, 2), kind.example(config, 2, torch.Generator().manual_seed(0))):
        assert example.shape == (2, *kind.shape(config)) and example.dtype == kind.dtype
        size = kind.patch_size(config)
        mean, std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        assert kind.grid_of(example, size) == config.grid
        patches = kind.cut(example, size, mean, std)
        assert patches.shape == (2, config.num_tokens, config.patch_dim)
        keep = torch.tensor([[1, 3], [0, 2]])
        assert torch.equal(kind.cut(example, size, mean, std, keep), patches[torch.arange(2)[:, None], keep])
        assert kind.misfit(kind.shape(config), size, config.patch_dim, config.num_tokens) == ""
        assert kind.misfit((3, 1), size, config.patch_dim, config.num_tokens) != ""
