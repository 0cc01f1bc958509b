"""What `export` writes loads in the real libraries, gives the same features, and says which encoder it is."""

import json

import numpy as np
import pytest
import real_libraries
import torch
from PIL import Image
from safetensors.torch import load_file

import jepa_fast
from jepa_fast.export import export, main
from jepa_fast.interop import initial_weights, load_jepa
from jepa_fast.interop.hf import from_hf, to_hf
from jepa_fast.interop.vit import Settings, from_vit, timm_arguments, to_vit


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def close(ours, theirs):
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", ["target", "context"])
def test_transformers_loads_it_and_gives_the_same_features(tiny_image_run, tmp_path, pixels, which):
    transformers = real_libraries.require("transformers")
    folder = export(tiny_image_run[0], "hf", which, out=tmp_path / "hf")
    model, told = transformers.IJepaModel.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    ours = jepa_fast.load_encoder(tiny_image_run[0], which).encoder
    with torch.no_grad():
        close(ours(pixels), model.eval()(pixel_values=pixels).last_hidden_state)


def test_transformers_preprocesses_as_our_evaluation_does(tiny_image_run, tmp_path):
    transformers = real_libraries.require("transformers")
    folder = export(tiny_image_run[0], "hf", out=tmp_path / "hf")
    said = json.loads((folder / "preprocessor_config.json").read_text())
    assert said["crop_size"] == {"height": 32, "width": 32} and said["size"] == {"shortest_edge": 37}
    kind = getattr(transformers, said["image_processor_type"] + "Pil", None) or transformers.CLIPImageProcessor
    try:
        processor = kind.from_pretrained(folder)
    except ImportError as error:
        pytest.skip(f"transformers' image processors need torchvision: {str(error).strip().splitlines()[0]}")
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize((37, 37))
    theirs = torch.as_tensor(np.asarray(processor(image)["pixel_values"]))[0]
    config = jepa_fast.load_encoder(tiny_image_run[0]).config
    middle = np.asarray(image)[2:34, 2:34].transpose(2, 0, 1) / 255
    ours = (middle - np.reshape(config.data.mean, (3, 1, 1))) / np.reshape(config.data.std, (3, 1, 1))
    assert theirs.shape == (3, 32, 32) and np.abs(theirs.numpy() - ours).mean() < 0.5  # their crop may sit a pixel off


def test_timm_loads_it_strictly_and_gives_the_same_features(tiny_image_run, tmp_path, pixels):
    timm = real_libraries.require("timm")
    folder = export(tiny_image_run[0], "timm", out=tmp_path / "timm")
    found = jepa_fast.load_encoder(tiny_image_run[0])
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    by_hand = timm.create_model("vit_base_patch16_224", **timm_arguments(found.encoder)).eval()
    by_hand.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    with torch.no_grad():
        close(found.encoder(pixels), by_hand.forward_features(pixels))
        close(found.encoder(pixels), by_folder.forward_features(pixels))
        close(found.encoder(pixels).mean(1), by_folder(pixels))
    assert by_folder.pretrained_cfg["mean"] == pytest.approx((0.485, 0.456, 0.406))


def test_a_real_timm_vit_is_imported_with_its_outputs(pixels, tmp_path):
    """LayerScale is folded in, learned positions are kept."""
    timm = real_libraries.require("timm")
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
    theirs = timm.create_model("vit_tiny_patch16_224", **shape, class_token=False, global_pool="avg", fc_norm=False,
                               init_values=0.5, num_classes=7).eval()  # fmt: skip
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    found = jepa_fast.load_encoder(tmp_path / "vit.pth")
    with torch.no_grad():
        close(found.encoder(pixels), theirs.forward_features(pixels))
    assert found.which == "unknown" and "learned" in found.notes[0]

    with_class = timm.create_model("vit_tiny_patch16_224", **shape)
    torch.save(with_class.state_dict(), tmp_path / "class.pth")
    notes = jepa_fast.load_encoder(tmp_path / "class.pth").notes
    assert any("class or register" in note for note in notes)


