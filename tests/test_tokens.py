"""Inputs to tokens: patches, positions, kept tokens, and what is refused."""

import pytest
import torch

from jepa_fast.config import check, replace
from jepa_fast.inputs.images import patchify_images
from jepa_fast.inputs.series import patchify_series
from jepa_fast.model.jepa import JEPA
from jepa_fast.model.tokens import sincos_table
from jepa_fast.presets import preset


def _small(name):
    sizes = {"model.width": 32, "model.heads": 2, "model.predictor_width": 16, "model.predictor_heads": 2}
    return check(replace(preset(name), sizes))


def test_other_resolutions_take_positions_from_the_same_extent():
    encoder = JEPA(_small("digits")).context_encoder  # 8 x 8 tokens
    assert torch.equal(sincos_table((8, 8), 32, (8, 8)), encoder.positions)
    finer = sincos_table((16, 8), 32, (8, 8)).view(16, 8, 32)
    row = torch.tensor([(5 + 0.5) / 2 - 0.5])  # row 5 of 16, on the 8 that were trained
    torch.testing.assert_close(finer[5, 0, 16], row.sin()[0])
    for height, width in ((64, 64), (32, 48), (24, 32)):
        images = torch.randn(2, 1, height, width)
        tokens = height // 4 * (width // 4)
        whole = encoder(images)
        assert whole.shape == (2, tokens, 32)
        table = sincos_table((height // 4, width // 4), 32, (8, 8))
        patches = encoder.tokenizer(images)
        torch.testing.assert_close(whole, encoder._dense(patches, table.expand(2, -1, -1)))
        keep = torch.tensor([[tokens - 1, 3], [0, 1]])
        assert encoder(images, keep).shape == (2, 2, 32)
    # A smooth input of twice the size looks alike to the encoder: pooled features stay near.
    images = torch.nn.functional.interpolate(torch.randn(4, 1, 8, 8), size=32, mode="bicubic")
    larger = torch.nn.functional.interpolate(images, size=64, mode="bicubic")
    near = torch.nn.functional.cosine_similarity(encoder(images).mean(1), encoder(larger).mean(1)).min()
    assert near > 0.8


def test_patches_keep_every_pixel_in_raster_order():
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8)
    patches = patchify_images(images, 4)
    assert patches.shape == (2, 4, 48)
    assert torch.equal(patches[1, 1].view(3, 4, 4), images[1, :, :4, 4:])
    series = torch.arange(23).view(1, 1, 23)
    assert patchify_series(series, 5).tolist() == [
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    ]
    with pytest.raises(ValueError, match=r"30 x 32.*patch size 4"):
        patchify_images(torch.zeros(1, 1, 30, 32), 4)
    with pytest.raises(ValueError, match=r"3 samples.*5 patches"):
        patchify_series(torch.zeros(1, 1, 3), 5)


def test_positions_are_ijepas_fixed_table():
    table = sincos_table((2, 3), 8)
    assert torch.equal(
        table[4, :2], torch.tensor([1.0, 1.0 / 100]).sin()
    )  # token 4 is row 1, column 1: the column first
    assert torch.equal(table[5, :2], torch.tensor([2.0, 2.0 / 100]).sin())
    assert torch.equal(table[5, 4:6], torch.tensor([1.0, 1.0 / 100]).sin())
    assert "positions" not in JEPA(_small("demo")).context_encoder.state_dict()


def test_keep_is_checked():
    encoder, images = JEPA(_small("digits")).context_encoder, torch.zeros(2, 1, 32, 32)
    with pytest.raises(ValueError, match="64"):
        encoder(images, torch.tensor([[0, 64], [0, 1]]))
    with pytest.raises(ValueError, match="twice"):
        encoder(images, torch.tensor([[0, 1], [5, 5]]))
    for wrong in (torch.tensor([[0, 1]]), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"\[2, K\]"):
            encoder(images, wrong)
    model = JEPA(_small("digits")).predictor
    keep = torch.tensor([[0, 1], [5, 6]])
    with pytest.raises(ValueError, match="target_index holds token 64"):
        model(torch.zeros(2, 2, 32), keep, torch.tensor([[0], [64]]))
    with pytest.raises(ValueError, match="3 tokens an image, context_index 2"):
        model(torch.zeros(2, 3, 32), keep, keep)


def test_kept_patches_are_cut_alone_and_are_those_of_the_whole():
    tokenizer = JEPA(_small("digits")).context_encoder.tokenizer
    raw = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    keep = torch.tensor([[63, 0, 17], [8, 9, 1]])
    assert torch.equal(tokenizer(raw, keep), tokenizer(raw).gather(1, keep[..., None].expand(-1, -1, 16)))
    series, keep = torch.randn(2, 3, 47), torch.tensor([[3, 0], [1, 2]])
    assert torch.equal(
        patchify_series(series, 5, keep), patchify_series(series, 5).gather(1, keep[..., None].expand(-1, -1, 27))
    )


def test_uint8_images_are_normalised_and_floats_are_taken_as_they_are():
    tokenizer = JEPA(_small("digits")).context_encoder.tokenizer
    raw = torch.randint(0, 256, (1, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(tokenizer(raw), tokenizer((raw.float() / 255 - 0.31) / 0.32))


def test_inputs_of_other_channels_lengths_or_widths_are_refused():
    jepa = JEPA(_small("digits"))
    with pytest.raises(ValueError, match=r"patches of 48 numbers.*built for 16.*channels"):
        jepa.context_encoder(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"patches of 40 numbers.*built for 50.*length"):
        JEPA(_small("demo")).context_encoder(torch.zeros(2, 1, 400))
    with pytest.raises(ValueError, match=r"context must be \[B, K, 32\]; it is \[2, 2, 16\]"):
        jepa.predictor(torch.zeros(2, 2, 16), torch.tensor([[0, 1]] * 2), torch.tensor([[2]] * 2))
    with pytest.raises(ValueError, match="at least one"):
        jepa.context_encoder(torch.zeros(0, 1, 32, 32))
    with pytest.raises(ValueError, match="int32; give uint8"):  # pixels of 0 to 255 would be taken for normalised ones
        jepa.context_encoder(torch.zeros(2, 1, 32, 32, dtype=torch.int32))


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"max_len": 3}, "max_len is 3, but a sequence has 4 tokens"),  # would read its neighbours' tokens
        ({"positions": torch.tensor([0, 1, 2, 3, 4, -1])}, "token -1; an input has tokens 0 to 63"),
        ({"positions": torch.arange(5)}, r"6 packed patches and positions of \[5\]"),
        ({"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)}, r"rise from 0 to the 6.*\[0, 2, 5\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6], dtype=torch.int32)}, "must rise"),
    ],
)
def test_packed_tokens_that_do_not_fit_together_are_refused(wrong, says):
    right = {"positions": torch.arange(6), "cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32), "max_len": 4}
    encoder = JEPA(_small("digits")).context_encoder
    assert encoder.packed(torch.zeros(6, 16), **right).shape == (6, 32)
    with pytest.raises(ValueError, match=says):
        encoder.packed(torch.zeros(6, 16), **right | wrong)


@pytest.mark.parametrize("name, shape", [("digits", (2, 1, 32, 32)), ("demo", (2, 1, 500))])
def test_inputs_take_the_precision_of_the_weights(name, shape):
    encoder, inputs = JEPA(_small(name)).context_encoder, torch.randn(*shape, dtype=torch.float64)
    single = encoder(inputs)
    double = encoder.double()(inputs)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
