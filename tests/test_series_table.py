"""Tables of series as people have them: where the label is, what is a header, what is an index, and what nobody can tell."""

import numpy as np
import pytest

from jepa_fast import shards
from jepa_fast.config import replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.readers import series
from jepa_fast.data.readers.series import load_all
from jepa_fast.errors import UsageError
from jepa_fast.presets import preset

ROWS = np.random.default_rng(0).normal(size=(30, 12)).round(4)
CLASSES = [str(i % 2) for i in range(30)]
NUMBERED = [str(i) for i in range(12)]
NAMED = [f"t{i}" for i in range(12)]


def write(file, header, *columns, separator=","):
    """columns: lists of cells, or the array of values."""
    cells = [c.astype(str) if isinstance(c, np.ndarray) else np.array(c)[:, None] for c in columns]
    lines = [separator.join(row) for row in np.concatenate(cells, axis=1)]
    file.write_text("\n".join([separator.join(header)] * bool(header) + lines) + "\n")
    return file


def check(held, labels=CLASSES, rows=ROWS):
    np.testing.assert_allclose(held.samples[:, 0], rows, atol=1e-6)
    assert (held.labels is None) if labels is None else held.labels.tolist() == list(labels)


@pytest.mark.parametrize(("header", "columns"), [
    (["label", *NUMBERED], (CLASSES, ROWS)), (["label", *NAMED], (CLASSES, ROWS)), ([*NAMED, "Target"], (ROWS, CLASSES)),
    (["", *NAMED, "label"], (range(30), ROWS, CLASSES)), (["index", "class", *NUMBERED], (range(30), CLASSES, ROWS)),
    (["Unnamed: 0", *NUMBERED, "y"], (range(30), ROWS, CLASSES)), ([], (CLASSES, ROWS)), ([], (ROWS, CLASSES)),
    ([], (range(30), CLASSES, ROWS)), ([], (range(1, 31), ROWS, CLASSES)), ([*NAMED, "diagnosis"], (ROWS, CLASSES)),
    ([*NUMBERED, "12"], (ROWS, CLASSES)), (["", *NUMBERED, "12"], (range(30), ROWS, CLASSES)),
])  # fmt: skip
def test_a_csv_has_its_label_first_or_last_an_index_or_none_and_any_header(tmp_path, header, columns):
    columns = [list(map(str, c)) if isinstance(c, range) else c for c in columns]
    check(series.load(write(tmp_path / "x.csv", header, *columns)))


def test_classes_may_be_words(tmp_path):
    words = ["good", "bad", "ugly"] * 10
    for columns in ((words, ROWS), (ROWS, words)):
        check(series.load(write(tmp_path / "x.csv", [], *columns)), words)


@pytest.mark.parametrize("header", [[], NAMED, NUMBERED])
def test_no_label_at_all_is_said(tmp_path, header):
    held = series.load(write(tmp_path / "x.csv", header, ROWS))
    check(held, None)
    assert "no column looks like a label" in held.notes[0]


@pytest.mark.parametrize(("label", "expected", "rows"), [
    ("first", CLASSES, slice(1, None)), ("0", CLASSES, slice(1, None)), ("last", None, slice(0, -1)), ("none", None, slice(None)),
])  # fmt: skip
def test_the_user_says_where_the_label_is(tmp_path, label, expected, rows):
    values = np.concatenate([np.array(CLASSES, float)[:, None], ROWS], 1)
    held = series.load(write(tmp_path / "x.csv", [], CLASSES, ROWS), label)
    np.testing.assert_allclose(held.samples[:, 0], values[:, rows], atol=1e-6)
    assert (None if held.labels is None else held.labels.tolist()) == expected


def test_a_column_that_is_not_there_is_one_line_with_those_that_are(tmp_path):
    file = write(tmp_path / "x.csv", ["state", *NAMED], CLASSES, ROWS)
    check(series.load(file, "state"))
    with pytest.raises(UsageError, match=r"--data.label speed: .* its columns are state, t0, .*, t11") as error:
        series.load(file, "speed")
    assert len(str(error.value)) < 300


