"""Several sets in one stream: shares as asked, every sample once in each epoch of its set, nothing to remember."""

import numpy as np
import pytest

from jepa_fast.data.loading.mixture import Mixture

COUNTS, WEIGHTS = [100, 1000, 37], (1.0, 2.0, 0.5)


def stream(steps, **changes):
    mixture = Mixture(**{"counts": COUNTS, "weights": WEIGHTS, "batch_size": 64, "seed": 0, **changes})
    epochs, samples = (np.concatenate(x) for x in zip(*(mixture.batch(s) for s in range(steps)), strict=True))
    return epochs, samples


@pytest.mark.parametrize("window", [0, 90])
def test_every_sample_comes_once_in_each_epoch_of_its_set(window):
    epochs, samples = stream(110, window=window)
    for first, count in zip(np.cumsum([0, *COUNTS]), COUNTS, strict=False):
        mine = (samples >= first) & (samples < first + count)
        assert epochs[mine].max() >= 1
        for epoch in range(epochs[mine].max()):
            assert sorted(samples[mine & (epochs == epoch)]) == list(range(first, first + count))


def test_shares_are_the_weights_everywhere_in_the_stream():
    _, samples = stream(400)
    sets = np.searchsorted(np.cumsum(COUNTS), samples, side="right")
    for part in (sets, sets[:4096], sets[-8192:]):
        np.testing.assert_allclose(np.bincount(part, minlength=3) / len(part), np.array(WEIGHTS) / 3.5, atol=0.01)
    runs = np.diff(np.flatnonzero(np.diff(sets)))
    assert runs.max() < 40  # mixed, not one set after the other


def test_a_batch_is_a_function_of_seed_and_step_alone():
    epochs, samples = stream(200)
    again = Mixture(COUNTS, WEIGHTS, 64, 0).batch(199)
    np.testing.assert_array_equal(again[0], epochs[-64:])
    np.testing.assert_array_equal(again[1], samples[-64:])
    assert not np.array_equal(stream(3, seed=1)[1], samples[: 3 * 64])


def test_sets_of_one_size_are_not_shuffled_alike():
    _, samples = stream(100, counts=[500, 500], weights=(1, 1))
    first, second = samples[samples < 500], samples[samples >= 500] - 500
    assert np.mean(first[:400] == second[:400]) < 0.05


@pytest.mark.parametrize("weights", [(1,), (1, 1, 1), (1, 0), (1, 1e-9), (1, float("nan"))])
def test_weights_that_cannot_be_met_are_refused(weights):
    with pytest.raises(ValueError, match="2 sets need as many weights"):
        Mixture([10, 10], weights, 4, 0)
