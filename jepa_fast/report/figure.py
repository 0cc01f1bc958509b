"""The figures of one run. In: records and events. Out: matplotlib figures.

`phase_figure` is the glance, after the paper's figure 4; `detail_figures` are what lies behind it.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator

from jepa_fast.monitor import phase
from jepa_fast.report.bands import Band, bands, legend, shade
from jepa_fast.report.logs import Record, values

# name: (on paper, on a dark screen). Line colours are close to Okabe and Ito's, which colour-blind readers tell apart.
COLOURS = {
    "paper": ("#ffffff", "#15171b"), "ink": ("#1c1e21", "#e4e6ea"), "muted": ("#6a7078", "#9aa1ab"),
    "rule": ("#e3e5e8", "#2d3138"), "band": ("#fbeec4", "#3d3517"), "lost": ("#f7dcd3", "#432720"),
    "hatch": ("#e6cf86", "#5f5325"), "hatch lost": ("#e3b0a0", "#6b3d31"), "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#f28e3c"), "green": ("#00805d", "#2fc49a"), "purple": ("#a8518a", "#d68fbe"),
}  # fmt: skip
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
MOST_POINTS = 600  # of a line; more cannot be seen

Line = tuple[str, str, str, str]  # key, label, colour, style
Panel = tuple[str, float, str, tuple[Line, ...]]  # title, height, scale (log, linear, or a key of LIMITS), lines
# Panels whose axis is fixed: (lowest, highest, the line that values are read against)
LIMITS = {"skill": (-1.05, 1.0, 0.0), "probability": (0.0, 1.0, 0.5)}
PANELS: tuple[Panel, ...] = (
    ("Training loss", 1.2, "log", (("loss", "loss", "ink", "-"),)),
    ("Linear probe, accuracy", 1.3, "linear", (
        ("probe/context", "context encoder", "blue", "-"), ("probe/target", "target encoder", "orange", "-"),
        ("probe/untrained", "untrained", "muted", "--"), ("probe/majority", "majority class", "muted", ":"))),
    ("Predictor's skill: at 0 no better than a trivial predictor", 0.9, "skill", (("skill/smooth", "skill", "ink", "-"),)),
    ("Probability of useful features, estimated without labels", 0.9, "probability", (
        ("phase/useful/context", "context encoder", "blue", "-"), ("phase/useful/target", "target encoder", "orange", "-"))),
    ("Discrepancy C of the two encoders", 1.1, "log", (
        ("discrepancy/visible", "visible tokens", "green", "-"), ("discrepancy/full", "whole inputs", "blue", "-"),
        ("discrepancy/relative", "visible / spread", "purple", "-"))),
)  # fmt: skip
# name of the section: (what to read there, its panels)
DETAILS: dict[str, tuple[str, tuple[Panel, ...]]] = {
    "What the features tell of the inputs": (
        "Readout: how well ridge regression reads a rich description of the inputs from pooled features, as a correlation. "
        "It needs no labels. Compare with the untrained encoder's.",
        (
            ("Readout", 1.2, "linear", (
                ("readout/context", "context encoder", "blue", "-"), ("readout", "target encoder", "orange", "-"),
                ("readout/untrained", "untrained", "muted", "--"))),
        ),
    ),
    "Which trivial predictor comes near": (
        "1 - loss / loss of a trivial predictor on the same targets. The skill above is the least of the three, smoothed. "
        "Where the share is near 1, every input looks the same at a position.",
        (
            ("Skill beside each trivial predictor", 1.3, "skill", (
                ("skill/constant", "constant", "blue", "-"), ("skill/copy", "nearest token", "orange", "-"),
                ("skill/context_mean", "context mean", "green", "-"))),
            ("Share of the targets' variance that lies between positions", 0.8, "linear", (
                ("position_share", "share", "ink", "-"),)),
        ),
    ),
    "How the encoders part": (
        "",
        (
            ("Instance spread of the target encoder", 0.8, "linear", (("spread", "spread", "ink", "-"),)),
            ("Drift ‖θ − θ̄‖ of the weights", 0.8, "linear", (("drift/total", "drift", "ink", "-"),)),
        ),
    ),
    "Where the discrepancy comes from": (
        "Equation 4 splits C into what masking does to the context encoder and what the EMA lag does; C is at most their "
        "sum, which is asserted at every look. The bound γ is shown term by term beside what it bounds: how far it lies "
        "above says how little it can decide. For encoders of more than one layer γ is a heuristic.",
        (
            ("Equation 4, on fixed inputs and masks", 1.2, "log", (
                ("mismatch/both", "C", "green", "-"), ("mismatch/input", "input mismatch", "blue", "-"),
                ("mismatch/ema", "EMA mismatch", "orange", "--"))),
            ("Bound γ against what it bounds", 1.3, "log", (
                ("bound/gamma", "γ", "ink", "-"), ("bound/mask_term", "L B √(pN)", "blue", "-"),
                ("bound/ema_term", "‖D‖ ‖x‖", "orange", "--"), ("bound/measured", "measured", "green", "-"))),
        ),
    ),
    "How many directions the features use": (
        "Spectra of pooled features. They need not fall in the collapse phase: RankMe is blind to scale, and often falls "
        "when features get better.",
        (
            ("Effective directions", 1.3, "log", (
                ("rankme", "RankMe, target", "orange", "-"), ("rankme/context", "RankMe, context", "blue", "-"),
                ("participation", "participation", "purple", "-"), ("lidar", "LiDAR", "green", "-"))),
            ("Decay α of the spectrum (α-ReQ), target encoder", 0.7, "linear", (("alpha_req", "α", "ink", "-"),)),
        ),
    ),
    "Throughput and health": (
        "",
        (
            ("Samples per second", 0.7, "linear", (("images_per_s", "samples/s", "ink", "-"),)),
            ("Residual of θ − θ̄ against theorem 4.2 (1 = rounding at its worst)", 0.7, "linear", (
                ("identity/residual", "residual", "ink", "-"),)),
        ),
    ),
}  # fmt: skip
# Heat maps of layers over steps: heading, what to read there, keys (the first that there are)
MAPS = (
    ("Which layers drift", "‖θ − θ̄‖ of every layer, relative to ‖θ‖ where that is logged: where the weights differ.",
     ("drift_relative/", "drift/")),
    ("In which layers the features part", "‖f − g‖ after every block, relative to the spread between inputs there.",
     ("layer_discrepancy/",)),
)  # fmt: skip
NAMES = {"drift/": "Drift", "drift_relative/": "Drift, relative,", "layer_discrepancy/": "Discrepancy, relative,"}
# Events that are a mark on the loss, the mark, and how one and several are called.
MARKED = {"loss_minimum": ("o", "loss minimum", "loss minima"), "late_drop": ("v", "sudden fall", "sudden falls")}
SMALL: dict[str, Any] = {"fontsize": 8, "color": LIGHT["muted"]}
END = "end"  # marks the names at the right ends of curves until `settle` has put them where they belong


def phase_figure(records: list[Record], events: list[Record]) -> Figure:
    """The paper's figure 4 for this run: loss, probes, skill, probability and discrepancy, the phase shaded."""
    return _figure(PANELS, records, events)


