"""A run in a few sentences. In: records and events. Out: text.

The loss and the discrepancy are told; what the features are worth is said by the probe alone. Without one, what the
other signals suspect is told as a suspicion, with its confidence.
"""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from jepa_fast.monitor import phase

Record = dict[str, Any]

# (loss minimum, features below untrained, features recovered since): what it means
MEANING = {
    (1, 1, 1): "This is the collapse phase and its end: the features got worse while the loss fell, and better while it rose.",
    (1, 1, 0): "The features are worse than at the start. The loss has risen again, but that alone is no recovery: this is the collapse phase, not yet its end.",
    (0, 1, 1): "The features dipped and came back without a rise of the loss: half of the pattern.",
    (0, 1, 0): "The features are worse than at the start while the loss looks well: this is how the collapse phase begins.",
    (0, 0, 0): "The pattern of the collapse phase does not appear up to here.",
}  # fmt: skip
# the same two with a loss minimum, in another order
LATE = {
    True: "The features fell below the untrained encoder's only after the loss had turned, and came back while it rose: a dip and its end, but later than the loss would say.",
    False: "The features are worse than at the start, and fell only after the loss had turned: its rise is no recovery.",
}
EARLY = "The features dipped and came back while the loss still fell: its minimum marks neither."


def verdict(records: list[Record], events: list[Record], description: str) -> str:
    """A few sentences: what the loss did, what the probe says, what it means, what to do next."""
    levels = list(phase.levels(phase.series(records, "loss")))
    if len(levels) < 5:
        of = f" of {len(records)}" if len(records) > len(levels) else ""
        said = [
            f"Too short to say: {len(levels)}{of} record{'s' * (len(levels) != 1)} with a loss. Train longer, or log more often."
        ]
    else:
        said = [_on_loss(levels, events), *_on_late_drop(events), *_on_probe(records, events)]
    if levels and len(lost := [r for r in records if r["step"] > levels[-1].called and "loss" in r]) >= 2:
        said.insert(1, f"From step {int(lost[0]['step']):,} on the loss is no finite, positive number.")
    if "synthetic" in description:
        said.append("The data are synthetic: the run illustrates the phase, it is no evidence for other data.")
    return " ".join(said)


def _on_loss(levels: list[phase.Level], events: list[Record]) -> str:
    called, last = last_of("loss_minimum", events), levels[-1]
    if called:
        times = math.exp(last.log - min(levels, key=lambda level: abs(level.step - called["step"])).log)
        return f"The loss was lowest at step {called['step']:,} of {last.called:,}; at the end it is {times:.1f} times that."
    times = math.exp(last.log - min(level.log for level in levels))
    return f"Up to step {last.called:,} the loss shows no minimum followed by a lasting rise; it is {times:.2f} times its lowest."


def _on_probe(records: list[Record], events: list[Record]) -> list[str]:
    kinds = ("loss_minimum", "features_below_untrained", "features_recovered")
    bottomed, below, back = (last_of(kind, events) for kind in kinds)
    context, target, untrained, majority = (
        values(records, f"probe/{name}") for name in ("context", "target", "untrained", "majority")
    )
    if not target or not untrained:
        return _without_probe(records, events, bottomed is not None)
    recovered = below is not None and back is not None and back["step"] > below["step"]
    other = f" and on the context encoder at {context[-1][1]:.3f}" if context else ""
    said = f"A linear probe on the target encoder ends at {target[-1][1]:.3f}{other}; the untrained encoder has {untrained[-1][1]:.3f}"
    said += f", always naming the most common class {majority[-1][1]:.3f}." if majority else "."
    if below:
        said += f" The mean of both encoders' probes was below the untrained encoder's from step {below['step']:,}"
        said += (
            f", and above it again from step {back['step']:,}." if back and recovered else ", and has not come back."
        )
    if bottomed and not below:
        means = _shape_without_dip(records, events)
    else:
        means = _meaning(bottomed, below, back if recovered else None)
    more = [] if below else [*_no_room(untrained[-1][1], majority), *_alone(records), *_unconfirmed(events)]
    return [said, means, *more, _next(target, context, untrained[-1][1], bool(below) and not recovered)]


