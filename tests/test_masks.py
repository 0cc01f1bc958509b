"""The mask sampler: same bits from both backends, pure in its numbers, I-JEPA's quirks where they belong and nowhere else."""

import dataclasses
import itertools
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_fast.config import Masks
from jepa_fast.errors import UsageError
from jepa_fast.extension import extension
from jepa_fast.masks.reference import SplitMix64, stream_keys
from jepa_fast.masks.sample import check_masks, sample_masks
from jepa_fast.presets import PRESETS, preset

BLOCKS = ("reference", "fixed", "subsampled", "packed")
TOKENS = ("random", "bernoulli")
GRID = (14, 14)
ONE_SIZE = {"target_scale": (0.18, 0.18), "target_aspect": (1.0, 1.0), "context_scale": (0.9, 0.9)}  # 6x6 in 13x13

needs_cpp = pytest.mark.skipif(extension() is None, reason="jepa_fast_C is not built")


def _config(mode, **changes):
    return Masks(**({"mode": mode} | ({"num_targets": 1, "min_keep": 1} if mode in TOKENS else {}) | changes))


def _sample(config, grid=GRID, batch=128, seed=0, step=0, **more):
    numbers = np.arange(step * batch, (step + 1) * batch)
    return sample_masks(config, grid, seed, step, numbers // 1000, numbers % 1000, **more)


def _contexts(drawn):
    return np.split(drawn.context, np.cumsum(drawn.context_lengths)[:-1])


def _targets(drawn):
    """The target blocks of each image, as lists of token numbers."""
    blocks = np.repeat(drawn.target_lengths, drawn.num_targets)
    flat = np.split(drawn.targets, np.cumsum(blocks)[:-1])
    return [flat[i : i + drawn.num_targets] for i in range(0, len(flat), drawn.num_targets)]


def _assert_equal(a, b):
    for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


# ---- the stream ---------------------------------------------------------------------------------


def test_the_stream_is_splitmix64():
    stream = SplitMix64(1234567)  # outputs of the published generator for this state
    assert [stream.next() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_masks_stay_what_they_are():
    """A resumed run must see the masks it would have seen: change these numbers only on purpose."""
    drawn = [_sample(_config(mode), seed=3, step=5, batch=16) for mode in (*BLOCKS, *TOKENS)]
    assert [zlib.crc32(d.context.tobytes() + d.targets.tobytes()) for d in drawn] == [
        965057865,
        3718648408,
        1129752334,
        1559259146,
        634171818,
        2303566616,
    ]


def test_keys_differ_in_every_number():
    keys = [stream_keys(s, d, a, b)[0] for s in (0, 1, 2**63) for d in (1, 2) for a in (0, 1, 7) for b in (0, 1, 7)]
    assert len(set(keys)) == len(keys)


# ---- two backends -------------------------------------------------------------------------------


@needs_cpp
@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from((*BLOCKS, *TOKENS)), rows=st.integers(2, 18), columns=st.integers(2, 18),
    seed=st.integers(0, 2**63 - 1), step=st.integers(0, 10**6), batch=st.integers(1, 13), group=st.integers(1, 7),
    num_targets=st.integers(1, 5), min_keep=st.integers(1, 6), context_tokens=st.integers(0, 20), ratio=st.floats(0.05, 0.95),
)  # fmt: skip
def test_both_backends_give_the_same_bits(
    mode, rows, columns, seed, step, batch, group, num_targets, min_keep, context_tokens, ratio
):
    config = Masks(
        mode,
        1 if mode in TOKENS else num_targets,
        min_keep=min_keep,
        group=group,
        context_tokens=context_tokens,
        ratio=ratio,
    )
    got = []
    for backend in ("cpp", "python"):
        try:
            got.append(_sample(config, (rows, columns), batch, seed, step, backend=backend))
        except UsageError as error:
            got.append(str(error))
    if isinstance(got[0], str):
        assert got[0] == got[1]
    else:
        _assert_equal(*got)


@needs_cpp
@given(
    seed=st.integers(-(2**70), 2**70), domain=st.integers(0, 9), pairs=st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 2), min_size=1, max_size=5)
)  # fmt: skip
def test_both_backends_give_the_same_keys(seed, domain, pairs):
    first, second = np.array(pairs, np.int64).T
    for a, b in ((first, second), (first[0], second), (first, second[0]), (int(first[0]), int(second[0]))):
        np.testing.assert_array_equal(extension().stream_keys(seed, domain, a, b), stream_keys(seed, domain, a, b))


