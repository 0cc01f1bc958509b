"""The figure of a run, after the paper's figure 4. In: records and events. Out: a matplotlib figure."""

import io
import math

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

# title, height, scale, lines: (key, label, colour, style)
PANELS = (
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
# The curve an event is drawn on. Probe events bound the shaded steps.
MARKED = {"loss_minimum": "loss", "discrepancy_valley": "discrepancy/visible", "variance_escape": "spread"}
SMALL = {"fontsize": 8, "color": LIGHT["muted"]}


def phase_figure(records: list[Record], events: list[Record]) -> Figure:
    """The paper's figure 4 for this run: loss, probes, discrepancy, spread and drift over the steps."""
    panels = [panel for panel in PANELS if any(values(records, key) for key, *_ in panel[3])]
    layers = sorted({k for r in records for k in r if k.startswith("drift/")} - {"drift/total"}, reverse=True)
    rows = [r for r in records if layers and all((phase.number(r.get(k)) or 0) > 0 for k in layers)]
    heights = [height for _, height, *_ in panels] + [0.2 + 0.16 * len(layers)] * (len(rows) > 1)
    figure = Figure(figsize=(6.4, 0.6 + 1.35 * sum(heights)), facecolor=LIGHT["paper"], layout="constrained")
    if not panels:
        figure.text(0.5, 0.5, "no records yet", ha="center", color=LIGHT["muted"])
        return figure
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax in axes:
        ax.set_facecolor("none")
        ax.spines[:].set_visible(False)
        ax.tick_params(colors=LIGHT["muted"], labelsize=8, length=0)
    for ax, (title, _, scale, lines) in zip(axes, panels, strict=False):
        ax.set_title(title, loc="left", fontsize=9, color=LIGHT["ink"], fontweight="bold")
        _draw(ax, scale, lines, records)
        for event in events:
            if MARKED.get(event["kind"]) in [key for key, *_ in lines]:
                _mark(ax, values(records, MARKED[event["kind"]]), event)
        for start, stop in _below(records, events):
            ax.axvspan(start, stop, color=LIGHT["band"], linewidth=0, zorder=0)
            if ax is axes[0]:
                where = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top"}
                ax.text((start + stop) / 2, 0.95, "target probe\nbelow untrained", **where, **SMALL)
    if len(rows) > 1:
        _draw_layers(axes[-1], rows[:: math.ceil(len(rows) / 200)], layers)
    axes[-1].set_xlabel("step", **SMALL)
    return figure


def _draw(ax: Axes, scale: str, lines: tuple[tuple[str, str, str, str], ...], records: list[Record]) -> None:
    ax.set_yscale(scale)
    if scale == "log":
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    ax.margins(x=0, y=0.15)
    ax.grid(axis="y", color=LIGHT["rule"], linewidth=0.6)
    ends = []
    for key, label, colour, style in lines:
        points = [(s, v) for s, v in values(records, key) if v > 0 or scale == "linear"]
        points = points[:: math.ceil(len(points) / MOST_POINTS) or 1] + points[-1:]
        ax.plot([s for s, _ in points], [v for _, v in points], style, color=LIGHT[colour], linewidth=1.4)
        ends += [(value, f"{label} {value:#.3g}", LIGHT[colour]) for _, value in points[-1:]]
    up = ax.transScale
    low, high = (up.transform((0, y))[1] for y in ax.get_ylim())
    if lines[0][0] in MARKED.values():  # room for the names of events on the floor
        low -= 0.12 * (high - low)
        ax.set_ylim(bottom=up.inverted().transform((0, low))[1])
    _label_ends(ax, sorted(((up.transform((0, v))[1] - low) / (high - low), text, c) for v, text, c in ends))


def _label_ends(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """(height 0 to 1, text, colour) of each line, low to high: written at its right end, moved apart where they touch."""
    at = [height for height, *_ in ends]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + 0.12)
    for i in reversed(range(len(at))):
        at[i] = min(at[i], at[i + 1] - 0.12 if i + 1 < len(at) else 1.0)
    for y, (_, text, colour) in zip(at, ends, strict=True):
        ax.text(1.015, y, text, transform=ax.transAxes, va="center", fontsize=8, color=colour)


def _mark(ax: Axes, points: list[tuple[int, float]], event: Record) -> None:
    """A dot on the curve, and its name on the floor of the panel, where no curve is."""
    if not points:
        return
    step, value = min(points, key=lambda point: abs(point[0] - event["step"]))
    across = ax.transLimits.transform((step, 1))[0]
    side = "left" if across < 0.2 else "right" if across > 0.8 else "center"
    ax.vlines(step, ax.get_ylim()[0], value, color=LIGHT["ink"], linewidth=0.7)
    ax.plot([step], [value], "o", color=LIGHT["ink"], markersize=4)
    ax.text(step, 0.03, f" {event['kind'].replace('_', ' ')}, step {event['step']:,} ", transform=ax.get_xaxis_transform(), ha=side,
            va="bottom", fontsize=8, color=LIGHT["ink"])  # fmt: skip


def _below(records: list[Record], events: list[Record]) -> list[tuple[int, int]]:
    """Steps during which the target probe stood below the untrained encoder's, as the events have it."""
    turns = [e["step"] for e in events if e["kind"] in ("features_below_untrained", "features_recovered")]
    return list(zip(turns[::2], [*turns[1::2], records[-1]["step"]], strict=False))


def _draw_layers(ax: Axes, rows: list[Record], layers: list[str]) -> None:
    values = [[row[key] for row in rows] for key in layers]
    low, high = min(map(min, values)), max(map(max, values))
    title = f"Drift by layer, from {low:.2g} (dark) to {high:.2g} (light)"
    ax.set_title(title, loc="left", fontsize=9, color=LIGHT["ink"], fontweight="bold")
    ax.pcolormesh([row["step"] for row in rows], range(len(layers)), values, norm=LogNorm(low, high), cmap="cividis",
                  shading="nearest", rasterized=True)  # fmt: skip
    ax.set_yticks(range(len(layers)), [key.removeprefix("drift/") for key in layers])


def svg(figure: Figure) -> str:
    """The figure as SVG, its text as text, the same each time."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "phase"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
