"""A run in plain words and pictures: `python -m jepa_fast.report [RUN_DIR]`.

In: metrics.jsonl, events.jsonl and config.json of a run folder, finished or not. Out: report.html, one file that works
offline, and its figure as phase.png and phase.svg. Nothing here calls a run collapsed by its loss or its discrepancy.
"""

import io
import math
import sys
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from jepa_fast import rundir
from jepa_fast.config import Config, flatten
from jepa_fast.data.embedded import SETS
from jepa_fast.errors import UsageError, one_line_errors
from jepa_fast.log import read
from jepa_fast.monitor import phase

Record = dict[str, Any]

USAGE = """usage: python -m jepa_fast.report [RUN_DIR]

Writes report.html, phase.png and phase.svg into the run folder.
Without RUN_DIR: the run under runs/ that wrote last."""

# ---- the verdict ----------------------------------------------------------------------------------

# (loss minimum, features below untrained, features recovered since): what it means
MEANING = {
    (1, 1, 1): "This is the collapse phase and its end: the features got worse while the loss fell, and better while it rose.",
    (1, 1, 0): "The features are worse than at the start. The loss has risen again, but that alone is no recovery: this is the collapse phase, not yet its end.",
    (1, 0, 0): "The loss has the shape of the collapse phase, but by the probe the features never fell below the untrained encoder's, so there was none.",
    (0, 1, 1): "The features dipped and came back without a rise of the loss: half of the pattern.",
    (0, 1, 0): "The features are worse than at the start while the loss looks well: this is how the collapse phase begins.",
    (0, 0, 0): "The pattern of the collapse phase does not appear up to here.",
}  # fmt: skip


def verdict(records: list[Record], events: list[Record], description: str) -> str:
    """A few sentences: what the loss did, what the probe says, what it means, what to do next."""
    levels = list(phase.levels(phase.series(records, "loss")))
    if len(levels) < 5:
        said = [f"Too short to say: {len(levels)} records with a loss. Train longer, or lower --log.every."]
    else:
        said = [_on_loss(levels, events), *_on_probe(records, events)]
    if "synthetic" in description:
        said.append("The data are synthetic: the run illustrates the phase, it is no evidence for other data.")
    return " ".join(said)


def _on_loss(levels: list[phase.Level], events: list[Record]) -> str:
    called, last = _last_of("loss minimum", events), levels[-1]
    if called:
        times = math.exp(last.log - min(levels, key=lambda level: abs(level.step - called["step"])).log)
        return f"The loss was lowest at step {called['step']:,} of {last.called:,}; at the end it is {times:.1f} times that."
    times = math.exp(last.log - min(level.log for level in levels))
    return f"Up to step {last.called:,} the loss shows no minimum followed by a lasting rise; it is {times:.2f} times its lowest."


def _on_probe(records: list[Record], events: list[Record]) -> list[str]:
    kinds = ("loss minimum", "features below untrained", "features recovered")
    bottomed, below, back = (_last_of(kind, events) for kind in kinds)
    target, untrained, majority = (_values(records, f"probe/{name}") for name in ("target", "untrained", "majority"))
    if not target or not untrained:
        alarm = ": a loss minimum is the alarm of the collapse phase, no proof of it" if bottomed else ""
        return [f"There is no probe, so nothing says how good the features are{alarm}.", "Next: give labelled data."]
    recovered = below is not None and back is not None and back["step"] > below["step"]
    said = f"A linear probe on the target encoder ends at {target[-1][1]:.3f}; the untrained encoder has {untrained[-1][1]:.3f}"
    said += f", always naming the most common class {majority[-1][1]:.3f}." if majority else "."
    if below:
        said += f" It was below the untrained encoder from step {below['step']:,}"
        said += (
            f", and above it again from step {back['step']:,}." if back and recovered else ", and has not come back."
        )
    means = MEANING[bool(bottomed), below is not None, recovered]
    return [said, means, _next(target, untrained[-1][1], bool(below) and not recovered)]


def _next(target: list[tuple[int, float]], untrained: float, down: bool) -> str:
    step, best = max(target, key=lambda point: point[1])
    if down:
        return "Next: train on (--resume --train.steps N) and go by the probe, not by the loss; if it stays down, try a larger --ema.decay."
    if target[-1][1] - untrained < phase.PROBE_MARGIN:
        return "The features are no better than an untrained encoder's. Next: train longer, and go by the probe, not by the loss."
    if best - target[-1][1] > phase.PROBE_MARGIN:
        return f"Next: the probe was best at step {step:,} ({best:.3f}); keep checkpoints (--checkpoint.every, --checkpoint.keep 0) and choose by the probe, not by the loss."
    return "Next: use the last checkpoint, not the one of the lowest loss; the probe is about as good as it has been."


def _values(records: list[Record], key: str) -> list[tuple[int, float]]:
    """(step, value) of the records that have one."""
    pairs = ((r["step"], phase.number(r.get(key))) for r in records if phase.number(r.get("step")) is not None)
    return [(int(step), value) for step, value in pairs if value is not None]


