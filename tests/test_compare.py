"""Runs beside each other: what tells them apart, what they measured, what the paper says of it; figures 1 to 5."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr
from test_report import checked, dipping, run_of
from test_verdict import assert_apart

from jepa_fast import report
from jepa_fast.config import replace, to_json
from jepa_fast.errors import UsageError
from jepa_fast.presets import preset
from jepa_fast.report import compare, paper
from jepa_fast.report.bands import bands
from jepa_fast.report.figure import phase_figure


def write(folder, changes, lag=1.0, target=lambda s: 0.5 if 0 < s < 600 else 0.7):
    folder.mkdir(parents=True)
    records = run_of(dipping, target)
    for record in records:
        if "probe/target" in record:
            record |= {"probe/context": record["probe/target"], "discrepancy/full": lag * record["step"] / 100}
        record["drift/total"] = lag * record["step"] / 100
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "config.json").write_text(to_json(replace(preset("demo"), changes)))
    return folder


def over_decay(tmp_path, lags, seeds=(0,)):
    decays = (0.9, 0.99, 0.996, 0.999)[: len(lags)]
    return [
        write(tmp_path / f"{d}-{s}", {"ema.decay": d, "train.seed": s}, lag=lag)
        for d, lag in zip(decays, lags, strict=True)
        for s in seeds
    ]


# ---- what tells runs apart ------------------------------------------------------------------------


def test_runs_are_told_apart_by_the_fields_that_differ_and_stand_in_their_order(tmp_path):
    folders = over_decay(tmp_path, (1, 2, 3))
    runs = compare.read_runs(folders[::-1])
    assert [run.label for run in runs] == ["β 0.9", "β 0.99", "β 0.996"]
    assert list(runs[0].fields) == ["ema.decay"]


def test_runs_on_different_data_are_told_apart_by_their_folders(tmp_path):
    folders = [write(tmp_path / name, {"data.path": name}) for name in ("forda", "fordb")]
    assert [run.label for run in compare.read_runs(folders)] == ["forda", "fordb"]


def test_a_configuration_of_another_version_still_tells_runs_apart(tmp_path):
    folders = over_decay(tmp_path, (1, 2, 3))
    raw = json.loads((folders[0] / "config.json").read_text())
    del raw["data"]["decoder"]
    raw["data"]["colour"] = "grey"
    (folders[0] / "config.json").write_text(json.dumps(raw))
    assert [run.label for run in compare.read_runs(folders)] == ["β 0.9", "β 0.99", "β 0.996"]
    (folders[0] / "config.json").write_text("{")
    assert [run.label for run in compare.read_runs(folders)] == [folder.name for folder in folders]


def test_long_names_leave_the_curves_their_room(tmp_path):
    names = [f"run-with-a-name-that-goes-on-and-on-{i}-and-ends-alike" for i in "abc"] + ["short"]
    runs = compare.read_runs([write(tmp_path / name, {"data.path": name}) for name in names])
    for number, panels in ((2, 4), (3, 2), (5, 2)):
        drawn = paper.figure(number, runs)
        drawn.canvas.draw()
        axes = [ax for ax in drawn.axes if ax.lines][:panels]
        assert all(ax.get_window_extent().width > 0.5 * drawn.bbox.width / 2 for ax in axes)
        texts = [t.get_text() for ax in axes for t in (*ax.texts, ax.title, ax._left_title)]
        assert all(len(text) <= 60 for text in texts)
    labels = paper._shortened(names, 22)
    assert len(set(labels)) == 4 and labels[3] == "short"


def test_a_run_is_measured(tmp_path):
    measured = compare.measure(compare.read_run(write(tmp_path / "a", {}, lag=2.0), []))
    assert 300 <= measured["at step"] <= 500 and measured["untrained"] == 0.6
    assert (measured["phase begins"], measured["phase ends"]) == (80, 600)
    assert measured["share of run"] == pytest.approx(0.52)
    assert measured["best probe"] == measured["final probe"] == 0.7
    assert measured["C early"] == measured["drift early"] == 2.0


def test_a_phase_that_lasts_has_no_end_and_its_share_is_up_to_the_last_step(tmp_path):
    measured = compare.measure(compare.read_run(write(tmp_path / "a", {}, target=lambda s: 0.6), []))
    assert measured["phase begins"] == 80 and measured["phase ends"] != measured["phase ends"]
    assert measured["share of run"] == pytest.approx(0.92)


def test_table_figures_and_verdict_of_a_run_have_the_same_phase(tmp_path):
    for target in (lambda s: 0.5 if 0 < s < 600 else 0.7, lambda s: 0.6, lambda s: 0.7 if s else 0.6):
        folder = write(tmp_path / str(len(list(tmp_path.iterdir()))), {}, target=target)
        run = compare.read_run(folder, [])
        begins, ends = compare.phase_of(run)
        stop = run.records[-1]["step"] if math.isnan(ends) else ends
        said = report.verdict(run.records, run.events, "")
        if math.isnan(begins):
            assert said.startswith("No collapse phase") and not bands(run.records, run.events)
        else:
            assert (
                f"since step {begins:,}," in said if math.isnan(ends) else f"from step {begins:,} to {ends:,}," in said
            )
        for drawn in (paper.figure(1, [run]), paper.figure(2, [run]), paper.figure(3, [run]), paper.figure(4, [run]), phase_figure(run.records, run.events)):  # fmt: skip
            shaded = {(p.get_x(), p.get_x() + p.get_width()) for ax in drawn.axes for p in ax.patches}
            assert shaded == (set() if math.isnan(begins) else {(begins, stop)})


def test_the_phase_of_each_of_several_runs_is_a_bar_below_the_curves(tmp_path):
    runs = compare.read_runs(over_decay(tmp_path, (1, 2, 3)))
    for number in (3, 5):
        drawn = paper.figure(number, runs)
        for ax in [ax for ax in drawn.axes if ax.lines][:2]:
            bars = [tuple(line.get_xdata()) for line in ax.lines if line.get_linewidth() == 2.5]
            assert bars == [(80, 600)] * 3


# ---- claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lags", "says"), [((1, 2, 3, 4), "the opposite"), ((4, 3, 2, 1), "agrees"), ((1, 3, 3, 1), "no clear order")])  # fmt: skip
def test_the_corollary_stands_beside_what_was_measured(tmp_path, lags, says):
    said = compare.claims(compare.read_runs(over_decay(tmp_path, lags)))
    (line,) = [line for line in said if "makes the encoders' discrepancy smaller" in line]
    assert line.endswith(f"{says}.") and f"0.9: {lags[0]}" in line
    assert any("One seed" in line for line in said)


def test_seeds_are_averaged(tmp_path):
    said = compare.claims(compare.read_runs(over_decay(tmp_path, (1, 2, 3), seeds=(0, 1))))
    assert any("0.9: 1, 0.99: 2, 0.996: 3" in line for line in said) and not any("One seed" in line for line in said)


def test_a_phase_that_lasts_counts_as_one_that_ends_at_the_last_step_or_later(tmp_path):
    folders = over_decay(tmp_path, (1, 2, 3))
    records = [json.loads(line) for line in (folders[2] / "metrics.jsonl").read_text().splitlines()]
    useless = [r | {"probe/target": 0.6, "probe/context": 0.6} if "probe/target" in r else r for r in records]
    (folders[2] / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in useless))
    (line,) = [line for line in compare.claims(compare.read_runs(folders)) if "prolongs" in line]
    assert "0.9: 600, 0.99: 600, 0.996: 1000 or later;" in line


def test_nothing_is_claimed_of_other_fields_or_of_two_values(tmp_path):
    assert compare.claims(compare.read_runs(over_decay(tmp_path, (1, 2)))) == []
    folders = [write(tmp_path / f"lr{i}", {"optim.lr": 10.0**-i}) for i in (3, 4, 5)]
    assert compare.claims(compare.read_runs(folders)) == []


def test_the_rank_correlation_is_scipys():
    x, y = np.random.default_rng(0).integers(0, 5, (2, 40))
    assert compare.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert compare.spearman([1, 2, 3], [7, 7, 7]) == 0


# ---- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "count"), [(1, 1), (2, 3), (3, 2), (4, 1), (5, 4)])
def test_each_figure_of_the_paper_is_one_command(tmp_path, capsys, number, count):
    folders = over_decay(tmp_path / "runs", range(1, count + 1))
    assert report.main(["--figure", str(number), *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    image = np.asarray(Image.open(tmp_path / "out" / f"figure-{number}.png").convert("L"))
    assert min(image.shape) > 300 and 0.003 < (image < 200).mean() < 0.5
    text = (tmp_path / "out" / f"figure-{number}.svg").read_text()
    assert "step" in text and (number != 5 or "β 0.996" in text)


def test_an_inset_covers_no_curve(tmp_path):
    figure = paper.figure(1, compare.read_runs(over_decay(tmp_path, (1,))))
    figure.canvas.draw()
    left = figure.axes[0]
    (inset,) = left.child_axes
    box = inset.get_window_extent()
    for line in left.lines:
        points = left.transData.transform(line.get_xydata())
        assert not any(box.contains(*point) for point in points)


def test_names_at_the_ends_of_many_curves_never_touch(tmp_path):
    runs = compare.read_runs([write(tmp_path / f"{i}", {"ema.decay": 0.9 + 0.01 * i}, lag=1) for i in range(9)])
    for number in (3, 5):
        assert_apart(paper.figure(number, runs))


@pytest.mark.parametrize("arguments", [["--figure", "4"], ["--figure", "1"], ["--figure", "6"], ["--figure", "x"]])
def test_a_figure_that_cannot_be_is_one_line(tmp_path, capsys, arguments):
    folders = over_decay(tmp_path, (1, 2))
    assert report.main([*arguments, *map(str, folders)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_several_runs_have_a_page(tmp_path):
    folders = over_decay(tmp_path / "runs", (1, 2, 3))
    page = report.write_comparison(folders, tmp_path / "out")
    checker = checked(page)
    words = " ".join(checker.words)
    assert "Corollary 4.3" in words and "ema.decay" in words and "final probe" in words and "phase ends" in words
    assert not [link for link in checker.links if not link.startswith(("#", "data:"))]


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(UsageError, match="empty"):
        compare.read_runs([tmp_path / "empty"])
