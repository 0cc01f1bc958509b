"""What features tell of the inputs' spectra: read where it is, not where it is not, whatever the features' scale."""

import math

import pytest
import torch

from jepa_fast.monitor.content import COMPONENTS, PENALTIES, content, signature


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tones(n, length=200):
    """Series of one tone each, of a frequency of their own, in noise; and the frequencies."""
    frequency = torch.linspace(0.05, 0.3, n)
    phase = 6.28 * torch.rand(n, 1, generator=torch.Generator().manual_seed(1))
    wave = torch.sin(2 * math.pi * frequency[:, None] * torch.arange(length) + phase)
    return (wave + 0.3 * noise(n, length))[:, None], frequency


def test_features_that_hold_the_spectrum_are_told_from_noise():
    target = signature(tones(300)[0])
    mixed = torch.cat([target.float() @ noise(COMPONENTS, 8, seed=2), noise(300, 8, seed=3)], 1)
    assert content(mixed, target) > 0.95
    assert content(noise(300, 16, seed=4), target) < 0.15


def test_less_of_it_in_more_noise_reads_lower():
    target = signature(tones(300)[0])
    unit = (target / target.std(0)).float()
    readings = [content(unit + size * noise(300, COMPONENTS, seed=5), target) for size in (0.1, 1.0, 4.0, 50.0)]
    assert readings == sorted(readings, reverse=True) and readings[0] > 0.9 > 0.3 > readings[-1]


def test_neither_scale_nor_offset_of_the_features_counts():
    target = signature(tones(200)[0])
    x = noise(200, 12, seed=6)
    x[:, :2] += target[:, -2:].float()
    assert content(1e-4 * x + 3.0, target) == pytest.approx(content(x, target), abs=1e-3)


@pytest.mark.parametrize("width", [5, 60])  # fewer and more features than inputs
def test_each_input_is_predicted_by_a_fit_without_it(width):
    n, target = 30, signature(tones(30)[0])
    x = noise(n, width, seed=7).double()
    x[:, 0] += target[:, -1]
    x = (x - x.mean(0)) / x.std(0)
    errors, guess = torch.zeros(len(PENALTIES), COMPONENTS, dtype=torch.double), torch.zeros(COMPONENTS)
    for i in range(n):
        kept = torch.arange(n) != i
        base = target[kept].mean(0)
        guess = guess + (target[i] - base).square()
        for k, penalty in enumerate(PENALTIES):
            a = torch.cat([x[kept], torch.ones(n - 1, 1)], 1)  # intercept, unpenalised
            gram = a.T @ a + torch.diag(torch.tensor([penalty * n] * width + [0.0]).double())
            weight = torch.linalg.solve(gram, a.T @ target[kept])
            errors[k] += (target[i] - torch.cat([x[i], torch.ones(1)]) @ weight).square()
    least = torch.minimum(errors.amin(0), guess).sum()
    expected = float(1 - least / guess.sum()) ** 0.5
    assert content(x, target) == pytest.approx(expected, abs=1e-6)


def test_rings_of_an_image_are_its_scale_and_not_its_direction():
    t = torch.arange(24.0)
    waves = [torch.sin(2 * math.pi * f * t) for f in (0.125, 0.375)]
    images = torch.stack([w[None, :].expand(24, 24) for w in waves] + [w[:, None].expand(24, 24) for w in waves])
    images = (127 + 60 * images + noise(4, 24, 24)).to(torch.uint8)[:, None]
    slow, fast, slow_turned, fast_turned = signature(images)[:, -1]
    assert abs(slow - slow_turned) < 0.2 * abs(slow - fast) and abs(fast - fast_turned) < 0.2 * abs(slow - fast)


def test_what_has_no_spectrum_has_no_signature_and_equal_inputs_tell_nothing():
    assert signature(noise(10, 7)) is None and signature(noise(1, 1, 50)) is None
    assert signature(noise(10, 1, 1)) is None  # a series of one sample
    assert content(noise(10, 4), signature(torch.ones(10, 1, 50))) == 0.0
    assert content(torch.ones(300, 4), signature(tones(300)[0])) < 1e-6