@needs_cpp
def test_threads_do_not_disturb_one_another():
    config = _config("packed")
    with ThreadPoolExecutor(4) as pool:
        for step, drawn in enumerate(pool.map(lambda s: _sample(config, step=s), range(16))):
            _assert_equal(drawn, _sample(config, step=step))


@pytest.mark.parametrize("cause", ["stale", "missing"])
def test_without_a_fitting_extension_python_serves_after_one_warning(monkeypatch, cause):
    expected = _sample(_config("packed"))
    if cause == "stale":
        pytest.importorskip("jepa_fast_C")
        monkeypatch.setattr("jepa_fast.extension.ABI", -1)
    else:
        monkeypatch.setitem(sys.modules, "jepa_fast_C", None)
    extension.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="version .* reinstall" if cause == "stale" else "cannot be used"):
            _assert_equal(_sample(_config("packed")), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _sample(_config("packed"))
        with pytest.raises(ValueError, match="not installed"):
            _sample(_config("packed"), backend="cpp")
    finally:
        extension.cache_clear()


# ---- pure functions of their numbers --------------------------------------------------------------


@pytest.mark.parametrize("mode", [*BLOCKS, *TOKENS])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_split_over_ranks_changes_nothing(mode, ranks):
    config, batch = _config(mode, group=8), 37  # groups cross the ranks' borders, and the last one is short
    whole = _sample(config, batch=batch)
    bounds = [r * batch // ranks for r in range(ranks + 1)]
    parts = [_sample(config, batch=batch, start=a, stop=b) for a, b in itertools.pairwise(bounds)]
    for name in ("context", "context_lengths", "targets", "target_lengths"):
        np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))


@pytest.mark.parametrize("mode", ["subsampled", "packed", *TOKENS])
def test_a_row_hangs_on_seed_epoch_and_sample_alone(mode):
    """With one block size, so that the group does not matter: not on step, place in the batch or neighbours."""
    config = _config(mode, **ONE_SIZE)
    many = sample_masks(config, GRID, 4, 0, np.zeros(9, np.int64), np.arange(9))
    alone = sample_masks(config, GRID, 4, 77, np.zeros(1, np.int64), np.array([6]))
    np.testing.assert_array_equal(_contexts(many)[6], alone.context)
    np.testing.assert_array_equal(_targets(many)[6], _targets(alone)[0])
    for seed, epoch, sample in ((5, 0, 6), (4, 1, 6), (4, 0, 7)):
        other = sample_masks(config, GRID, seed, 77, np.array([epoch]), np.array([sample]))
        assert not np.array_equal(other.targets, alone.targets)


def test_sizes_are_shared_in_a_group_and_differ_between_groups_and_steps():
    config = _config("packed", group=16)
    lengths = np.stack([_sample(config, step=step).target_lengths.reshape(8, 16) for step in range(5)])
    assert (lengths == lengths[..., :1]).all()
    assert len(np.unique(lengths)) > 3 and len(np.unique(lengths[:, 0])) > 1


# ---- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", BLOCKS)
@pytest.mark.parametrize("grid, min_keep", [((14, 14), 10), ((16, 16), 10), ((8, 8), 4), ((6, 6), 4), ((9, 15), 8)])
def test_targets_are_rectangles_and_contexts_are_what_they_leave(mode, grid, min_keep):
    config = _config(mode, min_keep=min_keep)
    check_masks(config, grid)
    for step in range(4):
        drawn = _sample(config, grid, batch=32, step=step)
        assert drawn.num_targets == 4 and drawn.context.dtype == drawn.targets.dtype == np.int64
        for context, blocks, size in zip(_contexts(drawn), _targets(drawn), drawn.target_lengths, strict=True):
            assert len(context) >= min_keep and size >= min_keep
            assert (np.diff(context) > 0).all() and context[0] >= 0 and context[-1] < grid[0] * grid[1]
            assert not np.intersect1d(context, np.concatenate(blocks)).size
            shapes = set()
            for block in blocks:
                r, c = np.divmod(block, grid[1])
                shapes.add((np.ptp(r) + 1, np.ptp(c) + 1))
                assert (np.diff(block) > 0).all() and len(block) == size == (np.ptp(r) + 1) * (np.ptp(c) + 1)
            assert len(shapes) == 1


