"""The verdict: its first sentence is the answer, four sentences at most, and it says no more than the records do."""

import math
import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from jepa_fast import report
from jepa_fast.monitor import phase
from jepa_fast.report.bands import bands
from jepa_fast.report.figure import detail_figures, phase_figure, thinned
from jepa_fast.report.logs import with_phase
from jepa_fast.report.verdict import _share

STEPS = range(0, 1001, 10)
UNTRAINED, TESTS = 0.6, 1000  # a margin of .044


def falling(step):
    return math.exp(-step / 50) + 0.01


def dipping(step):
    return math.exp(-step / 50) + 0.02 + 0.3 * max(0, step - 400) / 600


def run_of(loss=dipping, target=None, context=None, tests=TESTS, untrained=UNTRAINED, **signals):
    """Records every 10 steps; where probes are given, a look every 50. signals: functions of the step, for every record."""
    records = []
    for step in STEPS:
        record = {"step": step, "loss": loss(step)} | {key.replace("__", "/"): f(step) for key, f in signals.items()}
        if target and step % 50 == 0:
            record |= {"probe/target": target(step), "probe/context": (context or target)(step), "probe/untrained": untrained,
                       "probe/majority": 0.3, "probe/num_test": tests}  # fmt: skip
        records.append(record)
    return records


def said_of(records, description="data of x"):
    return report.verdict(
        records, [e.entry() | {"kind": e.kind, "step": e.step} for e in phase.detect(records)], description
    )


def sentences(text):
    return re.split(r"(?<=[.])\s+(?=[A-Z])", text)


def steps(*pairs):
    """A function of the step: the value of the last pair (first step, value) that has begun."""
    return lambda step: [value for begins, value in pairs if step >= begins][-1]


PROBED = {
    "a phase with its end": (
        run_of(target=steps((0, 0.6), (300, 0.8))), "Collapse phase from step 40 to 300, a quarter of the run; over since."),
    "a share with no word for it": (
        run_of(target=steps((0, 0.6), (450, 0.8))), "Collapse phase from step 40 to 450, 41 % of the run; over since."),
    "a short phase": (
        run_of(target=steps((0, 0.6), (50, 0.8))), "Collapse phase from step 40 to 50, 1 % of the run; over since."),
    "a phase that lasts": (
        run_of(target=steps((0, 0.6))),
        "In the collapse phase since step 40, 96 % of the run so far: the loss has halved, but the features are no better than "
        "an untrained encoder's."),
    "the last look was useful": (
        run_of(target=steps((0, 0.6), (1000, 0.8))),
        "In the collapse phase since step 40, 96 % of the run so far; the features were useful at the last look, and a second "
        "such look in a row would end it."),
    "not yet": (
        run_of(target=steps((0, 0.6)), loss=lambda s: 1.0),
        "Not yet in the collapse phase: up to step 1,000 the loss has not halved, and the features are not useful."),
    "none": (
        run_of(target=steps((0, 0.6), (50, 0.8)), loss=lambda s: math.exp(-s / 500)),
        "No collapse phase: the features were useful from step 50, before the loss had halved."),
    "lost again": (
        run_of(target=steps((0, 0.6), (300, 0.8), (700, 0.6))),
        "Collapse phase from step 40 to 300, a quarter of the run; the features were useful after that, but have not been since step 700."),
    "a relapse": (
        run_of(target=steps((0, 0.6), (300, 0.8), (500, 0.6), (700, 0.8))),
        "Collapse phase from step 40 to 300, a quarter of the run; over since, apart from a relapse from step 500 to 700."),
    "two relapses": (
        run_of(target=steps((0, 0.6), (300, 0.8), (400, 0.6), (500, 0.8), (600, 0.6), (700, 0.8))),
        "Collapse phase from step 40 to 300, a quarter of the run; over since, apart from 2 relapses, the last from step 600 to 700."),
    "none, and lost": (
        run_of(target=steps((0, 0.6), (50, 0.8), (700, 0.6)), loss=lambda s: math.exp(-s / 500)),
        "No collapse phase: the features were useful from step 50, before the loss had halved; they have not been since step 700."),
    "undecided": (
        run_of(target=steps((0, 0.6), (1000, 0.8)), loss=lambda s: 1.0),
        "Not decided yet: the features were useful at the last look, step 1,000, and the next look decides."),
    "one look": (
        run_of(target=steps((0, 0.6)))[:5], "One look at the probes is not enough to say: two in a row decide."),
    "only one encoder useful": (
        run_of(target=steps((0, 0.6)), context=steps((0, 0.6), (300, 0.8))),
        "Collapse phase from step 40 to 300, a quarter of the run; over since."),
    "below the untrained encoder": (
        run_of(target=steps((0, 0.6), (50, 0.45), (300, 0.8))),
        "Collapse phase from step 40 to 300, a quarter of the run; over since."),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROBED)
