"""Documents from rows: `python -m benchmarks.table` fills the marked blocks of DOCUMENTS and draws the figures.

A block is what stands between `<!-- begin rows BENCH [METRIC ...] -->`, `<!-- begin newest BENCH METRIC ... of PROVIDER ...
-->` or `<!-- begin computed NAME -->` and `<!-- end -->`. The first is a table and a figure of the newest rows of each
device, shape and dtype; the second a short table of the CPU and of the GPU measured last; the third what a function in
`benchmarks/predict.py` computes. `--check` only says whether the documents are up to date.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks import predict, rows
from benchmarks.harness import render
from benchmarks.machine import ROOT
from benchmarks.rows import Row

DOCUMENTS = (
    "benchmarks/README.md", "benchmarks/GPU.md", "docs/data.md", "docs/performance.md", "docs/scaling.md",
    "kernels/fused_ema/README.md",
)  # fmt: skip
BLOCK = re.compile(r"<!-- begin (rows|newest|computed) ([^>]+?) -->\n(.*?)<!-- end -->", re.DOTALL)
# What a benchmark is about: this metric is drawn and shown with its spread.
HEADLINE = {
    "ema": "fraction_of_copy_bandwidth",
    "monitor": "overhead_fraction",
    "step": "ratio_to_ijepa",
    "data": "images_per_s",
    "parallel": "overhead_fraction",
    "checkpoint": "overhead_steps",
    "profile": "share_of_step",
    "mask_modes": "probe/target",
}
# By another command than `python -m benchmarks NAME`.
MEASURED_BY = {
    "profile": "python -m benchmarks.kernel_table --out benchmarks/results",
    "data_scale": "python -m benchmarks.imagenet_scale FOLDER",
    "mask_modes": "python benchmarks/mask_modes.py",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of the rows (%(default)s)")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose documents are filled (%(default)s)")
    parser.add_argument("--text", action="store_true", help="write nothing; print the headline of every benchmark")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is out of date")
    args = parser.parse_args(argv)
    found, stale = rows.read(args.results), []
    if args.text:
        print(text(found))
        return 0
    for name in DOCUMENTS:
        path = args.root / name
        if not path.exists():
            continue
        before = path.read_text()
        after = fill(before, found, path.parent, args.root)
        if after != before:
            stale.append(name)
            if not args.check:
                path.write_text(after)
    if args.check:
        print("".join(f"{name} is out of date; run python -m benchmarks.table\n" for name in stale), end="")
        return 1 if stale else 0
    drawn = draw(found, args.root / "benchmarks" / "figures")
    print(f"{len(found)} rows; wrote {', '.join([*stale, *drawn]) or 'nothing: all is up to date'}")
    return 0


def fill(text: str, found: list[Row], here: Path, root: Path) -> str:
    """A document with its blocks made anew. `here` is its folder, for the links to the figures."""

    def block(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        if kind == "computed":
            body = predict.BLOCKS[name]()
        elif kind == "newest":
            subject, _, providers = name.partition(" of ")
            bench, *metrics = subject.split()
            mine = newest_devices(r for r in found if r["bench"] == bench)
            mine = [r for r in mine if r["provider"] in ("machine", *providers.split()) or r["metric"] == "ceiling"]
            body = section(bench, mine, metrics, "")
        else:
            bench, *metrics = name.split()
            figures = os.path.relpath(root / "benchmarks" / "figures", here)
            body = section(bench, [r for r in found if r["bench"] == bench], metrics, figures)
        return f"<!-- begin {kind} {name} -->\n{body.strip()}\n<!-- end -->"

    return BLOCK.sub(block, text)


def text(found: list[Row]) -> str:
    """For a terminal: of every benchmark, shape and provider the time and the headline."""
    parts = []
    for bench, shape, dtype in dict.fromkeys((r["bench"], r["shape"], r["dtype"]) for r in found):
        wanted = ("ms", "images_per_s", "mfu_measured", "speedup", HEADLINE.get(bench, "ms"))
        mine = [r for r in found if (r["bench"], r["shape"], r["dtype"]) == (bench, shape, dtype)]
        mine = [r for r in mine if r["metric"] in wanted and r["provider"] != "machine"]
        if mine:
            parts.append(render(mine, f"{bench} {shape} {dtype}"))
    return "\n\n".join(parts)


def latest(found: Iterable[Row]) -> list[Row]:
    """Of each device, shape and dtype, the rows of the last run."""
    found = list(found)
    last: dict[tuple[str, str, str], str] = {}
    for row in found:
        key = (row["device"], row["shape"], row["dtype"])
        last[key] = max(last.get(key, ""), row["date"])
    return [r for r in found if r["date"] == last[r["device"], r["shape"], r["dtype"]]]


def newest_devices(found: Iterable[Row]) -> list[Row]:
    """The rows of the CPU that was measured last, and of the GPU (which has a driver)."""
    found = list(found)
    last: dict[bool, tuple[str, str]] = {}
    for row in found:
        kind = bool(row["driver"])
        last[kind] = max(last.get(kind, ("", "")), (row["date"], row["device"]))
    return [r for r in found if r["device"] == last[bool(r["driver"])][1]]


def section(bench: str, found: list[Row], metrics: list[str], figures: str) -> str:
    """Figure, caption and table of one benchmark, device by device, the newest first. `metrics`: only these, no figure."""
    found = latest(found)
    newest: dict[str, str] = {}
    for row in found:
        newest[row["device"]] = max(newest.get(row["device"], ""), row["date"])
    devices = sorted(newest, key=lambda device: (newest[device], device))
    parts = []
    for device in reversed(devices):
        mine = [r for r in found if r["device"] == device and (not metrics or r["metric"] in metrics)]
        if not mine:
            continue
        headline = HEADLINE.get(bench, "ms")
        if not metrics and any(r["metric"] == headline for r in mine):
            parts.append(f"![{bench}, {headline}, on {device}]({figures}/{figure_name(bench, device)})")
        parts += [caption([r for r in found if r["device"] == device]), table(mine, headline)]
    return (
        "\n\n".join(parts)
        or f"*No rows yet: `{MEASURED_BY.get(bench, f'python -m benchmarks {bench}')}` measures them.*"
    )


def caption(found: list[Row]) -> str:
    """Where, when and at which commit; how busy the machine was, and what it can do."""
    first = found[0]
    commits, dates = sorted({r["commit"] for r in found}), sorted({r["date"][:10] for r in found})
    text = f"**{first['device']}**, torch {first['torch']}"
    text += f", driver {first['driver']}, Triton {first['triton']}" if first["driver"] else ""
    text += f", commit {', '.join(commits)}, {' and '.join(dates)}."
    watched = {}
    for row in found:
        if row["provider"] == "machine" and not row["metric"].endswith("_cold"):
            watched.setdefault((row["metric"], row["unit"]), []).extend([float(row["p20"]), float(row["p80"])])
    for (metric, unit), values in watched.items():
        text += f" {metric.replace('_', ' ').capitalize()} {min(values):.4g} to {max(values):.4g}{'' if unit == '1' else ' ' + unit}."
    reached: dict[str, list[Row]] = {}
    for row in found:
        if row["metric"] == "ceiling":
            reached.setdefault(f"{row['provider']} {row['dtype']}", []).append(row)
    if reached:
        best = (max(group, key=lambda r: float(r["p50"])) for group in reached.values())
        text += " Ceilings: " + ", ".join(
            f"{name} {scaled(float(row['p50']), row['unit'])}" for name, row in zip(reached, best, strict=True)
        )
        text += "."
    return text


def table(found: list[Row], headline: str) -> str:
    """A Markdown table of medians: a line a provider and shape, a column a metric; the headline with p20 and p80."""
    found = [r for r in found if r["provider"] != "machine" and not r["metric"].startswith("ceiling")]
    metrics = list(dict.fromkeys((r["metric"], r["unit"]) for r in found))
    value = {(r["shape"], r["dtype"], r["provider"], r["metric"]): r for r in found}
    names = [metric if unit in ("1", metric) else f"{metric}, {unit}" for metric, unit in metrics]
    lines = ["| " + " | ".join(["shape", "dtype", "provider", *names]) + " |", "|---|---|---|" + "---:|" * len(names)]
    for shape, dtype, provider in dict.fromkeys(key[:3] for key in value):
        cells = []
        for metric, _ in metrics:
            row = value.get((shape, dtype, provider, metric))
            spread = f" ({short(row['p20'])} to {short(row['p80'])})" if row and metric == headline else ""
            cells.append(short(row["p50"]) + spread if row else "")
        lines.append(f"| {shape} | {dtype} | {provider} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short(number: str) -> str:
    """Three significant digits, without an exponent where that is readable."""
    value = float(number)
    return (
        f"{value:.3g}"
        if 1e-4 <= abs(value) < 1e3 or not value
        else f"{value:,.0f}"
        if abs(value) >= 1
        else f"{value:.1e}"
    )


def scaled(value: float, unit: str) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


# ---- figures -------------------------------------------------------------------------------------------


def figure_name(bench: str, device: str) -> str:
    return f"{bench}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.svg"


def draw(found: list[Row], folder: Path) -> list[str]:
    """One figure a benchmark and device: its headline by provider, a panel a shape. Returns the names of changed files."""
    written = []
    for bench, device in dict.fromkeys((r["bench"], r["device"]) for r in found):
        headline = HEADLINE.get(bench, "ms")
        mine = [r for r in found if (r["bench"], r["device"]) == (bench, device)]
        shown = [r for r in latest(mine) if r["metric"] == headline and r["provider"] != "machine"]
        if not shown:
            continue
        path = folder / figure_name(bench, device)
        before = path.read_bytes() if path.exists() else b""
        folder.mkdir(parents=True, exist_ok=True)
        bars(shown, f"{bench} on {device}", headline, path)
        if path.read_bytes() != before:
            written.append(path.name)
    return written


def bars(shown: list[Row], title: str, metric: str, path: Path) -> None:
    """Medians as bars with p20 to p80 as whiskers. The same rows give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[Row]] = {}
    for row in shown:
        panels.setdefault(f"{row['shape']} {row['dtype']}", []).append(row)
    heights = [len(panel) for panel in panels.values()]
    with plt.rc_context({"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(7.5, 0.9 + 0.6 * len(panels) + 0.22 * sum(heights)), squeeze=False,
            height_ratios=heights, layout="constrained", sharex=metric not in ("ms", "images_per_s"),
        )  # fmt: skip
        for axis, (name, panel) in zip(axes[:, 0], panels.items(), strict=True):
            low, mid, high = ([float(r[q]) for r in panel] for q in ("p20", "p50", "p80"))
            whiskers = [[m - x for m, x in zip(mid, low, strict=True)], [x - m for m, x in zip(mid, high, strict=True)]]
            axis.barh([r["provider"] for r in panel], mid, xerr=whiskers, color="#4878a8", ecolor="#303030", capsize=2)
            axis.invert_yaxis()
            axis.set_title(name, loc="left", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
        axes[-1, 0].set_xlabel(metric + ("" if shown[0]["unit"] in ("1", metric) else f" ({shown[0]['unit']})"))
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
