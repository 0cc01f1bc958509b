"""Decoding on the device, against a stand-in that keeps to what torchvision.io.decode_jpeg promises of a list."""

import inspect
import sys

import numpy as np
import pytest
import torch

from jepa_fast.config import check, replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.loading.loader import Loader
from jepa_fast.data.readers import images, nvjpeg
from jepa_fast.data.readers.nvjpeg import DeviceDecoder
from jepa_fast.data.shards.writer import write_shards
from jepa_fast.errors import UsageError
from jepa_fast.presets import preset
from tests.real_libraries import require
from tests.test_images import encoded, photograph

CPU = torch.device("cpu")


class Recorded:
    """decode_jpeg of a list: 1-D uint8 tensors on the host in, uint8 [C, H, W] out; RuntimeError if any is damaged."""

    def __init__(self):
        self.calls = []

    def __call__(self, input, mode, device):
        assert mode in ("RGB", "GRAY") and device == CPU and isinstance(input, list)
        assert all(one.dtype == torch.uint8 and one.dim() == 1 and one.device == CPU for one in input)
        self.calls.append(len(input))
        try:
            decoded = [images.decode(one.numpy().tobytes(), 3 if mode == "RGB" else 1)[0] for one in input]
        except images.BadSample as error:
            raise RuntimeError(f"nvjpegDecode failed: {error}") from None
        return [torch.from_numpy(pixels).permute(2, 0, 1).contiguous() for pixels in decoded]


def config(folder, **changes):
    return replace(
        preset("images"),
        {"data.path": str(folder), "data.image_size": 64, "data.workers": 2, "train.batch_size": 12,
         "data.max_bad_share": 0.2, "masks.min_keep": 1, **changes},
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """JPEGs, and among them a PNG, inks and a JPEG that ends early."""

    def samples():
        for i in range(40):
            pixels = photograph(70 + i, 130 - i)
            kind = {5: "PNG", 9: "JPEG"}.get(i, "JPEG")
            data = encoded(pixels, kind, "CMYK" if i == 9 else None)
            yield {"__key__": f"{i:04}", "png" if i == 5 else "jpg": data[:-400] if i == 20 else data}

    return write_shards(tmp_path / "d", {"train": samples()}, "n")


def batches(made, stop=7):
    held = Loader(made, open_dataset(made).train, 3, 0, 1, 0, stop)
    try:
        return list(held), held.bad
    finally:
        held.close()


@pytest.mark.parametrize("random_crop", [True, False])
def test_the_same_batches_come_within_a_step_and_what_it_refuses_by_the_cpu(folder, monkeypatch, random_crop):
    made, recorded = config(folder, **{"data.random_crop": random_crop}), Recorded()
    expected, bad = batches(made)
    monkeypatch.setattr(nvjpeg, "device_decoder", lambda data: DeviceDecoder(data, CPU, recorded))
    got, as_bad = batches(replace(made, {"data.decoder": "nvjpeg"}))
    for ours, reference in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours.samples, reference.samples)
        assert ours.inputs.dtype == torch.uint8 and ours.inputs.shape == reference.inputs.shape
        difference = (ours.inputs.int() - reference.inputs.int()).abs()
        assert difference.max() <= 1
    assert [(one.key, one.kind) for one in bad] == [(one.key, one.kind) for one in as_bad]
    assert [one.key for one in bad] == ["n-train-0000.tar:0020"]
    assert max(recorded.calls) >= 10, "one call a batch"


def test_one_channel_is_asked_for_as_grey(folder, monkeypatch):
    made = config(folder, **{"data.channels": 1, "data.mean": (0.5,), "data.std": (0.2,), "data.decoder": "nvjpeg"})
    monkeypatch.setattr(nvjpeg, "device_decoder", lambda data: DeviceDecoder(data, CPU, Recorded()))
    assert batches(made, stop=1)[0][0].inputs.shape == (12, 1, 64, 64)


def test_probes_are_decoded_on_the_cpu(folder):
    made = config(folder, **{"data.decoder": "nvjpeg"})
    assert open_dataset(made).train.load(0, None).shape == (3, 64, 64)


def test_without_cuda_or_torchvision_it_is_refused_with_the_mend(folder, monkeypatch):
    made = config(folder, **{"data.decoder": "nvjpeg"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"needs a CUDA device.*--data.decoder cpu"):
        Loader(made, open_dataset(made).train, 0, 0, 1, 0, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(UsageError, match=r"needs torchvision built for torch .*install it, or use --data.decoder cpu"):
        nvjpeg.device_decoder(made.data)


def test_a_series_has_no_jpegs():
    with pytest.raises(UsageError, match=r"data\.decoder is .nvjpeg."):
        check(replace(preset("demo"), {"data.decoder": "nvjpeg"}))


def test_torchvision_takes_what_the_stand_in_takes():
    require("torchvision")
    from torchvision.io import decode_jpeg

    assert {"input", "mode", "device"} <= set(inspect.signature(decode_jpeg).parameters)