def _last_of(kind: str, events: list[Record]) -> Record | None:
    return next((e for e in reversed(events) if e["kind"] == kind), None)


# ---- the figure -----------------------------------------------------------------------------------

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
MARKED = {"loss minimum": "loss", "discrepancy valley": "discrepancy/visible", "variance escape": "spread"}
SMALL = {"fontsize": 8, "color": LIGHT["muted"]}


def phase_figure(records: list[Record], events: list[Record]) -> Figure:
    """The paper's figure 4 for this run: loss, probes, discrepancy, spread and drift over the steps."""
    panels = [panel for panel in PANELS if any(_values(records, key) for key, *_ in panel[3])]
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
                _mark(ax, _values(records, MARKED[event["kind"]]), event)
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
        points = [(s, v) for s, v in _values(records, key) if v > 0 or scale == "linear"]
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
    ax.text(step, 0.03, f" {event['kind']}, step {event['step']:,} ", transform=ax.get_xaxis_transform(), ha=side,
            va="bottom", fontsize=8, color=LIGHT["ink"])  # fmt: skip


def _below(records: list[Record], events: list[Record]) -> list[tuple[int, int]]:
    """Steps during which the target probe stood below the untrained encoder's, as the events have it."""
    turns = [e["step"] for e in events if e["kind"] in ("features below untrained", "features recovered")]
    return list(zip(turns[::2], [*turns[1::2], records[-1]["step"]], strict=False))


def _draw_layers(ax: Axes, rows: list[Record], layers: list[str]) -> None:
    values = [[row[key] for row in rows] for key in layers]
    low, high = min(map(min, values)), max(map(max, values))
    title = f"Drift by layer, from {low:.2g} (dark) to {high:.2g} (light)"
    ax.set_title(title, loc="left", fontsize=9, color=LIGHT["ink"], fontweight="bold")
    ax.pcolormesh([row["step"] for row in rows], range(len(layers)), values, norm=LogNorm(low, high), cmap="cividis",
                  shading="nearest", rasterized=True)  # fmt: skip
    ax.set_yticks(range(len(layers)), [key.removeprefix("drift/") for key in layers])


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "phase"}
    ):  # text as text, and the same each time
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


# ---- the page -------------------------------------------------------------------------------------

CLAIMS = """<h2>What is measured beside what is claimed</h2>
<ul>
<li><b>A low loss is the alarm</b>, and a loss that rises again is often the recovery. Only a probe tells.</li>
<li><b>A small discrepancy is neither necessary nor sufficient</b> for useless features. It is small before the first
step, has a valley near the loss minimum in runs that dip, and can end below that valley with the best features. Its
shape is reported; its level decides nothing.</li>
<li><b>The bound γ</b> (theorem 4.2, proposition 4.4) is an upper bound. It cannot show that the discrepancy is small, so
it is not used.</li>
<li><b>Corollary 4.3</b> says that a larger decay β reduces the discrepancy. The identity behind it,
θ<sub>t</sub> − θ̄<sub>t</sub> = βΔ<sub>t</sub> − (1−β) Σ β<sup>t−l</sup> Δ<sub>l</sub>, gives the opposite for weights
that move steadily: 0 at β = 0 and all of ‖Δ<sub>t</sub>‖ at β = 1. The drift above is measured: compare runs.</li>
</ul>"""

CSS = f""":root{{{"".join(f"--{name}:{light};" for name, (light, _) in COLOURS.items())}color-scheme:light dark}}
@media(prefers-color-scheme:dark){{:root{{{"".join(f"--{name}:{dark};" for name, (_, dark) in COLOURS.items())}}}}}
body{{background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif;max-width:46rem;margin:0 auto;padding:2rem 1rem}}
h1{{font-size:1.5rem;margin:0}}h2{{font-size:1.1rem;margin:2.5rem 0 .5rem}}.quiet{{color:var(--muted);margin:.2rem 0}}
.verdict{{font-size:1.1rem;border-left:4px solid var(--orange);padding-left:1rem;margin:1.5rem 0}}details{{margin-top:2.5rem}}
.wide{{overflow-x:auto}}svg{{width:100%;min-width:30rem;height:auto}}svg text{{font-family:system-ui,sans-serif!important}}
table{{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}}th{{color:var(--muted)}}
td,th{{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--rule);font-weight:400}}"""

NUMBERS = {
    "loss": "training loss", "probe/target": "probe, target encoder", "probe/context": "probe, context encoder",
    "discrepancy/visible": "discrepancy, visible tokens", "discrepancy/full": "discrepancy, whole inputs",
    "discrepancy/relative": "visible / spread", "spread": "instance spread", "skill": "predictor skill",
    "drift/total": "drift ‖θ − θ̄‖", "rankme": "RankMe, target encoder", "images_per_s": "samples per second",
}  # fmt: skip


