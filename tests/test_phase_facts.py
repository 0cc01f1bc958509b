"""The collapse phase by the paper's definition: loss halved, features no better than the untrained encoder's."""

import json
import math

import pytest

from jepa_fast.monitor import phase
from jepa_fast.monitor.phase import assess, detect, latest, probe_margin


def run(context, target=None, losses=None, untrained=0.5, every=10, num_test=1000):
    """Records with a look each: probes of the context encoder (and the target's, as untrained if not given)."""
    target = target or [untrained] * len(context)
    losses = losses or [1.0] + [0.1] * (len(context) - 1)
    return [
        {"step": i * every, "loss": loss, "probe/context": c, "probe/target": t, "probe/untrained": untrained,
         "probe/majority": 0.5, "probe/num_test": num_test}
        for i, (c, t, loss) in enumerate(zip(context, target, losses, strict=True))
    ]  # fmt: skip


def kinds(records):
    return [(e.kind, e.step, e.end) for e in detect(records)]


def test_the_phase_lasts_from_half_the_loss_to_the_first_useful_look():
    records = run([0.5, 0.5, 0.48, 0.5, 0.7, 0.7, 0.7])
    events = {e.kind: e for e in detect(records)}
    found = events["collapse_phase"]
    assert (found.step, found.end, found.length, events["useful"].step) == (10, 40, 30, 40)
    assert found.depth == pytest.approx(0.0) and found.loss_factor == pytest.approx(10)
    assert found.share == pytest.approx(30 / 60)  # of the whole run, not of the steps up to its end
    assert "context encoder" in events["useful"].evidence[0]


def test_the_depth_is_how_far_the_better_encoder_fell_below_the_untrained_one():
    records = run([0.5, 0.42, 0.40, 0.7, 0.7], target=[0.5, 0.45, 0.44, 0.45, 0.45])
    assert next(e for e in detect(records) if e.kind == "collapse_phase").depth == pytest.approx(0.06)


def test_a_phase_that_lasts_has_no_end_and_counts_up_to_now():
    found = next(e for e in detect(run([0.5] * 6)) if e.kind == "collapse_phase")
    assert (found.step, found.end, found.length) == (10, None, 40)
    json.dumps(found.entry())


def test_one_useful_look_is_not_enough_and_one_bad_look_does_not_degrade():
    assert kinds(run([0.5, 0.5, 0.7, 0.5, 0.5])) == [("collapse_phase", 10, None)]
    assert not any(kind == "degraded" for kind, *_ in kinds(run([0.5, 0.7, 0.7, 0.5, 0.7, 0.7])))


def test_features_that_are_useful_before_the_loss_has_halved_have_no_phase():
    records = run([0.5, 0.7, 0.7, 0.7, 0.7], losses=[1.0, 0.9, 0.8, 0.4, 0.3])
    assert kinds(records) == [("useful", 10, None)]


def test_useful_features_that_are_lost_for_two_looks_are_degraded():
    assert ("degraded", 40, None) in kinds(run([0.5, 0.5, 0.7, 0.7, 0.5, 0.5]))


def test_an_untrained_encoder_below_the_majority_class_is_no_easier_to_beat():
    by_chance = [r | {"probe/untrained": 0.47} for r in run([0.5, 0.5, 0.52, 0.53, 0.7, 0.7])]
    (found,) = [e for e in detect(by_chance) if e.kind == "collapse_phase"]
    assert (found.step, found.end) == (10, 40) and found.depth == 0
    (event,) = [e for e in detect(by_chance) if e.kind == "useful"]
    assert "majority class 0.500 (untrained 0.470" in " ".join(event.evidence)
    without = [{k: v for k, v in r.items() if k != "probe/majority"} for r in by_chance]
    assert [e.end for e in detect(without) if e.kind == "collapse_phase"] == [20]


def test_the_loss_alone_or_a_loss_that_never_halves_begins_no_phase():
    assert not kinds([{"step": i, "loss": 1 / (1 + i)} for i in range(50)])
    assert not kinds(run([0.5] * 5, losses=[1.0, 0.9, 0.8, 0.7, 0.6]))


def test_the_margin_follows_from_the_number_of_test_samples():
    assert probe_margin(0.516, 1320) == pytest.approx(2 * math.sqrt(2 * 0.25 / 1320), rel=0.01)
    assert probe_margin(0.5, 100) > 2 * probe_margin(0.5, 1000) > 0
    assert probe_margin(0.0, 4) > 0.5 and probe_margin(1.0, 4) > 0.5  # four samples are never certain


def test_four_test_samples_with_random_labels_call_nothing_useful_or_degraded():
    probes = [0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.75, 0.75, 0.0, 0.5]
    assert {kind for kind, *_ in kinds(run(probes, target=probes[::-1], num_test=4))} <= {"collapse_phase"}