def test_the_first_sentence_is_the_answer_and_four_are_enough(kind):
    records, first = PROBED[kind]
    said = sentences(said_of(records))
    assert said[0] == first
    assert len(said) <= 4 and said[-1].startswith("Next: ")


@pytest.mark.parametrize(("length", "words"), [
    (100, "a tenth"), (185, "a fifth"), (260, "a quarter"), (333, "a third"), (510, "half"), (660, "two thirds"),
    (750, "three quarters"), (410, "41 %"), (9, "under 1 %"), (0, "under 1 %"),
])  # fmt: skip
def test_a_share_is_said_in_words_where_one_is_near(length, words):
    assert _share(length, 1000) == words


def test_a_gain_within_the_margin_is_not_useful_and_one_beyond_it_is():
    margin = phase.probe_margin(UNTRAINED, TESTS)
    within = run_of(target=steps((0, 0.6), (300, UNTRAINED + margin - 0.002)))
    beyond = run_of(target=steps((0, 0.6), (300, UNTRAINED + margin + 0.002)))
    assert said_of(within).startswith("In the collapse phase since step 40")
    assert said_of(beyond).startswith("Collapse phase from step 40 to 300")


def test_useful_features_that_fall_and_stay_useful_have_no_relapse():
    assert "relapse" not in said_of(run_of(target=steps((0, 0.6), (100, 0.8), (300, 0.66), (600, 0.75))))
    assert "relapse from step 300 to 600" in said_of(
        run_of(target=steps((0, 0.6), (100, 0.8), (300, 0.62), (600, 0.75)))
    )


def test_the_shape_of_the_loss_is_no_collapse_phase():
    """It falls and rises, and the features get better all the time."""
    slow = run_of(loss=lambda s: math.exp(-s / 300) if s < 500 else math.exp(-500 / 300 + (s - 500) / 300), target=lambda s: 0.6 + s / 500)  # fmt: skip
    said = said_of(slow)
    assert said.startswith("No collapse phase") and "rose" in said and "worse" not in said


def test_the_loss_is_described_and_nothing_is_concluded_from_it():
    probed = {"target": steps((0, 0.6), (300, 0.8))}
    assert "The loss fell 50x up to step 400 and rose 14.4x since, which says nothing about the features" in said_of(run_of(**probed))  # fmt: skip
    assert "rose" not in said_of(run_of(loss=falling, **probed))
    assert "The loss has not fallen." in said_of(run_of(loss=lambda s: 1.0, **probed))
    drop = said_of(run_of(loss=lambda s: dipping(s) * (0.3 if s > 800 else 1), **probed))
    assert re.search(r"suddenly down at step 8\d\d: perhaps a partial collapse", drop)


def test_the_skill_is_said_with_its_error_and_only_surely_above_0_is_better():
    probed = {"target": steps((0, 0.6), (300, 0.8)), "skill__error": lambda s: 0.02}
    assert "better than a trivial one (skill 0.20 ± 0.04)" in said_of(run_of(skill__smooth=lambda s: 0.2, phase__state=lambda s: "learning", **probed))  # fmt: skip
    assert "no better than a trivial one (skill 0.03 ± 0.04)" in said_of(run_of(skill__smooth=lambda s: 0.03, phase__state=lambda s: "learning", **probed))  # fmt: skip


def test_the_limit_of_synthetic_data_is_one_sentence_more():
    for records, _ in PROBED.values():
        said = sentences(said_of(records, "demo: a generated, synthetic set"))
        assert len(said) <= 5 and said[-1].startswith("The data are synthetic")


def test_the_numbers_that_the_answer_rests_on_come_second():
    said = sentences(said_of(run_of(target=steps((0, 0.6), (300, 0.8), (500, 0.9), (600, 0.85)))))
    assert said[1] == (
        "The better probe (context encoder) ends at 0.850, best 0.900 at step 500; untrained 0.600, majority class 0.300, "
        "margin 0.044 (1,000 test samples)."
    )
    assert "(context encoder) ends at 0.800" in said_of(
        run_of(target=steps((0, 0.6)), context=steps((0, 0.6), (300, 0.8)))
    )


def test_the_best_checkpoint_is_named_where_the_end_is_worse():
    assert "(checkpoints/best; step 500)" in said_of(run_of(target=steps((0, 0.6), (300, 0.8), (500, 0.9), (600, 0.8))))
    assert "(checkpoints/best; step 300)" in said_of(run_of(target=steps((0, 0.6), (300, 0.8), (700, 0.6))))
    assert "the last is about as good" in said_of(run_of(target=steps((0, 0.6), (300, 0.8))))