def test_what_cannot_be_told_is_refused_with_the_flag(tmp_path):
    with pytest.raises(
        UsageError, match=r"first and its last column could both be the label: give --data.label first, last or none"
    ):
        series.load(write(tmp_path / "x.csv", [], CLASSES, ROWS, CLASSES))
    with pytest.raises(UsageError, match=r"label and class: say which is the label, --data.label NAME"):
        series.load(write(tmp_path / "x.csv", ["label", *NAMED, "class"], CLASSES, ROWS, CLASSES))


def test_a_regression_target_is_no_class(tmp_path):
    held = series.load(write(tmp_path / "x.csv", ["target", *NAMED], [f"{v:.3f}" for v in ROWS[:, 0]], ROWS))
    check(held, None)
    assert "a regression target, so no probes" in held.notes[0]
    held = series.load(write(tmp_path / "x.tsv", [], [f"{v:.3f}" for v in ROWS[:, 0]], ROWS, separator="\t"))
    check(held, None)  # the archive's format has a label first, whatever it is
    assert "30 different numbers" in held.notes[0] and "--data.label none" in held.notes[0]
    lines = [",".join(map(str, row)) for row in ROWS]
    (tmp_path / "x.ts").write_text(
        "@targetLabel true\n@data\n" + "".join(f"{line}:{i / 7}\n" for i, line in enumerate(lines))
    )
    held = series.load(tmp_path / "x.ts")
    check(held, None)
    assert "regression" in held.notes[0]


@pytest.mark.parametrize(("head", "tail", "labels"), [
    ("@classLabel true 0 1\n", ":{}", CLASSES), ("", ":{}", CLASSES), ("@classLabel false\n", "", None), ("", "", None),
])  # fmt: skip
@pytest.mark.parametrize("times", [False, True])
def test_ts_with_and_without_times_and_class_line(tmp_path, head, tail, labels, times):
    def cell(i, value):
        return f"(2019-01-01 00:{i:02}:00,{value})" if times else str(value)

    lines = [
        ",".join(cell(i, v) for i, v in enumerate(row)) + tail.format(c) for row, c in zip(ROWS, CLASSES, strict=True)
    ]
    (tmp_path / "x.TS").write_text(f"@problemName X\n{head}@data\n" + "\n".join(lines))
    check(series.load(tmp_path / "x.TS"), labels)


@pytest.mark.parametrize("separator", [",", "  ", " "])
def test_the_archives_older_text_files(tmp_path, separator):
    for part in ("Train", "TEST"):
        write(tmp_path / f"Old_{part}.txt", [], CLASSES, ROWS, separator=separator)
    data = open_dataset(replace(preset("series"), {"data.path": str(tmp_path / "Old_Train.txt")}))
    assert len(data.train) == len(data.probe_test) == 30 and data.num_classes == 2


def test_a_test_file_has_its_label_where_the_training_file_has(tmp_path):
    train = write(tmp_path / "x_train.csv", [*NAMED, "label"], ROWS, CLASSES)
    test = write(tmp_path / "x_test.csv", ["label", *NAMED], CLASSES, ROWS)
    for part in load_all({"train": train, "test": test}).values():
        check(part)
    bare = load_all({"train": train, "test": write(tmp_path / "x_test.csv", NAMED, ROWS)})["test"]
    check(bare, None)
    assert "no column label, so no labels" in bare.notes[0]


def test_shards_and_training_refuse_the_same_things_in_the_same_words(tmp_path, capsys):
    file = tmp_path / "x_TRAIN.tsv"
    file.write_text("".join("\t".join(["1", *map(str, row[: 6 + i % 6])]) + "\n" for i, row in enumerate(ROWS)))
    with pytest.raises(UsageError) as refused:
        open_dataset(replace(preset("series"), {"data.path": str(file)}))
    assert shards.main([str(file), str(tmp_path / "s")]) == 2
    assert (
        str(refused.value).partition(": ")[2] == capsys.readouterr().err.strip().partition(": ")[2].partition(": ")[2]
    )
    assert shards.main([str(file), str(tmp_path / "s"), "--data.lengths", "pad"]) == 0
    assert "30 samples" in capsys.readouterr().out
