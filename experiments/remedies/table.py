"""The trial's tables from rows.jsonl: `python experiments/remedies/table.py [--grid remedies]`. README.md has the statistic.

With --write: all that there are, into results.md between its marks.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

ROWS = Path(__file__).parent / "rows.jsonl"
RESULTS = Path(__file__).parent / "results.md"
TUNED_ON = "FordA"
LOOK, DRAWS = 50, 2000
BASE = {"remedies": "paper", "images": "paper", "beta": "beta=0.996", "ratio": "ratio=0.7"}
Row = dict[str, Any]
Pairs = dict[str, np.ndarray]  # set -> a number for each seed


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def ended(row: Row) -> float:
    """Step of the end; of a run without one its last step and a look."""
    return row["end"] if row["end"] is not None else row["steps"] + LOOK


def better(row: Row, when: str) -> float:
    return max(row[when].values())


def paired(rows: list[Row], remedy: str, base: str) -> dict[str, Pairs]:
    """{outcome: {set: per seed, against the base on the same set and seed}}."""
    held = {(r["remedy"], r["data"], r["seed"]): r for r in rows}
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ("ratio", "best", "final")}
    for (name, data, seed), row in sorted(held.items()):
        other = held.get((base, data, seed))
        if name != remedy or other is None:
            continue
        # A base that is useful at the first look would divide by 0; the ratio is of looks, at least one.
        found["ratio"][data].append(max(ended(row), LOOK) / max(ended(other), LOOK))
        for when in ("best", "final"):
            found[when][data].append(better(row, when) - better(other, when))
    return {name: {data: np.array(v) for data, v in sets.items()} for name, sets in found.items()}


def statistic(pairs: Pairs, ratio: bool) -> float:
    """Median of medians of a ratio; mean of means of a difference."""
    if ratio:
        return float(np.median([np.median(v) for v in pairs.values()]))
    return float(np.mean([np.mean(v) for v in pairs.values()]))


def interval(pairs: Pairs, ratio: bool, rng: np.random.Generator) -> tuple[float, float]:
    """95 % by bootstrap: sets with replacement, and within each set seeds with replacement."""
    sets = list(pairs.values())
    inner = np.median if ratio else np.mean
    drawn = []
    for _ in range(DRAWS):
        chosen = rng.integers(len(sets), size=len(sets))
        values = [inner(rng.choice(sets[i], len(sets[i]))) for i in chosen]
        drawn.append(inner(values))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def not_below(pairs: Pairs, rng: np.random.Generator) -> int:
    """Sets on which the 95 % interval of the mean difference over seeds is not wholly below 0."""
    count = 0
    for values in pairs.values():
        drawn = rng.choice(values, (DRAWS, len(values))).mean(1)
        count += bool(np.quantile(drawn, 0.975) >= 0)
    return count


def table(rows: list[Row], base: str) -> list[str]:
    """Lines of Markdown, the earliest end first."""
    lines = [
        "| remedy | sets x runs | end, of the base's | sooner on | never | best probe, less the base's | final probe, less the base's | not below on |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    body = []
    for remedy in dict.fromkeys(r["remedy"] for r in rows):
        found = paired(rows, remedy, base)
        if not found["ratio"]:
            continue
        rng = np.random.default_rng(0)
        ratio, best, final = found["ratio"], found["best"], found["final"]
        cells = [f"{statistic(ratio, True):.2f} ({'{:.2f} to {:.2f}'.format(*interval(ratio, True, rng))})"]
        sooner = sum(bool(np.median(v) < 1) for v in ratio.values())
        never = sum(r["end"] is None for r in rows if r["remedy"] == remedy)
        for pairs in (best, final):
            low, high = interval(pairs, False, rng)
            cells.append(f"{statistic(pairs, False):+.3f} ({low:+.3f} to {high:+.3f})")
        runs = sum(map(len, ratio.values()))
        line = (
            f"| {remedy} | {len(ratio)} x {runs} | {cells[0]} | {sooner} | {never} | {cells[1]} | {cells[2]} "
            f"| {not_below(final, rng)} of {len(final)} |"
        )
        body.append((statistic(ratio, True), line))
    return lines + [line for _, line in sorted(body, key=lambda pair: pair[0])]


def by_set(rows: list[Row]) -> list[str]:
    """Median end and mean final probe of each remedy on each set."""
    held: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        held[row["data"], row["remedy"]].append(row)
    remedies = list(dict.fromkeys(r["remedy"] for r in rows))
    lines = ["| set | untrained | " + " | ".join(remedies) + " |", "|---|---:|" + "---:|" * len(remedies)]
    for data in dict.fromkeys(r["data"] for r in rows):
        cells = []
        for remedy in remedies:
            of = held.get((data, remedy), [])
            cells.append(
                f"{np.median([ended(r) for r in of]):.0f}, {np.mean([better(r, 'final') for r in of]):.3f}"
                if of
                else ""
            )
        untrained = np.mean([r["untrained"] for r in rows if r["data"] == data])
        lines.append(f"| {data} | {untrained:.3f} | " + " | ".join(cells) + " |")
    return lines


def written(grid: str, rows: list[Row], tuned_on: str) -> str:
    """Both tables of a grid, Markdown."""
    rows = [row for row in rows if row["grid"] == grid]
    shown = [r for r in rows if r["data"] != tuned_on] if grid == "remedies" else rows
    seeds = {
        remedy: sorted({r["seed"] for r in rows if r["remedy"] == remedy}) for remedy in {r["remedy"] for r in rows}
    }
    said = f"{len(rows)} runs, seeds {min(map(min, seeds.values()))} to {max(map(max, seeds.values()))}."
    cells = "Each cell: median end of the phase, mean final probe of the better encoder. A run without an end counts as its last look."
    return "\n".join([said, "", *table(shown, BASE[grid]), "", cells, "", *by_set(rows)])


def write(rows: list[Row], tuned_on: str) -> str:
    """results.md with the tables of every grid that it has marks for and that has runs."""
    text = RESULTS.read_text(encoding="utf-8")
    for grid in BASE:
        begin, end = f"<!-- begin {grid} -->\n", f"<!-- end {grid} -->"
        if begin in text and any(row["grid"] == grid for row in rows):
            before, rest = text.split(begin)
            text = f"{before}{begin}{written(grid, rows, tuned_on)}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", choices=tuple(BASE), default="remedies")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--tuned_on", default=TUNED_ON, help="the set that is left out of the table and shown apart")
    parser.add_argument("--write", action="store_true", help="bring results.md up to date")
    asked = parser.parse_args()
    rows = read(asked.rows)
    if asked.write:
        RESULTS.write_text(write(rows, asked.tuned_on), encoding="utf-8")
        return
    if not any(row["grid"] == asked.grid for row in rows):
        raise SystemExit(f"{asked.rows} holds no run of --grid {asked.grid}: run.py makes them")
    print(written(asked.grid, rows, asked.tuned_on))


if __name__ == "__main__":
    main()
