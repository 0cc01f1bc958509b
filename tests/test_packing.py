"""MaskPlan's rows, and the ladder of buckets that token totals are rounded up to."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jepa_fast.config import replace as change
from jepa_fast.extension import extension
from jepa_fast.masks import packing
from jepa_fast.masks.ladder import Ladder, ladder
from jepa_fast.masks.packing import MaskPlan, plan
from jepa_fast.masks.sample import MaskBatch, sample_masks
from jepa_fast.presets import preset

ANY = Ladder((10, 20), (40,), 9, 12, 5)


def test_a_plan_names_rows_of_images_and_of_sequences():
    masks = MaskBatch(np.array([0, 3, 1]), np.array([2, 1]), np.array([1, 2, 0]), np.array([1, 1]), 1)
    masks = MaskBatch(masks.context, masks.context_lengths, np.array([1, 2, 0, 3]), masks.target_lengths, 2)
    chosen = plan(masks, 4)
    assert chosen.context_rows.tolist() == [0, 3, 5] and chosen.target_rows.tolist() == [1, 2, 4, 7]
    # image 0: [its two context tokens, target] twice; image 1: [its one, target] twice. Mask tokens follow context's.
    assert chosen.predictor_order.tolist() == [0, 1, 3, 0, 1, 4, 2, 5, 2, 6]
    assert chosen.predictor_targets.tolist() == [2, 5, 7, 9]
    assert chosen.predictor_cu.tolist() == [0, 3, 6, 8, 10] and chosen.target_cu.tolist() == [0, 1, 2, 3, 4]
    assert (chosen.context_max, chosen.predictor_max, chosen.target_max, chosen.num_inputs) == (2, 3, 1, 2)
    assert chosen.context_bucket == chosen.predictor_bucket == 0
    assert float(chosen.target_weight.sum()) == pytest.approx(1)


@pytest.mark.skipif(extension() is None, reason="jepa_fast_C is not built")
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=7),
    blocks=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), laddered=st.booleans(),
)  # fmt: skip
def test_cpp_and_numpy_make_the_same_plan(lengths, blocks, seed, laddered):
    rng, (context, target) = np.random.default_rng(seed), np.array(lengths, np.int64).T
    masks = MaskBatch(rng.integers(0, 20, context.sum()), context, rng.integers(0, 20, blocks * target.sum()), target, blocks)  # fmt: skip
    by_cpp = plan(masks, 20, ANY if laddered else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "extension", lambda: None)
        by_numpy = plan(masks, 20, ANY if laddered else None)
    for field in fields(MaskPlan):
        a, b = getattr(by_cpp, field.name), getattr(by_numpy, field.name)
        assert (a.dtype == b.dtype and torch.equal(a, b)) if isinstance(a, torch.Tensor) else a == b, field.name


@pytest.mark.parametrize("field", ["context", "context_lengths", "targets", "target_lengths"])
def test_lengths_that_are_not_those_of_the_tokens_are_refused(field):
    masks = MaskBatch(np.array([0, 3, 1]), np.array([2, 1]), np.array([1, 2]), np.array([1, 1]), 1)
    with pytest.raises(ValueError, match=r"add up|operands|broadcast"):
        plan(replace(masks, **{field: np.append(getattr(masks, field), 1)}), 4)


@pytest.mark.skipif(extension() is None, reason="jepa_fast_C is not built")
@pytest.mark.parametrize(
    "lengths", [[2**62, 2**62, 2**62, 2**62 + 10], [2**63 - 1, 2**63 - 1, 12], [10**6, 10 - 10**6]]
)
def test_lengths_that_add_up_by_overflow_or_by_a_negative_are_refused(lengths):
    tokens, lengths = np.zeros(10, np.int64), np.array(lengths, np.int64)
    fine = np.array([10] + [0] * (len(lengths) - 1), np.int64)
    for pair in ((lengths, fine), (fine, lengths)):
        with pytest.raises(ValueError, match="add up"):
            extension().indices(tokens, pair[0], tokens, pair[1], 1, 20)


def test_a_ladder_rounds_totals_up_and_fixes_lengths():
    masks = MaskBatch(np.arange(11), np.array([6, 5]), np.array([1, 2]), np.array([1, 1]), 1)
    chosen = plan(masks, 16, ANY)
    assert (chosen.context_bucket, chosen.predictor_bucket) == (20, 40)
    assert (chosen.context_max, chosen.predictor_max, chosen.target_max) == (9, 12, 5)
    # (bucket, sequences behind the tokens, none empty and none over 4): a rung's own number, but for very few tokens
    expected = {1: (10, 3), 6: (10, 2), 8: (10, 2), 9: (20, 3), 17: (20, 3), 18: (20, 1), 45: (60, 4)}
    assert {n: Ladder.rung((10, 20), n, 4) for n in expected} == expected
    assert Ladder.rung((10,), 10, 4) == (10, 0), "totals that never vary fill their bucket"


CASES = [
    ("in1k-vitb16", "packed", 64, 2048),
    ("in1k-vitb16", "reference", 128, 128),
    ("in1k-vith14", "fixed", 128, 2048),
    ("in1k-vith14", "subsampled", 64, 64),
    ("textures", "packed", 64, 64),
    ("demo", "bernoulli", 32, 32),
]


@pytest.mark.parametrize("name, mode, share, batch", CASES)
def test_on_batches_it_never_saw_padding_is_three_per_cent_at_most_and_nothing_is_too_long(name, mode, share, batch):
    config = change(preset(name), {"masks.mode": mode, "train.batch_size": batch})
    rungs = ladder(config, share)
    assert len(rungs.context) <= 18 and len(rungs.predictor) <= 18
    padded, real, counts = np.zeros(2), np.zeros(2), dict[tuple[int, int], set[int]]()
    for step in range(5000, 5080):
        samples = np.arange(batch) + step * batch
        masks = sample_masks(config.masks, config.grid, 7, step, np.zeros_like(samples), samples, 0, share)
        chosen = plan(masks, config.num_tokens, rungs)
        assert chosen.context_bucket in rungs.context and chosen.predictor_bucket in rungs.predictor
        assert chosen.context_max == rungs.context_max and chosen.predictor_max == rungs.predictor_max
        assert chosen.target_max == rungs.target_max
        for total, bucket, spare, bound in (
            (len(chosen.context_index), chosen.context_bucket, chosen.context_spare, chosen.context_max),
            (len(chosen.predictor_order), chosen.predictor_bucket, chosen.predictor_spare, chosen.predictor_max),
        ):  # the rows behind the tokens: sequences that are neither empty nor too long, as many whatever the batch
            lengths = np.diff(spare.numpy(), prepend=total)
            assert total + lengths.sum() == bucket and (
                not len(lengths) or 1 <= lengths.min() <= lengths.max() <= bound
            )
            counts.setdefault((bound, bucket), set()).add(len(lengths))
        behind = [min(len(chosen.context_spare), 1), min(len(chosen.predictor_spare), 1)]  # a row that must be there
        padded += [chosen.context_bucket - behind[0], chosen.predictor_bucket - behind[1]]
        real += [len(chosen.context_index), len(chosen.predictor_order)]
    assert (padded / real <= 1.03).all(), padded / real - 1
    assert all(len(each) == 1 for each in counts.values())


def test_where_totals_cannot_vary_there_is_one_rung_and_no_padding():
    config = preset("demo")  # exactly 7 of 10 hidden
    assert ladder(config, 32) == Ladder((96,), (320,), 3, 10, 7)


def test_the_ladder_is_the_same_on_every_process():
    config = change(preset("textures"), {"train.batch_size": 64})
    assert ladder(config, 32) == ladder(config, 32)
