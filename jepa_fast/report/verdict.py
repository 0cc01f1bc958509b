"""A run in a few sentences. In: records and events. Out: text: the answer, the numbers, what to do.

With labels the answer is a fact, by the paper's definition (`phase`). Without, it is an estimate, with its probability.
"""

import math
from collections.abc import Sequence

from jepa_fast.monitor import phase
from jepa_fast.report.bands import Band, bands
from jepa_fast.report.logs import Record, cannot_tell, last_of, looks, values, with_phase

FRACTIONS = {"a tenth": 0.1, "a fifth": 0.2, "a quarter": 0.25, "a third": 1 / 3, "half": 0.5, "two thirds": 2 / 3,
             "three quarters": 0.75}  # fmt: skip
LIKELY = 0.7  # a probability from which the text says "probably"


def verdict(records: Sequence[Record], events: Sequence[Record], description: str) -> str:
    """At most four sentences, and one more where a limit of the data must be said. `description` is the data set's."""
    curve = list(phase.series(records, "loss"))
    limits = [*_synthetic(description)]
    lost = _lost(records, curve)
    if len(curve) < 5:
        of = f" of {len(records)}" if len(records) > len(curve) else ""
        short = f"Too short to say: {len(curve)}{of} record{'s' * (len(curve) != 1)} with a loss. Train longer, or log more often."
        return " ".join([*_no_number(lost), short, *limits])
    if not any("phase/state" in record for record in records):
        records, events = with_phase(records)
    events, looked = phase.latest(list(events)), looks(records)
    labelled = bool(looked) and not cannot_tell(looked)
    if labelled:
        said = [_answer(events, looked), _probes(looked, values(records, "probe/majority"))]
    else:
        said = _blind(looked, _estimate(records, events)) if looked else _estimate(records, events)
    if lost is None:
        said.append(_loss_and_skill(records, events, curve))
        said.append(_next(events, looked) if labelled else _next_without_labels(records, bool(looked)))
    else:
        said.append(
            f"Next: go on from a checkpoint from before step {lost:,}; a lower learning rate is the usual first try."
        )
    return " ".join([*_no_number(lost), *said, *limits])


# ---- the answer, from probes ------------------------------------------------------------------------


def _answer(events: Sequence[Record], looked: Sequence[phase.Look]) -> str:
    found, turns = last_of(phase.PHASE, events), [e for e in events if e["kind"] in ("useful", "degraded")]
    now, useful = looked[-1].step, bool(turns) and turns[-1]["kind"] == "useful"
    if found is None and not turns:
        if len(looked) < 2:
            return "One look at the probes is not enough to say: two in a row decide."
        if looked[-1].useful:
            return (
                f"Not decided yet: the features were useful at the last look, step {now:,}, and the next look decides."
            )
        return f"Not yet in the collapse phase: up to step {now:,} the loss has not halved, and the features are not useful."
    if found is not None and found.get("end") is None:
        said = (
            f"In the collapse phase since step {found['step']:,}, {_share(now - found['step'], now)} of the run so far"
        )
        if looked[-1].useful:
            return f"{said}; the features were useful at the last look, and a second such look in a row would end it."
        return f"{said}: the loss has halved, but the features are no better than an untrained encoder's."
    if found is None:
        said = f"No collapse phase: the features were useful from step {turns[0]['step']:,}, before the loss had halved"
    else:
        length = _share(found["end"] - found["step"], now)
        said = f"Collapse phase from step {found['step']:,} to {found['end']:,}, {length} of the run"
    falls = [e["step"] for e in turns if e["kind"] == "degraded"]
    if not useful:
        return f"{said}; {'the features were useful after that, but' if found else 'they'} have not been since step {falls[-1]:,}."
    return f"{said}{'; over since' if found else ''}{_relapses(falls, turns)}."


def _relapses(falls: Sequence[int], turns: Sequence[Record]) -> str:
    if not falls:
        return ""
    if len(falls) > 1:
        return f", apart from {len(falls)} relapses, the last from step {falls[-1]:,} to {turns[-1]['step']:,}"
    return f", apart from a relapse from step {falls[0]:,} to {turns[-1]['step']:,}"


