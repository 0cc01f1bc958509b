"""The phase detector: what it calls on curves whose story is known, and that it never looks ahead."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_fast.monitor import phase
from jepa_fast.monitor.phase import curves, shapes

STEPS = np.arange(0, 2000, 10)


def curve(key, values, steps=STEPS):
    return [{"step": int(s), key: float(v)} for s, v in zip(steps, values, strict=True)]


def facts(records):
    """Events that are no suspicions."""
    return [e for e in phase.detect(records) if not e.kind.endswith("_suspected")]


def kinds(records):
    return [e.kind for e in facts(records)]


def noise(n, size, seed=0):
    return np.exp(size * np.random.default_rng(seed).normal(size=n))


def dip(bottom=500, depth=20.0, rise=8.0):
    """Falls by `depth` until `bottom`, then rises by `rise`."""
    falling = np.clip(STEPS / bottom, 0, 1)
    rising = np.clip((STEPS - bottom) / (STEPS[-1] - bottom), 0, 1)
    return depth ** -np.sin(falling * np.pi / 2) * rise**rising


# ---- valleys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scatter", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("key, kind", [("loss", "loss_minimum")])
def test_a_fall_and_a_lasting_rise_are_one_minimum_near_the_bottom(key, kind, scatter):
    (event,) = facts(curve(key, dip() * noise(len(STEPS), scatter)))
    assert event.kind == kind
    assert 350 <= event.step <= 650 < 2000
    assert event.step < event.called_at <= 1200
    assert 0.8 < event.confidence < 1
    assert str(event.step) in event.evidence[0]


@pytest.mark.parametrize("scatter", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("trend", [0.0, -2.0, -6.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_trend_is_no_valley_however_noisy(trend, scatter, seed):
    falling = np.exp(trend * STEPS / STEPS[-1])
    assert kinds(curve("loss", falling * noise(len(STEPS), scatter, seed))) == []


def test_a_plateau_after_a_fall_is_no_valley():
    assert kinds(curve("loss", np.maximum(np.exp(-STEPS / 100), 0.01) * noise(len(STEPS), 0.1))) == []


def test_one_spike_is_no_valley():
    values = np.exp(-STEPS / 700)
    values[100:102] *= 50
    assert kinds(curve("loss", values)) == []


def test_the_first_epochs_of_a_known_report_are_called():
    """The loss by epoch that a user of I-JEPA's code took for a failure (its issue 41)."""
    losses = [0.028, 0.005, 0.005, 0.006, 0.008, 0.012, 0.015]
    (event,) = facts(curve("loss", losses, range(len(losses))))
    assert event.kind == "loss_minimum"
    assert event.step in (1, 2)
    assert event.confidence < 0.9  # seven points are few


def test_after_the_first_minimum_only_a_deeper_one_counts():
    wave = np.cos(STEPS / 100)
    shallower = np.exp(1.5 * wave + STEPS / 500)
    deeper = np.exp(1.5 * wave - STEPS / 500)
    assert kinds(curve("loss", shallower)).count("loss_minimum") == 1
    assert kinds(curve("loss", deeper)).count("loss_minimum") > 1


def test_a_coarse_and_a_fine_log_tell_the_same():
    fine = curve("loss", dip() * noise(len(STEPS), 0.02))
    (a,), (b,) = facts(fine), facts(fine[::10])
    assert a.kind == b.kind and abs(a.step - b.step) <= 100


# ---- late drops -----------------------------------------------------------------------------------


def escape_then(late):
    """A dip at step 400, a rise, a plateau, and from step 1,400 on the curve times `late`."""
    values = dip(bottom=400)
    values[STEPS > 900] = values[STEPS <= 900][-1]
    return values * np.where(STEPS > 1400, late, 1.0)


@pytest.mark.parametrize("every, scatter", [(1, 0.0), (1, 0.02), (1, 0.1), (10, 0.0), (10, 0.02)])
def test_a_sudden_fall_after_the_escape_is_a_late_drop(every, scatter):
    values = escape_then(0.4) * noise(len(STEPS), scatter)
    minimum, drop = facts(curve("loss", values[::every], STEPS[::every]))
    assert (minimum.kind, drop.kind) == ("loss_minimum", "late_drop")
    assert 1400 <= drop.step <= 1600 and drop.called_at <= 1850
    assert "2.5x" in drop.evidence[0] or scatter


@pytest.mark.parametrize("late", [0.8, 1.0, 2.0])
def test_a_small_step_or_a_rise_after_the_escape_is_none(late):
    assert kinds(curve("loss", escape_then(late) * noise(len(STEPS), 0.05))) == ["loss_minimum"]


