"""Figures 1 to 5 of the paper, from run folders. In: runs. Out: matplotlib figures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jepa_fast.errors import UsageError
from jepa_fast.report.bands import KINDS, bands, shade
from jepa_fast.report.compare import Compared, order, smooth
from jepa_fast.report.figure import LIGHT, SMALL, bare, label_ends, literal, log_axis, settle, svg, thinned
from jepa_fast.report.logs import last_of, looks, values

CAPTIONS = {
    1: "The collapse phase: training loss and linear probe of one run",
    2: "Training loss of several runs, the early phase enlarged",
    3: "The phase on several data sets: training loss and linear probe",
    4: "The collapse hypothesis: loss, probe, discrepancy",
    5: "A hyperparameter's effect on loss and probe",
}
HUES = ("blue", "orange", "green", "purple", "ink", "muted")
Curve = tuple[str, str, str]  # label, colour, style
LABEL, TITLE = 22, 46  # most characters of a run's name beside its curve, above its panel


def figure(number: int, runs: Sequence[Compared]) -> Figure:
    """Raises UsageError on a number the paper has not, or too many runs for it."""
    if number not in CAPTIONS:
        raise UsageError(f"--figure {number}: the paper has figures 1 to 5")
    if not runs:
        raise UsageError(f"--figure {number} needs the folder of a run")
    if number in (1, 4) and len(runs) > 1:
        raise UsageError(f"figure {number} shows one run, and {len(runs)} were given; figures 2, 3 and 5 show several")
    drawn = {1: _one, 2: _losses, 3: _losses_and_probes, 4: _hypothesis, 5: _sensitivity}[number](runs)
    settle(drawn)
    return drawn


def write(number: int, runs: Sequence[Compared], stem: Path) -> Path:
    """Write <stem>.png and <stem>.svg; the path of the first."""
    drawn = figure(number, runs)
    drawing = svg(drawn)
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(stem.with_name(stem.name + ".png"), dpi=160)
        stem.with_name(stem.name + ".svg").write_text(drawing, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {stem}.png ({error.strerror}); give another --out") from None
    return stem.with_name(stem.name + ".png")


# ---- the five -------------------------------------------------------------------------------------


def _one(runs: Sequence[Compared]) -> Figure:
    drawn, (left, right) = _canvas(1, 2)
    _loss(left, runs[0], [("loss", "ink", "-")], inset=True)
    _probe(right, runs[0])
    _shade(runs[0], left, right)
    return drawn


def _losses(runs: Sequence[Compared]) -> Figure:
    columns = min(2, len(runs))
    drawn, axes = _canvas(-(-len(runs) // columns), columns)
    for ax, run in zip(axes, runs, strict=False):
        _loss(ax, run, [("", "ink", "-")], inset=True)
        ax.set_title(_shortened([run.label], TITLE)[0], loc="left", fontsize=9, color=LIGHT["ink"], fontweight="bold")
        _shade(run, ax)
    for ax in axes[len(runs) :]:
        ax.set_axis_off()
    return drawn


def _losses_and_probes(runs: Sequence[Compared]) -> Figure:
    drawn, (left, right) = _canvas(1, 2)
    _many(left, right, runs, _hues(len(runs)))
    return drawn


def _hypothesis(runs: Sequence[Compared]) -> Figure:
    drawn, (left, middle, right) = _canvas(1, 3)
    run = runs[0]
    _loss(left, run, [("loss", "ink", "-")])
    _probe(middle, run)
    right.set_title("Discrepancy C", loc="left", fontsize=9, color=LIGHT["ink"], fontweight="bold")
    log_axis(right)
    keys = (("discrepancy/visible", "visible", "green"), ("discrepancy/full", "whole", "blue"))
    _lines(right, [(values(run.records, key), (label, colour, "-")) for key, label, colour in keys], "log")
    _shade(run, left, middle, right)
    return drawn


def _sensitivity(runs: Sequence[Compared]) -> Figure:
    runs = sorted(runs, key=order)
    drawn, (left, right) = _canvas(1, 2, height=3.6)
    _many(left, right, runs, _ordered_hues(len(runs)))
    return drawn


# ---- pieces ---------------------------------------------------------------------------------------


def _canvas(rows: int, columns: int, height: float = 2.8) -> tuple[Figure, list[Axes]]:
    drawn = Figure(figsize=(4.6 * columns, height * rows), facecolor=LIGHT["paper"], layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in axes:
        bare(ax)
        ax.grid(axis="y", color=LIGHT["rule"], linewidth=0.6)
        ax.margins(x=0, y=0.1)
        ax.set_xlabel("step", **SMALL)
    return drawn, axes


def _lines(ax: Axes, lines: list[tuple[list[tuple[int, float]], Curve]], scale: str, early: int = 0) -> None:
    """Curves with their names at the right end; `early` above 0: the steps around it enlarged in an inset."""
    ends = []
    for points, (label, colour, style) in lines:
        points = thinned(points, scale)
        shade = LIGHT.get(colour, colour)
        ax.plot([s for s, _ in points], [v for _, v in points], style, color=shade, linewidth=1.4)
        ends += [(value, label, shade) for _, value in points[-1:] if label]
    if early and any(points for points, _ in lines):
        _inset(ax, lines, early)
    label_ends(ax, ends)


def _loss(ax: Axes, run: Compared, curves: list[Curve], inset: bool = False) -> None:
    ax.set_title("Training loss", loc="left", fontsize=9, color=LIGHT["ink"], fontweight="bold")
    log_axis(ax)
    points = values(run.records, "loss")
    _lines(ax, [(points, curves[0])], "log", early=_bottom(run) if inset else 0)


def _probe(ax: Axes, run: Compared) -> None:
    ax.set_title("Linear probe, accuracy", loc="left", fontsize=9, color=LIGHT["ink"], fontweight="bold")
    keys = (("context", "context", "blue", "-"), ("target", "target", "orange", "-"),
            ("untrained", "untrained", "muted", "--"), ("majority", "majority", "muted", ":"))  # fmt: skip
    _lines(ax, [(values(run.records, f"probe/{key}"), (label, colour, style)) for key, label, colour, style in keys], "linear")  # fmt: skip


def _many(left: Axes, right: Axes, runs: Sequence[Compared], hues: list[str]) -> None:
    left.set_title("Training loss", loc="left", fontsize=9, color=LIGHT["ink"], fontweight="bold")
    right.set_title("Linear probe of the better encoder", loc="left", fontsize=9, color=LIGHT["ink"], fontweight="bold")
    log_axis(left)
    curves: list[Curve] = [(label, hue, "-") for label, hue in zip(_shortened([r.label for r in runs], LABEL), hues, strict=True)]  # fmt: skip
    losses = [(smooth(values(run.records, "loss"), 0.005), curve) for run, curve in zip(runs, curves, strict=True)]
    early = max((_bottom(run) for run in runs), default=0)
    _lines(left, losses, "log", early if len(runs) > 1 else 0)
    probes = [
        ([(k.step, k.probes[k.better]) for k in looks(run.records)], curve)
        for run, curve in zip(runs, curves, strict=True)
    ]
    baselines = {round(values(run.records, "probe/untrained")[-1][1], 4) for run in runs if values(run.records, "probe/untrained")}  # fmt: skip
    if len(baselines) == 1:
        probes.append((values(runs[0].records, "probe/untrained"), ("untrained", "muted", "--")))
    _lines(right, probes, "linear")
    _strips((left, right), runs, hues)


def _shortened(labels: list[str], most: int) -> list[str]:
    """Long names without their middle, numbered where that leaves them alike, or they would take the curves' room."""
    cut = [name if len(name) <= most else f"{name[: most - most // 3 - 1]}…{name[-(most // 3) :]}" for name in labels]
    return [literal(f"{i}: {name}" if cut.count(name) > 1 else name) for i, name in enumerate(cut, start=1)]


