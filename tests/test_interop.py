"""facebookresearch/ijepa's files: read to the module, written to the bit, refused in one line."""

import copy
import warnings

import pytest
import torch

from jepa_fast.errors import UsageError
from jepa_fast.interop import load_official, save_official
from jepa_fast.model.jepa import JEPA
from jepa_fast.model.predictor import Predictor
from jepa_fast.model.tokens import sincos_table
from jepa_fast.model.vit import Encoder
from jepa_fast.presets import preset

# width, depth, heads, MLP, patch, grid, predictor width and depth: as H/14 and B/16 are made, only smaller
TINY = {
    "h14": (80, 3, 16, 320, 14, 4, 96, 2),
    "b16": (48, 2, 12, 192, 16, 3, 24, 1),
    "g16": (44, 1, 4, 150, 16, 2, 16, 1),
}


def _linear(state, name, rows, columns):
    state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(rows, columns) * 0.2, torch.randn(rows) * 0.1


def _norm(state, name, width):
    state[f"{name}.weight"], state[f"{name}.bias"] = 1 + torch.randn(width) * 0.1, torch.randn(width) * 0.1


def _block(state, name, width, hidden):
    _norm(state, f"{name}.norm1", width)
    _linear(state, f"{name}.attn.qkv", 3 * width, width)
    _linear(state, f"{name}.attn.proj", width, width)
    _norm(state, f"{name}.norm2", width)
    _linear(state, f"{name}.mlp.fc1", hidden, width)
    _linear(state, f"{name}.mlp.fc2", width, hidden)


