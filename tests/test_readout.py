"""The probe without labels reads pseudo-classes of the inputs: nothing from noise, nearly all from a description of them."""

import pytest
import torch

from jepa_fast.monitor.measures.readout import description, pseudo_classes, readout


@pytest.fixture(scope="module")
def series():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 1, 60, generator=generator)
    period = torch.tensor([3.0, 8.0, 20.0])[torch.arange(120) % 3]
    return x + 2 * torch.sin(torch.arange(60) * 6.28 / period[:, None])[:, None]


def test_noise_reads_near_chance_and_the_description_nearly_all(series):
    classes = pseudo_classes(series)
    noise = torch.randn(120, 8, generator=torch.Generator().manual_seed(1))
    assert readout(noise, classes) < 0.45 < 0.75 < readout(description(series), classes)


def test_it_does_not_depend_on_the_features_scale_and_repeats(series):
    classes = pseudo_classes(series)
    assert torch.equal(classes, pseudo_classes(series))
    features = description(series)[:, :5]
    assert readout(1e-4 * features + 3, classes) == pytest.approx(readout(features, classes), abs=0.01)


def test_less_of_the_inputs_in_more_noise_reads_lower(series):
    classes, features = pseudo_classes(series), description(series)[:, -5:]
    features = features / features.std(0)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(4))
    readings = [readout(features + size * noise, classes) for size in (0.0, 1.0, 4.0, 50.0)]
    assert readings == sorted(readings, reverse=True) and readings[0] > readings[-1] + 0.2


def test_features_that_are_all_equal_read_no_more_than_the_commonest_class(series):
    classes = pseudo_classes(series)
    commonest = sum(int(labels.bincount().max()) for labels in classes) / classes.numel()
    assert readout(torch.ones(120, 4), classes) <= commonest + 1e-9


def test_each_input_is_left_out_of_the_fit_that_predicts_it(series):
    """Features that could only be learnt by heart are worth nothing."""
    classes = pseudo_classes(series)
    assert readout(torch.randn(120, 119, generator=torch.Generator().manual_seed(2)), classes) < 0.45


def test_the_closed_form_is_the_loop_over_left_out_inputs(series):
    classes, x = pseudo_classes(series)[:1], torch.randn(120, 6, generator=torch.Generator().manual_seed(3))
    x = x + classes[0][:, None] * torch.tensor([1.0, 0, 0, 0, 0, 0])
    z = ((x.double() - x.double().mean(0)) / x.double().std(0)).clone()
    y = torch.nn.functional.one_hot(classes[0]).double()
    gram = z.T @ z + 0.01 * 120 * torch.eye(6)
    hat = z @ torch.linalg.solve(gram, z.T) + 1 / 120
    fitted = z @ torch.linalg.solve(gram, z.T @ (y - y.mean(0))) + y.mean(0)
    left_out = (fitted - hat.diagonal()[:, None] * y) / (1 - hat.diagonal())[:, None]
    assert readout(x, classes) == pytest.approx(float((left_out.argmax(1) == classes[0]).double().mean()))


def test_images_work_and_what_cannot_be_described_is_none():
    images = torch.randint(0, 255, (30, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert pseudo_classes(images).shape == (6, 30)
    assert pseudo_classes(torch.zeros(30, 1, 40)) is None and pseudo_classes(torch.zeros(2, 1, 40)) is None
    assert pseudo_classes(torch.zeros(5, 7)) is None


def test_features_that_are_not_finite_have_no_readout(series):
    features = torch.zeros(120, 3)
    features[0, 0] = float("nan")
    assert torch.isnan(torch.tensor(readout(features, pseudo_classes(series))))