def _bottom(run: Compared) -> int:
    """Step of the loss minimum, as called or as it is."""
    called = last_of("loss_minimum", run.events)
    points = smooth(values(run.records, "loss"))
    return called["step"] if called else min(points, key=lambda p: p[1])[0] if points else 0


def _inset(ax: Axes, lines: list[tuple[list[tuple[int, float]], Curve]], bottom: int) -> None:
    """The early phase, up to half as far again as the loss minimum, in room that is made for it above the curves."""
    last = max(points[-1][0] for points, _ in lines if points)
    if not 0 < bottom * 1.5 < 0.7 * last:
        return
    later = [v for points, _ in lines for s, v in points if s > 0.3 * last and v > 0]
    low, high = ax.get_ylim()
    room = low * (1.15 * max(later) / low) ** (1 / 0.55)  # a logarithmic axis: what is later stays below 55 %
    ax.set_ylim(low, max(high, room))
    small = ax.inset_axes((0.4, 0.6, 0.58, 0.37))
    small.set_facecolor(LIGHT["paper"])
    small.spines[:].set_color(LIGHT["rule"])
    small.tick_params(colors=LIGHT["muted"], labelsize=6, length=0, pad=1)
    for points, (_, colour, style) in lines:
        early = [(s, v) for s, v in points if s <= 1.5 * bottom and v > 0]
        small.plot([s for s, _ in early], [v for _, v in early], style, color=LIGHT.get(colour, colour), linewidth=1)
    log_axis(small)
    small.set_xticks([0, round(1.5 * bottom)])


