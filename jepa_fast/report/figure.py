"""The figures of one run. In: records and events. Out: matplotlib figures.

`phase_figure` is the glance, after the paper's figure 4; `detail_figures` are what lies behind it.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from jepa_fast.monitor import phase
from jepa_fast.report.verdict import Record, values

# name: (on paper, on a dark screen). Line colours are close to Okabe and Ito's, which colour-blind readers tell apart.
COLOURS = {
    "paper": ("#ffffff", "#15171b"), "ink": ("#1c1e21", "#e4e6ea"), "muted": ("#6a7078", "#9aa1ab"),
    "rule": ("#e3e5e8", "#2d3138"), "band": ("#fbf0cf", "#38321c"), "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#f28e3c"), "green": ("#00805d", "#2fc49a"), "purple": ("#a8518a", "#d68fbe"),
}  # fmt: skip
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
MOST_POINTS = 600  # of a line; more cannot be seen

Line = tuple[str, str, str, str]  # key, label, colour, style
Panel = tuple[str, float, str, tuple[Line, ...]]  # title, height, scale, lines
PANELS: tuple[Panel, ...] = (
    ("Training loss", 1.2, "log", (("loss", "loss", "ink", "-"),)),
    ("Linear probe, accuracy", 1.5, "linear", (
        ("probe/context", "context encoder", "blue", "-"), ("probe/target", "target encoder", "orange", "-"),
        ("probe/untrained", "untrained", "muted", "--"), ("probe/majority", "majority class", "muted", ":"))),
    ("Discrepancy C of the two encoders", 1.3, "log", (
        ("discrepancy/visible", "visible tokens", "green", "-"), ("discrepancy/full", "whole inputs", "blue", "-"),
        ("discrepancy/relative", "visible / spread", "purple", "-"))),
    ("Instance spread of the target encoder", 0.8, "linear", (("spread", "spread", "ink", "-"),)),
    ("Drift ‖θ − θ̄‖ of the weights", 0.8, "linear", (("drift/total", "drift", "ink", "-"),)),
)  # fmt: skip
# name of the section: (what to read there, its panels)
DETAILS: dict[str, tuple[str, tuple[Panel, ...]]] = {
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
    "What the features tell of the inputs": (
        "Without labels: how well a ridge regression reads the inputs' power spectra from pooled features, as a correlation. "
        "Below the untrained encoder's the features have lost what tells inputs apart, as far as a spectrum shows it.",
        (
            ("Content: correlation with the inputs' spectra", 1.2, "linear", (
                ("content/context", "context encoder", "blue", "-"), ("content", "target encoder", "orange", "-"),
                ("content/untrained", "untrained", "muted", "--"))),
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
            ("Predictor's skill: 0 is the best constant, 1 is perfect", 0.8, "linear", (("skill", "skill", "ink", "-"),)),
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
# The curve an event is drawn on. Probe events bound the shaded steps.
MARKED = {"loss_minimum": "loss", "discrepancy_valley": "discrepancy/visible", "variance_escape": "spread"}
SMALL: dict[str, Any] = {"fontsize": 8, "color": LIGHT["muted"]}


def phase_figure(records: list[Record], events: list[Record]) -> Figure:
    """The paper's figure 4 for this run: loss, probes, discrepancy, spread and drift over the steps."""
    return _figure(PANELS, records, events)


def detail_figures(records: list[Record]) -> dict[str, tuple[str, Figure]]:
    """{section: (what to read there, figure)}, of sections that the records have something for."""
    figures: dict[str, tuple[str, Figure]] = {}
    for title, (says, panels) in DETAILS.items():
        if any(values(records, line[0]) for panel in panels for line in panel[3]):
            figures[title] = (says, _figure(panels, records, []))
    for heading, says, prefixes in MAPS:
        prefix = next((p for p in prefixes if len(_complete_rows(records, _layers(records, p))) > 1), "")
        if prefix:
            figures[heading] = (says, _figure((), records, [], layers=prefix))
    return figures


