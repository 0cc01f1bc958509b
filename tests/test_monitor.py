"""The monitor's numbers against independent implementations: NumPy, scikit-learn, and the definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from jepa_fast.config import replace
from jepa_fast.masks.remarks import hoeffding
from jepa_fast.model.jepa import JEPA
from jepa_fast.monitor import Examination, probes
from jepa_fast.monitor.fixed_masks import FixedMasks
from jepa_fast.monitor.measures import bound, discrepancy, spectrum
from jepa_fast.presets import preset


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


# ---- discrepancy ----------------------------------------------------------------------------------


def test_discrepancy_is_the_mean_token_distance():
    f, g = normal(7, 5), normal(7, 5, seed=1)
    assert float(discrepancy.discrepancy(f, g)) == pytest.approx(
        np.mean([np.linalg.norm(a - b) for a, b in zip(f.numpy(), g.numpy(), strict=True)])
    )
    assert float(discrepancy.discrepancy(f, f)) == 0


def test_the_terms_of_equation_4_are_its_terms_and_the_triangle_holds():
    """||f(x) - g(x_hat)|| <= ||f(x) - f(x_hat)|| + ||f(x_hat) - g(x_hat)||, on the visible tokens of a real model."""
    config = preset("demo")
    jepa = pushed_apart(config)
    inputs, views = normal(6, 1, 500), FixedMasks(config)
    record = Examination(jepa.context_encoder, jepa.target_encoder, inputs, views=views).look()
    masks = views.plan(6, 0)
    keep = masks.context_index.view(6, 3)
    with torch.no_grad():
        visible = jepa.context_encoder(inputs, keep)
        whole, target = (
            e(inputs).gather(1, keep[..., None].expand(-1, -1, 128))
            for e in (jepa.context_encoder, jepa.target_encoder)
        )
    c, by_input, by_ema = ((a - b).norm(dim=-1) for a, b in ((visible, target), (visible, whole), (whole, target)))
    for name, value in (("both", c), ("input", by_input), ("ema", by_ema)):
        assert record[f"mismatch/{name}"] == pytest.approx(float(value.mean()), rel=1e-4) and value.min() > 0
    assert record["mismatch/excess"] < 1e-6


def test_the_discrepancy_of_a_layer_is_that_of_its_output():
    jepa, inputs = pushed_apart(preset("demo")), normal(16, 1, 500)
    record = Examination(jepa.context_encoder, jepa.target_encoder, inputs).look()
    with torch.no_grad():
        f, g = (
            e.blocks[0](*entering(e, inputs)).view(16, 10, 128) for e in (jepa.context_encoder, jepa.target_encoder)
        )
    expected = (f - g).norm(dim=-1).mean() / discrepancy.instance_spread(g)
    assert record["layer_discrepancy/blocks.0"] == pytest.approx(float(expected), rel=1e-4)
    assert {k for k in record if k.startswith("layer_")} == {"layer_discrepancy/blocks.0", "layer_discrepancy/blocks.1"}


def entering(encoder, inputs):
    """What the first block is called with."""
    seen = []
    handle = encoder.blocks[0].register_forward_pre_hook(lambda _module, given: seen.append(given))
    encoder(inputs)
    handle.remove()
    return seen[0]


def test_a_triangle_that_is_none_is_found():
    _, excess = discrepancy.mismatches(normal(5, 8), torch.full((5, 8), math.nan), normal(5, 8, seed=1))
    assert math.isnan(float(excess)) and not float(excess) <= 1e-4


def pushed_apart(config):
    jepa = JEPA(config)
    with torch.no_grad():
        for p in jepa.target_encoder.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return jepa


def test_spread_is_zero_for_an_encoder_that_says_the_same_of_all_and_right_on_average_else():
    assert float(discrepancy.instance_spread(normal(1, 4, 8).expand(9, 4, 8))) < 1e-5
    wide = [float(discrepancy.instance_spread(normal(n, 50, 64, seed=n))) for n in (2, 4, 64)]
    np.testing.assert_allclose(wide, np.sqrt(64), rtol=0.02)  # whatever the batch size


# ---- spectrum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 40), (40, 300)])
def test_rankme_is_the_papers(shape):
    z = normal(*shape) @ torch.diag(torch.linspace(1, 0.01, shape[1]))
    singular = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    assert spectrum.rankme(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)


def test_rank_one_features_have_rank_one():
    z = normal(100, 1) @ normal(1, 20)
    assert spectrum.rankme(z) == pytest.approx(1, abs=1e-3) and spectrum.participation_ratio(z) == pytest.approx(
        1, abs=1e-5
    )


def test_participation_ratio_counts_equal_directions_and_ignores_the_mean():
    z = F.pad(normal(20000, 7), (0, 5)) + 100
    assert spectrum.participation_ratio(z) == pytest.approx(7, rel=0.01)
    eigenvalues = np.linalg.eigvalsh(np.cov(z.double().numpy().T))
    assert spectrum.participation_ratio(z) == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-6)


def test_feature_std_is_one_over_root_width_if_spread_and_zero_if_collapsed():
    assert spectrum.feature_std(normal(4000, 64)) == pytest.approx(1 / 8, rel=0.02)
    assert spectrum.feature_std(normal(1, 64).expand(50, 64) * torch.linspace(1, 9, 50)[:, None]) < 1e-6


def test_alpha_req_finds_the_exponent_and_is_silent_where_it_would_lie():
    scale = torch.arange(1, 121).float() ** (-1.3 / 2)
    assert spectrum.alpha_req(normal(200_00, 120) * scale) == pytest.approx(1.3, abs=0.05)
    assert math.isnan(spectrum.alpha_req(normal(300, 15) @ normal(15, 120, seed=1)))  # rank collapse
    assert math.isnan(spectrum.alpha_req(normal(12, 120)))  # too few inputs


def test_alpha_req_of_a_narrow_encoder_does_without_the_direction_that_its_layer_norm_takes():
    scale = torch.arange(1, 65).float() ** -0.5
    normed = F.layer_norm(normal(4000, 64) * scale, (64,))
    values = np.sort(np.linalg.eigvalsh(np.cov(normed.double().numpy().T)))[::-1]
    assert values[-1] < 1e-12
    slope = np.polyfit(np.log(np.arange(11, 64)), np.log(values[10:63]), 1)[0]
    assert spectrum.alpha_req(normed) == pytest.approx(-slope, rel=1e-6)
    collapsed = normal(300, 15) @ normal(15, 64, seed=1)
    assert math.isnan(spectrum.alpha_req(F.layer_norm(collapsed, (64,))))


@pytest.mark.parametrize("shape", [(60, 3, 10), (9, 4, 40)])
def test_lidar_is_the_papers(shape):
    n, q, d = shape
    views = normal(n, 1, d) + 0.3 * normal(n, q, d, seed=1)
    e = views.double().numpy()
    mu = e.mean(1)
    between = (mu - mu.mean(0)).T @ (mu - mu.mean(0)) / (n - 1)
    flat = (e - mu[:, None]).reshape(-1, d)
    within = flat.T @ flat / (n * (q - 1)) + 1e-4 * np.eye(d)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ between @ root).clip(0)
    p = eigenvalues / eigenvalues.sum() + 1e-8
    assert spectrum.lidar(views) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    with pytest.raises(ValueError, match="two views"):
        spectrum.lidar(views[:, :1])


# ---- the bound ------------------------------------------------------------------------------------


def test_the_terms_of_gamma_are_what_they_are_called():
    config = preset("demo")
    jepa, inputs, views = pushed_apart(config), normal(6, 1, 500), FixedMasks(preset("demo"))
    record = Examination(jepa.context_encoder, jepa.target_encoder, inputs, views=views).look()
    x_hat = views.embed(jepa.context_encoder, inputs).detach()
    rows = views.plan(6, 0).context_rows
    x = torch.zeros(60, 128).index_copy_(0, rows, x_hat.flatten(0, 1)[rows]).view(6, 10, 128)
    f_x, _ = views(jepa.context_encoder, inputs, 0)
    with torch.no_grad():
        f_whole, g_whole = (e(inputs).flatten(0, 1)[rows] for e in (jepa.context_encoder, jepa.target_encoder))
    moved, apart = ((f_x - other).detach().view(6, 3, 128).flatten(1).norm(dim=1) for other in (f_whole, g_whole))
    hidden = (x - x_hat).flatten(1).norm(dim=1)
    expected = {
        "lipschitz": (moved / hidden).max(), "token_norm": x_hat.norm(dim=-1).max(), "hidden": 7.0, "hidden_std": 0.0,
        "input_norm": x_hat.flatten(1).norm(dim=1).mean(), "mask_norm": hidden.mean(), "measured": apart.mean(),
        "mask_term": (moved / hidden).max() * x_hat.norm(dim=-1).max() * 7**0.5,
    }  # fmt: skip
    for name, value in expected.items():
        assert record[f"bound/{name}"] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    assert bound.complete(record, 2.0)["bound/gamma"] == pytest.approx(
        record["bound/mask_term"] + 2 * record["bound/input_norm"]
    )


def test_a_fixed_number_of_hidden_tokens_varies_less_than_bernoullis_and_blocks_vary_more():
    """Remarks B.1 and B.2: 7 of 10 exactly, and blocks on 14 x 14 tokens that no group cuts."""
    count = {}
    for name, mode, num_tokens in (("demo", "random", 10), ("in1k-vitb16", "packed", 196)):
        masks = FixedMasks(replace(preset(name), {"masks.mode": mode})).plan(400, 0)
        hidden = num_tokens - masks.context_cu.diff().double()
        p = float(hidden.mean()) / num_tokens
        count[name] = float(hidden.var()) / (num_tokens * p * (1 - p))
        assert (hidden <= hoeffding(num_tokens, p)).double().mean() > (0.95 if name == "demo" else 0.5)
    assert count["demo"] == 0 and count["in1k-vitb16"] > 2


def test_the_jacobian_of_a_linear_encoder_is_its_largest_singular_value():
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed, self.head = torch.nn.Linear(5, 6), torch.nn.Linear(6, 4)

        def forward(self, inputs):
            return self.head(self.patch_embed(inputs))

    encoder, jacobian, inputs = Linear(), bound.Jacobian(), normal(3, 7, 5)
    found = [jacobian(encoder, encoder.patch_embed, inputs) for _ in range(40)]
    assert found[-1] == pytest.approx(float(torch.linalg.matrix_norm(encoder.head.weight, 2).detach()), rel=1e-3)
    assert found[0] <= found[-1] * (1 + 1e-4)


# ---- probes ---------------------------------------------------------------------------------------


def test_ridge_is_scikit_learns():
    x, test = normal(200, 12) * 3 + 5, normal(50, 12, seed=1) * 3 + 5
    y = torch.from_numpy(np.random.default_rng(2).integers(0, 3, 200))
    model = Ridge(alpha=0.01 * 200).fit(x.double().numpy(), F.one_hot(y, 3).numpy())
    np.testing.assert_array_equal(
        probes.ridge_predict(x, y, test, 3, 0.01).numpy(), model.predict(test.double().numpy()).argmax(1)
    )


def test_knn_votes_as_defined():
    x, test, y = normal(60, 8), normal(20, 8, seed=1), torch.arange(60) % 4
    got = probes.knn_predict(x, y, test, 4, 5, 0.07)
    for i in range(20):
        similarity = [(float(F.cosine_similarity(test[i], v, dim=0)), int(c)) for v, c in zip(x, y, strict=True)]
        votes = np.zeros(4)
        for s, c in sorted(similarity, reverse=True)[:5]:
            votes[c] += np.exp(s / 0.07)
        assert int(got[i]) == votes.argmax()


def test_balanced_accuracy_is_the_mean_recall():
    truth, said = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 0, 0])
    assert probes.accuracy(said, truth) == 0.8 and probes.balanced_accuracy(said, truth) == 0.5


class Labelled:
    def __init__(self, count, classes):
        self.labels = np.arange(count) % classes

    def __len__(self):
        return len(self.labels)

    def load(self, index, rng, out=None):
        return np.full((1, 500), self.labels[index] + 0.1, np.float32) * np.sin(
            np.arange(500) * (1 + self.labels[index])
        )

    def key(self, index):
        return str(index)


def test_the_probe_set_is_fixed_and_its_majority_is_the_training_sets():
    sets = [probes.collect(Labelled(50, 3), Labelled(30, 3), 3, 20, 100) for _ in range(2)]
    assert torch.equal(sets[0].train, sets[1].train) and len(sets[0].train) == 20 and len(sets[0].test) == 30
    common = np.bincount(sets[0].train_labels).argmax()
    assert sets[0].majority == pytest.approx(float((sets[0].test_labels == common).double().mean()))


def test_an_examination_finds_what_is_there_to_find():
    """Series of different frequencies: even an untrained encoder tells them apart, and both encoders alike."""
    config = preset("demo")
    jepa = JEPA(config)
    probe_set = probes.collect(Labelled(60, 3), Labelled(30, 3), 3, 60, 30)

    def examination():
        return Examination(jepa.context_encoder, jepa.target_encoder, probe_set.test, probe_set=probe_set)

    first = examination()
    record = first.look()
    assert record["probe/target"] == record["probe/context"] == record["probe/untrained"] == 1.0
    assert record["discrepancy/full"] == 0 and record["probe/majority"] == pytest.approx(1 / 3)
    restored = examination()
    restored.load_state_dict(first.state_dict())
    assert restored.untrained == first.untrained


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_have_no_value_and_stop_no_training(value):
    jepa = JEPA(preset("demo"))
    jepa.target_encoder.norm.bias.data[3] = value
    probe_set = probes.collect(Labelled(60, 3), Labelled(30, 3), 3, 60, 30)
    record = Examination(
        jepa.context_encoder, jepa.target_encoder, probe_set.test, probe_set=probe_set, views=FixedMasks(preset("demo"))
    ).look()
    lost = ("probe/target", "probe/target/knn", "rankme", "participation", "readout", "lidar", "discrepancy/full")
    assert all(not math.isfinite(record[key]) for key in (*lost, "mismatch/excess"))
    kept = ("probe/context", "probe/untrained", "probe/majority", "rankme/context", "readout/context", "lidar/context")
    assert all(math.isfinite(record[key]) for key in kept)


def test_an_examination_leaves_the_encoders_as_they_were():
    jepa = JEPA(preset("demo"))
    jepa.context_encoder.train(), jepa.target_encoder.eval()
    Examination(jepa.context_encoder, jepa.target_encoder, normal(6, 1, 500)).look()
    assert jepa.context_encoder.training and not jepa.target_encoder.training
