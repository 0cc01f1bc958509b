"""What the label-free signals are taken to say of the features: when, how surely, and when nothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jepa_fast.monitor import phase

STEPS = np.arange(0, 1500, 10)
ISSUE_41 = [0.028, 0.005, 0.005, 0.006, 0.008, 0.012, 0.015]  # loss by epoch, from a user's report on I-JEPA's code


def noise(size, seed):
    return np.exp(size * np.random.default_rng(seed).normal(size=len(STEPS)))


def ramp(*points):
    """Piecewise linear through (step, value)."""
    return np.interp(STEPS, *zip(*points, strict=True))


def jepa(variation, share=0.06, learning=150, scatter=0.02, seed=0):
    """Records of a run whose features vary between inputs as `variation` (1 at the start): what follows from it.

    The loss is the constant predictor's, which goes as the variation squared, and what the predictor lacks of it.
    """
    lack = (1 / share - 1) * np.exp(-STEPS / learning)
    rng = [noise(scatter, seed + i) for i in range(6)]
    spread = math.sqrt(share) * 11.3 * variation
    values = {
        "loss": (1 + lack) * share * variation**2 * rng[0],
        "skill": -lack,
        "spread": spread * rng[1],
        "norm/target": 11.3 + 0 * STEPS,
        "discrepancy/visible": (1 + 8 * (1 - np.exp(-STEPS / 50))) * variation**2 * rng[2],
        "rankme": 8 * variation * rng[3],
        "rankme/context": 8 * variation * rng[4],
        "feature_std": 0.02 * variation * rng[5],
    }
    return [{"step": int(s)} | {k: float(v[i]) for k, v in values.items()} for i, s in enumerate(STEPS)]


def collapse(**how):
    return jepa(ramp((0, 1), (100, 1), (500, 0.55), (600, 0.55), (1000, 1), (1500, 1.8)), **how)


def only(records, *keys):
    return [{k: r[k] for k in ("step", *keys) if k in r} for r in records]


def suspected(records):
    return [e for e in phase.detect(records) if e.kind.endswith("_suspected")]


def story(records):
    return [e.kind.removesuffix("_suspected") for e in suspected(records)]


# ---- what is called --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("every", [1, 10])
def test_a_collapse_and_its_end_are_called_while_they_happen(seed, every):
    fall, rise = suspected(collapse(seed=10 * seed)[::every])
    assert (fall.kind, rise.kind) == ("collapse_suspected", "recovery_suspected")
    assert 100 <= fall.step <= fall.called_at <= (400 if every == 1 else 500)
    assert 650 <= rise.step <= rise.called_at <= 1150
    assert fall.confidence > 0.3 and rise.confidence > 0.5


@pytest.mark.parametrize("keys", [("loss",), ("loss", "skill"), ("loss", "spread"), ("loss", "discrepancy/visible"),
                                  ("spread",), ("loss", "rankme")])  # fmt: skip
def test_a_few_signals_do_and_more_make_surer(keys):
    few, many = suspected(only(collapse(), *keys)), suspected(collapse())
    assert [e.kind for e in few] == [e.kind for e in many] == ["collapse_suspected", "recovery_suspected"]
    assert few[0].confidence < many[0].confidence
    assert few[0].called_at >= many[0].called_at - 50


def test_a_loss_alone_says_little_and_late():
    fall, rise = suspected(only(collapse(), "loss"))
    assert fall.called_at > 600  # after its minimum: a loss that falls is nothing to suspect
    assert fall.confidence < 0.5 and rise.confidence < 0.6


def test_the_losses_of_a_known_report_are_suspected_and_no_more():
    fall, *rest = suspected([{"step": i, "loss": v} for i, v in enumerate(ISSUE_41)])
    assert fall.kind == "collapse_suspected" and fall.confidence < 0.5 and fall.step in (1, 2)
    assert [e.kind for e in rest] in ([], ["recovery_suspected"])


def test_the_evidence_has_the_numbers():
    fall = suspected(collapse(scatter=0.0))[0]
    said = " ".join(fall.evidence)
    assert "spread went from 2.77 to" in said and "(0." in said and "no probe" in said


def test_a_signal_that_speaks_against_it_is_told_too():
    records = collapse(share=0.06)
    for r in records:
        r["rankme"] = 8.0
    fall = suspected(records)[0]
    assert any(says.startswith("but rankme went from 8 to 8") for says in fall.evidence)


# ---- with the content ------------------------------------------------------------------------------


def content(records, *points, every=100, untrained=0.4):
    """The records with, every 100 steps, what both encoders tell of the inputs' spectra."""
    looks = (r for r in records if r["step"] % every == 0)
    for r in looks:
        r["content"] = r["content/context"] = float(np.interp(r["step"], *zip(*points, strict=True)))
        r["content/untrained"] = untrained
    return records