def _checkpoint(kind, prefix="module."):
    """A dict as facebookresearch/ijepa's trainer saves it, with tensors of our own."""
    width, depth, _, hidden, patch, grid, narrow, predictor_depth = TINY[kind]
    torch.manual_seed(0)
    encoder = {"pos_embed": sincos_table((grid, grid), width)[None]}
    encoder["patch_embed.proj.weight"] = torch.randn(width, 3, patch, patch) * 0.05
    encoder["patch_embed.proj.bias"] = torch.randn(width) * 0.1
    for i in range(depth):
        _block(encoder, f"blocks.{i}", width, hidden)
    _norm(encoder, "norm", width)
    predictor = {
        "mask_token": torch.randn(1, 1, narrow),
        "predictor_pos_embed": sincos_table((grid, grid), narrow)[None],
    }
    _linear(predictor, "predictor_embed", narrow, width)
    for i in range(predictor_depth):
        _block(predictor, f"predictor_blocks.{i}", narrow, 4 * narrow)
    _norm(predictor, "predictor_norm", narrow)
    _linear(predictor, "predictor_proj", width, narrow)
    target = {name: value + 0.01 * (name != "pos_embed") for name, value in encoder.items()}
    parts = {"encoder": encoder, "predictor": predictor, "target_encoder": target}
    parts = {part: {prefix + name: value for name, value in state.items()} for part, state in parts.items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    return parts | {"opt": optimizer, "scaler": {"scale": 65536.0}, "epoch": 300, "loss": 0.2, "batch_size": 128,
                    "world_size": 16, "lr": 1e-3}  # fmt: skip


def _saved(tmp_path, raw):
    torch.save(raw, tmp_path / "jepa-latest.pth.tar")
    return tmp_path / "jepa-latest.pth.tar"


def _heads(kind):
    heads, narrow = TINY[kind][2], TINY[kind][6]
    return {"heads": heads, "predictor_heads": heads if narrow % heads == 0 else 4}


@pytest.mark.parametrize("kind", TINY)
def test_sizes_are_read_from_shapes_and_a_round_trip_is_exact(kind, tmp_path):
    raw = _checkpoint(kind)
    jepa = load_official(_saved(tmp_path, raw), **_heads(kind))
    width, depth, heads, hidden, patch, grid, narrow, predictor_depth = TINY[kind]
    encoder = jepa.context_encoder
    assert (encoder.width, len(encoder.blocks), encoder.grid, encoder.tokenizer.size) == (
        width,
        depth,
        (grid, grid),
        patch,
    )
    assert encoder.blocks[0].attn.heads == heads and encoder.blocks[0].mlp.fc1.out_features == hidden
    assert jepa.predictor.embed.out_features == narrow and len(jepa.predictor.blocks) == predictor_depth
    assert not any(p.requires_grad for p in jepa.target_encoder.parameters())
    assert all(p.requires_grad for p in (*encoder.parameters(), *jepa.predictor.parameters()))

    save_official(jepa, tmp_path / "ours.pth.tar", epoch=300)
    again = torch.load(tmp_path / "ours.pth.tar", weights_only=True)
    assert again.keys() == raw.keys() and again["epoch"] == 300
    for part in ("encoder", "predictor", "target_encoder"):
        assert again[part].keys() == raw[part].keys()
        assert all(torch.equal(again[part][name], raw[part][name]) for name in raw[part])
    twice = load_official(tmp_path / "ours.pth.tar", **_heads(kind)).state_dict()
    assert all(torch.equal(value, twice[name]) for name, value in jepa.state_dict().items())


def test_values_are_those_of_the_files_own_equations(tmp_path):
    """The patch embedding as the convolution it was saved from, one block by hand."""
    raw = _checkpoint("g16")
    encoder = load_official(_saved(tmp_path, raw), which="target_encoder", **_heads("g16"))
    state = {name.removeprefix("module."): value for name, value in raw["target_encoder"].items()}
    images = torch.randn(2, 3, 32, 32)
    x = torch.nn.functional.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    q, k, v = linear(norm(x, "blocks.0.norm1"), "blocks.0.attn.qkv").view(2, 4, 3, 4, 11).permute(2, 0, 3, 1, 4)
    mixed = (q @ k.transpose(-1, -2) / 11**0.5).softmax(-1) @ v
    x = x + linear(mixed.transpose(1, 2).reshape(2, 4, 44), "blocks.0.attn.proj")
    hidden = torch.nn.functional.gelu(linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.fc1"))
    x = norm(x + linear(hidden, "blocks.0.mlp.fc2"), "norm")
    torch.testing.assert_close(encoder(images), x, rtol=1e-5, atol=1e-5)


def test_which_gives_one_part_and_needs_no_other(tmp_path):
    raw = _checkpoint("b16")
    whole = load_official(_saved(tmp_path, raw), heads=12)
    for name, theirs, kind in (
        ("context_encoder", "encoder", Encoder), ("target_encoder", "target_encoder", Encoder), ("predictor", "predictor", Predictor),
    ):  # fmt: skip
        part = load_official(_saved(tmp_path, {theirs: raw[theirs]}), name, heads=12, predictor_heads=12)
        assert type(part) is kind
        own = getattr(whole, name).state_dict()
        assert all(torch.equal(value, own[key]) for key, value in part.state_dict().items())
    images = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    part = load_official(_saved(tmp_path, raw), "target_encoder", heads=12)
    torch.testing.assert_close(part(images), whole.target_encoder(images))


@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_dropped(prefix, tmp_path):
    plain = load_official(_saved(tmp_path, _checkpoint("b16")), heads=12).state_dict()
    other = load_official(_saved(tmp_path, _checkpoint("b16", prefix)), heads=12).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in plain.items())


def test_heads_come_from_the_published_models_or_are_given(tmp_path):
    raw = _checkpoint("b16")
    with pytest.raises(UsageError, match=r"width 48 is no published model's.*give heads="):
        load_official(_saved(tmp_path, raw))
    with pytest.raises(UsageError, match=r"5 heads do not divide width 48; give heads="):
        load_official(_saved(tmp_path, raw), heads=5)
    torch.manual_seed(0)
    small = JEPA(preset("images"))  # ViT-S/16
    save_official(small, tmp_path / "s16.pth.tar")
    jepa = load_official(tmp_path / "s16.pth.tar")
    assert jepa.context_encoder.blocks[0].attn.heads == jepa.predictor.blocks[0].attn.heads == 6


def test_half_precision_weights_are_widened(tmp_path):
    raw = _checkpoint("b16")
    for part in ("encoder", "predictor", "target_encoder"):
        raw[part] = {name: value.bfloat16() for name, value in raw[part].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a rounded table is the fixed table still
        jepa = load_official(_saved(tmp_path, raw), heads=12)
    assert all(p.dtype == torch.float32 for p in jepa.parameters())


def test_positions_that_are_no_fixed_table_are_taken_with_a_warning(tmp_path):
    raw = _checkpoint("b16")
    raw["encoder"]["module.pos_embed"] = torch.randn(1, 9, 48)
    with pytest.warns(UserWarning, match="encoder: positions are no fixed sin-cos table"):
        jepa = load_official(_saved(tmp_path, raw), heads=12)
    assert torch.equal(jepa.context_encoder.positions, raw["encoder"]["module.pos_embed"][0])


class Foreign:
    pass


def _broken(raw, tmp_path):
    """(what is wrong, the file's content or bytes, part of the message)"""
    missing, extra, shape, class_token, odd, lost, flat = (copy.deepcopy(raw) for _ in range(7))
    del missing["encoder"]["module.blocks.1.attn.qkv.weight"]
    extra["encoder"]["module.head.weight"] = torch.zeros(2)
    shape["target_encoder"]["module.norm.weight"] = torch.zeros(5)
    class_token["encoder"]["module.pos_embed"] = torch.zeros(1, 10, 48)
    odd["encoder"]["module.norm.weight"] = "a string"
    lost["predictor"]["module.predictor_norm.weight"][0] = float("nan")
    flat["predictor"]["module.predictor_embed.weight"] = torch.zeros(48)
    return [
        (flat, "a weight is no matrix"),
        ({"state_dict": {}}, "has no 'encoder' .it holds state_dict."),
        ({**raw, "encoder": {}}, "it has no positions"),
        (missing, r"encoder has no blocks\.1\.attn\.qkv\.weight"),
        (extra, r"encoder has head\.weight"),
        (shape, r"norm\.weight is \[5\], expected \[48\]"),
        (class_token, "10 tokens; a square grid"),
        (odd, "is a str, not a tensor"),
        (lost, "predictor_norm.weight holds NaN or infinite weights"),
        ([1, 2], "holds a list"),
        ({**raw, "encoder": Foreign()}, "more than tensors"),
        (b"not a checkpoint", "jepa-latest"),
        (b"", "jepa-latest"),
    ]


def test_what_is_no_such_checkpoint_is_refused_in_one_line(tmp_path):
    raw = _checkpoint("b16")
    for content, message in _broken(raw, tmp_path):
        if isinstance(content, bytes):
            (path := tmp_path / "jepa-latest.pth.tar").write_bytes(content)
        else:
            path = _saved(tmp_path, content)
        with pytest.raises(UsageError, match=message) as error:
            load_official(path, heads=12)
        assert "\n" not in str(error.value) and "jepa-latest.pth.tar" in str(error.value)
    whole = _saved(tmp_path, raw).read_bytes()
    (tmp_path / "jepa-latest.pth.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="jepa-latest"):
        load_official(tmp_path / "jepa-latest.pth.tar", heads=12)
    with pytest.raises(UsageError, match="is not a file"):
        load_official(tmp_path / "nothing.pth.tar")
    with pytest.raises(UsageError, match="give one of context_encoder, target_encoder, predictor"):
        load_official(_saved(tmp_path, raw), "teacher")


def test_what_cannot_be_written_is_refused_and_nothing_is_left_behind(tmp_path):
    with pytest.raises(UsageError, match="square images"):
        save_official(JEPA(preset("demo")), tmp_path / "x.pth.tar")
    with pytest.raises(UsageError, match="is not a folder"):
        save_official(JEPA(preset("digits")), tmp_path / "no" / "x.pth.tar")
    assert list(tmp_path.iterdir()) == []