@pytest.mark.parametrize("grid", [(10,), (14, 14)])
def test_random_hides_exactly_its_share_and_bernoulli_on_average(grid):
    n = int(np.prod(grid))
    drawn = _sample(_config("random", ratio=0.7), grid, batch=500)
    assert (drawn.target_lengths == int(0.7 * n)).all() and (drawn.context_lengths == n - int(0.7 * n)).all()
    for context, (target,) in zip(_contexts(drawn), _targets(drawn), strict=True):
        assert np.array_equal(np.sort(np.concatenate([context, target])), np.arange(n)) and (np.diff(target) > 0).all()
    assert _spread(drawn.targets, n, 500) < 5

    rows = 20000
    drawn = _sample(_config("bernoulli", ratio=0.7), grid, batch=rows)
    assert (drawn.target_lengths + drawn.context_lengths == n).all()
    assert drawn.target_lengths.min() >= 1 and drawn.context_lengths.min() >= 1
    everything, nothing = 0.7**n, 0.3**n  # drawn again: the binomial without its two ends
    mean = (0.7 * n - n * everything) / (1 - everything - nothing)
    variance = (0.21 * n + (0.7 * n) ** 2 - n**2 * everything) / (1 - everything - nothing) - mean**2
    assert abs(drawn.target_lengths.mean() - mean) < 5 * np.sqrt(variance / rows)
    assert abs(drawn.target_lengths.var() - variance) < 5 * variance * np.sqrt(2 / rows)


def _spread(tokens, n, images):
    """Largest deviation of a position's count from even use, in standard deviations of a binomial."""
    share = len(tokens) / n / images
    return np.abs(np.bincount(tokens, minlength=n) - images * share).max() / np.sqrt(images * share * (1 - share))


# ---- I-JEPA's quirks ----------------------------------------------------------------------------


def _many(config, steps=200):
    return [_sample(config, step=step) for step in range(steps)]


def test_reference_has_the_published_samplers_token_counts():
    """14x14, groups of 128: 82 visible tokens cut to 51, 38 % thrown away, 80 % in the top half, four block sizes."""
    cut, whole = _many(_config("reference")), _many(_config("reference", group=1), steps=50)
    lengths = np.concatenate([d.context_lengths for d in cut])
    visible = np.concatenate([d.context_lengths for d in whole]).mean()
    assert visible == pytest.approx(82, abs=1.5) and lengths.mean() == pytest.approx(51, abs=2)
    assert 1 - lengths.mean() / visible == pytest.approx(0.38, abs=0.03)
    assert np.mean(np.concatenate([d.context for d in cut]) < 98) == pytest.approx(0.8, abs=0.02)
    assert set(np.concatenate([d.target_lengths for d in cut])) == {30, 35, 36, 40}


@pytest.mark.parametrize("mode", BLOCKS)
def test_only_reference_never_uses_the_last_row_and_column(mode):
    drawn = _many(_config(mode), steps=20)
    for name in ("context", "targets"):
        rows, columns = np.divmod(np.concatenate([getattr(d, name) for d in drawn]), 14)
        expected = 12 if mode == "reference" else 13
        if (mode, name) != ("fixed", "context"):  # its cut leaves the last row to luck
            assert rows.max() == expected
        assert columns.max() == expected and rows.min() == columns.min() == 0