def test_a_slow_fall_after_the_escape_is_none():
    values = dip(bottom=300) * np.exp(-np.clip(STEPS - 1200, 0, None) / 1000)
    assert kinds(curve("loss", values * noise(len(STEPS), 0.05))) == ["loss_minimum"]


def test_a_fall_without_an_escape_is_no_late_drop():
    values = np.where(STEPS > 1400, 0.3, 1.0)
    assert kinds(curve("loss", values)) == []


def test_crashes_that_come_again_are_each_called():
    values = escape_then(0.3)
    values[(STEPS > 1600) & (STEPS <= 1750)] = values[STEPS == 1400]
    assert kinds(curve("loss", values)).count("late_drop") == 2


# ---- any records ----------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([-3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0]), max_size=60), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_what_is_called_by_a_step_does_not_depend_on_what_comes_later(moves, cut):
    """Causality: the events of a prefix are the events of the whole that were called in it."""
    values = np.exp(np.cumsum(moves)) if moves else []
    whole = [
        {"step": 10 * i, "loss": v, "spread": 1 / v, "probe/target": min(v, 1.0), "probe/untrained": 0.5}
        for i, v in enumerate(values)
    ]
    prefix = whole[:cut]
    of_prefix, of_whole = phase.Detector(), phase.Detector()
    assert [of_prefix.add(r) for r in prefix] == [of_whole.add(r) for r in whole][: len(prefix)]
    # `detect` states a phase as it is at the end; all else is as it was called.
    settled = [e for e in phase.detect(whole) if e.kind != phase.PHASE and prefix and e.called_at <= prefix[-1]["step"]]
    assert [e for e in phase.detect(prefix) if e.kind != phase.PHASE] == settled


RUBBISH = [None, math.nan, math.inf, -1.0, 0, 0.0, True, "0.3", [], {}, 1e308, -1e308, 5e-324, 10**400, -(10**400)]


@pytest.mark.parametrize("key", ["loss", "spread", "discrepancy/visible", "probe/target", "probe/untrained"])
def test_rubbish_and_missing_values_are_passed_over(key):
    clean = curve("loss", dip())
    spoilt = [dict(r) for r in clean]
    for i, value in enumerate(RUBBISH):
        spoilt.insert(20 + 3 * i, {"step": spoilt[20 + 3 * i - 1]["step"] + 1, key: value})
    spoilt += [
        None,
        [],
        "step",
        3,
        {"step": 10**400},
        {"loss": 0.5},
        {"step": None},
        {"step": math.nan, "loss": 1.0},
        {"step": "7", "loss": 1.0},
        {},
    ]
    assert kinds(spoilt) == kinds(clean) == ["loss_minimum"]


def test_a_curve_without_any_noise_is_as_sure_as_can_be():
    """Noise of next to nothing, which a square of the ratio would not survive."""
    values = [2.0, 1.0, 0.5 + 1e-14, 0.5, 0.5, 0.5, 0.5, 0.5 + 1e-15, 4.0, 4.0, 4.0, 4.0, 4.0]
    events = phase.detect({"step": 10 * i, "loss": v * (1 + 1e-16)} for i, v in enumerate(values))
    assert all(0 <= e.confidence <= 1 for e in events)
    assert curves.confidence(1.0, 1e-200, 3) == curves.confidence(1.0, 0.0, 3) == 0.8


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50))
@settings(max_examples=50, deadline=None)
def test_the_running_median_is_the_median(values):
    median = curves.Median()
    for count, value in enumerate(values, start=1):
        median.add(value)
        assert median.count == count and median.value == pytest.approx(statistics.median(values[:count]))


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_a_drop_is_measured_from_the_first_highest_level_of_its_window(logs):
    drops = shapes.Drops("loss")
    for i, log in enumerate(logs):
        drops.add(curves.Level(i, log, 0.1, 5, 1.0, i))
        assert drops.peaks[0] is max(drops.past, key=lambda level: level.log)


def test_no_records_no_events():
    assert phase.detect([]) == []
    assert phase.detect(iter([{"step": 0, "loss": 1.0}])) == []


def test_a_step_seen_twice_counts_once():
    clean = curve("loss", dip())
    assert phase.detect(clean[:50] + clean[30:]) == phase.detect(clean)


def test_numbers_at_the_ends_of_the_range_are_no_reason_to_fail():
    for tiny, huge in ((1e-160, 1e160), (1e-299, 1e299)):
        rows = [{"step": s, "loss": tiny, "spread": huge, "norm/target": tiny, "skill": 1 - 1e-16} for s in range(30)]
        assert phase.detect(rows) == []
