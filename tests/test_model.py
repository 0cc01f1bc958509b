"""The packed model against an independent, dense, float64 implementation written from the equations."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from jepa_fast.config import replace
from jepa_fast.data.masks import sample_masks
from jepa_fast.data.packing import plan
from jepa_fast.model.attention import Sequences, attend
from jepa_fast.model.jepa import JEPA, token_loss
from jepa_fast.model.tokens import patchify_images, patchify_series, sincos_table
from jepa_fast.presets import preset

# ---- the dense reference: one image at a time, no packing, no fused attention ------------------------


def _norm(x, layer):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight.double() + layer.bias.double()


def _linear(x, layer):
    return x @ layer.weight.double().T + layer.bias.double()


def _block(x, block, heads):
    _n, width = x.shape
    q, k, v = _linear(_norm(x, block.norm1), block.attn.qkv).split(width, dim=1)
    out = []
    for h in range(heads):
        part = slice(h * width // heads, (h + 1) * width // heads)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width // heads)
        out.append(scores.softmax(-1) @ v[:, part])
    x = x + _linear(torch.cat(out, 1), block.attn.proj)
    hidden = _linear(_norm(x, block.norm2), block.mlp.fc1)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + _linear(hidden, block.mlp.fc2)


def _encode(encoder, patches, index, heads):
    x = _linear(patches[index], encoder.patch_embed) + encoder.positions.double()[index]
    for block in encoder.blocks:
        x = _block(x, block, heads)
    return _norm(x, encoder.norm)


def _predict(predictor, context, context_index, target_index, heads):
    table = predictor.positions.double()
    x = torch.cat(
        [
            _linear(context, predictor.embed) + table[context_index],
            predictor.mask_token.double().view(-1) + table[target_index],
        ]
    )
    for block in predictor.blocks:
        x = _block(x, block, heads)
    return _linear(_norm(x[len(context_index) :], predictor.norm), predictor.proj)


def _dense_loss(jepa, config, patches, masks):
    """Equation 2 (or smooth-L1): mean over images of the mean over an image's target tokens."""
    heads, every = config.model.heads, torch.arange(config.num_tokens)
    losses, at_context, at_target = [], 0, 0
    for image, (kept, size) in enumerate(zip(masks.context_lengths, masks.target_lengths, strict=True)):
        visible = torch.from_numpy(masks.context[at_context : at_context + kept])
        context = _encode(jepa.context_encoder, patches[image], visible, heads)
        with torch.no_grad():
            target = _encode(jepa.target_encoder, patches[image], every, heads)
            mean, var = target.mean(-1, keepdim=True), target.var(-1, unbiased=False, keepdim=True)
            target = (target - mean) / (var + 1e-5).sqrt()
        mine = []
        for _ in range(masks.num_targets):
            hidden = torch.from_numpy(masks.targets[at_target : at_target + size])
            error = _predict(jepa.predictor, context, visible, hidden, heads) - target[hidden]
            if config.objective.loss == "smooth_l1":
                mine.append(torch.where(error.abs() < 1, 0.5 * error**2, error.abs() - 0.5).mean())
            else:
                mine.append((error**2).mean() if config.objective.loss == "l2" else error.abs().mean())
            at_target += size
        losses.append(torch.stack(mine).mean())
        at_context += kept
    return torch.stack(losses).mean()


def _small(name, **changes):
    sizes = {
        "model.width": 32,
        "model.heads": 2,
        "model.depth": 2,
        "model.predictor_width": 16,
        "model.predictor_heads": 2,
        "model.init_std": 0.2,
    }
    return replace(preset(name), sizes | changes).check()


def _masks(config, batch, seed=0):
    return sample_masks(config.masks, config.grid, seed, 0, np.zeros(batch, np.int64), np.arange(batch), 0, batch)


@pytest.mark.parametrize("loss", ["l2", "smooth_l1", "l1"])
@pytest.mark.parametrize("mode", ["reference", "fixed", "subsampled", "packed", "random", "bernoulli"])
def test_loss_and_gradients_equal_the_dense_float64_model(mode, loss):
    series = mode in ("random", "bernoulli")
    config = _small("demo" if series else "digits", **{"masks.mode": mode, "masks.group": 3, "objective.loss": loss})
    torch.manual_seed(0)
    jepa = JEPA(config)
    with torch.no_grad():  # the target differs from the context encoder, as in training
        for p in jepa.target_encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    inputs = torch.randn(5, 1, 500) if series else torch.randn(5, 1, 32, 32)
    masks = _masks(config, 5)

    packed = jepa(inputs, plan(masks, config.num_tokens)).loss
    packed.backward()
    got = {n: p.grad.clone() for n, p in jepa.named_parameters() if p.grad is not None}
    jepa.zero_grad()
    dense = _dense_loss(jepa, config, jepa.context_encoder.tokenizer(inputs).double(), masks)
    dense.backward()

    torch.testing.assert_close(packed.double(), dense, rtol=1e-5, atol=1e-6)
    scale = max(p.grad.abs().max() for p in jepa.parameters() if p.grad is not None)
    for name, p in jepa.named_parameters():
        assert (p.grad is None) == (name not in got), name
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-5 * float(scale), msg=name)


