"""Files of series, in exactly the formats people have."""

import numpy as np
import pytest
import torch

from jepa_fast.data.readers import series
from jepa_fast.errors import UsageError

VALUES = np.array([[0.5, 1.25, -3.0], [1e-3, 2.0, 4.0]], dtype=np.float32)


def test_ucr_tsv(tmp_path):
    file = tmp_path / "FordA_TRAIN.tsv"
    file.write_text("-1\t0.5\t1.25\t-3\n1\t1e-3\t2\t4\n")
    held = series.load(file)
    np.testing.assert_array_equal(held.samples, VALUES[:, None])
    assert held.samples.dtype == np.float32 and held.labels.tolist() == ["-1", "1"]


def test_ts_with_header_and_channels(tmp_path):
    file = tmp_path / "X_TRAIN.ts"
    file.write_text(
        "#comment\n@problemName X\n@timeStamps false\n@univariate false\n@classLabel true a b\n@data\n0.5,1.25,-3:1,2,3:a\n1e-3,2,4:4,5,6:b\n"
    )
    held = series.load(file)
    assert held.samples.shape == (2, 2, 3) and held.labels.tolist() == ["a", "b"]
    np.testing.assert_array_equal(held.samples[:, 0], VALUES)


def test_ts_without_labels(tmp_path):
    file = tmp_path / "x.ts"
    file.write_text("@classLabel false\n@data\n1,2,3\n4,5,6\n")
    held = series.load(file)
    assert held.samples.shape == (2, 1, 3) and held.labels is None


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3)])
def test_pt_of_float64_with_float_labels(tmp_path, shape):
    file = tmp_path / "train.pt"
    torch.save({"samples": torch.from_numpy(VALUES.reshape(shape)).double(), "labels": torch.tensor([0.0, 2.0])}, file)
    held = series.load(file)
    np.testing.assert_array_equal(held.samples, VALUES[:, None])
    assert held.labels.tolist() == ["0", "2"]


def test_npy_with_and_without_labels_and_csv_with_a_header(tmp_path):
    np.save(tmp_path / "x.npy", VALUES.astype(np.float64))
    assert series.load(tmp_path / "x.npy").labels is None
    np.save(tmp_path / "x_labels.npy", np.array([3, 4]))
    assert series.load(tmp_path / "x.npy").labels.tolist() == ["3", "4"]
    (tmp_path / "x.csv").write_text("label,t0,t1,t2\nok,0.5,1.25,-3\nbroken,1e-3,2,4\n")
    held = series.load(tmp_path / "x.csv")
    np.testing.assert_array_equal(held.samples, VALUES[:, None])
    assert held.labels.tolist() == ["ok", "broken"]


def test_training_and_test_files_find_each_other(tmp_path):
    for name in ("FordA_TRAIN.tsv", "FordA_TEST.tsv"):
        (tmp_path / name).write_text("1\t2\t3\n")
    found = (tmp_path / "FordA_TRAIN.tsv", tmp_path / "FordA_TEST.tsv")
    assert series.find(str(tmp_path)) == series.find(str(found[0])) == found
    lone = tmp_path / "other.csv"
    lone.write_text("1,2\n")
    assert series.find(str(lone)) == (lone, None)


