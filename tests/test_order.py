"""The order of the samples: stateless, exact, the same on any number of processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_fast.data.order import Order, philox


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


def test_samples_have_streams_of_their_own():
    words = {philox(0, e, s).random_raw() for e in range(10) for s in range(-1, 100)}
    assert len(words) == 10 * 101


def test_nothing_to_order_is_refused():
    with pytest.raises(ValueError, match="got 0 and 4"):
        Order(0, 4, 0)
