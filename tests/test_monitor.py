"""The monitor's numbers against independent implementations: NumPy, scikit-learn, and the definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from jepa_fast.model.jepa import JEPA
from jepa_fast.monitor import Examination, discrepancy, probes, spectrum
from jepa_fast.monitor.views import FixedMasks
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
    record = Examination(jepa.context_encoder, jepa.target_encoder, inputs, masked=views).look()
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


@pytest.mark.parametrize("kind", ["l2", "l1", "smooth_l1"])
def test_skill_is_zero_for_the_best_constant_and_one_for_a_perfect_predictor(kind):
    target = 2 * normal(400, 6, 16)
    rows = torch.arange(400 * 6)
    weight = torch.full((400 * 6,), 1 / (400 * 6))
    from jepa_fast.model.jepa import token_loss

    centre = target.median(0, keepdim=True).values if kind == "l1" else target.mean(0, keepdim=True)
    constant = token_loss(centre.expand_as(target), target, kind).mean()
    assert float(discrepancy.predictor_skill(constant, target, rows, weight, kind)) == pytest.approx(0, abs=0.01)
    assert float(discrepancy.predictor_skill(torch.tensor(0.0), target, rows, weight, kind)) == 1
    assert float(discrepancy.predictor_skill(2 * constant, target, rows, weight, kind)) == pytest.approx(-1, abs=0.02)


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

    def load(self, index, rng):
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


def test_an_examination_leaves_the_encoders_as_they_were():
    jepa = JEPA(preset("demo"))
    jepa.context_encoder.train(), jepa.target_encoder.eval()
    Examination(jepa.context_encoder, jepa.target_encoder, normal(6, 1, 500)).look()
    assert jepa.context_encoder.training and not jepa.target_encoder.training