def _meaning(bottomed: Record | None, below: Record | None, back: Record | None) -> str:
    """What a dip of the features means beside the loss minimum: whether it came before, around or after it."""
    if bottomed and below and below["step"] > bottomed["step"]:
        return LATE[back is not None]
    if bottomed and back and back["step"] < bottomed["step"]:
        return EARLY
    return MEANING[bottomed is not None, below is not None, back is not None]


def _no_room(untrained: float, majority: list[tuple[int, float]]) -> list[str]:
    """Where features that lose everything would not be seen to."""
    if not majority or untrained - majority[-1][1] >= phase.PROBE_MARGIN:
        return []
    return [
        "The untrained encoder hardly beats naming the most common class, so a fall of the features could not show."
    ]


def _shape_without_dip(records: list[Record], events: list[Record]) -> str:
    """What the curves have of the phase, and what the probe has not: apart, as each may be right."""
    curves = ["the loss"]
    curves += [
        name
        for kind, name in (("variance_escape", "the spread"), ("discrepancy_valley", "the discrepancy"))
        if last_of(kind, events)
    ]
    named = f"{', '.join(curves[:-1])} and {curves[-1]} have" if len(curves) > 1 else "the loss has"
    step, gap = min(_gaps(records), key=lambda point: point[1])
    shape = f"{named[0].upper()}{named[1:]} the shape of the collapse phase"
    if gap > -phase.PROBE_MARGIN / 2:
        return f"{shape}, but the features never fell below the untrained encoder's: by the probe there was none.{_setback(records)}"
    return (
        f"{shape}. The mean of both encoders' probes was at most {-100 * gap:.1f} points below the untrained encoder's (step {step:,}), "
        f"and {100 * phase.PROBE_MARGIN:.1f} on two records in a row count as a difference: whether the features got worse on the way, this probe cannot tell."
    )


def _setback(records: list[Record]) -> str:
    """The deepest fall of the probes that stayed above the untrained encoder's, if there is one to speak of."""
    gaps = _gaps(records)
    best_so_far: Iterator[tuple[int, float]] = accumulate(gaps, lambda best, now: now if now[1] > best[1] else best)
    falls = list(zip(best_so_far, gaps, strict=True))
    (began, high), (ended, low) = max(falls, key=lambda fall: fall[0][1] - fall[1][1])
    if high - low < 2 * phase.PROBE_MARGIN:
        return ""
    return (
        f" They got worse on the way, though: from {100 * high:.1f} points above it at step {began:,} to {100 * low:.1f} at step {ended:,}, "
        "mean of both encoders' probes."
    )


def _gaps(records: list[Record]) -> list[tuple[int, float]]:
    """(step, mean of the encoders' probes less the untrained encoder's)."""
    gaps = []
    for record in records:
        held = [v for name in ("context", "target") if (v := phase.number(record.get(f"probe/{name}"))) is not None]
        untrained = phase.number(record.get("probe/untrained"))
        if held and untrained is not None:
            gaps.append((int(record["step"]), sum(held) / len(held) - untrained))
    return gaps


def _alone(records: list[Record]) -> list[str]:
    """One encoder below the untrained one by the same rule, where the mean of both was not."""
    said = []
    for name in ("context", "target"):
        keys = ("step", f"probe/{name}", "probe/untrained")
        events = phase.detect({key: record[key] for key in keys if key in record} for record in records)
        below, back = (
            [e for e in events if e.kind == kind] for kind in ("features_below_untrained", "features_recovered")
        )
        if below:
            end = f", and above it again from step {back[0].step:,}" if back else ", and has not come back"
            said.append(
                f"The {name} encoder's probe alone was below the untrained encoder's from step {below[0].step:,}{end}."
            )
    return said


