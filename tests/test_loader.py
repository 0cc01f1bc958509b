"""The loader: the same global batches whatever the threads, the processes and the interruptions."""

import dataclasses
import re
import threading

import numpy as np
import pytest
import torch

from jepa_fast.config import replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.loading.loader import AHEAD, IN_WORK, Loader
from jepa_fast.data.sample import BadSample, Counts
from jepa_fast.data.sources import Joined
from jepa_fast.errors import UsageError
from jepa_fast.presets import preset


class Noise:
    """Samples that tell their number, and the random stream they were augmented with."""

    labels = None

    def __init__(self, count, bad=()):
        self.count, self.bad, self.counts = count, set(bad), Counts()

    def __len__(self):
        return self.count

    def prepare(self, indices):
        pass

    def load(self, index, rng, out=None):
        if index in self.bad:
            raise BadSample("unreadable")
        return np.array([[index, rng.random(), *np.zeros(98)]], np.float32)

    def key(self, index):
        return f"noise:{index}"


def config(**changes):
    return replace(preset("demo"), {"train.batch_size": 8, "data.series_length": 100, **changes})


def batches(start=0, stop=12, rank=0, size=1, source=None, **changes):
    loader = Loader(config(**changes), source or Noise(37), 5, rank, size, start, stop)
    try:
        return list(loader)
    finally:
        loader.close()


def test_a_resumed_loader_gives_the_batches_it_would_have_given():
    for a, b in zip(batches()[5:], batches(start=5), strict=True):
        assert a.step == b.step and torch.equal(a.inputs, b.inputs)
        for field in dataclasses.fields(a.plans[0]):
            x, y = getattr(a.plans[0], field.name), getattr(b.plans[0], field.name)
            assert x == y if isinstance(x, int) else torch.equal(x, y)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_out_one_global_batch(size):
    parts = [batches(rank=rank, size=size) for rank in range(size)]
    for whole, shares in zip(batches(), zip(*parts, strict=True), strict=True):
        assert torch.equal(whole.inputs, torch.cat([s.inputs for s in shares]))
        assert torch.equal(whole.plans[0].target_index, torch.cat([s.plans[0].target_index for s in shares]))


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_threads_change_nothing(workers):
    for a, b in zip(batches(), batches(**{"data.workers": workers}), strict=True):
        assert torch.equal(a.inputs, b.inputs)


def test_a_sample_is_augmented_anew_every_epoch():
    seen = {}
    for batch in batches(stop=15):
        for epoch, row in zip(batch.epochs, batch.inputs[:, 0].tolist(), strict=True):
            seen.setdefault(row[0], {})[int(epoch)] = row[1]
    assert any(len(by_epoch) == 3 for by_epoch in seen.values())
    assert all(len(set(by_epoch.values())) == len(by_epoch) for by_epoch in seen.values())


def test_bad_samples_are_replaced_reported_once_and_the_same_for_everyone():
    got = batches(source=Noise(400, bad=[3, 4, 200]), stop=100)
    again = batches(source=Noise(400, bad=[3, 4, 200]), start=50, stop=100, **{"data.workers": 7})
    assert torch.equal(got[99].inputs, again[49].inputs)
    loader = Loader(config(), Noise(400, bad=[3, 4, 200]), 5, 0, 1, 0, 100)
    numbers = np.concatenate([b.samples for b in loader])
    loader.close()
    assert sorted((b.key, b.reason) for b in loader.bad) == [(f"noise:{i}", "unreadable") for i in (200, 3, 4)]
    assert (
        not set(numbers) & {3, 4, 200} and np.bincount(numbers)[5] == 6
    )  # in place of 3 and 4, and for itself, in two epochs


def test_too_many_bad_samples_end_the_run_with_one_sentence():
    with pytest.raises(
        UsageError, match=r"cannot be read, more than --data.max_bad_share 0.01; the last is noise:\d+: unreadable"
    ):
        batches(source=Noise(400, bad=range(0, 400, 10)), stop=100)
    with pytest.raises(UsageError, match="not one of the 5 samples can be read"):
        batches(source=Noise(5, bad=range(5)), **{"data.max_bad_share": 1.0})


