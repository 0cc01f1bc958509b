"""A checkpoint's predictor beside trivial ones: an ijepa file gives the numbers of its own equations, in float64."""

import json
import math

import numpy as np
import pytest
import test_interop
import torch
import torch.nn.functional as F
from PIL import Image

import jepa_fast
from jepa_fast import trivial
from jepa_fast.config import IMAGENET_MEAN, IMAGENET_STD, Masks
from jepa_fast.diagnose import main
from jepa_fast.errors import UsageError
from jepa_fast.masks.sample import sample_masks

# width, depth, heads, MLP, patch, grid, predictor width and depth, of a ViT as facebookresearch/ijepa writes it
SIZES = (48, 2, 4, 96, 8, 6, 24, 2)
HEADS, PATCH, GRID = SIZES[2], SIZES[4], SIZES[5]
COUNT, BATCH = 64, 16  # images, and those of one batch: a quarter


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(test_interop.TINY, "p8", SIZES)
    return tmp_path


def photos(folder):
    """64 unlabelled images of the encoder's own size, and their pixels."""
    folder.mkdir()
    rng, side = np.random.default_rng(1), PATCH * GRID
    pixels = []
    for i in range(COUNT):
        coarse = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        pixels.append(np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)))
        Image.fromarray(pixels[-1]).save(folder / f"{i:02}.png")
    return np.stack(pixels).transpose(0, 3, 1, 2)  # [n, 3, H, W]


def official(folder, **changes):
    """(an ijepa checkpoint's path, its content) with what `changes` gives for tensors of the predictor."""
    raw = test_interop._checkpoint("p8")
    raw["predictor"] |= {f"module.{name}": value for name, value in changes.items()}
    torch.save(raw, folder / "jepa-ep5.pth.tar")
    return folder / "jepa-ep5.pth.tar", raw


# ---- the reference: plain torch, float64, one image and one target block at a time ----------------


def tensors(part):
    return {name.removeprefix("module."): value.double() for name, value in part.items()}


def norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def block(p, name, x):
    """One pre-norm block on one sequence [n, D]."""
    n, width = x.shape
    qkv = linear(p, f"{name}.attn.qkv", norm(p, f"{name}.norm1", x)).view(n, 3, HEADS, width // HEADS)
    q, k, v = qkv.permute(1, 2, 0, 3)
    mixed = (q @ k.transpose(1, 2) / math.sqrt(width // HEADS)).softmax(-1) @ v
    x = x + linear(p, f"{name}.attn.proj", mixed.transpose(0, 1).reshape(n, width))
    return x + linear(p, f"{name}.mlp.fc2", F.gelu(linear(p, f"{name}.mlp.fc1", norm(p, f"{name}.norm2", x))))


def encode(p, pixels, keep=None):
    """Features [n, D] of one image's tokens, or of those in `keep`."""
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    image = (torch.from_numpy(pixels).double() / 255 - mean) / std
    x = F.conv2d(image[None], p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2)[0].T + p["pos_embed"][0]
    x = x if keep is None else x[keep]
    for i in range(SIZES[1]):
        x = block(p, f"blocks.{i}", x)
    return norm(p, "norm", x)


def predict(p, context, keep, hidden):
    """Predictions [m, D] of one target block."""
    positions = p["predictor_pos_embed"][0]
    seen = linear(p, "predictor_embed", context) + positions[keep]
    x = torch.cat([seen, p["mask_token"].view(-1) + positions[hidden]])
    for i in range(SIZES[7]):
        x = block(p, f"predictor_blocks.{i}", x)
    return linear(p, "predictor_proj", norm(p, "predictor_norm", x)[len(keep) :])


def best_constant(targets):
    """The constant [N, D] with the least smooth-L1 over inputs: each sum of clipped differences is zero there."""
    low, high = targets.amin(0), targets.amax(0)
    for _ in range(60):
        middle = (low + high) / 2
        above = (targets - middle).clamp(-1, 1).sum(0) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def reference(raw, pixels):
    """{name: loss of each batch} of the predictor and of the three trivial ones."""
    encoder, target_encoder, predictor = (tensors(raw[name]) for name in ("encoder", "target_encoder", "predictor"))
    pixels = pixels[np.random.default_rng(0).permutation(COUNT)]
    where = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"), -1).view(-1, 2).double()
    found = {name: [] for name in ("own", *trivial.NAMES)}
    for view in range(COUNT // BATCH):
        masks = sample_masks(
            Masks(mode="reference", min_keep=4), (GRID, GRID), 0, view, np.full(BATCH, view), np.arange(BATCH)
        )
        images = pixels[view * BATCH : (view + 1) * BATCH]
        targets = torch.stack([F.layer_norm(encode(target_encoder, x), (SIZES[0],)) for x in images])
        constant = best_constant(targets)
        losses = {name: [] for name in found}
        for i, image in enumerate(images):
            own = masks.rows(i, i + 1)
            keep = torch.from_numpy(own.context)
            context = encode(encoder, image, keep)
            plain = F.layer_norm(context, (SIZES[0],))
            for hidden in torch.from_numpy(own.targets).view(own.num_targets, -1):
                near = torch.cdist(where[hidden], where[keep]).argmin(1)  # the first of equally near ones
                guesses = {
                    "own": predict(predictor, context, keep, hidden),
                    "constant": constant[hidden],
                    "copy": plain[near],
                    "context_mean": plain.mean(0).expand(len(hidden), -1),
                }
                for name, guess in guesses.items():
                    losses[name].append(F.smooth_l1_loss(guess, targets[i, hidden]))
        for name, values in losses.items():
            found[name].append(float(torch.stack(values).mean()) * (BATCH / (BATCH - 1) if name == "constant" else 1))
    return {name: np.array(values) for name, values in found.items()}


# ---- the claims -----------------------------------------------------------------------------------


def test_an_ijepa_file_gives_the_loss_and_the_skills_of_its_own_equations(there):
    pixels = photos(there / "photos")
    path, raw = official(there)
    found = jepa_fast.predictor_skill(path, there / "photos", heads=HEADS)
    want = reference(raw, pixels)
    assert (found.num_inputs, found.num_batches) == (COUNT, COUNT // BATCH)
    assert found.loss == pytest.approx(want["own"].mean(), rel=1e-5)
    skills = {name: 1 - want["own"].sum() / want[name].sum() for name in trivial.NAMES}
    assert found.copy == pytest.approx(skills["copy"], abs=1e-5)
    assert found.context_mean == pytest.approx(skills["context_mean"], abs=1e-5)
    assert 1 - found.constant == pytest.approx(
        1 - skills["constant"], rel=5e-3
    )  # three steps towards the best constant
    least = min(skills, key=skills.get)
    assert found.skill == getattr(found, least) and found.best == trivial.NAMES[least]
    left_out = [1 - np.delete(want["own"], k).sum() / np.delete(want[least], k).sum() for k in range(found.num_batches)]
    error = math.sqrt((len(left_out) - 1) * np.var(left_out))
    assert found.error == pytest.approx(error, rel=0.05) and found.better is False  # random weights
    assert jepa_fast.predictor_skill(path, there / "photos", heads=HEADS) == found


def test_a_predictor_that_says_the_same_of_every_input_has_no_skill_whatever_its_loss(there):
    photos(there / "photos")
    path, _ = official(there, **{"predictor_proj.weight": torch.zeros(SIZES[0], SIZES[6])})
    found = jepa_fast.predictor_skill(path, there / "photos", heads=HEADS)
    assert found.constant < 0 and not found.better


def test_a_predictor_that_knows_the_targets_has_skill_one(there, monkeypatch):
    photos(there / "photos")
    path, _ = official(there)
    objective = trivial.objective

    def clairvoyant(jepa, inputs, plan):
        targets = F.layer_norm(jepa.target_encoder(inputs), (SIZES[0],)).flatten(0, 1)[plan.target_rows]
        monkeypatch.setattr(jepa.predictor, "packed", lambda context, plan: targets)
        return objective(jepa, inputs, plan)

    monkeypatch.setattr(trivial, "objective", clairvoyant)
    found = jepa_fast.predictor_skill(path, there / "photos", heads=HEADS)
    assert found.skill == pytest.approx(1) and found.better
    assert str(found).startswith("the predictor is better than the best trivial one, ")


def test_what_is_within_the_noise_is_said_to_be(there):
    def skill(value, error):
        rest = {"constant": value, "copy": 0.5, "context_mean": math.nan}
        return trivial.PredictorSkill(0.1, value, error, **rest, position_share=0.5, num_inputs=64, num_batches=4)

    assert skill(0.1, 0.01).better is True and skill(-0.1, 0.01).better is False and skill(0.01, 0.01).better is None
    said = str(skill(0.01, 0.01))
    assert said == ("the predictor is as good as the best trivial one, the constant of each position, within the noise "
                    "(skill 0.010, standard error 0.010, loss 0.1)")  # fmt: skip
    assert "is worse than" in str(skill(-0.1, 0.01)) and str(skill(0.1, math.nan)).startswith("too few inputs")


def test_our_own_checkpoint_is_judged_by_its_own_objective_and_test_series(tiny_run, there):
    run, records = tiny_run
    first = jepa_fast.predictor_skill(run, step=3)
    assert first == jepa_fast.predictor_skill(run / "checkpoints" / "step-3")
    assert first != jepa_fast.predictor_skill(run)
    assert first.loss == pytest.approx(records[3]["loss"], rel=0.2)  # of a batch of the same kind of series
    with pytest.raises(UsageError, match="give data of that shape"):
        np.savetxt(there / "short_TRAIN.tsv", np.random.default_rng(0).normal(size=(20, 61)), delimiter="\t")
        jepa_fast.predictor_skill(run, there / "short_TRAIN.tsv")


def test_diagnose_says_of_each_checkpoint_whether_its_predictor_predicts(there, capsys):
    photos(there / "photos")
    path, raw = official(there)
    path.rename(there / "jepa-ep5.pth.tar")
    raw["predictor"] = {}
    torch.save(raw | {"epoch": 301}, there / "jepa-ep6.pth.tar")
    (there / "theirs.csv").write_text("epoch,loss\n" + "".join(f"{e},{math.exp(-e / 90):.4f}\n" for e in range(303)))
    asked = ["theirs.csv", "--checkpoints", "jepa-*.pth.tar", "--data", "photos", "--heads", str(HEADS)]
    assert main([*asked, "--predictor-heads", "5"]) == 2
    assert "5 heads do not divide width 24; give predictor_heads" in capsys.readouterr().err
    assert main(asked) == 0
    said = capsys.readouterr().out
    found = jepa_fast.predictor_skill(there / "jepa-ep5.pth.tar", there / "photos", heads=HEADS)
    assert f"step 300 (jepa-ep5.pth.tar): {found}\n" in said
    assert "step 301 (jepa-ep6.pth.tar): the file holds no predictor" in said
    rows = [json.loads(line) for line in (there / "diagnoses" / "theirs-1" / "metrics.jsonl").read_text().splitlines()]
    [row] = [row for row in rows if "skill" in row]
    assert row["step"] == 300 and {key: row[key] for key in found.record()} == found.record()


def test_what_has_no_predictor_or_no_data_is_one_line(there, tiny_run):
    path, raw = official(there)
    with pytest.raises(UsageError, match="does not say what it was trained on: give the data"):
        jepa_fast.predictor_skill(path, heads=HEADS)
    torch.save({name: raw[name] for name in ("encoder", "target_encoder")}, path)
    with pytest.raises(UsageError, match="has no 'predictor'"):
        jepa_fast.predictor_skill(path, there, heads=HEADS)
    with pytest.raises(UsageError, match="is not a file"):
        jepa_fast.predictor_skill(there / "nothing.pth.tar", there)
