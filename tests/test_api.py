"""The notebook's names: an encoder from wherever it lies, features of files and arrays, and what they are worth."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import jepa_fast
from jepa_fast.errors import UsageError
from jepa_fast.interop.vit import to_vit


def test_importing_the_package_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, jepa_fast; assert 'torch' not in sys.modules; assert 'rankme' in dir(jepa_fast); print(jepa_fast.__version__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = jepa_fast.no_such_name


def test_features_of_a_folder_in_its_own_order_with_labels_and_places(tiny_image_run):
    found = jepa_fast.load_encoder(tiny_image_run[0])
    folder = found.config.data.path
    some = [jepa_fast.features(found, folder, split=split, batch_size=7) for split in ("train", "test", "all")]
    assert [f.values.shape for f in some] == [(32, 64), (8, 64), (40, 64)]
    assert not found.encoder.training and not any(p.requires_grad for p in found.encoder.parameters())
    for f in some:
        assert len(f.keys) == len(f.values) == len(f.labels) and not f.unreadable
        assert all(key.startswith(f"class{label}/") for key, label in zip(f.keys, f.labels.tolist(), strict=True))
    torch.testing.assert_close(torch.cat([some[0].values, some[1].values]), some[2].values)
    few = jepa_fast.features(found, folder, split="train", limit=10, pool=False)
    assert few.values.shape == (10, 16, 64) and set(few.labels.tolist()) == {0, 1}  # a draw, not the first class alone


def test_features_of_arrays_are_the_encoders(tiny_image_run, tiny_run):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    found = jepa_fast.load_encoder(tiny_image_run[0], "context")
    with torch.no_grad():
        want = found.encoder(torch.from_numpy(images)).mean(1)
    torch.testing.assert_close(jepa_fast.features(found, images, batch_size=2).values, want)
    series = jepa_fast.load_encoder(tiny_run[0] / "checkpoints" / "step-3")
    assert series.step == 3 and jepa_fast.features(series, torch.randn(4, 1, 500)).values.shape == (4, 128)
    with pytest.raises(UsageError, match=r"shape \[1, 400\] do not fit"):
        jepa_fast.features(series, torch.randn(4, 1, 400))
    with pytest.raises(UsageError, match=r"3 channel\(s\) and 32 x 32"):
        jepa_fast.features(found, images[:, :1])


def test_a_damaged_image_is_left_out_and_named(tiny_image_run, tmp_path):
    from PIL import Image

    for i in range(6):
        (tmp_path / f"c{i % 2}").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (i * 40, 0, 0)).save(tmp_path / f"c{i % 2}" / f"{i}.png")
    (tmp_path / "c1" / "3.png").write_bytes(b"not an image")
    some = jepa_fast.features(jepa_fast.load_encoder(tiny_image_run[0]), tmp_path)
    assert len(some.values) == len(some.labels) == 5 and "c1/3.png" in some.unreadable[0]


def test_probe_scores_stand_beside_the_majority_and_agree_with_what_the_run_logged(tiny_run):
    run, records = tiny_run
    found = jepa_fast.load_encoder(run)
    train, test = (jepa_fast.features(found, split=split) for split in ("train", "test"))
    scores = jepa_fast.probe_scores(train, test)
    last = records[-1]
    logged = {
        "ridge": "probe/target",
        "raw": "probe/target/raw",
        "knn": "probe/target/knn",
        "majority": "probe/majority",
    }
    assert {name: scores[name] for name in logged} == pytest.approx({name: last[key] for name, key in logged.items()})
    fresh = jepa_fast.untrained(found)
    assert not torch.equal(
        fresh.encoder.state_dict()["patch_embed.weight"], found.encoder.state_dict()["patch_embed.weight"]
    )
    with pytest.raises(UsageError, match="needs labels"):
        jepa_fast.probe_scores(jepa_fast.features(found, torch.randn(4, 1, 500)), test)


def test_rankme_and_lidar_count_directions():
    torch.manual_seed(0)
    z = torch.randn(500, 3) @ torch.randn(3, 32)
    assert 2 < jepa_fast.rankme(z) < 3.1
    inputs = torch.randn(200, 1, 5) @ torch.randn(5, 32)
    assert 3 < jepa_fast.lidar(inputs + 0.01 * torch.randn(200, 8, 32)) < 5.1
    with pytest.raises(ValueError, match="two"):
        jepa_fast.lidar(torch.randn(5, 1, 8))


def test_views_are_masks_of_the_same_inputs(tiny_image_run):
    found = jepa_fast.load_encoder(tiny_image_run[0])
    seen = jepa_fast.views(found, limit=9, num_views=4)
    assert seen.shape[1:] == (4, 64) and torch.equal(seen, jepa_fast.views(found, limit=9, num_views=4))
    whole = jepa_fast.views(found, limit=9, num_views=2, keep=1.0)
    torch.testing.assert_close(whole[:, 0], whole[:, 1])
    assert 1 <= jepa_fast.lidar(seen) <= 64


# ---- weights that cannot be used --------------------------------------------------------------------


class Malice:
    def __reduce__(self):
        return (Path("executed").touch, ())


def broken(weights, how):
    weights = dict(weights)
    if how == "missing":
        del weights["blocks.1.mlp.fc2.bias"]
    elif how == "nan":
        weights["blocks.1.norm1.weight"] = weights["blocks.1.norm1.weight"] * float("nan")
    elif how == "foreign":
        weights["blocks.0.attn.q_norm.weight"] = torch.ones(16)
    elif how == "shape":
        weights["blocks.0.attn.qkv.weight"] = torch.zeros(100, 64)
    elif how == "grid":
        weights["pos_embed"] = torch.zeros(1, 15, 64)
    elif how == "fc_norm":
        weights["fc_norm.weight"] = torch.ones(64)
    return weights


@pytest.mark.parametrize(
    ("how", "says"),
    [("missing", "no blocks.1.mlp.fc2.bias"), ("nan", "blocks.1.norm1.weight holds NaN"), ("foreign", "q_norm"),
     ("shape", "attn.qkv.weight is"), ("grid", "15 positions"), ("fc_norm", "fc_norm=False")],
)  # fmt: skip
def test_weights_that_do_not_fit_are_told_by_name(tiny_image_run, tmp_path, how, says):
    weights = broken(to_vit(jepa_fast.load_encoder(tiny_image_run[0]).encoder), how)
    save_file(weights, tmp_path / "vit.safetensors")
    with pytest.raises(UsageError, match=says) as error:
        jepa_fast.load_encoder(tmp_path / "vit.safetensors", heads=4)
    assert "\n" not in str(error.value)


def test_unknown_files_are_refused_and_code_in_them_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder": {"a": Malice()}}, "a.pth.tar")
    Path("b.pth").write_bytes(pickle.dumps(Malice()))
    Path("c.safetensors").write_bytes(b"junk" * 100)
    Path("d.pth").write_bytes(b"")
    torch.save([1, 2], "e.pth")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3, 3)}}, "f.pth")
    for file, says in {"a.pth.tar": "nothing in it was executed", "b.pth": "nothing in it was executed", "c.safetensors": "damaged",
                       "d.pth": "cannot be read", "e.pth": "holds a list", "f.pth": "not a ViT", "g.pth": "does not exist"}.items():  # fmt: skip
        with pytest.raises(UsageError, match=says) as error:
            jepa_fast.load_encoder(file)
        assert "\n" not in str(error.value)
    assert not Path("executed").exists()
    with pytest.raises(UsageError, match="'target' or 'context'"):
        jepa_fast.load_encoder("a.pth.tar", "teacher")


def test_a_checkpoint_for_another_patch_size_does_not_start_a_run(tiny_image_run, tmp_path, capsys):
    from jepa_fast.train import main

    weights = to_vit(jepa_fast.load_encoder(tiny_image_run[0]).encoder)
    save_file(weights, tmp_path / "vit.safetensors")
    data = jepa_fast.load_encoder(tiny_image_run[0]).config.data.path
    sizes = [
        "--masks.min_keep",
        "1",
        "--data.image_size",
        "32",
        "--model.patch",
        "4",
        "--model.width",
        "64",
        "--model.depth",
        "2",
        "--model.heads",
        "4",
    ]
    asked = [
        "images",
        "--data.path",
        data,
        *sizes,
        "--run.dir",
        str(tmp_path / "run"),
        "--init.from",
        str(tmp_path / "vit.safetensors"),
    ]
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert "another architecture" in said and "[64, 192]" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