def write(run_dir: Path) -> Path:
    """Write report.html, phase.png and phase.svg into the run folder; the path of the first. Raises UsageError."""
    records = [
        r for r in read(run_dir / "metrics.jsonl") if isinstance(r, dict) and phase.number(r.get("step")) is not None
    ]
    events = [e for e in read(run_dir / "events.jsonl") if isinstance(e, dict) and "kind" in e and "step" in e]
    if not any("evidence" in e for e in events):  # another project's log, which has none
        events += [asdict(event) for event in phase.detect(records)]
    figure, page = phase_figure(records, events), run_dir / "report.html"
    svg = _svg(figure)
    try:
        figure.savefig(run_dir / "phase.png", dpi=160)
        (run_dir / "phase.svg").write_text(svg)
        page.write_text(_page(run_dir, records, events, svg))
    except OSError as error:
        raise UsageError(f"cannot write the report to {run_dir} ({error.strerror}); make it writable") from None
    return page


def _page(run_dir: Path, records: list[Record], events: list[Record], svg: str) -> str:
    try:
        config, trouble = rundir.saved_config(run_dir), "No config.json here."
    except UsageError as error:
        config, trouble = None, str(error)
    told, name, description = (
        [e for e in events if "evidence" in e],
        escape(run_dir.resolve().name),
        _description(config),
    )
    for colour, (light, _) in COLOURS.items():  # the page's own colours, so that the figure follows light and dark
        svg = svg.replace(light, f"var(--{colour})")
    facts = [
        (f"{e['step']:,}", e["kind"], f"{e['called_at']:,}", e["confidence"], "; ".join(e["evidence"])) for e in told
    ]
    settings = list(flatten(config).items()) if config else []
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{name}</title><style>{CSS}</style></head><body>
<h1>{name}</h1><p class="quiet">{escape(description)}</p><p class="quiet">{_progress(records, config)}</p>
<p class="verdict">{escape(verdict(records, told, description))}</p>
<div class="wide">{svg[svg.index("<svg") :]}</div>
<h2>Events</h2>{_table(("step", "event", "called at", "confidence", "evidence"), facts, "None so far.")}
<p class="quiet">Each states a fact about one curve, by what was known when it was called. Confidence is the chance that
it is no accident of noise; it does not say that anything is wrong.</p>
<h2>Key numbers</h2>{_table(("", "start", "lowest", "at step", "at loss minimum", "end"), _numbers(records, told), "None yet.")}
{CLAIMS}
<h2>Skipped steps, bad samples, resumes</h2>{_table(("step", "event", "details"), _incidents(events), "None.")}
<details><summary>Settings</summary>{_table(("field", "value"), settings, trouble)}</details>
</body></html>
"""


def _description(config: Config | None) -> str:
    if config is None:
        return ""
    data = config.data
    made = SETS[data.embedded].description if not data.path and data.embedded in SETS else ""
    return f"{config.preset}: {made or f'data of {data.path}'}"


def _progress(records: list[Record], config: Config | None) -> str:
    step, steps = records[-1]["step"] if records else 0, config.train.steps if config else 0
    return f"Step {step:,} of {steps:,}: in progress, or stopped." if step < steps else f"{step:,} steps."


def _numbers(records: list[Record], events: list[Record]) -> list[Any]:
    bottom, rows = _last_of("loss minimum", events), []
    for key, name in NUMBERS.items():
        if points := _values(records, key):
            step, lowest = min(points, key=lambda point: point[1])
            there = min(points, key=lambda p: abs(p[0] - bottom["step"]))[1] if bottom else math.nan
            start, low, middle, end = (f"{value:.3g}" for value in (points[0][1], lowest, there, points[-1][1]))
            rows.append((name, start, low, f"{step:,}", middle.replace("nan", ""), end))
    return rows


def _incidents(events: list[Record]) -> list[Any]:
    """Events that are no phase event, the last 50."""
    rows = []
    for event in (e for e in events if "evidence" not in e):
        details = ", ".join(f"{key}: {value}" for key, value in event.items() if key not in ("kind", "step"))
        rows.append((f"{event['step']:,}", event["kind"].replace("_", " "), details))
    return rows[-50:]


def _table(head: tuple[str, ...], rows: list[Any], empty: str) -> str:
    if not rows:
        return f"<p>{escape(empty)}</p>"
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>\n{body}</table></div>'


# ---- the command ----------------------------------------------------------------------------------


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(args):
        print(USAGE)
        return 0
    if len(args) > 1 or (args and args[0].startswith("-")):
        raise UsageError(f"unexpected {args[-1]}; give one run folder, as in python -m jepa_fast.report runs/demo-1")
    files = [Path(args[0]) / "metrics.jsonl"] if args else list(Path("runs").glob("*/metrics.jsonl"))
    files = sorted((file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime)
    if not files:
        place = f"{args[0]} holds" if args else "the folders under runs/ hold"
        raise UsageError(f"{place} no metrics.jsonl; give a run folder, or start a run with python -m jepa_fast.train")
    print(f"report: {write(files[-1].parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
