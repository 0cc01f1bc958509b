"""`python -m jepa_fast.masks --report`: what each mode really shows, and the paper's Remarks B.1 and B.2 beside it."""

import itertools

import numpy as np
import pytest

from jepa_fast.masks import report
from tests.test_masks import BLOCKS, TOKENS


def _tables(out):
    """The report's two tables, as {mode: cells}."""
    lines, tables = out.splitlines(), []
    for at in (i for i, line in enumerate(lines) if line.startswith("mode  ")):
        rows = list(itertools.takewhile(str.strip, lines[at + 1 :]))
        tables.append({row.split()[0]: row.split()[1:] for row in rows})
    return tables


def test_the_report_has_a_line_for_each_mode_and_a_map_of_it(capsys):
    assert report.main(["--report", "--batch", "16", "--batches", "2"]) == 0
    out = capsys.readouterr().out
    for table in _tables(out):
        assert list(table) == [*BLOCKS, *TOKENS]
        assert len({len(cells) for cells in table.values()}) == 1
    maps = out.split("Coverage")[1].split("\n\n")[1:]
    assert [m.splitlines()[0] for m in maps] == [*BLOCKS, *TOKENS]
    assert all(len(m.splitlines()) == 15 and len(m.splitlines()[1].split()) == 28 for m in maps)
    assert set(maps[0].splitlines()[14].split()) == {"."}, "the reference never uses the last row"
    assert set(maps[4].splitlines()[1].split()) <= set("0123456789.X")


def test_the_report_measures_remarks_b1_and_b2(capsys):
    """Independent masks vary as the remark says and keep its bound; blocks, uncut, vary several times as much."""
    assert report.main(["--report", "--grid", "12", "12", "--batch", "128", "--batches", "12"]) == 0
    table = {mode: [float(c) for c in cells] for mode, cells in _tables(capsys.readouterr().out)[1].items()}
    p, mean, variance, independent, ratio, bound, over, energy, corr = range(9)
    bernoulli = table["bernoulli"]
    assert bernoulli[mean] == pytest.approx(0.7 * 144, rel=0.01) and bernoulli[independent] == pytest.approx(
        0.21 * 144, rel=0.02
    )
    assert bernoulli[ratio] == pytest.approx(1, abs=0.1) and bernoulli[energy] == pytest.approx(1, abs=0.1)
    assert bernoulli[over] < 0.05 and abs(bernoulli[corr]) < 0.02
    assert bernoulli[bound] == pytest.approx(144 * bernoulli[p] + np.sqrt(72 * np.log(40)), rel=0.01)
    assert table["random"][variance] == 0 and table["subsampled"][variance] == 0
    assert table["packed"][ratio] > 3 and table["packed"][energy] > 3 and table["packed"][corr] > 0.5
    assert table["packed"][over] > 0.05, "the bound is for independent masks"


def test_the_reports_usual_number_of_batches_settles_variances(capsys):
    """Where a group shares its sizes, twenty groups told half of the variance of 1.5 times Bernoulli's."""
    if report.extension() is None:
        pytest.skip("takes minutes without the C++ sampler")
    ratios = []
    for seed in "01":
        assert report.main(["--report", "--mode", "reference", "--seed", seed]) == 0
        ratios.append(float(_tables(capsys.readouterr().out)[1]["reference"][4]))
    assert ratios == pytest.approx([1.5, 1.5], abs=0.3)


def test_the_report_takes_a_line_of_patches(capsys):
    assert report.main(["--report", "--grid", "10", "--batch", "8", "--batches", "2"]) == 0
    assert [list(t) for t in _tables(capsys.readouterr().out)] == [list(TOKENS)] * 2


@pytest.mark.parametrize(
    "argv",
    [
        ["--report", "--colour"],
        ["--report", "--mode", "spiral"],
        ["--report", "--grid", "8", "8"],
        ["--report", "--grid", "8", "8", "8"],
        [],
    ],
)
def test_the_reports_errors_are_one_line(argv, capsys):
    assert report.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