def test_the_target_encoder_gets_no_gradient_and_starts_equal_to_the_context_encoder():
    jepa = JEPA(_small("demo"))
    for a, b in zip(jepa.context_encoder.parameters(), jepa.target_encoder.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and not b.requires_grad


def test_a_samples_features_do_not_depend_on_its_neighbours():
    config = _small("digits")
    jepa = JEPA(config)
    masks, images = _masks(config, 6), torch.randn(6, 1, 32, 32)
    whole = jepa(images, plan(masks, 64)).context
    kept = masks.context_lengths[0]
    alone = jepa.context_encoder(images[:1], torch.from_numpy(masks.context[:kept])[None])
    torch.testing.assert_close(whole[:kept], alone[0], rtol=1e-5, atol=1e-5)


def test_packed_and_dense_interfaces_of_encoder_and_predictor_agree():
    config = _small("digits")
    jepa = JEPA(config)
    images = torch.randn(3, 1, 32, 32)
    keep = torch.stack([torch.randperm(64)[:20].sort().values for _ in range(3)])
    dense = jepa.context_encoder(images, keep)
    patches = jepa.context_encoder.tokenizer(images).gather(1, keep[..., None].expand(-1, -1, 16)).flatten(0, 1)
    packed = jepa.context_encoder.packed(patches, keep.flatten(), torch.arange(4, dtype=torch.int32) * 20, 20)
    torch.testing.assert_close(dense.flatten(0, 1), packed)
    prediction = jepa.predictor(dense, keep, torch.arange(7).expand(3, 7))
    assert prediction.shape == (3, 7, 32)


def test_ragged_attention_equals_one_sequence_at_a_time():
    lengths = [1, 7, 3, 12]
    q, k, v = torch.randn(3, sum(lengths), 2, 8).unbind(0)
    cu = torch.tensor([0, 1, 8, 11, 23], dtype=torch.int32)
    got = attend(q, k, v, Sequences.of(cu, 12, 23))
    for a, b in itertools.pairwise(cu):
        scores = torch.einsum("nhd,mhd->hnm", q[a:b], k[a:b]) / math.sqrt(8)
        torch.testing.assert_close(
            got[a:b], torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v[a:b]), rtol=1e-4, atol=1e-5
        )


def test_hidden_pixels_do_not_reach_the_context():
    config = _small("digits")
    jepa, masks = JEPA(config), _masks(_small("digits"), 2)
    images = torch.randn(2, 1, 32, 32)
    before = jepa(images, plan(masks, 64)).context
    hidden = np.setdiff1d(np.arange(64), masks.context[: masks.context_lengths[0]])
    row, column = divmod(int(hidden[0]), 8)
    images[0, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = torch.nan
    assert torch.equal(before, jepa(images, plan(masks, 64)).context)


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
    with pytest.raises(ValueError, match=r"\[2, K\]"):
        encoder(images, torch.tensor([[0, 1]]))


def test_initial_weights_are_truncated_normal_without_depth_rescale():
    jepa = JEPA(replace(preset("digits"), {"model.depth": 6}))
    for block in jepa.context_encoder.blocks:
        assert abs(float(block.attn.proj.weight.detach().std()) - 0.02) < 1e-3
        assert float(block.attn.proj.bias.detach().abs().max()) == 0
    scaled = JEPA(replace(preset("digits"), {"model.depth": 6, "model.depth_scaled_init": True}))
    assert float(scaled.context_encoder.blocks[5].mlp.fc2.weight.detach().std()) == pytest.approx(
        0.02 / math.sqrt(12), rel=0.05
    )


def test_losses_are_what_their_names_say():
    a, b = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.5, 0.0]])
    assert float(token_loss(a, b, "l2")) == pytest.approx((0.25 + 9) / 2)
    assert float(token_loss(a, b, "l1")) == pytest.approx(1.75)
    assert float(token_loss(a, b, "smooth_l1")) == pytest.approx((0.125 + 2.5) / 2)


def test_uint8_images_are_normalised_and_floats_are_taken_as_they_are():
    tokenizer = JEPA(_small("digits")).context_encoder.tokenizer
    raw = torch.randint(0, 256, (1, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(tokenizer(raw), tokenizer((raw.float() / 255 - 0.31) / 0.32))


def test_every_preset_builds_on_meta_and_has_the_size_its_name_says():
    sizes = {"in1k-vitb16": 85.6e6, "in1k-vitl16": 303.1e6, "in1k-vith14": 630.4e6}
    for name in ("in1k-vitb16", "in1k-vitl16", "in1k-vith14"):
        with torch.device("meta"):
            jepa = JEPA(preset(name))
        assert sum(p.numel() for p in jepa.context_encoder.parameters()) == pytest.approx(sizes[name], rel=5e-3)
    assert dataclasses.is_dataclass(preset("demo"))
