"""The order of the samples: stateless, exact, the same on any number of processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_fast.data.loading.order import Order
from jepa_fast.data.random import augmentation, philox, shuffled


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_every_sample_comes_once_an_epoch_and_every_batch_is_whole(num_samples, batch_size, seed):
    order = Order(num_samples, batch_size, seed)
    steps = -(-3 * num_samples // batch_size)
    epochs, samples = (np.concatenate(x) for x in zip(*(order.batch(s) for s in range(steps)), strict=True))
    assert len(samples) == steps * batch_size
    for epoch in range(3):
        assert sorted(samples[epochs == epoch]) == list(range(num_samples))


def test_a_batch_is_a_function_of_seed_and_step_alone():
    forward, resumed = Order(100, 32, 7), Order(100, 32, 7)
    for step in range(9):
        forward.batch(step)
    for got, expected in zip(resumed.batch(9), forward.batch(9), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert not np.array_equal(Order(100, 32, 8).batch(9)[1], forward.batch(9)[1])


def test_epochs_are_shuffled_differently():
    order = Order(1000, 10, 0)
    assert np.mean(order.permutation(0) == order.permutation(1)) < 0.02


def test_the_stream_is_frozen():
    """These numbers may never change: a resumed run depends on them."""
    np.testing.assert_array_equal(Order(8, 8, 3).batch(0)[1], FROZEN)


FROZEN = [6, 1, 5, 2, 7, 4, 3, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 20_000])
def test_a_shuffle_is_the_order_of_random_words(count):
    words = philox(4, 2, part=1).random_raw(count)
    np.testing.assert_array_equal(shuffled(count, 4, 2, 1), np.argsort(words, kind="stable"))


def test_samples_have_streams_of_their_own():
    words = {philox(0, e, s).random_raw() for e in range(10) for s in range(-1, 100)}
    assert len(words) == 10 * 101


def test_a_kept_generator_gives_the_stream_of_a_new_one():
    for seed, epoch, sample in ((0, 0, 0), (3, 7, 10**12), (2**64 - 1, 5, 1)):
        new, kept = np.random.Generator(philox(seed, epoch, sample)), augmentation(seed, epoch, sample)
        for draw in (lambda g: g.uniform(0.3, 1, 5), lambda g: g.integers(100, size=3), lambda g: g.normal(size=3)):
            np.testing.assert_array_equal(draw(kept), draw(new))
        kept.integers(100, dtype=np.uint32)  # leaves half a word behind


def test_nothing_to_order_is_refused():
    with pytest.raises(ValueError, match="got 0 and 4"):
        Order(0, 4, 0)


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 80), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_a_block_shuffle_is_as_exact(num_samples, batch_size, window, seed):
    order = Order(num_samples, batch_size, seed, window)
    steps = -(-3 * num_samples // batch_size)
    epochs, samples = (np.concatenate(x) for x in zip(*(order.batch(s) for s in range(steps)), strict=True))
    for epoch in range(3):
        assert sorted(samples[epochs == epoch]) == list(range(num_samples))
    np.testing.assert_array_equal(
        Order(num_samples, batch_size, seed, window).batch(steps - 1)[1], samples[-batch_size:]
    )


def test_a_block_shuffle_reads_a_window_in_few_stretches():
    order = Order(100_000, 64, 0, window=1600)
    windows = order.permutation(0)[: 62 * 1600].reshape(-1, 1600)
    stretches = [1 + int((np.diff(np.sort(w)) > 1).sum()) for w in windows]
    assert max(stretches) <= 17
    assert np.mean(np.abs(np.diff(windows[0]))) > 1000  # and they are mixed
    full = Order(100_000, 64, 0).permutation(0)[:1600]
    assert 1 + int((np.diff(np.sort(full)) > 1).sum()) > 1500
    assert np.mean(order.permutation(0)[:1600] == order.permutation(1)[:1600]) < 0.02


def test_a_window_as_large_as_the_set_is_the_full_permutation():
    np.testing.assert_array_equal(Order(50, 8, 3, 50).permutation(2), Order(50, 8, 3).permutation(2))
    np.testing.assert_array_equal(Order(40, 40, 3, 16).batch(0)[1], FROZEN_WINDOWS)


FROZEN_WINDOWS = [
    5,
    1,
    7,
    13,
    37,
    2,
    8,
    6,
    34,
    11,
    31,
    26,
    29,
    19,
    24,
    18,
    35,
    28,
    32,
    39,
    9,
    21,
    3,
    30,
    38,
    23,
    15,
    10,
    22,
    25,
    4,
    36,
    12,
    33,
    16,
    14,
    20,
    17,
    27,
    0,
]
