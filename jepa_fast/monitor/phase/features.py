"""Events from probes: what the features are worth, against the untrained encoder's. The only ones that know."""

import math
from collections.abc import Iterator
from typing import Any

from jepa_fast.monitor.phase.curves import Event, confidence, number

PROBE_MARGIN = 0.026  # accuracy that counts as a difference: two standard errors on about 1,320 test samples
ROWS = 2  # records in a row that must show it


def feature_events(records: list[dict[str, Any]]) -> Iterator[Event]:
    """The mean of both encoders' probes against the untrained encoder's: in turn below and back above, by the margin."""
    below, begun, gaps, last = False, 0, [], -math.inf  # type: ignore[var-annotated]
    for record in records:
        step, untrained = number(record.get("step")), number(record.get("probe/untrained"))
        probes = [p for name in ("context", "target") if (p := number(record.get(f"probe/{name}"))) is not None]
        if step is None or step <= last or untrained is None or not probes:
            continue
        last = step
        mean = sum(probes) / len(probes)
        gap = round(mean - untrained, 9) * (1 if below else -1)  # rounded: 0.026 apart is apart, whatever the binary
        if gap < PROBE_MARGIN:
            gaps = []
            continue
        begun = begun if gaps else int(step)
        gaps.append(gap)
        if len(gaps) == ROWS:
            kind = "features_recovered" if below else "features_below_untrained"
            sure = confidence(sum(gaps) / ROWS, PROBE_MARGIN / 2, ROWS)
            yield Event(kind, begun, int(step), sure, _evidence(record, mean, untrained, len(probes)))
            below, gaps = not below, []


def _evidence(record: dict[str, Any], mean: float, untrained: float, num: int) -> tuple[str, ...]:
    what = "mean of both encoders' probes" if num == 2 else "probe (of one encoder, there is no other)"
    said = [
        f"{what} {mean:.3f} at step {record['step']}, untrained {untrained:.3f} ({mean - untrained:+.3f})",
        f"{ROWS} probe records in a row beyond the margin of {PROBE_MARGIN}",
    ]
    others = (
        ("context probe", "probe/context"),
        ("target probe", "probe/target"),
        ("majority class", "probe/majority"),
    )
    said += [f"{name} {v:.3f}" for name, key in others if (v := number(record.get(key))) is not None]
    return tuple(said)