def _probes(looked: Sequence[phase.Look], majority: list[tuple[int, float]]) -> str:
    last, best = looked[-1], max(looked, key=lambda look: look.probes[look.better])
    end, most = last.probes[last.better], best.probes[best.better]
    at_best = f", best {most:.3f} at step {best.step:,}" if most - end >= 0.001 else ""
    common = f", majority class {majority[-1][1]:.3f}" if majority else ""
    return (
        f"The better probe ({last.better} encoder) ends at {end:.3f}{at_best}; untrained {last.untrained:.3f}{common}, "
        f"margin {last.margin:.3f} ({_tests(last)})."
    )


def _tests(look: phase.Look) -> str:
    if look.num_test is None:
        return f"{phase.ASSUMED_TESTS:,} test samples assumed"
    return f"{look.num_test:,.0f} test samples"


def _next(events: Sequence[Record], looked: Sequence[phase.Look]) -> str:
    turns = [e for e in events if e["kind"] in ("useful", "degraded")]
    found, last = last_of(phase.PHASE, events), looked[-1]
    if found is not None and found.get("end") is None:
        return (
            "Next: train on and go by the probe, not by the loss; experiments/remedies measures whether "
            "--objective.target_norm batch shortens the phase."
        )
    if not turns:
        return "Next: train on."
    best = max(looked, key=lambda look: look.probes[look.better])
    if turns[-1]["kind"] == "degraded" or best.probes[best.better] - last.probes[last.better] >= last.margin:
        return (
            f"Next: use the checkpoint that was best by the probe (checkpoints/best; step {best.step:,}), not the last."
        )
    return "Next: choose the checkpoint by the probe (checkpoints/best), never by the lowest loss; the last is about as good."


# ---- the answer, without labels ---------------------------------------------------------------------


def _blind(looked: Sequence[phase.Look], estimate: list[str]) -> list[str]:
    """Two sentences: why the probe says nothing, and the answer of the estimate."""
    last, answer = looked[-1], estimate[0]
    what = "majority class" if last.reference > last.untrained else "untrained encoder"
    why = (
        f"The probe cannot show the phase: even a perfect one would not be above the {what}'s {last.reference:.3f} by the "
        f"margin of {last.margin:.3f} ({_tests(last)})."
    )
    return [why, answer if len(estimate) == 1 else f"Estimated without it: {answer[0].lower()}{answer[1:]}"]


def _estimate(records: Sequence[Record], events: Sequence[Record]) -> list[str]:
    """The answer, and the probabilities that it follows from."""
    known = {name: values(records, f"phase/useful/{name}") for name in ("context", "target")}
    now = {name: points[-1][1] for name, points in known.items() if points}
    if not now:
        return [_by_the_loss(events)]
    answer = _likely(records, events, max(now.values()))
    which = ", ".join(f"{_shown(p)} for the {name} encoder" for name, p in now.items())
    if not any(key.startswith(("readout", "rankme")) for record in records for key in record):
        which = _shown(max(now.values()))  # from the loss and the skill: one probability for the pair
    source = "without labels" if _has_signals(records) else "from the loss alone"
    return [answer, f"Estimated {source}, the probability that features beat an untrained encoder's is {which}."]


def _likely(records: Sequence[Record], events: Sequence[Record], p: float) -> str:
    states = [(int(r["step"]), r["phase/state"]) for r in records if "phase/state" in r]
    state = states[-1][1]
    others = [step for step, one in states if one != state]
    since = next((step for step, _ in states if not others or step > others[-1]), states[0][0])
    found = [band for band in bands(records, events) if band.kind == "probably collapse"]
    if state == "collapse":
        return f"{_probably(1 - p)} in the collapse phase since step {found[-1].start if found else since:,} (probability {_shown(1 - p)})."
    if state == "degraded":
        return f"The features were probably useful, and are {_probably(1 - p).lower()} not since step {since:,} (probability {_shown(1 - p)})."
    if state == "warmup":
        return f"Not yet in the collapse phase: the loss has not halved up to step {states[-1][0]:,}."
    said = _stretch(found)
    if state == "escape":
        perhaps = f"{said}; perhaps" if said else "Perhaps"
        return f"{perhaps} useful features since step {since:,} (probability {_shown(p)})."
    return f"{said or 'Probably no collapse phase'}; {_probably(p).lower()} useful features since step {since:,} (probability {_shown(p)})."


