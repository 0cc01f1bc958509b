"""Every test has its own cache of generated data and its own working folder's worth of nothing to clean up.

Where tests run side by side, every worker keeps to a core of its own, and so do the processes it starts: a hundred
threads of ten programs would wait for one another.
"""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_fast import cores


def pytest_configure(config):
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {mine[int(worker.removeprefix("gw")) % len(mine)]})


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory):
    """Generated sets are written once a test run, and never into the user's cache."""
    before = os.environ.get("JEPA_FAST_CACHE")
    os.environ["JEPA_FAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(min(2, cores.usable()))
    yield
    if before is None:
        del os.environ["JEPA_FAST_CACHE"]
    else:
        os.environ["JEPA_FAST_CACHE"] = before


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """In an empty folder, on a machine without CUDA, and reports are not drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("jepa_fast.report.write", lambda folder: folder)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """(run folder, records) of six steps on forty generated series, with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("series")
    rng = np.random.default_rng(0)
    for split in ("TRAIN", "TEST"):
        label = np.arange(40) % 2
        series = np.sin((0.1 + 0.2 * label[:, None]) * np.arange(500) + rng.uniform(0, 6, (40, 1)))
        np.savetxt(folder / f"waves_{split}.tsv", np.column_stack([label, series]), delimiter="\t", fmt="%.5g")
    return _train("series", folder / "waves_TRAIN.tsv", tmp_path_factory.mktemp("run") / "waves-1")


@pytest.fixture(scope="session")
def tiny_image_run(tmp_path_factory):
    """(run folder, records) of six steps on forty small colour images of two classes, width 64, 16 tokens."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(40):
        place = folder / f"class{i % 2}"
        place.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 128 + 127 * (i % 2), (40, 48, 3), dtype=np.uint8)).save(place / f"{i:02}.png")
    sizes = ("--data.image_size", 32, "--model.patch", 8, "--model.width", 64, "--model.depth", 2, "--model.heads", 4,
             "--model.predictor_width", 32, "--model.predictor_depth", 1, "--masks.min_keep", 1)  # fmt: skip
    return _train("images", folder, tmp_path_factory.mktemp("run") / "blots-1", *sizes)


def _train(name, data, run, *more):
    from jepa_fast.train import main

    steps = ("--train.steps", 6, "--train.batch_size", 8, "--checkpoint.every", 3, "--checkpoint.keep", 0, "--log.every", 1,
             "--optim.warmup_epochs", 0, "--monitor.every", 3, "--data.workers", 1, "--train.precision", "fp32")  # fmt: skip
    assert main(list(map(str, (name, "--data.path", data, "--run.dir", run, *steps, *more)))) == 0
    return run, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
