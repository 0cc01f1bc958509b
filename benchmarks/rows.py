"""Rows of results: what a measurement leaves behind, one file a benchmark, only ever appended to."""

import argparse
import csv
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = (
    "bench", "provider", "shape", "dtype", "metric", "unit", "p20", "p50", "p80", "n",
    "device", "driver", "torch", "triton", "commit", "date",
)  # fmt: skip
Row = dict[str, str]


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile, linear between the values; never outside them. Raises ValueError for none."""
    if not values:
        raise ValueError("no values to summarise: the measurement made no round")
    if len(values) == 1:
        return (values[0],) * 3
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


def make(bench: str, provider: str, shape: str, dtype: str, metric: str, unit: str, values: Sequence[float]) -> Row:
    """A row without its environment."""
    p20, p50, p80 = (f"{value:.5g}" for value in quantiles(values))
    return {
        "bench": bench, "provider": provider, "shape": shape, "dtype": dtype, "metric": metric, "unit": unit,
        "p20": p20, "p50": p50, "p80": p80, "n": str(len(values)),
    }  # fmt: skip


def append(rows: Iterable[Row], path: Path) -> None:
    """Add complete rows to a file, which is made with its header if it is not there.

    Raises ValueError, before anything is written, for a row with other columns than COLUMNS and for a file
    with another header.
    """
    rows = list(rows)
    for row in rows:
        if set(row) != set(COLUMNS):
            raise ValueError(f"a row must have the columns {', '.join(COLUMNS)}; differing: {set(row) ^ set(COLUMNS)}")
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if tuple(header) != COLUMNS:
            raise ValueError(f"{path} has the columns {', '.join(header)}; move it away, rows are only ever appended")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def read(folder: Path = RESULTS) -> list[Row]:
    """Every row of a folder's CSV files that has these columns, file by file, oldest first."""
    found: list[Row] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) == COLUMNS:
                found.extend(reader)
    return found


def main(argv: list[str] | None = None) -> int:
    """`python -m benchmarks.rows FILE ...`: fold rows from elsewhere into results/, each once."""
    parser = argparse.ArgumentParser(
        description="Fold rows that were made elsewhere into benchmarks/results, each once."
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    known = {tuple(row.values()) for row in read(args.results)}
    for path in args.files:
        with path.open(newline="") as file:
            new = [row for row in csv.DictReader(file) if tuple(row.values()) not in known]
        for bench in dict.fromkeys(row.get("bench", "") for row in new):
            append((row for row in new if row.get("bench") == bench), args.results / f"{bench}.csv")
        print(f"{path}: {len(new)} new rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