def test_variation_that_falls_while_the_content_stays_raises_no_suspicion():
    assert story(collapse()) == ["collapse", "recovery"]
    assert story(content(collapse(), (0, 0.4), (1500, 0.39))) == []
    assert story(content(collapse(), (0, 0.4), (200, 0.5), (1500, 0.6))) == []


def test_content_that_is_lost_is_a_collapse_and_content_regained_its_end():
    points = (0, 0.4), (200, 0.32), (600, 0.32), (1000, 0.5)
    fall, rise = suspected(content(collapse(), *points))
    assert 100 <= fall.called_at <= 400
    more = suspected(content(collapse(), (0, 0.4), (100, 0.25), (600, 0.25), (1000, 0.5)))[0]
    assert fall.confidence < 0.5 < 0.6 < more.confidence < 0.9
    assert 800 <= rise.called_at <= 1200 and rise.confidence > 0.8
    assert "content went from 0.400 to 0.32" in fall.evidence[0]
    assert story(content(jepa(1 + 0 * STEPS), *points)) == ["collapse", "recovery"]  # variation or not


def test_content_that_never_was_cannot_be_lost_and_is_not_asked():
    without = suspected(collapse())[0]
    for start in (0.0, 0.03):
        fall = suspected(content(collapse(), (0, start), (1500, start), untrained=start))[0]
        assert (fall.step, fall.called_at, fall.confidence) == (without.step, without.called_at, without.confidence)
    assert story(content(collapse(), (0, 0.0), (200, 0.3), (1500, 0.6), untrained=0.0)) == []  # what is gained speaks


def test_content_that_says_neither_leaves_the_vetoes_in_force():
    unsure = (0, 0.4), (200, 0.386), (1500, 0.386)
    assert story(content(collapse(share=0.35), *unsure)) == []
    assert story(content(collapse(share=0.04), *unsure))[:1] == ["collapse"]


def test_content_needs_no_other_signal():
    records = only(content(collapse(), (0, 0.4), (200, 0.32), (600, 0.32), (1000, 0.5)), "content", "content/context")
    assert story(records) == story(records[::10]) == ["collapse", "recovery"]


def test_one_look_at_the_content_is_not_enough():
    assert story(content(collapse(), (0, 0.4), (200, 0.4), (300, 0.3), (400, 0.4), (1500, 0.4))) == []


def test_content_is_measured_against_the_untrained_encoder_where_a_log_begins_late():
    late = [r for r in content(collapse(), (0, 0.4), (200, 0.32), (1500, 0.32)) if r["step"] >= 300]
    assert story(late)[0] == "collapse"


# ---- silence ---------------------------------------------------------------------------------------

FALLING = {
    "exponential": np.exp(-STEPS / 300),
    "power law": (1 + STEPS / 30.0) ** -0.7,
    "to a plateau": np.maximum(np.exp(-STEPS / 100), 0.02),
    "constant": 0.7 + 0 * STEPS,
    "two lr drops": np.exp(-STEPS / 800) * np.where(STEPS > 500, 0.4, 1) * np.where(STEPS > 1000, 0.4, 1),
    "warm restarts": np.exp(-STEPS / 400) * (1 + 0.25 * np.exp(-(STEPS % 500) / 40)),
    "slow start": 1 / (1 + np.exp((STEPS - 600) / 100)) + 0.05,
    "rising": 0.5 + STEPS / 1500,
}


