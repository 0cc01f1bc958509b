"""Events from probes: what the features are worth, against the untrained encoder's. The only ones that know."""

from typing import Any

from jepa_fast.monitor.phase.curves import Event, confidence, number

PROBE_MARGIN = 0.026  # accuracy that counts as a difference: two standard errors on about 1,320 test samples
ROWS = 2  # records in a row that must show it


class Features:
    """The mean of both encoders' probes against the untrained encoder's: in turn below and back above, by the margin."""

    def __init__(self) -> None:
        self.below, self.begun = False, 0
        self.gaps: list[float] = []  # of the records in a row that are beyond the margin

    def add(self, step: int, record: dict[str, Any]) -> Event | None:
        untrained = number(record.get("probe/untrained"))
        found = [record[key] for key in ("probe/context", "probe/target") if record.get(key) is not None]
        probes = [p for value in found if (p := number(value)) is not None]
        if untrained is None or not probes or len(probes) < len(found):  # one that failed is not one that is not there
            return None
        mean = sum(probes) / len(probes)
        gap = round(untrained - mean, 9) * (-1 if self.below else 1)  # rounded: 0.026 apart is apart, in binary too
        if gap < PROBE_MARGIN:
            self.gaps = []
            return None
        self.begun = self.begun if self.gaps else step
        self.gaps.append(gap)
        if len(self.gaps) < ROWS:
            return None
        kind = "features_recovered" if self.below else "features_below_untrained"
        sure = confidence(sum(self.gaps) / ROWS, PROBE_MARGIN / 2, ROWS)
        self.below, self.gaps = not self.below, []
        return Event(kind, self.begun, step, sure, _evidence(record, mean, untrained, len(probes)))


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
