"""The packed model against an independent, dense, float64 implementation written from the equations."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from jepa_fast.config import check, replace
from jepa_fast.errors import UsageError
from jepa_fast.masks.ladder import Ladder
from jepa_fast.masks.packing import plan
from jepa_fast.masks.sample import MaskBatch, sample_masks
from jepa_fast.model import predictor, vit
from jepa_fast.model.attention import Sequences, attend
from jepa_fast.model.jepa import JEPA, token_loss
from jepa_fast.model.targets import regress
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


def _dense(jepa, config, patches, masks):
    """(loss, context features, target features, predictions): equation 2 (or smooth-L1), mean over images and tokens."""
    heads, every = config.model.heads, torch.arange(config.num_tokens)
    narrow = config.model.predictor_heads or heads
    losses, contexts, targets, predictions, at_context, at_target = [], [], [], [], 0, 0
    for image, (kept, size) in enumerate(zip(masks.context_lengths, masks.target_lengths, strict=True)):
        visible = torch.from_numpy(masks.context[at_context : at_context + kept])
        context = _encode(jepa.context_encoder, patches[image], visible, heads)
        with torch.no_grad():
            target = _encode(jepa.target_encoder, patches[image], every, heads)
            mean, var = target.mean(-1, keepdim=True), target.var(-1, unbiased=False, keepdim=True)
            normed = (target - mean) / (var + 1e-5).sqrt()
        mine = []
        for _ in range(masks.num_targets):
            hidden = torch.from_numpy(masks.targets[at_target : at_target + size])
            predictions.append(_predict(jepa.predictor, context, visible, hidden, narrow))
            error = predictions[-1] - normed[hidden]
            if config.objective.loss == "smooth_l1":
                mine.append(torch.where(error.abs() < 1, 0.5 * error**2, error.abs() - 0.5).mean())
            else:
                mine.append((error**2).mean() if config.objective.loss == "l2" else error.abs().mean())
            at_target += size
        losses.append(torch.stack(mine).mean())
        contexts.append(context)
        targets.append(target)
        at_context += kept
    return torch.stack(losses).mean(), torch.cat(contexts), torch.stack(targets), torch.cat(predictions)


def _assert_close(got, expected, tolerance=1e-5):
    """To `tolerance` of the largest value."""
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, float(error)


def _small(name, **changes):
    sizes = {
        "model.width": 32,
        "model.heads": 2,
        "model.depth": 2,
        "model.predictor_width": 16,
        "model.predictor_heads": 2,
        "model.init_std": 0.2,
    }
    return check(replace(preset(name), sizes | changes))


def _masks(config, batch, seed=0):
    return sample_masks(config.masks, config.grid, seed, 0, np.zeros(batch, np.int64), np.arange(batch), 0, batch)


MODES = ["reference", "fixed", "subsampled", "packed", "random", "bernoulli"]


def _pair(mode, loss="smooth_l1", batch=5, **changes):
    """(config, jepa with a target encoder of its own, inputs, masks)."""
    series = mode in ("random", "bernoulli")
    config = _small(
        "demo" if series else "digits",
        **{"masks.mode": mode, "masks.group": 3, "objective.loss": loss, "model.predictor_depth": 2} | changes,
    )
    torch.manual_seed(0)
    jepa = JEPA(config)
    with torch.no_grad():  # the target differs from the context encoder, and no bias is 0, as in training
        for p in jepa.parameters():
            p.add_(0.1 * torch.randn_like(p))
    inputs = torch.randn(batch, 1, 500) if series else torch.randn(batch, 1, 32, 32)
    return config, jepa, inputs, _masks(config, batch)


@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("mode, loss", [*((m, "smooth_l1") for m in MODES), ("packed", "l2"), ("random", "l1")])
def test_outputs_loss_and_gradients_equal_the_dense_float64_model(mode, loss, bucketed):
    config, jepa, inputs, masks = _pair(mode, loss)
    chosen = plan(masks, config.num_tokens, Ladder((350,), (1700,), 63, 80, 20) if bucketed else None)
    output = jepa(inputs, chosen)
    output.loss.backward()
    got = {n: p.grad.clone() for n, p in jepa.named_parameters() if p.grad is not None}
    with torch.no_grad():
        prediction = jepa.predictor.packed(output.context, chosen)
    jepa.zero_grad()
    patches = jepa.context_encoder.tokenizer(inputs).double()
    loss, context, target, predictions = _dense(jepa, config, patches, masks)
    loss.backward()

    assert output.loss.dtype == torch.float32 and abs(float(output.loss.detach()) / float(loss.detach()) - 1) < 1e-5
    _assert_close(output.context, context.detach())
    _assert_close(output.target, target)
    _assert_close(prediction, predictions.detach())
    assert got.keys() == {n for n, p in jepa.named_parameters() if p.requires_grad}
    largest = max(float(g.abs().max()) for g in got.values())
    for name, p in jepa.named_parameters():
        if p.requires_grad:  # gradients that cancel (the keys' bias has none) are judged by the largest there is
            error = (got[name].double() - p.grad).abs().max()
            assert error < 1e-5 * max(float(p.grad.abs().max()), 0.1 * largest), (name, float(error))


def test_rows_behind_the_tokens_change_nothing_whatever_they_hold(monkeypatch):
    _config, jepa, inputs, masks = _pair("packed")
    rungs = Ladder((350,), (1700,), 63, 80, 20)
    chosen = plan(masks, 64, rungs)
    assert chosen.context_bucket == 350 > len(chosen.context_index)
    assert chosen.predictor_bucket == 1700 > len(chosen.predictor_order)

    def run():
        jepa.zero_grad()
        output = jepa(inputs, chosen)
        output.loss.backward()
        return [output.loss.detach(), output.context, *(p.grad.clone() for p in jepa.parameters() if p.requires_grad)]

    zeros = run()
    for module in (vit, predictor):
        poison = lambda x, bucket: torch.nn.functional.pad(x, (0, 0, 0, bucket - len(x)), value=3e3) if bucket else x  # noqa: E731
        monkeypatch.setattr(module, "pad_rows", poison)
    for a, b in zip(zeros, run(), strict=True):
        assert torch.equal(a, b)


def test_the_last_predictor_block_on_target_rows_is_the_whole_block_at_those_rows():
    _, jepa, inputs, masks = _pair("packed")
    chosen, model = plan(masks, 64), jepa.predictor
    context = jepa(inputs, chosen).context
    short = model.packed(context, chosen)
    x = torch.cat([model._place(context, chosen.context_index), model._hidden(chosen.target_index)])
    x = x[chosen.predictor_order]
    sequences = Sequences.of(chosen.predictor_cu, chosen.predictor_max, len(x))
    for block in model.blocks:
        x = block(x, sequences)
    torch.testing.assert_close(short, model.proj(model.norm(x))[chosen.predictor_targets], rtol=1e-5, atol=1e-5)


def test_four_blocks_in_one_call_are_four_calls():
    _config, jepa, inputs, masks = _pair("reference", batch=3)
    chosen = plan(masks, 64)
    together = jepa.predictor.packed(jepa(inputs, chosen).context, chosen)
    kept, size = int(masks.context_lengths[0]), int(masks.target_lengths[0])
    index = torch.from_numpy(masks.context).view(3, kept)
    context = jepa.context_encoder(inputs, index)
    targets = torch.from_numpy(masks.targets).view(3, 4, size)
    apart = torch.stack([jepa.predictor(context, index, targets[:, block]) for block in range(4)], 1)
    torch.testing.assert_close(together.view(3, 4, size, -1), apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["packed", "subsampled", "bernoulli"])
def test_a_sample_does_not_depend_on_its_batch_neighbours(mode):
    config, jepa, inputs, masks = _pair(mode)
    chosen = plan(masks, config.num_tokens)
    output = jepa(inputs, chosen)
    prediction = jepa.predictor.packed(output.context, chosen)
    contexts, targets = (
        np.cumsum([0, *masks.context_lengths]),
        np.cumsum([0, *masks.target_lengths]) * masks.num_targets,
    )
    for image in (4, 1):
        mine, hidden = slice(*contexts[image : image + 2]), slice(*targets[image : image + 2])
        alone = MaskBatch(
            masks.context[mine], masks.context_lengths[[image]], masks.targets[hidden], masks.target_lengths[[image]],
            masks.num_targets,
        )  # fmt: skip
        single = plan(alone, config.num_tokens)
        again = jepa(inputs[[image]], single)
        torch.testing.assert_close(again.context, output.context[mine], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again.target[0], output.target[image], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            jepa.predictor.packed(again.context, single), prediction[hidden], rtol=1e-5, atol=1e-5
        )


def test_a_loss_under_bf16_is_still_summed_in_float32():
    _config, jepa, inputs, masks = _pair("packed", **{"train.precision": "bf16"})
    chosen = plan(masks, 64)
    exact = jepa(inputs, chosen)
    with torch.autocast("cpu", torch.bfloat16):
        half = jepa(inputs, chosen)
        prediction = jepa.predictor.packed(half.context, chosen)
    assert half.loss.dtype == half.target.dtype == half.context.dtype == torch.float32
    hidden = regress(half.target, "layer").flatten(0, 1)[chosen.target_rows]
    again = (chosen.target_weight * token_loss(prediction, hidden, "smooth_l1")).sum()
    assert float(half.loss.detach()) == pytest.approx(float(again.detach()), rel=1e-5)  # bf16 would be off by 4e-3
    assert float(half.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=0.03)


def test_the_bf16_residual_stream_is_bf16_inside_and_close_outside():
    _config, jepa, inputs, masks = _pair("packed", **{"train.precision": "bf16", "model.residual": "bf16"})
    seen = []
    for block in (*jepa.context_encoder.blocks, *jepa.predictor.blocks):
        block.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    exact = jepa(inputs, plan(masks, 64))  # without autocast nothing is bf16
    assert {t for pair in seen for t in pair} == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        half = jepa(inputs, plan(masks, 64))
    assert {t for pair in seen for t in pair} == {torch.bfloat16} and half.target.dtype == torch.float32
    assert float(half.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=0.03)
    with pytest.raises(UsageError, match=r"--model\.residual.*--train\.precision bf16"):
        _small("digits", **{"model.residual": "bf16"})


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_changes_memory_and_nothing_else(how):
    def run(how):
        _config, jepa, inputs, masks = _pair("packed")
        for block in (*jepa.context_encoder.blocks, *jepa.predictor.blocks):
            block.recompute = how
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = jepa(inputs, plan(masks, 64)).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in jepa.parameters() if p.requires_grad)], kept

    (plain, much), (again, little) = run("none"), run(how)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert little < 0.5 * much


def test_the_model_refuses_inputs_and_masks_that_do_not_fit():
    _config, jepa, inputs, masks = _pair("packed")
    with pytest.raises(ValueError, match=r"\(16, 16\) tokens; this JEPA was built for \(8, 8\)"):
        jepa(torch.randn(5, 1, 64, 64), plan(masks, 64))
    with pytest.raises(ValueError, match="3 inputs and masks of 5"):
        jepa(inputs[:3], plan(masks, 64))
    with pytest.raises(ValueError, match="image 1 has no context"):
        plan(MaskBatch(np.array([0]), np.array([1, 0]), np.array([1, 2]), np.array([1, 1]), 1), 64)
    with pytest.raises(ValueError, match="target tokens are 1 to 64"):
        plan(MaskBatch(np.array([0]), np.array([1]), np.array([1, 64]), np.array([2]), 1), 64)


def test_the_target_encoder_gets_no_gradient_and_starts_equal_to_the_context_encoder():
    jepa = JEPA(_small("demo"))
    for a, b in zip(jepa.context_encoder.parameters(), jepa.target_encoder.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and not b.requires_grad


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
    sequences = Sequences.of(cu, 12, 23)
    got = attend(q, k, v, sequences, sequences)
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


def test_every_preset_builds_on_meta_and_has_the_size_its_name_says():
    sizes = {"in1k-vitb16": 85.6e6, "in1k-vitl16": 303.1e6, "in1k-vith14": 630.4e6}
    for name in ("in1k-vitb16", "in1k-vitl16", "in1k-vith14"):
        with torch.device("meta"):
            jepa = JEPA(preset(name))
        assert sum(p.numel() for p in jepa.context_encoder.parameters()) == pytest.approx(sizes[name], rel=5e-3)
    assert dataclasses.is_dataclass(preset("demo"))