@pytest.mark.parametrize("mode", ["reference", "fixed"])
def test_contexts_are_cut_in_raster_order_to_the_shortest_of_the_group(mode):
    whole = _contexts(_sample(_config(mode, group=1, **ONE_SIZE)))
    cut = _sample(_config(mode, group=32, **ONE_SIZE))
    for i, (context, all_of_it) in enumerate(zip(_contexts(cut), whole, strict=True)):
        shortest = min(len(c) for c in whole[i // 32 * 32 : i // 32 * 32 + 32])
        np.testing.assert_array_equal(context, all_of_it[:shortest])


def test_scale_and_aspect_are_one_draw_in_reference_and_two_in_packed():
    line = [(int(196 * (0.15 + 0.05 * u)), 0.75 + 0.75 * u) for u in np.linspace(0, 0.9999, 5000)]
    expected = {(round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)) for area, aspect in line}
    assert {_size(d) for d in _many(_config("reference"))} == expected
    tall_and_wide = {_size(d) for d in _many(_config("packed"))}
    areas = {h * w for h, w in tall_and_wide}
    assert any((h, w) in tall_and_wide and (w, h) in tall_and_wide for h, w in tall_and_wide if h != w)
    assert len(tall_and_wide) > len(areas)


def _size(drawn):
    rows, columns = np.divmod(_targets(drawn)[0][0], 14)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


@pytest.mark.parametrize("mode", ["fixed", "subsampled", "packed"])
def test_corners_are_even_over_the_whole_grid(mode):
    drawn = _many(_config(mode, **ONE_SIZE), steps=30)
    corners = np.array([block[0] for d in drawn for blocks in _targets(d) for block in blocks])
    assert _spread(corners // 14, 9, len(corners)) < 5 and _spread(corners % 14, 9, len(corners)) < 5


@pytest.mark.parametrize("mode", ["subsampled", "packed"])
def test_contexts_lean_to_no_side(mode):
    tokens = np.concatenate([d.context for d in _many(_config(mode), steps=60)])
    assert np.mean(tokens // 14 < 7) == pytest.approx(0.5, abs=0.01)
    assert np.mean(tokens % 14 < 7) == pytest.approx(0.5, abs=0.01)


def test_subsampled_keeps_an_even_k_of_what_packed_shows():
    some = _sample(_config("subsampled", context_tokens=40, **ONE_SIZE), batch=2000)
    every = _sample(_config("packed", min_keep=36, **ONE_SIZE), batch=2000)
    assert (some.context_lengths == 40).all()
    assert (_sample(_config("subsampled")).context_lengths == 49).all()
    same = [set(a) <= set(b) for a, b in zip(_contexts(some), _contexts(every), strict=True) if len(b) >= 40]
    assert all(same) and len(same) > 1900
    places = [
        np.searchsorted(b, a) / len(b) for a, b in zip(_contexts(some), _contexts(every), strict=True) if len(b) >= 40
    ]
    histogram = np.histogram(np.concatenate(places), bins=5, range=(0, 1))[0]
    assert histogram.std() / histogram.mean() < 0.02


# ---- what cannot work ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes(name):
    config = preset(name)
    check_masks(config.masks, config.grid)


@pytest.mark.parametrize(
    "config, grid, field",
    [
        (_config("packed"), (10,), "mode"),
        (_config("spiral"), GRID, "mode"),
        (_config("random", num_targets=4), (10,), "num_targets"),
        (_config("bernoulli", num_targets=2), GRID, "num_targets"),
        (_config("random", ratio=0.05), (10,), "ratio"),
        (_config("random", min_keep=4), (10,), "min_keep"),
        (_config("bernoulli", min_keep=6), (10,), "min_keep"),
        (_config("bernoulli", ratio=0.0001), (10,), "min_keep"),  # possible, and hardly ever
        (_config("packed"), (8, 8), "min_keep"),  # the reference sampler hangs here
        (_config("reference"), (6, 6), "min_keep"),
        (_config("packed", target_scale=(0.01, 0.02), target_aspect=(0.1, 9.0), min_keep=1), (6, 6), "target_scale"),
        (_config("reference", min_keep=1), (1, 14), "target_scale"),
        (_config("packed", context_scale=(0.1, 0.2), min_keep=25), GRID, "min_keep"),
        (_config("packed", target_scale=(0.9, 1.0)), GRID, "min_keep"),
        (_config("packed", num_targets=60), GRID, "min_keep"),  # possible, and hardly ever
        (_config("subsampled", context_tokens=9), GRID, "context_tokens"),
        (_config("subsampled", context_tokens=190), GRID, "context_tokens"),
        (_config("subsampled", context_tokens=140), GRID, "context_tokens"),  # possible, and hardly ever
    ],
)
def test_what_cannot_be_met_is_refused_in_one_line(config, grid, field):
    with pytest.raises(UsageError, match=rf"^--masks\.{field} is .*give") as error:
        check_masks(config, grid)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["python", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize(
    "config, grid",
    [(_config("packed", num_targets=200, min_keep=4), (6, 6)), (_config("bernoulli", ratio=1e-9), (10,))],
)
def test_the_sampler_gives_up_instead_of_hanging(config, grid, backend):
    with pytest.raises(UsageError, match=r"--masks\.min_keep"):
        _sample(config, grid, backend=backend)


def test_rows_and_backends_that_do_not_exist_are_refused():
    for rows in ((3, 3), (0, 129), (-1, 4)):
        with pytest.raises(ValueError, match=r"rows \["):
            _sample(_config("packed"), start=rows[0], stop=rows[1])
    with pytest.raises(ValueError, match="auto, cpp, python"):
        _sample(_config("packed"), backend="rust")
