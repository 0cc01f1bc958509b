"""The estimate without labels: what moves it, what does not, and that ordinary curves raise no suspicion."""

import math

import numpy as np
import pytest

from jepa_fast.monitor import phase
from jepa_fast.monitor.phase import assess

STEPS = np.arange(0, 1500, 10)
UNTRAINED = 0.5


def ramp(*points):
    """Piecewise linear through (step, value)."""
    return np.interp(STEPS, *zip(*points, strict=True))


def run_of(gain=((0, 0), (200, -0.05), (600, -0.05), (900, 0.1)), skill=((0, -3), (500, -0.2), (900, 0.4)), scatter=0.0, seed=0,
           every=50):  # fmt: skip
    """A loss that falls and rises, the predictor's skill, and every 50 steps a readout that gains `gain` on the untrained one's."""
    rng = np.random.default_rng(seed)
    loss = ramp((0, 0), (400, -3), (1500, -1.5)) + scatter * rng.normal(size=len(STEPS))
    records = []
    for step, x, s, g in zip(STEPS, loss, ramp(*skill), ramp(*gain), strict=True):
        record = {"step": int(step), "loss": math.exp(x), "skill": float(s) + scatter * rng.normal(), "spread": 2.0}
        if step % every == 0:
            record |= {"readout": UNTRAINED + g, "readout/context": UNTRAINED + g, "readout/untrained": UNTRAINED}
            record |= {"rankme": 8.0 + 10 * g, "rankme/context": 8.0 + 10 * g}
        records.append(record)
    return records


def only(records, *keys):
    return [{k: r[k] for k in ("step", *keys) if k in r} for r in records]


def suspected(records):
    return [e for e in phase.detect(records) if e.kind.endswith("_suspected")]


def story(records):
    return [(e.kind.removesuffix("_suspected"), e.called_at) for e in suspected(records)]


def useful(records):
    return [a.useful for a in assess(records)]


# ---- what is said -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_collapse_and_the_escape_from_it_are_suspected_while_they_happen(seed):
    fall, rise = suspected(run_of(scatter=0.05, seed=seed))
    assert (fall.kind, rise.kind) == ("collapse_suspected", "escape_suspected")
    assert 100 <= fall.step <= fall.called_at <= 300 and 650 <= rise.step <= rise.called_at <= 1000
    assert fall.confidence > 0.7 and rise.confidence > 0.5
    assert any("skill" in said for said in fall.evidence) and any("0.4" in said for said in fall.evidence)


def test_more_skill_and_a_better_readout_each_make_useful_features_likelier():
    def last(gain, skill):
        return useful(run_of(gain=((0, gain), (1500, gain)), skill=((0, skill), (1500, skill))))[-1]

    assert last(-0.05, -0.5) < last(0.0, -0.5) < last(0.05, -0.5)
    assert last(0.0, -0.9) < last(0.0, 0.0) < last(0.0, 0.5)


def test_a_loss_alone_raises_no_suspicion_of_a_collapse_and_no_certainty_of_an_escape():
    found = suspected(only(run_of(), "loss"))
    assert [e.kind for e in found] in ([], ["escape_suspected"]) and all(e.confidence < 0.7 for e in found)


def test_the_skill_alone_is_of_the_pair():
    now = assess(only(run_of(), "loss", "skill"))[-1]
    assert now.useful_context is not None and now.useful_target is None


def test_one_look_is_not_enough():
    once = run_of(gain=((0, 0.0), (1500, 0.0)), skill=((0, -0.3), (1500, -0.3)))
    calm = story(once)
    for record in once:
        if record["step"] == 700:
            record |= {"readout": 0.7, "readout/context": 0.7}
    assert story(once) == calm


def test_the_untrained_readout_is_the_measure_where_a_log_begins_late():
    late = [r for r in run_of() if r["step"] >= 300]
    assert useful(late)[-1] == pytest.approx(useful(run_of())[-1], abs=0.05)


# ---- what does not move it ----------------------------------------------------------------------------


def test_probes_do_not_sway_it():
    probed = [r | {"probe/context": 0.9, "probe/target": 0.9, "probe/untrained": 0.5} for r in run_of()]
    assert useful(probed) == useful(run_of()) and story(probed) == story(run_of())


def test_the_unit_of_the_loss_and_the_first_step_do_not_matter():
    scaled = [r | {"loss": 1e3 * r["loss"], "spread": 1e-4 * r["spread"]} for r in run_of()]
    assert story(scaled) == story(run_of()) and useful(scaled) == useful(run_of())
    moved = [r | {"step": r["step"] + 70_000} for r in run_of()]
    assert story(moved) == [(kind, at + 70_000) for kind, at in story(run_of())]


@pytest.mark.parametrize("seed", range(5))
def test_gaps_and_nulls_change_little(seed):
    rng, records = np.random.default_rng(seed), run_of(every=10)
    torn = [{k: (v if k == "step" or rng.random() > 0.3 else None) for k, v in r.items()} for r in records]
    torn = [r for r in torn if rng.random() > 0.3 and not 300 <= r["step"] < 340]
    whole, ragged = suspected(records), suspected(torn)
    assert [e.kind for e in ragged] == [e.kind for e in whole]
    assert all(abs(a.called_at - b.called_at) <= 120 for a, b in zip(whole, ragged, strict=True))


def test_nothing_is_taken_back():
    records = run_of(scatter=0.05)
    whole = suspected(records)
    for cut in range(1, len(records), 7):
        assert suspected(records[:cut]) == [e for e in whole if e.called_at <= records[cut - 1]["step"]]


# ---- silence ------------------------------------------------------------------------------------------

ORDINARY = {
    "exponential": np.exp(-STEPS / 300),
    "power law": (1 + STEPS / 30.0) ** -0.7,
    "to a plateau": np.maximum(np.exp(-STEPS / 100), 0.02),
    "constant": 0.7 + 0 * STEPS,
    "two drops of the learning rate": np.exp(-STEPS / 800) * np.where(STEPS > 500, 0.4, 1) * np.where(STEPS > 1000, 0.4, 1),
    "warm restarts": np.exp(-STEPS / 400) * (1 + 0.25 * np.exp(-(STEPS % 500) / 40)),
    "slow start": 1 / (1 + np.exp((STEPS - 600) / 100)) + 0.05,
    "rising": 0.5 + STEPS / 1500,
}  # fmt: skip


@pytest.mark.parametrize("scatter", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("shape", ORDINARY)
def test_ordinary_losses_raise_no_suspicion(shape, scatter):
    for unit in (1.0, 1e4, 1e-6):
        for every in (1, 10):
            noise = np.exp(scatter * np.random.default_rng(1).normal(size=len(STEPS)))
            losses = (ORDINARY[shape] * noise * unit)[::every]
            records = [{"step": int(s), "loss": float(v)} for s, v in zip(STEPS[::every], losses, strict=True)]
            assert phase.detect(records) == []


def test_features_that_gain_from_the_start_raise_no_suspicion_of_a_collapse():
    kinds = [kind for kind, _ in story(run_of(gain=((0, 0), (100, 0.1), (1500, 0.2)), skill=((0, 0.0), (100, 0.4), (1500, 0.5))))]  # fmt: skip
    assert "collapse" not in kinds