@pytest.mark.parametrize(("name", "text", "says"), [
    ("a.tsv", "y\ta\tb\n1\t2\t3\n1\tz\t3\n", "line 3: could not convert string to float: 'z'"),
    ("c.tsv", "", "holds no series"),
    ("e.ts", "1,2,3:1\n", "line 1: data before the @data line"),
    ("f.npy", "rubbish", "f.npy cannot be read as .npy"),
    ("g.pt", "rubbish", "g.pt cannot be read"),
    ("h.log", "1 2", "not a file of series"),
])  # fmt: skip
def test_what_is_wrong_is_said_with_the_place(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as raised:
        series.load(tmp_path / name)
    assert says in str(raised.value) and name in str(raised.value) and "\n" not in str(raised.value)


def test_a_series_may_have_no_label_and_a_place_is_told_by_the_lines_of_the_file(tmp_path):
    file = tmp_path / "a.tsv"
    file.write_text("1\t2\t3\n\n?\t2\t3\r\n\t2\t4\nnan\t2\t4\n1.0\t5\t6\n")
    assert series.load(file).labels.tolist() == ["1", "", "", "", "1"]
    file.write_text("1\t2\t3\n\n1\tz\t3\n")
    with pytest.raises(UsageError, match="line 3: could not convert"):
        series.load(file)
    file.write_text("1,2,3\n")
    with pytest.raises(UsageError, match="line 1: no tab in it"):
        series.load(file)


def test_pt_may_hold_arrays_and_lists(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(4, 2, 9)), np.array([0, 1, 0, 1])
    for samples, labels in ((x, y), (list(torch.from_numpy(x)), y.tolist()), (x.astype(np.float32), ["0", "1"] * 2)):
        torch.save({"samples": samples, "labels": labels}, tmp_path / "a.pt")
        held = series.load(tmp_path / "a.pt")
        np.testing.assert_allclose(held.samples, x.astype(np.float32))
        assert held.labels.tolist() == ["0", "1", "0", "1"]
    torch.save({"samples": [torch.zeros(5), torch.zeros(4)]}, tmp_path / "a.pt")
    assert np.isnan(series.load(tmp_path / "a.pt").samples[1, 0, 4])  # a shorter series ends in missing values


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", ["per_series", "train", "none"])
def test_infinite_values_spoil_their_own_series_only(tmp_path, how):
    (tmp_path / "a.tsv").write_text("1\t1\t2\t4\n1\t1\tinf\t4\n2\t1\t1e300\t4\n2\t3\t2\t1\n")
    held = series.load(tmp_path / "a.tsv").samples
    whole = np.isfinite(series.normalise(held, how, series.statistics(held))).all((1, 2))
    assert whole.tolist() == [True, False, False, True]


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    torch.save({"samples": Evil()}, tmp_path / "evil.pt", pickle_module=pickle)
    with pytest.raises(UsageError, match=r"evil.pt cannot be read"):
        series.load(tmp_path / "evil.pt")


def test_normalisation():
    x = np.random.default_rng(0).normal(3, 5, (4, 2, 50)).astype(np.float32)
    each = series.normalise(x, "per_series")
    np.testing.assert_allclose(each.mean(2), 0, atol=1e-6)
    np.testing.assert_allclose(each.std(2), 1, atol=1e-6)
    by_train = series.normalise(x[:1], "train", series.statistics(x))
    np.testing.assert_allclose(
        by_train, (x[:1] - x.mean((0, 2))[None, :, None]) / x.std((0, 2))[None, :, None], rtol=1e-4, atol=1e-5
    )
    assert series.normalise(x, "none") is x
    assert np.isfinite(series.normalise(np.ones((1, 1, 5), np.float32), "per_series")).all()


def test_a_folder_of_series_takes_its_classes_from_folders(tmp_path):
    from jepa_fast.config import replace
    from jepa_fast.data.dataset import open_dataset
    from jepa_fast.presets import preset

    def opened():
        return open_dataset(replace(preset("series"), {"data.path": str(tmp_path), "data.series_norm": "none"}))

    for name in ("ok", "worn"):
        (tmp_path / name).mkdir()
        for i in range(8):
            text = "a,b\n" + "".join(f"{i + t},{-t}\n" for t in range(5))
            (tmp_path / name / f"{i}.csv").write_text(text)
    data = opened()
    assert data.shape == (2, 5) and data.num_classes == 2 and len(data.train) == 13
    assert data.train.key(0).endswith(".csv")
    np.testing.assert_array_equal(data.train.load(0, None)[1], -np.arange(5.0))


def test_a_folder_of_series_counts_the_files_that_cannot_be_used(tmp_path):
    from jepa_fast.config import replace
    from jepa_fast.data.dataset import open_dataset
    from jepa_fast.data.sample import BadSample
    from jepa_fast.presets import preset

    for i in range(12):
        np.save(tmp_path / f"{i:02}.npy", np.arange(5.0) + i)
    (tmp_path / "03.npy").write_bytes(b"")
    (tmp_path / "04.npy").write_bytes((tmp_path / "05.npy").read_bytes()[:-8])
    (tmp_path / "06.csv").write_text("x\n1\nn/a\n")
    (tmp_path / "07.csv").write_text("")
    (tmp_path / "12.csv").write_text("1\n2\n3#4\n4\n5\n")
    (tmp_path / "13.csv").write_text("0\n1\n2\n3\n4\n", "utf-8-sig")
    np.save(tmp_path / "14.npy", 1j * np.ones(5))
    np.save(tmp_path / "15.npy", np.full(5, 1e300))
    (tmp_path / "02.npy").rename(tmp_path / "02.NPY")
    np.save(tmp_path / "08.npy", np.arange(6.0))
    np.save(tmp_path / "09.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "10.npy", np.full(5, np.nan))
    (tmp_path / "11.npy").unlink()
    (tmp_path / "11.npy").symlink_to(tmp_path / "gone")
    config = replace(preset("series"), {"data.path": str(tmp_path), "data.series_norm": "train"})
    train, said, good = open_dataset(config).train, {}, []
    for i in range(len(train)):
        try:
            good.append(train.load(i, None))
        except BadSample as error:
            said[train.key(i)] = f"{error.kind}: {error}"
    assert {key: value.partition(":")[0] for key, value in said.items()} == {
        "03.npy": "undecodable", "04.npy": "undecodable", "06.csv": "undecodable", "07.csv": "undecodable",
        "08.npy": "other_shape", "09.npy": "undecodable", "10.npy": "not_finite", "11.npy": "unreadable",
        "12.csv": "undecodable", "14.npy": "undecodable", "15.npy": "not_finite",
    }  # fmt: skip
    assert said["08.npy"].endswith("holds 1 channels of 6 values, where most hold 1 channels of 5 values")
    np.testing.assert_allclose(np.mean(good), 0, atol=1e-6)  # what is good is normalised by what is good
    for file in tmp_path.iterdir():
        file.unlink()
        file.write_text("no series")
    with pytest.raises(UsageError, match=r"not one of the 18 series of .* can be read; .*00.npy: not a readable array"):
        open_dataset(config)


@pytest.mark.parametrize("gap", ["", "?", "NaN", " "])
@pytest.mark.parametrize("suffix, separator", [(".tsv", "\t"), (".csv", ",")])
def test_a_first_series_with_a_gap_is_no_header(tmp_path, suffix, separator, gap):
    lines = [("1", gap, "3"), ("2", "4", "5"), ("1", "6", "7")]
    file = tmp_path / f"x{suffix.upper()}"
    file.write_text("\n".join(separator.join(line) for line in lines), "utf-8-sig")  # with the mark of spreadsheets
    held = series.load(file)
    assert np.isnan(held.samples[0, 0, 0]) and held.samples[:, 0, 1].tolist() == [3, 5, 7]
    assert held.labels.tolist() == ["1", "2", "1"]


def test_numbers_that_are_not_real_are_no_series(tmp_path):
    np.save(tmp_path / "x.npy", 1j * np.ones((3, 5)))
    torch.save({"samples": torch.ones(3, 5, dtype=torch.complex64)}, tmp_path / "x.pt")
    for name in ("x.npy", "x.pt"):
        with pytest.raises(UsageError, match=rf"{name} cannot be read .*complex"):
            series.load(tmp_path / name)


def test_tensors_may_have_half_the_bits_or_a_gradient(tmp_path):
    values = torch.arange(10.0).view(2, 5)
    for tensor in (values.bfloat16(), values.half(), values.clone().requires_grad_()):
        torch.save({"samples": tensor, "labels": torch.tensor([1, 2])}, tmp_path / "x.pt")
        np.testing.assert_array_equal(series.load(tmp_path / "x.pt").samples[:, 0], values)


def test_shards_are_normalised_by_their_training_part_as_files_are(tmp_path):
    from jepa_fast.config import replace
    from jepa_fast.data.dataset import open_dataset
    from jepa_fast.data.readers import from_series
    from jepa_fast.data.shards.writer import write_shards
    from jepa_fast.presets import preset

    rng = np.random.default_rng(0)
    parts = {name: rng.normal(40, 3, (n, 2, 30)).astype(np.float32) for name, n in (("train", 50), ("test", 20))}
    parts["train"][:, 1] *= 100
    parts["train"][7, 0, 3] = np.nan
    for name, values in parts.items():
        np.save(tmp_path / f"{name}.npy", values)
    samples = {k: ({"__key__": f"{i:03}", "npy": one} for i, one in enumerate(v)) for k, v in parts.items()}
    write_shards(tmp_path / "set", samples, "s", 13)
    config = replace(preset("series"), {"data.series_norm": "train", "data.path": str(tmp_path / "train.npy")})
    by_file = open_dataset(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_series, "AT_A_TIME", 4)
        by_shard = open_dataset(replace(config, {"data.path": str(tmp_path / "set")}))
    assert len(by_file.train) == len(by_shard.train) == 50
    for i in (0, 6, 8, 49):
        np.testing.assert_allclose(by_shard.train.load(i, None), by_file.train.load(i, None), rtol=1e-5, atol=1e-5)