def _unconfirmed(events: list[Record]) -> list[str]:
    """A suspicion that the probe, which knows, does not share."""
    suspected = last_of("collapse_suspected", events)
    if not suspected:
        return []
    return [
        f"The signals without labels suggested useless features from step {suspected['step']:,}, with confidence "
        f"{suspected['confidence']:.2f}; the probe does not confirm it."
    ]


def _without_probe(records: list[Record], events: list[Record], bottomed: bool) -> list[str]:
    """What can be said where nothing knows what the features are worth."""
    alarm = ": a loss minimum is the alarm of the collapse phase, no proof of it" if bottomed else ""
    said = [f"There is no probe, so nothing says how good the features are{alarm}."]
    content, untrained = values(records, "content"), values(records, "content/untrained")
    if content and untrained:
        step, lowest = min(content, key=lambda point: point[1])
        said.append(
            f"What the target encoder's features tell of the inputs' spectra was least at step {step:,} (correlation {lowest:.2f}) "
            f"and ends at {content[-1][1]:.2f}; the untrained encoder's tell {untrained[-1][1]:.2f}."
        )
    collapse, recovery = last_of("collapse_suspected", events), last_of("recovery_suspected", events)
    for event, what in ((collapse, "useless features"), (recovery, "useful features again")):
        if event and not (event is recovery and collapse and recovery["step"] < collapse["step"]):
            said.append(
                f"The other signals suggest {what} from step {event['step']:,}, with confidence {event['confidence']:.2f}: {event['evidence'][0]}."
            )
    return [*said, "Next: give labelled data."]


def _on_late_drop(events: list[Record]) -> list[str]:
    drop = last_of("late_drop", events)
    if not drop:
        return []
    return [
        f"At step {drop['step']:,}, after an escape, a curve fell suddenly ({drop['evidence'][0]}): such a fall can be a partial collapse."
    ]


def _next(target: list[tuple[int, float]], context: list[tuple[int, float]], untrained: float, down: bool) -> str:
    step, best = max(target, key=lambda point: point[1])
    if down:
        return "Next: train on (--resume --train.steps N) and go by the probe, not by the loss; if it stays down, try a larger --ema.decay."
    if target[-1][1] - untrained < phase.PROBE_MARGIN and context and context[-1][1] - untrained >= phase.PROBE_MARGIN:
        return "The context encoder's features are better than an untrained encoder's, the target encoder's not yet. Next: train longer, and go by the probe, not by the loss."
    if target[-1][1] - untrained < phase.PROBE_MARGIN:
        return "The target encoder's features are no better than an untrained encoder's. Next: train longer, and go by the probe, not by the loss."
    if best - target[-1][1] > phase.PROBE_MARGIN:
        return f"Next: the probe was best at step {step:,} ({best:.3f}); keep checkpoints (--checkpoint.every, --checkpoint.keep 0) and choose by the probe, not by the loss."
    return "Next: use the last checkpoint, not the one of the lowest loss; the probe is about as good as it has been."


def values(records: list[Record], key: str) -> list[tuple[int, float]]:
    """(step, value) of the records that have one."""
    pairs = ((r["step"], phase.number(r.get(key))) for r in records if phase.number(r.get("step")) is not None)
    return [(int(step), value) for step, value in pairs if value is not None]


def last_of(kind: str, events: list[Record]) -> Record | None:
    return next((e for e in reversed(events) if e["kind"] == kind), None)


def left_out(events: list[Record]) -> str:
    """How many samples could not be used, by reason, in one sentence; '' if there is none."""
    why = Counter(e.get("why", "unreadable") for e in events if e["kind"] == "bad_sample")
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(why.items()))
    return f"samples left out: {why.total()} ({reasons}); events.jsonl names them" if why else ""
