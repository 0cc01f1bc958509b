"""experiments/remedies: what is kept of a run, and the table's statistic."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from jepa_fast import cli

HERE = Path(__file__).parents[1] / "experiments" / "remedies"


def load(name):
    spec = importlib.util.spec_from_file_location(f"remedies_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


run, table = load("run"), load("table")


def records(context, target=None, untrained=0.5, tests=100):
    """One look every 50 steps. Two standard errors of the difference are .14 on 100 samples."""
    return [
        {"step": 50 * i, "loss": 1.0 - 0.01 * i, "probe/untrained": untrained, "probe/context": c,
         "probe/target": (target or [0.5] * len(context))[i], "probe/num_test": tests}
        for i, c in enumerate(context)
    ]  # fmt: skip


@pytest.mark.parametrize(("context", "target", "end"), [
    ([0.5, 0.65, 0.55, 0.65, 0.66], None, 150),  # one look alone is not the end
    ([0.5, 0.65, 0.5, 0.5], [0.5, 0.5, 0.66, 0.5], 50),  # the better encoder, whichever it is
    ([0.5, 0.62, 0.62, 0.65], None, None),
])  # fmt: skip
def test_the_end_is_the_first_of_two_looks_two_standard_errors_above_the_untrained_encoder(context, target, end):
    found = run.outcome(records(context, target))
    assert found["end"] == end and found["best"]["context"] == max(context) and found["final"]["context"] == context[-1]


def test_every_run_of_the_trial_is_a_configuration_that_works(tmp_path):
    names = set()
    for grid in ("remedies", "images", "beta", "ratio"):
        for cell in run.cells(grid, range(1)):
            assert cell.name not in names
            names.add(cell.name)
            if cell.data == "FordA":
                cli.parse(cell.arguments(tmp_path / cell.name))


def row(remedy, data, seed, end, final):
    return {"remedy": remedy, "data": data, "seed": seed, "end": end, "steps": 1500, "untrained": 0.5,
            "best": {"context": final, "target": 0.1}, "final": {"context": final, "target": 0.1}}  # fmt: skip


def test_pairs_are_of_the_same_set_and_seed_and_a_run_without_an_end_counts_as_its_last_look():
    rows = [row("paper", "A", 0, 400, 0.7), row("paper", "A", 1, None, 0.6), row("paper", "B", 0, 200, 0.9),
            row("batch", "A", 0, 100, 0.75), row("batch", "A", 1, 775, 0.6), row("batch", "C", 0, 50, 0.9)]  # fmt: skip
    found = table.paired(rows, "batch", "paper")
    assert list(found["ratio"]) == ["A"] and found["ratio"]["A"].tolist() == [0.25, 0.5]
    assert found["final"]["A"] == pytest.approx([0.05, 0.0])
    assert table.statistic(found["ratio"], True) == 0.375


def test_the_interval_holds_the_statistic_and_narrows_with_agreement():
    rng = np.random.default_rng(0)
    wide = {name: rng.normal(0.1, 0.1, 8) for name in "ABCDEFGHIJ"}
    low, high = table.interval(wide, False, np.random.default_rng(0))
    assert low < table.statistic(wide, False) < high and 0.05 < high - low < 0.2
    same = dict.fromkeys("AB", np.full(8, 0.1))
    assert table.interval(same, False, rng) == pytest.approx((0.1, 0.1))
    assert table.not_below({"A": np.full(4, -0.1), "B": np.array([-0.1, 0.1, 0.0, 0.0])}, rng) == 1


def test_the_committed_tables_are_those_of_the_committed_rows():
    rows = table.read(table.ROWS)
    assert rows and table.RESULTS.read_text(encoding="utf-8") == table.write(rows, table.TUNED_ON)