def test_an_error_of_the_source_reaches_the_loop():
    class Broken(Noise):
        def load(self, index, rng, out=None):
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        batches(source=Broken(10))


def test_closing_early_ends_the_threads():
    before = threading.active_count()
    loader = Loader(config(), Noise(37), 5, 0, 1, 0, 10**6)
    next(iter(loader))
    loader.close()
    assert threading.active_count() == before


def test_a_closed_loader_gives_no_more_and_does_not_hang():
    loader = Loader(config(), Noise(37), 5, 0, 1, 0, 50)
    batches_of = iter(loader)
    next(batches_of)
    loader.close()
    assert list(batches_of) == []


def test_the_demo_trains_on_its_shards():
    demo = preset("demo")
    data = open_dataset(demo)
    loader = Loader(demo, data.train, 0, 0, 1, 0, 2)
    first, _ = loader
    loader.close()
    assert first.inputs.shape == (32, 1, 500) and first.inputs.dtype == torch.float32
    np.testing.assert_array_equal(first.inputs[4], data.train.load(int(first.samples[4]), None))
    assert len(first.plans[0].context_index) == 32 * 3 and len(first.plans[0].target_index) == 32 * 7


@pytest.mark.parametrize("window", [0, 40])
def test_killed_at_random_and_going_on_with_fewer_processes_every_sample_comes_once_an_epoch(window):
    """8 processes, then 4, 2, 1: the same global batches as one process that never stopped."""
    rng = np.random.default_rng(window)
    source, changes = Noise(137), {"data.shuffle_window": window, "train.batch_size": 16}
    whole = batches(stop=30, source=source, **changes)
    start, seen = 0, []
    for size, stop in zip(
        (8, 4, 2, 1), [*np.sort(rng.choice(np.arange(2, 29), 3, replace=False)).tolist(), 30], strict=True
    ):
        ahead = stop + int(rng.integers(0, 3))  # what was made ahead when it was killed is made again
        parts = [batches(start, min(30, ahead), rank, size, source, **changes) for rank in range(size)]
        for shares in zip(*(part[: stop - start] for part in parts), strict=True):
            expected = whole[shares[0].step]
            assert torch.equal(expected.inputs, torch.cat([s.inputs for s in shares]))
            assert torch.equal(expected.plans[0].target_index, torch.cat([s.plans[0].target_index for s in shares]))
            seen += [(int(e), int(n)) for s in shares for e, n in zip(s.epochs, s.samples, strict=True)]
        start = stop
    assert len(seen) == len(set(seen)) == 30 * 16
    for epoch in range(3):
        assert sorted(n for e, n in seen if e == epoch) == list(range(137))


def test_sets_are_mixed_by_weight_and_kept_apart():
    source = Joined([Noise(50), Noise(20, bad=[3])], ["a", "b"])
    changes = {"data.weights": (3.0, 1.0), "data.max_bad_share": 0.1, "train.batch_size": 16}
    got = batches(stop=40, source=source, **changes)
    numbers = np.concatenate([b.samples for b in got])
    assert abs((numbers >= 50).mean() - 0.25) < 0.02 and 53 not in numbers
    assert torch.equal(batches(start=39, stop=40, source=source, **changes)[0].inputs, got[39].inputs)


class Series(Noise):
    """Without augmentation, as series are."""

    def load(self, index, rng, out=None):
        return super().load(index, np.random.default_rng(index))