@pytest.mark.parametrize(
    ("tests", "untrained", "why"), [(4, 0.75, "4 test samples"), (1000, 1.0, "1,000 test samples")]
)
def test_a_probe_that_could_show_nothing_says_so_first(tests, untrained, why):
    said = sentences(said_of(run_of(target=lambda s: untrained, tests=tests, untrained=untrained)))
    assert said[0].startswith("The probe cannot show the phase") and why in said[0]
    assert f"the untrained encoder's {untrained:.3f}" in said[0]
    assert not any(s.startswith(("Collapse phase", "In the collapse phase")) for s in said)
    assert len(said) <= 4 and "more test samples" in said[-1]


def test_a_probe_that_could_show_nothing_is_no_fact_and_leaves_the_estimate_in_force():
    blind = {"target": lambda s: 1.0, "untrained": 1.0}
    gains = run_of(**blind, **signals(steps((0, -0.05), (400, 0.1)), steps((0, -1.0), (400, 0.5))))
    said = sentences(said_of(gains))
    assert said[1].startswith("Estimated without it: probably a collapse phase from step 50 to ") and len(said) == 4
    assert not [e for e in phase.detect(gains) if e.kind in ("collapse_phase", "useful", "degraded")]
    assert {band.kind for band in bands(*with_phase(gains))} == {"probably collapse"}
    lost = [r | {"loss": math.nan} if r["step"] > 700 else r for r in gains]
    said = sentences(said_of(lost))
    assert len(said) == 4 and said[0].startswith("From step 710") and said[1].startswith("The probe cannot show")


def test_a_majority_class_that_leaves_no_margin_is_named():
    records = [r | {"probe/majority": 0.999} if "probe/target" in r else r for r in run_of(target=lambda s: 0.6)]
    assert "above the majority class's 0.999" in sentences(said_of(records))[0]


def test_a_loss_that_is_lost_for_good_is_the_first_sentence():
    for lost in (math.nan, None, math.inf):
        records = run_of(loss=lambda s, lost=lost: falling(s) if s <= 700 else lost, target=steps((0, 0.6)))
        said = sentences(said_of(records))
        assert said[0] == "From step 710 on the loss is no finite, positive number: training has failed."
        assert "checkpoint from before step 710" in said[-1]
    assert "no finite" not in said_of(run_of(loss=lambda s: math.nan if s == 500 else falling(s)))


# ---- without labels ---------------------------------------------------------------------------------


def signals(gain, skill):
    """A readout that gains `gain(step)` on the untrained encoder's .5, and the predictor's skill."""
    looked = lambda s, value: value if s % 50 == 0 else None  # noqa: E731
    return {"readout": lambda s: looked(s, 0.5 + gain(s)), "readout__context": lambda s: looked(s, 0.5 + gain(s)),
            "readout__untrained": lambda s: looked(s, 0.5), "skill": skill}  # fmt: skip


@pytest.mark.parametrize(("records", "first"), [
    (run_of(**signals(steps((0, -0.05)), steps((0, -1.0)))),
     r"Probably in the collapse phase since step 50 \(probability 0\.9\d\)\."),
    (run_of(**signals(steps((0, -0.05), (400, 0.1)), steps((0, -1.0), (400, 0.5)))),
     r"Probably a collapse phase from step 50 to \d{3}; probably useful features since step \d{3} \(probability 0\.\d\d\)\."),
    (run_of(**signals(steps((0, -0.05), (300, 0.1), (700, -0.05)), steps((0, -1.0), (300, 0.5), (700, -1)))),
     r"The features were probably useful, and are probably not since step \d{3} \(probability 0\.\d\d\)\."),
    (run_of(**signals(steps((0, -0.05), (800, 0.07)), steps((0, -1.0), (600, 0.3)))),
     r"Probably a collapse phase from step 50 to \d{3}; perhaps useful features since step \d{3} \(probability 0\.\d\d\)\."),
    (run_of(loss=lambda s: math.exp(-s / 2000), **signals(steps((0, 0.1)), steps((0, 0.5)))),
     r"Probably no collapse phase; probably useful features since step \d+ \(probability 0\.\d\d\)\."),
    (run_of(loss=lambda s: 1.0, **signals(steps((0, -0.05)), steps((0, -1.0)))),
     r"Not yet in the collapse phase: the loss has not halved up to step 1,000\."),
    (run_of(loss=falling), r"The loss alone does not tell the phase: in the collapse phase, too, it only falls\."),
])  # fmt: skip
def test_without_labels_the_answer_is_an_estimate_with_its_probability(records, first):
    said = sentences(said_of(records))
    assert re.fullmatch(first, said[0]), said[0]
    assert len(said) <= 4 and "probe" in said[-1] and said[-1].startswith("Next: ")