def _shade(run: Compared, *axes: Axes) -> None:
    """The collapse phase; its name stands under the first panel."""
    found = bands(run.records, run.events)
    for ax in axes:
        shade(ax, found, LIGHT)
    names = list(dict.fromkeys(KINDS[band.kind][0] for band in found))
    axes[0].set_xlabel("step" + (f"; shaded: {', '.join(names)}" if names else ""), **SMALL)


def _strips(axes: Sequence[Axes], runs: Sequence[Compared], hues: list[str]) -> None:
    """The collapse phase of each run, as a bar in its colour below the curves. Of one run it is shaded."""
    if len(runs) == 1:
        return _shade(runs[0], *axes)
    found = [[band for band in bands(run.records, run.events) if "collapse" in band.kind] for run in runs]
    if not any(found):
        return None
    for ax in axes:
        low, high = (ax.transScale.transform((0, y))[1] for y in ax.get_ylim())
        room = min(0.25, 0.04 * len(runs)) * (high - low)
        ax.set_ylim(bottom=ax.transScale.inverted().transform((0, low - room))[1])
        share = room / (high - low + room)
        for i, (of, hue) in enumerate(zip(found, hues, strict=True)):
            y = share * (len(runs) - i - 0.5) / len(runs)
            for band in of:
                ax.plot([band.start, band.stop], [y, y], color=hue, linewidth=2.5, transform=ax.get_xaxis_transform(),
                        solid_capstyle="butt", alpha=0.5 if band.kind.startswith("probably") else 1)  # fmt: skip
    estimated = any(band.kind.startswith("probably") for of in found for band in of)
    axes[0].set_xlabel(f"step; bars: {'collapse phase (pale: estimated)' if estimated else 'collapse phase'}", **SMALL)
    return None


def _hues(count: int) -> list[str]:
    return [LIGHT[HUES[i]] for i in range(count)] if count <= len(HUES) else _ordered_hues(count)


def _ordered_hues(count: int) -> list[str]:
    """Dark to bright, so that the order is read without colours; the palest end is left out."""
    ramp = matplotlib.colormaps["plasma"]
    return [matplotlib.colors.to_hex(ramp(0.82 * i / max(1, count - 1))) for i in range(count)]