@pytest.mark.parametrize("workers", [1, 3])
def test_series_kept_on_the_device_are_those_read_for_every_batch(workers):
    changes = {"data.max_bad_share": 0.5, "data.workers": workers}
    for bad in ([], [0, 3, 4, 36]):
        read, kept = (batches(source=Series(37, bad), **changes, **{"data.keep_on": on}) for on in ("host", "device"))
        for a, b in zip(read, kept, strict=True):
            assert torch.equal(a.inputs, b.inputs) and a.samples.tolist() == b.samples.tolist()
            assert torch.equal(a.plans[0].target_index, b.plans[0].target_index)
    loader = Loader(config(**changes, **{"data.keep_on": "device"}), Series(37, [3]), 5, 0, 1, 0, 2)
    assert re.search(r"series: 0 MB, .* GB free on cpu: read once and kept there", loader.where)
    list(loader)
    loader.close()
    assert [one.key for one in loader.bad] == ["noise:3"]
    with pytest.raises(UsageError, match="not one of the 5 samples"):
        batches(source=Series(5, range(5)), **{"data.keep_on": "device"})


@pytest.mark.parametrize(("free", "on", "keep", "says"), [
    (1e6, "auto", True, "read once and kept there"), (1e5, "auto", False, "more than 10% of it"),
    (1e5, "device", True, "read once"), (1e6, "host", False, ""),
])  # fmt: skip
def test_series_are_kept_on_a_gpu_if_they_fit(monkeypatch, free, on, keep, says):
    from jepa_fast.data.loading import resident

    monkeypatch.setattr(resident, "_free", lambda device: free)
    data = config(**{"data.keep_on": on}).data
    kept_there, line = resident.choose(Series(40), data, torch.device("cuda", 0))
    assert kept_there is keep and says in line and bool(line) == bool(says)
    with pytest.raises(UsageError, match="too little; use host"):
        monkeypatch.setattr(resident, "_free", lambda device: 1e4)
        resident.choose(Series(40), config(**{"data.keep_on": "device"}).data, torch.device("cuda", 0))


def test_health_tells_rates_and_reasons():
    loader = Loader(config(**{"data.max_bad_share": 0.5}), Noise(40, bad=[3, 4]), 5, 0, 1, 0, 12)
    list(loader)
    loader.close()
    record = loader.stats.record()
    assert 0 < record["data/wait_share"] <= 1 and record["data/bad"] == 2 and record["data/per_worker_s"] > 0
    assert loader.stats.kinds() == {"unreadable": 2}
    assert loader.stats.record()["data/per_worker_s"] == 0.0  # nothing since


def test_a_loop_that_keeps_no_batch_lives_in_the_memory_of_a_few():
    expected = batches(stop=40)
    loader = Loader(config(), Noise(37), 5, 0, 1, 0, 40)
    where = set()
    for batch, same in zip(loader, expected, strict=True):
        assert torch.equal(batch.inputs, same.inputs)
        where.add(batch.inputs.data_ptr())
    loader.close()
    assert 1 < len(where) <= AHEAD + IN_WORK + 3
    assert len({b.inputs.data_ptr() for b in expected}) == 40  # a list of them keeps them all


def test_buffers_of_a_device_are_used_again_and_hold_the_same_batches(monkeypatch):
    """With pinned memory, as on CUDA; here the memory is plain."""
    from jepa_fast.data.loading import loader as module
    from jepa_fast.masks.packing import MaskPlan

    class Passed:
        def synchronize(self):
            pass

    real = torch.empty
    monkeypatch.setattr(module.torch, "empty", lambda *a, pin_memory=False, **k: real(*a, **k))
    monkeypatch.setattr(module, "cuda_mark", Passed)
    monkeypatch.setattr(MaskPlan, "pin", lambda self: self)
    expected = batches(stop=40)
    loader = Loader(config(), Noise(37), 5, 0, 1, 0, 40)
    loader._pin = True
    where = set()
    for batch, same in zip(loader, expected, strict=True):
        assert torch.equal(batch.inputs, same.inputs)
        where.add(batch.inputs.data_ptr())
    loader.close()
    assert 1 < len(where) <= module.AHEAD + module.IN_WORK + 2
