"""The C++ functions refuse what they cannot hold, before they take memory or write behind it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_ema import ema_update_
from fused_ema.backends import extension as ema_extension
from jepa_fast.extension import extension

native = pytest.mark.skipif(extension() is None, reason="the C++ extension is not built")
numbers = st.one_of(st.integers(-3, 40), st.sampled_from([2**31 - 1, 2**31, 2**32, 2**33, 2**62, 2**63 - 1, -(2**63)]))


@native
@settings(max_examples=150, deadline=None)
@given(grid=st.tuples(numbers, numbers), within=st.tuples(numbers, numbers), block=st.lists(st.integers(-1, 9), min_size=4, max_size=4),
       targets=numbers, need=numbers, keep=numbers, tries=numbers)  # fmt: skip
def test_draw_blocks_draws_tokens_of_the_grid_or_refuses(grid, within, block, targets, need, keep, tries):
    if 1 <= grid[0] < 2**31 and 1 <= grid[1] < 2**31 and grid[0] * grid[1] > 10**6:
        grid = (2**40, 2**40)  # else it would rightly take gigabytes
    keys, sizes = np.arange(2, dtype=np.uint64), np.array([block, block])
    try:
        drawn = extension().draw_blocks(keys, sizes, grid, within, min(targets, 1000), need, keep, min(tries, 20))
    except (ValueError, TypeError, MemoryError):
        return
    if drawn is not None:
        context, lengths, hidden, _ = drawn
        assert lengths.sum() == len(context) and min(context.min(), hidden.min()) >= 0
        assert max(context.max(), hidden.max()) < grid[0] * grid[1]


@native
@pytest.mark.parametrize("grid", [(2**32, 2**32), (2**62, 2), (0, 5), (-1, -1), (2**31, 2)])
def test_a_grid_beyond_what_there_can_be_is_refused(grid):
    with pytest.raises(ValueError):
        extension().draw_blocks(np.zeros(1, np.uint64), np.ones((1, 4), np.int64), grid, (1, 1), 1, 1, 0, 1)


@native
@settings(max_examples=150, deadline=None)
@given(tokens=numbers, hidden=numbers, need=numbers, tries=numbers)
def test_exact_and_bernoulli_masks_are_of_the_tokens_or_refused(tokens, hidden, need, tries):
    if 10**6 < tokens <= 2**31:
        tokens = 2**40
    keys = np.arange(2, dtype=np.uint64)
    try:
        _, lengths, targets, counts = extension().draw_exact(keys, tokens, hidden)
        assert counts.tolist() == [hidden, hidden] and (lengths + counts == tokens).all() and targets.size == 2 * hidden
    except (ValueError, TypeError):
        assert not 0 <= hidden <= tokens or not 0 < tokens <= 2**31
    try:
        extension().draw_bernoulli(keys, tokens, 2**52, need, min(tries, 50))
    except (ValueError, TypeError):
        assert not (0 < tokens <= 2**31 and 0 <= need <= tokens and tries >= 0)


@native
@settings(max_examples=200, deadline=None)
@given(context=st.lists(st.integers(-1, 9), max_size=8), targets=st.lists(st.integers(-1, 9), max_size=8),
       lengths=st.lists(numbers, max_size=3), others=st.lists(numbers, max_size=3), blocks=numbers, tokens=numbers)  # fmt: skip
def test_index_rows_are_of_the_batch_or_refused(context, targets, lengths, others, blocks, tokens):
    arrays = [np.array(v, np.int64) for v in (context, lengths, targets, others)]
    try:
        made = extension().indices(*arrays, blocks, tokens)
    except (ValueError, TypeError):
        return
    total = len(lengths) * tokens
    assert all(((made[k] >= 0) & (made[k] < max(1, total))).all() for k in ("context_rows", "target_rows"))
    assert len(made["predictor_order"]) == blocks * len(context) + len(targets)


@native
@pytest.mark.parametrize("blocks", [2**31, 2**62, 2**63 - 1, 0, -1])
def test_more_blocks_than_a_batch_can_hold_are_refused(blocks):
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError):
        extension().indices(one, np.ones(1, np.int64), np.zeros(0, np.int64), one, blocks, 4)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("size", [0, 40])
@pytest.mark.parametrize("which", ["target", "source", "copy"])
def test_a_storage_that_was_freed_or_shrunk_is_refused_by_name(backend, size, which):
    if backend == "cpp" and ema_extension() is None:
        pytest.skip("the C++ extension is not built")
    tensors = {name: torch.ones(1000) for name in ("target", "source", "copy")}

    def update():
        ema_update_([tensors["target"]], [tensors["source"]], 0.9, backend=backend, copies=[tensors["copy"]])

    update()
    tensors[which].untyped_storage().resize_(size)
    with pytest.raises(ValueError, match=f"the storage of {which} 0 was freed or shrunk: 4000 bytes are needed"):
        update()


@pytest.mark.skipif(ema_extension() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("row", [(0, 64, 0, 10, 0, 0, 0, 0), (64, 0, 0, 10, 0, 0, 0, 0), (64, 64, 0, -1, 0, 0, 0, 0),
                                 (64, 64, 0, 2**62, 0, 0, 0, 0), (64, 64, 0, 1, 3, 0, 0, 0), (64, 64, 0, 1, 0, 0, 0, 5)])  # fmt: skip
def test_a_plan_of_tensors_without_memory_is_refused(row):
    with pytest.raises(ValueError):
        ema_extension().Plan([row], 1)
