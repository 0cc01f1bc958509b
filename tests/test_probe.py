"""The offline probe: what it measures, beside what, on which data, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from jepa_fast import probe, train
from jepa_fast.monitor import probes

SHORT = ["--train.steps", "4", "--log.every", "2", "--monitor.every", "4", "--monitor.probe_train", "40",
         "--monitor.probe_test", "40", "--checkpoint.every", "2", "--data.workers", "1"]  # fmt: skip


def clouds(n, shares, seed=0, apart=1.6):
    rng = np.random.default_rng(seed)
    y = rng.choice(len(shares), n, p=shares)
    centres = np.random.default_rng(9).normal(size=(len(shares), 10)) * apart
    return torch.from_numpy(centres[y] + rng.normal(size=(n, 10))).float(), torch.from_numpy(y)


def test_the_sgd_head_is_as_good_as_logistic_regression_and_the_same_each_time():
    (x, y), (test, truth) = clouds(600, [0.5, 0.3, 0.2]), clouds(400, [0.5, 0.3, 0.2], seed=1)
    said, rate = probes.sgd_predict(x, y, test, 3, epochs=30)
    reference = LogisticRegression().fit(x.numpy(), y.numpy()).score(test.numpy(), truth.numpy())
    assert probes.accuracy(said, truth) > reference - 0.02 > 0.8 and rate in probes.RATES
    assert torch.equal(said, probes.sgd_predict(x, y, test, 3, epochs=30)[0])


def test_balanced_accuracy_sees_a_class_that_accuracy_does_not():
    x, y = clouds(400, [0.95, 0.05], apart=0.3)
    said, _ = probes.sgd_predict(x, y, x, 2, epochs=10)
    assert probes.accuracy(said, y) > 0.9 > 0.8 > probes.balanced_accuracy(said, y)


def test_unequal_classes_are_judged_by_their_balanced_accuracy():
    def found(test_per_class, balanced):
        scores = dict.fromkeys(probe.COLUMNS, 0.9) | {"sgd/balanced": balanced}
        encoders = {"context": scores, "target": scores, "untrained": scores | {"sgd/balanced": 0.5}}
        return {"data": "", "checkpoint": "", "train": 9, "test": sum(test_per_class), "classes": 3, "majority": 0.9,
                "majority/balanced": 0.5, "test_per_class": test_per_class, "encoders": encoders}  # fmt: skip

    better = probe.table(found([900, 0, 100], 0.75))
    assert "neither" not in better and "(100 to 900 test samples)" in better and "0.026" in better
    assert "neither" in probe.table(found([900, 0, 100], 0.55))  # within the noise of a hundred
    assert "neither" in probe.table(found([500, 500], 0.75)) and "unequal" not in probe.table(found([500, 500], 0.75))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "run"
    assert train.main([*SHORT, "--run.dir", str(folder)]) == 0
    return folder


def series_file(path, count=60, length=500, classes=3):
    rng = np.random.default_rng(0)
    y = np.arange(count) % classes
    x = np.sin(np.arange(length) * (0.1 + 0.2 * y[:, None])) + 0.1 * rng.normal(size=(count, length))
    lines = ["\t".join([str(c), *(f"{v:.4f}" for v in row)]) for c, row in zip(y, x, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_both_encoders_stand_beside_the_untrained_one_and_the_majority(run_folder, capsys):
    assert probe.main([str(run_folder), "--num_train", "120", "--num_test", "80"]) == 0
    out = capsys.readouterr().out
    for word in ("context encoder", "target encoder", "untrained encoder", "majority", "SGD head", "kNN", "step-4"):
        assert word in out
    (found,) = json.loads((run_folder / "probe.json").read_text())
    assert (
        found["train"] == 120 and found["test"] == 80 and set(found["encoders"]) == {"context", "target", "untrained"}
    )
    assert found["encoders"]["untrained"]["ridge"] > 0.4


def test_the_untrained_encoder_is_the_one_the_run_began_with(run_folder):
    _, encoders, _ = probe.load(run_folder)
    _, first, _ = probe.load(run_folder, step=2)
    for a, b in zip(encoders["untrained"].parameters(), first["untrained"].parameters(), strict=True):
        assert torch.equal(a, b)
    moved = [not torch.equal(a, b) for a, b in zip(encoders["context"].parameters(), encoders["untrained"].parameters(), strict=True)]  # fmt: skip
    assert any(moved)


def test_the_encoders_are_probed_on_another_set_too(run_folder, tmp_path, capsys):
    other = series_file(tmp_path / "other_TRAIN.tsv")
    assert probe.main([str(run_folder), "--data.path", str(other), "--step", "2"]) == 0
    out = capsys.readouterr().out
    assert "other_TRAIN" in out and "step-2" in out
    found = json.loads((run_folder / "probe.json").read_text())[-1]
    assert found["classes"] == 3 and found["encoders"]["target"]["ridge"] > 0.9  # three frequencies: easy


@pytest.mark.parametrize(("make", "says"), [
    (lambda p: series_file(p / "a_TRAIN.tsv", length=100), "takes [1, 500]"),
    (lambda p: np.save(p / "a.npy", np.random.default_rng(0).normal(size=(30, 1, 500))) or p / "a.npy", "needs labels"),
    (lambda p: p / "nowhere.tsv", "does not exist"),
])  # fmt: skip
def test_a_set_that_will_not_do_is_one_line(run_folder, tmp_path, capsys, make, says):
    assert probe.main([str(run_folder), "--data.path", str(make(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(("arguments", "says"), [
    (["nowhere"], "nowhere has no checkpoint: give the folder of a run"), (["RUN", "--step", "3"], "no checkpoint of step 3"),
    (["RUN", "--num_train", "1"], "--num_train"), (["RUN", "--data.embedded", "cats"], "cats"),
])  # fmt: skip
def test_a_run_that_will_not_do_is_one_line(run_folder, capsys, arguments, says):
    assert probe.main([str(run_folder) if a == "RUN" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not Path("nowhere").exists()
