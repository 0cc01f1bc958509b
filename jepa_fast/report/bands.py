"""The steps that a figure shades: the collapse phase. In: records and events. Out: bands, and their patches.

With labels these are facts (`collapse_phase`, `degraded`). Without, they are stretches of the estimated state, hatched.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from jepa_fast.monitor import phase
from jepa_fast.report.logs import Record, cannot_tell, looks

# kind: (what the legend calls it, colour of the figures, hatched)
KINDS = {
    "collapse": ("collapse phase", "band", False),
    "lost": ("useful features lost again", "lost", False),
    "probably collapse": ("probably collapse phase (estimate)", "hatch", True),
    "probably lost": ("probably lost again (estimate)", "hatch lost", True),
}


class Band(NamedTuple):
    kind: str  # of KINDS
    start: int
    stop: int
    over: bool = True  # before the last record


def bands(records: Sequence[Record], events: Sequence[Record]) -> list[Band]:
    """By rising start, without overlap."""
    if not records:
        return []
    last, looked = int(records[-1]["step"]), looks(records)
    if not looked or cannot_tell(looked):
        return _estimated(records, last)
    found = []
    for event in events:
        if event["kind"] == phase.PHASE:
            end = event.get("end")
            found.append(Band("collapse", event["step"], last if end is None else end, end is not None))
        elif event["kind"] == "degraded":
            back = [e["step"] for e in events if e["kind"] == "useful" and e["step"] > event["step"]]
            found.append(Band("lost", event["step"], min(back, default=last), bool(back)))
    return sorted((band for band in found if band.stop > band.start), key=lambda band: band.start)


def _estimated(records: Sequence[Record], last: int) -> list[Band]:
    kinds = {"collapse": "probably collapse", "degraded": "probably lost"}
    said = [(int(r["step"]), kinds.get(str(r.get("phase/state")), "")) for r in records if "phase/state" in r]
    runs = [(kind, next(steps)[0]) for kind, steps in groupby(said, key=lambda pair: pair[1])]
    ends = [*(start for _, start in runs[1:]), last][: len(runs)]  # a log without states has none
    return [
        Band(kind, start, stop, i + 1 < len(runs))
        for i, ((kind, start), stop) in enumerate(zip(runs, ends, strict=True))
        if kind and stop > start
    ]


def shade(ax: Axes, found: Sequence[Band], colours: dict[str, str]) -> None:
    for band in found:
        ax.axvspan(band.start, band.stop, zorder=0, **_style(band.kind, colours))


def legend(found: Sequence[Band], colours: dict[str, str]) -> list[Patch]:
    """A patch for each kind that there is, with its steps where it is one stretch."""
    patches = []
    for kind, (name, *_) in KINDS.items():
        those = [band for band in found if band.kind == kind]
        if those:
            one = those[0]
            when = f"step {one.start:,} to {one.stop:,}" if one.over else f"since step {one.start:,}"
            when = when if len(those) == 1 else f"{len(those)} times from step {one.start:,}"
            patches.append(Patch(label=f"{name}, {when}", **_style(kind, colours)))
    return patches


def _style(kind: str, colours: dict[str, str]) -> dict:
    _, colour, hatched = KINDS[kind]
    if hatched:
        return {"facecolor": "none", "edgecolor": colours[colour], "hatch": "////", "linewidth": 0}
    return {"facecolor": colours[colour], "edgecolor": "none", "linewidth": 0}