def test_a_real_transformers_folder_is_imported_with_its_outputs(pixels, tmp_path):
    transformers = real_libraries.require("transformers")
    torch.manual_seed(0)
    config = transformers.IJepaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                                      image_size=32, patch_size=8)  # fmt: skip
    theirs = transformers.IJepaModel(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    found = jepa_fast.load_encoder(tmp_path / "theirs")
    with torch.no_grad():
        close(theirs(pixel_values=pixels).last_hidden_state, found.encoder(pixels))


def test_names_there_and_back_lose_nothing(tiny_image_run):
    weights = to_vit(jepa_fast.load_encoder(tiny_image_run[0]).encoder)
    back = from_hf(to_hf(weights), "here")
    assert back.keys() == weights.keys() and all(torch.equal(back[k], weights[k]) for k in weights)
    again, said = from_vit(weights, Settings(heads=4), "here")
    assert not said and all(torch.equal(v, to_vit(again)[k]) for k, v in weights.items())


@pytest.mark.parametrize("which", ["target", "context"])
@pytest.mark.parametrize("run", ["tiny_run", "tiny_image_run"])
def test_our_own_format_holds_either_kind_and_knows_which_encoder_it_is(request, tmp_path, run, which):
    folder = request.getfixturevalue(run)[0]
    out = export(folder, "safetensors", which, step=3, out=tmp_path / "own")
    found, want = (
        jepa_fast.load_encoder(out / "model.safetensors", which),
        jepa_fast.load_encoder(folder, which, step=3),
    )
    assert found.which == which and found.step == 3 and found.config == want.config
    assert all(torch.equal(v, want.encoder.state_dict()[k]) for k, v in found.encoder.state_dict().items())
    other = "context" if which == "target" else "target"
    with pytest.raises(jepa_fast.errors.UsageError, match=f"holds the {which} encoder"):
        jepa_fast.load_encoder(out / "model.safetensors", other)


def test_the_official_format_holds_all_three_parts_and_starts_a_run(tiny_image_run, tmp_path, pixels, capsys):
    run, _ = tiny_image_run
    out = export(run, "official", out=tmp_path / "official")
    held = torch.load(out / "jepa.pth.tar", weights_only=True)
    assert all(name.startswith("module.") for part in ("encoder", "target_encoder", "predictor") for name in held[part])
    for which in ("context", "target"):
        ours, theirs = (jepa_fast.load_encoder(p, which, heads=4).encoder for p in (run, out / "jepa.pth.tar"))
        with torch.no_grad():
            assert torch.equal(ours(pixels), theirs(pixels))
    assert "both encoders and the predictor" in (out / "README.md").read_text()

    jepa, config, step = load_jepa(run)
    weights, told = initial_weights(str(out / "jepa.pth.tar"), config)
    assert step == 6 and "predictor start from the official" in told[0]
    assert weights.keys() == jepa.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in jepa.state_dict().items())


def test_target_and_context_differ_and_the_card_says_which_it_is(tiny_image_run, tmp_path):
    run, records = tiny_image_run
    cards, weights = {}, {}
    for which in ("target", "context"):
        out = export(run, "timm", which, out=tmp_path / which)
        cards[which], weights[which] = (out / "README.md").read_text(), load_file(out / "model.safetensors")
        assert json.loads((out / "config.json").read_text())["jepa_fast"] == {
            "encoder": which,
            "step": 6,
            "preset": "images",
        }
        assert f"holds the **{which} encoder**" in cards[which] and "after 6 optimizer steps" in cards[which]
    assert not torch.equal(weights["target"]["norm.weight"], weights["context"]["norm.weight"])
    last = records[-1]
    for key in ("probe/target", "probe/context", "probe/untrained", "probe/majority"):
        assert f"{last[key]:.3f}" in cards["target"], key
    assert "0.485" in cards["target"]


def test_training_starts_from_an_export_and_says_what_it_took(tiny_image_run, tmp_path, capsys):
    from jepa_fast.train import main as train

    run, _ = tiny_image_run
    source = export(run, "hf", "target", out=tmp_path / "hf")
    config = json.loads((run / "config.json").read_text())
    sizes = [f"--{name}={config[name.split('.')[0]][name.split('.')[1]]}" for name in (
        "data.image_size", "model.patch", "model.width", "model.depth", "model.heads", "model.predictor_width",
        "model.predictor_depth", "masks.min_keep", "data.path")]  # fmt: skip
    rest = ["--train.steps", "1", "--train.batch_size", "8", "--optim.warmup_epochs", "0", "--optim.lr", "0", "--optim.start_lr", "0",
            "--optim.final_lr", "0", "--train.precision", "fp32", "--run.dir", str(tmp_path / "new"), "--init.from", str(source)]  # fmt: skip
    assert train(["images", *sizes, *rest]) == 0
    assert "both encoders start from the encoder" in capsys.readouterr().out
    first = json.loads((tmp_path / "new" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["discrepancy/full"] == 0 and first["probe/target"] == first["probe/context"]
    old, new = (jepa_fast.load_encoder(p).encoder.state_dict() for p in (run, tmp_path / "new"))
    assert all(torch.equal(v, new[k]) for k, v in old.items())


# ---- bad input ------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_exported_is_one_line_and_nothing_is_written_over(tiny_run, tiny_image_run, tmp_path, capsys):
    run, series = tiny_image_run[0], tiny_run[0]
    assert "invalid choice: 'onnx'" in refused(capsys, run, "--format", "onnx")
    assert "no run folder" in refused(capsys, tmp_path, "--format", "hf")
    assert "it has 3, 6" in refused(capsys, run, "--format", "hf", "--step", 4, "--out", tmp_path / "x")
    for format in ("timm", "hf", "official"):
        assert "encoder of series" in refused(capsys, series, "--format", format, "--out", tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "nothing was written over" in refused(capsys, run, "--format", "hf", "--out", tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