def test_a_probe_that_failed_is_not_a_look():
    records = run([0.5, 0.5, 0.7, 0.7, 0.7])
    records[3]["probe/context"] = math.nan
    assert next(e for e in detect(records) if e.kind == "useful").called_at == 40


def test_an_encoder_without_a_probe_is_no_failed_probe():
    records = [{k: v for k, v in r.items() if k != "probe/target"} for r in run([0.5, 0.5, 0.7, 0.7, 0.7])]
    (event,) = [e for e in detect(records) if e.kind == "useful"]
    assert (event.step, event.called_at) == (20, 30)


def test_the_evidence_names_what_the_probe_was_compared_with():
    (event,) = [e for e in detect(run([0.5, 0.5, 0.7, 0.7], untrained=0.55)) if e.kind == "useful"]
    assert "context probe 0.700 at step 30, untrained 0.550 (+0.150, margin" in event.evidence[1]


def test_a_probe_on_one_class_states_no_phase():
    records = run([1.0] * 6, untrained=1.0)
    assert kinds(records) == [] and {a.state for a in assess(records)} <= {"warmup", "unknown"}


def test_what_is_said_at_a_step_follows_from_the_records_up_to_it():
    records = run([0.5, 0.5, 0.5, 0.7, 0.7, 0.5, 0.5, 0.7, 0.7])
    for record in records:
        record |= {
            "skill": -0.5 + record["step"] / 100,
            "readout": 0.5,
            "readout/context": 0.5 + record["step"] / 400,
            "readout/untrained": 0.5,
        }
    whole = assess(records)
    for k in range(1, len(records)):
        assert assess(records[:k]) == whole[:k]
    called = [(e.kind, e.step) for e in detect(records) if e.called_at <= 50]
    assert called == [(e.kind, e.step) for e in detect(records[:6])]


def test_a_phase_that_was_written_twice_is_read_once_with_its_end():
    lines = [
        {"kind": "collapse_phase", "step": 10, "end": None},
        {"kind": "useful", "step": 40},
        {"kind": "collapse_phase", "step": 10, "end": 40},
    ]
    assert latest(lines) == [lines[2], lines[1]]


def test_the_state_follows_the_probes_where_there_are_any():
    states = [a.state for a in assess(run([0.5, 0.5, 0.5, 0.7, 0.7, 0.5, 0.5]))]
    assert states == ["warmup", "collapse", "collapse", "escape", "learning", "learning", "degraded"]


def signalled(readouts, skills=None, losses=None, every=50):
    """Records without labels: the context encoder's readout against an untrained one of .5."""
    skills = skills or [0.1] * len(readouts)
    losses = losses or [1.0] + [0.1] * (len(readouts) - 1)
    return [
        {"step": i * every, "loss": loss, "skill": s, "readout": 0.5, "readout/context": r, "readout/untrained": 0.5}
        for i, (r, s, loss) in enumerate(zip(readouts, skills, losses, strict=True))
    ]


def test_without_labels_a_readout_that_gains_is_an_escape_and_one_that_does_not_a_collapse():
    records = signalled([0.5] * 4 + [0.68] * 6, skills=[-3.0] * 4 + [0.3] * 6)
    found = assess(records)
    assert found[2].state == "collapse" and found[-1].state in ("escape", "learning")
    assert found[-1].useful_context > 0.6 > found[2].useful_context and found[-1].useful_target < 0.5
    events = {e.kind: e for e in detect(records)}
    assert events["collapse_suspected"].step < events["escape_suspected"].step <= 300
    assert any("skill" in reason for reason in found[2].reasons)


def test_a_loss_alone_says_nothing_until_it_has_fallen_far_and_risen_for_good():
    falling = [{"step": i * 10, "loss": math.exp(-i / 10)} for i in range(30)]
    assert {a.state for a in assess(falling)} == {"warmup", "unknown"} and assess(falling)[-1].useful is None
    risen = falling + [{"step": 300 + i * 10, "loss": math.exp(-2.9 + min(1.5, i / 10))} for i in range(40)]
    assert assess(risen)[-1].state == "escape" and 0.5 <= assess(risen)[-1].useful_context < 0.9


def test_rubbish_is_passed_over():
    records = [
        None,
        {},
        {"step": "x"},
        {"step": 0, "loss": "high", "skill": None},
        {"step": 1, "loss": -1},
        {"step": 1},
        {"step": 2, "loss": 1e400},
    ]
    assert [a.step for a in assess(records)] == [0, 1, 2] and not detect(records)
    assert phase.detect([]) == [] and assess([]) == []