def _figure(panels: Sequence[Panel], records: list[Record], events: list[Record], layers: str = "") -> Figure:
    panels = [panel for panel in panels if any(values(records, key) for key, *_ in panel[3])]
    names = _layers(records, layers) if layers else []
    rows = _complete_rows(records, names)
    heights = [height for _, height, *_ in panels] + [0.2 + 0.16 * len(names)] * (len(rows) > 1)
    figure = Figure(figsize=(6.4, 0.6 + 1.35 * sum(heights)), facecolor=LIGHT["paper"], layout="constrained")
    if not heights:
        figure.text(0.5, 0.5, "no records yet", ha="center", color=LIGHT["muted"])
        return figure
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax in axes:
        bare(ax)
    for ax, (title, height, scale, lines) in zip(axes, panels, strict=False):
        ax.set_title(title, loc="left", fontsize=9, color=LIGHT["ink"], fontweight="bold")
        _draw(ax, scale, lines, records, 1.1 * height)
        for event in events:
            if MARKED.get(event["kind"]) in [key for key, *_ in lines]:
                _mark(ax, values(records, MARKED[event["kind"]]), event)
        for start, stop in below(records, events):
            ax.axvspan(start, stop, color=LIGHT["band"], linewidth=0, zorder=0)
            if ax is axes[0]:
                where = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top"}
                ax.text((start + stop) / 2, 0.95, "features\nbelow untrained", **where, **SMALL)
    if len(rows) > 1:
        _draw_layers(axes[-1], rows[:: math.ceil(len(rows) / 200)], names, layers)
    axes[-1].set_xlabel("step", **SMALL)
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
    points = [(s, v) for s, v in points if v > 0 or scale == "linear"]
    return points[:: math.ceil(len(points) / MOST_POINTS) or 1] + points[-1:]


def _draw(ax: Axes, scale: str, lines: tuple[Line, ...], records: list[Record], inches: float) -> None:
    if scale == "log":
        log_axis(ax)
    ax.margins(x=0, y=0.15)
    ax.grid(axis="y", color=LIGHT["rule"], linewidth=0.6)
    ends = []
    for key, label, colour, style in lines:
        points = thinned(values(records, key), scale)
        ax.plot([s for s, _ in points], [v for _, v in points], style, color=LIGHT[colour], linewidth=1.4)
        ends += [(v, f"{label} {v:#.3g}".removesuffix("."), LIGHT[colour]) for _, v in points[-1:]]
    room = 0.12 if lines[0][0] in MARKED.values() else 0.0  # for the names of events on the floor
    label_ends(ax, ends, inches, room)


def literal(name: str) -> str:
    """A name from a file as matplotlib shall write it: `$...$` in it is no formula."""
    return name.replace("$", r"\$")


def label_ends(ax: Axes, ends: list[tuple[float, str, str]], inches: float, room: float = 0.0) -> None:
    """(value, text, colour) of each line: written at its right end, moved apart where they would touch.

    inches: height of the panel, about. room: share of it that is kept free below the lines.
    """
    up = ax.transScale
    low, high = (up.transform((0, y))[1] for y in ax.get_ylim())
    if room:
        low -= room * (high - low)
        ax.set_ylim(bottom=up.inverted().transform((0, low))[1])
    ends = sorted(((up.transform((0, v))[1] - low) / (high - low), text, colour) for v, text, colour in ends)
    at, gap = [height for height, *_ in ends], 0.15 / inches
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + gap)
    for i in reversed(range(len(at))):
        at[i] = min(at[i], at[i + 1] - gap if i + 1 < len(at) else 1.0)
    for y, (_, text, colour) in zip(at, ends, strict=True):
        ax.text(1.015, y, literal(text), transform=ax.transAxes, va="center", fontsize=8, color=colour)


def _mark(ax: Axes, points: list[tuple[int, float]], event: Record) -> None:
    """A dot on the curve, and its name on the floor of the panel, where no curve is."""
    if not points:
        return
    step, value = min(points, key=lambda point: abs(point[0] - event["step"]))
    across = ax.transLimits.transform((step, 1))[0]
    side = "left" if across < 0.6 else "right"  # beside its line, not across it
    ax.vlines(step, ax.get_ylim()[0], value, color=LIGHT["ink"], linewidth=0.7)
    ax.plot([step], [value], "o", color=LIGHT["ink"], markersize=4)
    ax.annotate(f"{literal(str(event['kind'])).replace('_', ' ')}, step {event['step']:,}", (step, 0.03), ha=side, va="bottom", fontsize=8,
                xycoords=ax.get_xaxis_transform(), xytext=(4 if side == "left" else -4, 0), textcoords="offset points",
                color=LIGHT["ink"])  # fmt: skip


def below(records: list[Record], events: list[Record]) -> list[tuple[int, int]]:
    """Steps during which the probes stood below the untrained encoder's, as the events have it."""
    turns = [e["step"] for e in events if e["kind"] in ("features_below_untrained", "features_recovered")]
    return list(zip(turns[::2], [*turns[1::2], records[-1]["step"]], strict=False))


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
