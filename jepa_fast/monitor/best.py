"""Which look was the best so far: by the probe where there is one, else by the probability that the features are useful.

In: records of metrics.jsonl, one after the other. Out: whether the weights of this one are to be kept.
"""

import math
from typing import Any

from jepa_fast.monitor.phase import number

PROBED = ("probe/target", "probe/context")
USEFUL = ("phase/useful/target", "phase/useful/context")
NOISE = 0.02  # of a probability: differences below say nothing
LATER = 1.1  # as good within the noise, and so many times the steps: later weights are taken, so that few are written


class Best:
    """The best look so far. known: what a checkpoint's state says of it (`state`), or {}."""

    def __init__(self, known: dict[str, Any]):
        whole = {"step", "by", "score", "highest"} <= known.keys()
        self.step = int(known["step"]) if whole else 0  # of the weights that are kept; 0: none are
        self.by = str(known["by"]) if whole else ""  # the key of the record that says so
        self.score, self.highest = (float(known[k]) if whole else -math.inf for k in ("score", "highest"))

    def add(self, record: dict[str, Any]) -> bool:
        """Whether the weights of this look are to be kept. The untrained ones are not; nor are any twice."""
        step, (by, score) = record["step"], _score(record)
        if by is None or step == 0 or step == self.step:
            return False
        kind = by.split("/")[0]
        if kind != self.by.split("/")[0]:  # nothing is kept yet, or the other kind of run wrote it
            better = True
        elif kind == "probe":
            tested = max(1.0, number(record.get("probe/num_test")) or 1.0)
            better = score > self.score + math.sqrt(max(0.0, self.score * (1 - self.score)) / tested)
        else:
            later = score >= max(self.highest, score) - NOISE and step >= LATER * self.step
            better = score > self.score + NOISE or later
            self.highest = max(self.highest, score)
        if better:
            self.step, self.by, self.score = step, by, score
            self.highest = max(self.highest, score) if kind == "phase" else score
        return better

    def state(self) -> dict[str, Any]:
        """For the checkpoint's state."""
        return {"step": self.step, "by": self.by, "score": self.score, "highest": self.highest}


def _score(record: dict[str, Any]) -> tuple[str | None, float]:
    """(key, value) of the better encoder; (None, 0) where the record says nothing of either."""
    for keys in (PROBED, USEFUL):
        found = [(value, key) for key in keys if (value := number(record.get(key))) is not None]
        if found:
            value, key = max(found, key=lambda pair: pair[0])
            return key, value
    return None, 0.0