@pytest.mark.parametrize("scatter", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("shape", FALLING)
@pytest.mark.parametrize("unit", [1.0, 1e4, 1e-6])
def test_ordinary_losses_raise_no_suspicion(shape, scatter, unit):
    for seed in range(2):
        for every in (1, 10):
            losses = (FALLING[shape] * noise(scatter, seed) * unit)[::every]
            records = [{"step": int(s), "loss": float(v)} for s, v in zip(STEPS[::every], losses, strict=True)]
            assert phase.detect(records) == []


@pytest.mark.parametrize("seed", range(3))
def test_features_that_keep_or_gain_variation_raise_none(seed):
    frozen = jepa(1 + 0 * STEPS, seed=seed, scatter=0.05)
    growing = jepa(1 + STEPS / 1500, seed=seed, scatter=0.05)
    assert story(frozen) == story(growing) == []


def test_features_that_start_rich_may_lose_half_their_variation():
    assert story(collapse(share=0.35)) == []


@pytest.mark.parametrize("scatter", [0.1, 0.5])
def test_noise_raises_none(scatter):
    for seed in range(5):
        records = jepa(1 + 0 * STEPS, scatter=scatter, seed=100 * seed)
        assert story(records) == [] and story(records[::10]) == []


# ---- any records -----------------------------------------------------------------------------------


def test_units_do_not_matter():
    records = collapse()
    scaled = [
        {k: v * {"loss": 1e3, "spread": 1e-4, "norm/target": 1e-4, "discrepancy/visible": 50.0}.get(k, 1) for k, v in r.items()}
        for r in records
    ]  # fmt: skip
    assert [(e.kind, e.called_at) for e in suspected(scaled)] == [(e.kind, e.called_at) for e in suspected(records)]


def test_a_log_that_starts_at_a_later_number_is_the_same_log():
    records = collapse()
    moved = [r | {"step": r["step"] + 70_000} for r in records]
    assert [(e.kind, e.called_at - 70_000) for e in suspected(moved)] == [
        (e.kind, e.called_at) for e in suspected(records)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_gaps_and_nulls_change_little(seed):
    rng = np.random.default_rng(seed)
    records = collapse()
    torn = [{k: (v if k == "step" or rng.random() > 0.3 else None) for k, v in r.items()} for r in records]
    torn = [r for r in torn if rng.random() > 0.3]
    torn = [r for r in torn if not 300 <= r["step"] < 340]
    whole, ragged = suspected(records), suspected(torn)
    assert [e.kind for e in ragged] == [e.kind for e in whole]
    assert all(abs(a.called_at - b.called_at) <= 120 for a, b in zip(whole, ragged, strict=True))


@pytest.mark.parametrize("period", [50, 100])
def test_signals_on_periods_of_their_own_are_taken_together(period):
    slow = ("rankme", "rankme/context", "feature_std")
    records = [{k: v for k, v in r.items() if k not in slow or r["step"] % period == 0} for r in collapse()]
    assert story(records) == ["collapse", "recovery"]


def test_nothing_is_taken_back():
    """Causality: the suspicions of a prefix are those of the whole that were called in it."""
    records = collapse()
    whole = suspected(records)
    for cut in range(1, len(records), 7):
        assert suspected(records[:cut]) == [e for e in whole if e.called_at <= records[cut - 1]["step"]]


def test_probes_do_not_sway_it():
    records = collapse()
    probed = [r | {"probe/context": 0.9, "probe/target": 0.9, "probe/untrained": 0.5} for r in records]
    assert suspected(probed) == suspected(records)


# ---- the committed calibration ---------------------------------------------------------------------


def test_the_committed_table_is_what_the_detector_says_today():
    """Whoever changes the detector runs `python benchmarks/calibrate_phase.py --write` again."""
    results = Path(__file__).parent.parent / "benchmarks" / "results"
    table = (results / "phase.md").read_text()
    for line in (results / "phase_runs.jsonl").read_text().splitlines():
        run = json.loads(line)
        columns = {k: v for k, v in run["columns"].items() if not k.startswith("probe/")}
        called = {
            e.kind: e.called_at
            for e in suspected(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        }
        collapse, recovery = (called.get(f"{kind}_suspected", "") for kind in ("collapse", "recovery"))
        (row,) = (row for row in table.splitlines() if row.startswith(f"| {run['name']} |"))
        assert row.endswith(f"| {collapse} | {recovery} |")