def detail_figures(records: list[Record], events: list[Record]) -> dict[str, tuple[str, Figure]]:
    """{section: (what to read there, figure)}, of sections that the records have something for."""
    figures: dict[str, tuple[str, Figure]] = {}
    for title, (says, panels) in DETAILS.items():
        if any(values(records, line[0]) for panel in panels for line in panel[3]):
            figures[title] = (says, _figure(panels, records, events))
    for heading, says, prefixes in MAPS:
        prefix = next((p for p in prefixes if len(_complete_rows(records, _layers(records, p))) > 1), "")
        if prefix:
            figures[heading] = (says, _figure((), records, events, layers=prefix))
    return figures


def _figure(panels: Sequence[Panel], records: list[Record], events: list[Record], layers: str = "") -> Figure:
    panels = [panel for panel in panels if any(values(records, key) for key, *_ in panel[3])]
    names = _layers(records, layers) if layers else []
    rows = _complete_rows(records, names)
    heights = [height for _, height, *_ in panels] + [0.2 + 0.16 * len(names)] * (len(rows) > 1)
    found = bands(records, events)
    marks = _marks(events) if any(key == "loss" for panel in panels for key, *_ in panel[3]) else []
    patches: list[Artist] = [*legend(found, LIGHT), *marks]
    figure = Figure(
        figsize=(6.4, 0.6 + 1.35 * sum(heights) + 0.2 * len(patches)), facecolor=LIGHT["paper"], layout="constrained"
    )
    if not heights:
        figure.text(0.5, 0.5, "no records yet", ha="center", color=LIGHT["muted"])
        return figure
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax in axes:
        bare(ax)
    for ax, (title, _, scale, lines) in zip(axes, panels, strict=False):
        ax.set_title(title, loc="left", fontsize=9, color=LIGHT["ink"], fontweight="bold")
        _draw(ax, scale, lines, records)
        shade(ax, found, LIGHT)
        if lines[0][0] == "loss":
            _mark(ax, values(records, "loss"), events)
    if len(rows) > 1:
        _draw_layers(axes[-1], rows[:: math.ceil(len(rows) / 200)], names, layers)
        _bound(axes[-1], found)
    axes[-1].set_xlabel("step", **SMALL)
    if patches:
        figure.legend(handles=patches, loc="outside upper left", fontsize=8, frameon=False, labelcolor=LIGHT["muted"])
    settle(figure)
    return figure