def _stretch(found: Sequence[Band]) -> str:
    if not found:
        return ""
    return f"Probably a collapse phase from step {found[0].start:,} to {found[-1].stop:,}"


def _shown(p: float) -> str:
    """Two digits, and never certainty: the model is not that good."""
    return f"{min(max(p, 0.01), 0.99):.2f}"


def _probably(p: float) -> str:
    return "Probably" if p >= LIKELY else "Perhaps"


def _by_the_loss(events: Sequence[Record]) -> str:
    shape = "it has fallen and risen, as in the collapse phase and its end, but a failing run can look the same"
    if last_of("loss_minimum", events) is None:
        shape = "in the collapse phase, too, it only falls"
    return f"The loss alone does not tell the phase: {shape}."


def _next_without_labels(records: Sequence[Record], looked: bool) -> str:
    if looked:
        return "Next: a probe on more test samples, or on classes that the untrained encoder tells apart less well, would settle it."
    if _has_signals(records):
        return "Next: a probe on labelled data would settle it."
    return "Next: log the predictor's skill and the readout (three lines with CollapseMonitor), or a probe on labelled data."


def _has_signals(records: Sequence[Record]) -> bool:
    """Whether the log holds more than a loss."""
    return any(key in record for record in records for key in ("skill", "readout", "rankme"))


# ---- loss and skill ---------------------------------------------------------------------------------


def _loss_and_skill(records: Sequence[Record], events: Sequence[Record], curve: list[tuple[int, float]]) -> str:
    called, levels = last_of("loss_minimum", events), list(phase.levels(curve))
    low = min(levels, key=lambda level: level.log)
    if called is not None:
        low = min(levels, key=lambda level: abs(level.step - called["step"]))
    fell, rose = curve[0][1] / math.exp(low.log), math.exp(levels[-1].log - low.log)
    after = f" and rose {rose:.1f}x since" if called else ""
    drop = last_of("late_drop", events)
    sudden = f" (suddenly down at step {drop['step']:,}: perhaps a partial collapse)" if drop else ""
    said = f"The loss fell {fell:.{0 if fell >= 10 else 1}f}x up to step {low.step:,}{after}{sudden}, which says nothing about the features"
    if fell < 1.05:
        said = "The loss has not fallen"
    skill, error = values(records, "skill/smooth"), values(records, "skill/error")
    if not skill:
        return f"{said}."
    wide = 2 * error[-1][1] if error else math.inf
    better = "better" if skill[-1][1] > wide else "no better"
    between = f" ± {wide:.2f}" if wide < math.inf else ""
    return f"{said}; the predictor is {better} than a trivial one (skill {skill[-1][1]:.2f}{between})."


def _lost(records: Sequence[Record], curve: list[tuple[int, float]]) -> int | None:
    """The step from which on the loss is no finite, positive number any more, at least two records."""
    after = [r for r in records if curve and r["step"] > curve[-1][0] and "loss" in r]
    return int(after[0]["step"]) if len(after) >= 2 else None


def _no_number(lost: int | None) -> list[str]:
    return (
        [] if lost is None else [f"From step {lost:,} on the loss is no finite, positive number: training has failed."]
    )


def _synthetic(description: str) -> list[str]:
    if "synthetic" not in description:
        return []
    return ["The data are synthetic: the run illustrates the phase, it is no evidence for other data."]


def _share(steps: int, of: int) -> str:
    """A share in words where one is near, else in percent."""
    share = steps / of if of else 0.0
    near = min(FRACTIONS, key=lambda name: abs(FRACTIONS[name] - share))
    if abs(FRACTIONS[near] - share) <= 0.02:
        return near
    return f"{100 * share:.0f} %" if share >= 0.01 else "under 1 %"