def test_an_estimate_says_what_it_rests_on():
    assert "Estimated without labels" in said_of(run_of(**signals(steps((0, -0.05)), steps((0, -1.0)))))
    alone = said_of(run_of(loss=dipping))
    assert "without labels" not in alone and "CollapseMonitor" in alone


def test_without_a_probe_a_loss_with_a_minimum_stays_a_guess_of_one_probability():
    said = sentences(said_of(run_of(loss=dipping)))
    assert re.fullmatch(r"Perhaps useful features since step \d{3} \(probability 0\.5\d\)\.", said[0]), said[0]
    assert "encoder's is 0.5" in said[1] and "context" not in said[1]  # the loss does not tell the encoders apart


def test_no_sentence_claims_certainty():
    sure = run_of(**signals(steps((0, -0.5)), steps((0, -9.0))))
    assert not re.search(r"probability (1\.00|0\.00)", said_of(sure)) and "is 0.00" not in said_of(sure)


def test_a_probe_is_never_overruled_by_an_estimate():
    records = run_of(target=steps((0, 0.6)), **signals(steps((0, 0.1)), steps((0, 0.9))))
    assert said_of(records).startswith("In the collapse phase since step 40")


# ---- the figure says the same -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROBED)
def test_the_shaded_band_is_the_phase_of_the_first_sentence(kind):
    records, first = PROBED[kind]
    found = [band for band in bands(records, [vars(e) for e in phase.detect(records)]) if band.kind == "collapse"]
    said = re.search(r"phase (?:from|since) step ([\d,]+)(?: to ([\d,]+))?", first)
    numbers = [int(n.replace(",", "")) for n in said.groups() if n] if said else []
    if first.startswith("Collapse phase"):
        assert [(band.start, band.stop) for band in found] == [tuple(numbers)]
    elif first.startswith("In the collapse phase"):
        assert [(band.start, band.stop, band.over) for band in found] == [(numbers[0], 1000, False)]
    else:
        assert not found


def test_negative_skill_is_drawn():
    below = [(0, -1.0), (10, -0.5), (20, 0.1)]
    assert thinned(below, "skill")[:3] == below and thinned(below, "log")[0] == (20, 0.1)
    records = run_of(loss=falling, skill__smooth=lambda s: -0.9 + s / 800)
    (panel,) = [ax for ax in phase_figure(records, []).axes if "skill" in ax.get_title(loc="left")]
    assert min(panel.lines[0].get_ydata()) == pytest.approx(-0.9)
    assert panel.get_ylim()[0] < -0.9 and list(panel.get_yticks()) == [-0.5, 0.0, 0.5, 1.0]


def test_a_skill_that_is_never_negative_needs_no_room_below_zero():
    (panel,) = [
        ax for ax in phase_figure(run_of(skill__smooth=lambda s: 0.2), []).axes if "skill" in ax.get_title(loc="left")
    ]
    assert panel.get_ylim()[0] == pytest.approx(-0.05) and list(panel.get_yticks()) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("seed", range(10))
def test_labels_at_the_ends_of_curves_never_overlap(seed):
    close = 0.6 + 0.001 * seed
    records = run_of(target=steps((0, 0.6), (300, close + 0.01 * (seed % 3))), context=steps((0, 0.6), (300, close)), untrained=close,
                     skill__smooth=lambda s: 0.1 * seed - 0.5, spread=lambda s: 1 + seed, discrepancy__visible=lambda s: 1e-3 * (1 + s),
                     discrepancy__full=lambda s: 1.01e-3 * (1 + s))  # fmt: skip
    events = [vars(e) for e in phase.detect(records)]
    for drawn in (phase_figure(records, events), *(figure for _, figure in detail_figures(records, events).values())):
        assert_apart(drawn)


def assert_apart(drawn):
    """No name at the end of a curve touches another or a title, or is cut off; a name for every curve."""
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    for ax in drawn.axes:
        names = [text for text in ax.texts if text.get_visible() and text.get_position()[0] > 1]
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in names]
        assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)], ax.get_title(loc="left")
        assert all(box.x1 <= drawn.bbox.x1 + 1 for box in boxes), ax.get_title(loc="left")
        assert len(names) >= len({line.get_label() for line in ax.lines if len(line.get_xdata()) > 2}) - 2