def bare(ax: Axes) -> None:
    ax.set_facecolor("none")
    ax.spines[:].set_visible(False)
    ax.tick_params(colors=LIGHT["muted"], labelsize=8, length=0)


def log_axis(ax: Axes) -> None:
    """Ticks at 1 and 3 of each decade, as plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def thinned(points: list[tuple[int, float]], scale: str) -> list[tuple[int, float]]:
    """What can be drawn of a line, and seen."""
    points = [(s, v) for s, v in points if v > 0 or scale != "log"]
    return points[:: math.ceil(len(points) / MOST_POINTS) or 1] + points[-1:]


def _draw(ax: Axes, scale: str, lines: tuple[Line, ...], records: list[Record]) -> None:
    if scale == "log":
        log_axis(ax)
    ax.margins(x=0, y=0.15)
    ax.grid(axis="y", color=LIGHT["rule"], linewidth=0.6)
    ends = []
    for key, label, colour, style in lines:
        points = thinned(values(records, key), scale)
        ax.plot([s for s, _ in points], [v for _, v in points], style, color=LIGHT[colour], linewidth=1.4)
        ends += [(v, f"{label} {v:#.3g}".removesuffix("."), LIGHT[colour]) for _, v in points[-1:]]
        if key == "skill/smooth":
            _interval(ax, records)
    if scale in LIMITS:
        low, high, line = LIMITS[scale]
        lowest = min((v for key, *_ in lines for _, v in values(records, key)), default=0.0)
        ax.set_ylim(max(low, min(lowest - 0.05, -0.05)) if scale == "skill" else low, high)
        ax.axhline(line, color=LIGHT["muted"], linewidth=0.9, linestyle="--")
        ax.set_yticks([tick for tick in (-1.0, -0.5, 0.0, 0.5, 1.0) if ax.get_ylim()[0] <= tick])
    label_ends(ax, ends)


def _interval(ax: Axes, records: list[Record]) -> None:
    """Two standard errors of the smoothed skill on either side."""
    pairs = [(s, v, e) for r in records for s, v, e in [[phase.number(r.get(k)) for k in ("step", "skill/smooth", "skill/error")]]
             if s is not None and v is not None and e is not None]  # fmt: skip
    pairs = pairs[:: math.ceil(len(pairs) / MOST_POINTS) or 1]
    steps, low, high = [s for s, _, _ in pairs], [v - 2 * e for _, v, e in pairs], [v + 2 * e for _, v, e in pairs]
    ax.fill_between(steps, low, high, color=LIGHT["muted"], alpha=0.25, linewidth=0)


def literal(name: str) -> str:
    """A name from a file as matplotlib shall write it: `$...$` in it is no formula."""
    return name.replace("$", r"\$")


def label_ends(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """(value, text, colour) of each line: written at its right end. `settle` moves apart what would touch."""
    for value, text, colour in ends:
        ax.annotate(literal(text), (1.015, value), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=colour,
                    annotation_clip=False, gid=END)  # fmt: skip


def settle(figure: Figure) -> None:
    """Lay the figure out, then move the names at the ends of curves apart; smaller, where there are many."""
    figure.draw_without_rendering()
    for ax in figure.axes:
        ends = [text for text in ax.texts if text.get_gid() == END]
        if ends:
            _spread(ax, ends)
    for text in figure.findobj(Text):
        text.set_gid(None)


def _spread(ax: Axes, ends: list[Text]) -> None:
    height = ax.get_window_extent().height / ax.figure.dpi * 72  # points
    size = max(4.5, min(8.0, height / (1.35 * len(ends))))
    gap = 1.35 * size / height
    low, high = (ax.transScale.transform((0, y))[1] for y in ax.get_ylim())

    def where(text: Text) -> float:
        at = (ax.transScale.transform((0, text.xy[1]))[1] - low) / (high - low)  # type: ignore[attr-defined]
        return min(max(at, 0.0), 1.0) if math.isfinite(at) else 0.0

    ends = sorted(ends, key=where)
    at = [where(text) for text in ends]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + gap)
    for i in reversed(range(len(at))):
        at[i] = min(at[i], at[i + 1] - gap if i + 1 < len(at) else 1.0)
    for y, text in zip(at, ends, strict=True):
        text.anncoords = "axes fraction"  # type: ignore[attr-defined]
        text.set_position((1.015, y))
        text.set_fontsize(size)


def _marks(events: list[Record]) -> list[Artist]:
    """Entries of the legend for the marks on the loss."""
    entries: list[Artist] = []
    for kind, (mark, one, several) in MARKED.items():
        steps = [e["step"] for e in events if e["kind"] == kind]
        if steps:
            more = ", ..." if len(steps) > 2 else ""
            label = f"{one if len(steps) == 1 else several}, step {', '.join(f'{s:,}' for s in steps[:2])}{more}"
            entries.append(Line2D([], [], marker=mark, color=LIGHT["ink"], markersize=4, linestyle="", label=label))
    return entries


def _mark(ax: Axes, points: list[tuple[int, float]], events: list[Record]) -> None:
    for event in events:
        if event["kind"] in MARKED and points:
            step, value = min(points, key=lambda point: abs(point[0] - event["step"]))
            ax.plot([step], [value], MARKED[event["kind"]][0], color=LIGHT["ink"], markersize=4)


def _bound(ax: Axes, found: Sequence[Band]) -> None:
    """The ends of the bands on a map, which covers what is shaded."""
    for band in found:
        for step in {band.start, band.stop} if band.over else {band.start}:
            ax.axvline(step, color=LIGHT["band"], linewidth=1, linestyle="--")


def _layers(records: list[Record], prefix: str) -> list[str]:
    """In the order of the encoder: embedding, blocks by number, the rest."""
    names = {k for r in records for k in r if k.startswith(prefix)} - {f"{prefix}total"}
    numbered = [(int(n.rsplit(".", 1)[-1]) if n.rsplit(".", 1)[-1].isdecimal() else -1, n) for n in names]
    ends = sorted(n for number, n in numbered if number < 0)
    first = [n for n in ends if "embed" in n]
    return [*[n for n in ends if n not in first][::-1], *[n for number, n in sorted(numbered, reverse=True) if number >= 0], *first]  # fmt: skip


def _complete_rows(records: list[Record], names: list[str]) -> list[Record]:
    return [r for r in records if names and all((phase.number(r.get(k)) or 0) > 0 for k in names)]


def _draw_layers(ax: Axes, rows: list[Record], names: list[str], prefix: str) -> None:
    drawn = [[row[key] for row in rows] for key in names]
    low, high = min(map(min, drawn)), max(map(max, drawn))
    title = f"{NAMES[prefix]} by layer, from {low:.2g} (dark) to {high:.2g} (light)"
    ax.set_title(title, loc="left", fontsize=9, color=LIGHT["ink"], fontweight="bold")
    ax.pcolormesh([row["step"] for row in rows], range(len(names)), drawn, norm=LogNorm(low, high), cmap="cividis",
                  shading="nearest", rasterized=True)  # fmt: skip
    ax.set_yticks(range(len(names)), [literal(key.removeprefix(prefix)) for key in names])


def svg(figure: Figure) -> str:
    """The figure as SVG, its text as text, the same each time."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "phase"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
