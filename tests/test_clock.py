"""Where the time goes, and that the host waits for the device on log steps alone."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from test_parallel import TINY
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_fast import run, train
from jepa_fast.clock import Clock, HostSyncs
from jepa_fast.data.loading.batch import HostBatch
from jepa_fast.model.attention import Sequences
from jepa_fast.parallel import World

pytestmark = pytest.mark.usefixtures("alone")


# ---- host synchronisations, without a device to wait for -------------------------------------------

# What needs a value, or a shape that depends on values, and so would wait on a GPU.
WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2",
    "unique_consecutive", "unique_dim_consecutive", "bincount", "linalg_eigvals", "histc", "segment_reduce",
}  # fmt: skip
READS = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}


class Operations(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        selects = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        repeats = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in WAITS or selects or repeats:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Tensor.cpu, .numpy and .tolist, of tensors that would be on the device: those in host memory may be read."""

    def __init__(self, found, on_host):
        super().__init__()
        self.found, self.on_host = found, on_host

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS and args[0].untyped_storage().data_ptr() not in self.on_host:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits_of_a_step(monkeypatch, *args, step=3):
    """What in that step of a real run, between two records, would have made the host wait for a GPU."""
    found, on_host = [], set()
    modes = [Operations(found), Reads(found, on_host)]
    begin, parts, of = Clock.begin, HostBatch.parts, Sequences.of

    def watched(self, now, waited):
        begin(self, now, waited)
        if now == step:
            for mode in modes:
                mode.__enter__()
        if now == step + 1:
            for mode in reversed(modes):
                mode.__exit__(None, None, None)

    def copied(self, device):
        """As to a GPU: what the loop gets is not what the loader holds."""
        for plan in self.plans:
            on_host.update(t.untyped_storage().data_ptr() for t in vars(plan).values() if isinstance(t, torch.Tensor))
        for inputs, plan, share in parts(self, device):
            copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(plan).items()}
            yield inputs.clone(), type(plan)(**copies), share

    with monkeypatch.context() as patched:
        patched.setattr(Clock, "begin", watched)
        patched.setattr(HostBatch, "parts", copied)
        patched.setattr(Sequences, "of", lambda *a, **k: of(*a, **k | {"compiled": True}))  # a CPU may look at lengths
        assert train.main([*args, "--log.every", "10", "--monitor.every", "100", "--checkpoint.every", "0"]) == 0
    return found


IMAGE = ["--train.steps", "6", "--data.workers", "1", "--train.batch_size", "6", "--model.width", "16", "--model.depth", "1",
         "--model.heads", "2", "--model.predictor_width", "16", "--model.predictor_depth", "1", "--masks.group", "3",
         "--monitor.probe_train", "20", "--monitor.probe_test", "20", "--parallel.threads", "1"]  # fmt: skip


@pytest.mark.parametrize("args", [
    ["demo", *TINY, "--optim.clip", "0.1", "--parallel.micro_batch", "3", "--perturb.noise", "0.01"],
    ["demo", *TINY, "--parallel.mode", "fsdp"],
    ["digits", *IMAGE, "--masks.mode", "reference", "--train.precision", "bf16"],
    ["digits", *IMAGE, "--masks.mode", "packed", "--parallel.mode", "ddp"],
], ids=["accumulating", "fsdp", "reference", "packed"])  # fmt: skip
def test_between_records_a_step_reads_nothing_from_the_device(args, monkeypatch):
    assert waits_of_a_step(monkeypatch, *args) == []


def test_each_kind_of_read_would_be_found(monkeypatch):
    forward = run.JEPA.forward

    def reading(self, inputs, plan):
        output = forward(self, inputs, plan)
        features = output.target.detach()
        _ = (
            features.sum().item(),
            bool(output.loss > 0),
            features[features > 0],
            features.sum().tolist(),
            features.cpu(),
        )
        return output

    monkeypatch.setattr(run.JEPA, "forward", reading)
    found = waits_of_a_step(monkeypatch, "demo", *TINY)
    assert found == ["_local_scalar_dense", "_local_scalar_dense", "index", "tolist", "cpu"]


def test_torchs_warnings_of_host_syncs_are_counted_and_told_to_nobody_else(monkeypatch, recwarn):
    asked = []
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", asked.append)
    with warnings.catch_warnings():
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        syncs = HostSyncs()
        for _ in range(3):
            warnings.warn(f"{HostSyncs.SAID} (function)", stacklevel=1)
        warnings.warn("another matter", stacklevel=1)
    assert asked == ["warn"] and syncs.count == 3
    assert [str(w.message) for w in recwarn] == ["another matter"]


# ---- time -----------------------------------------------------------------------------------------


def test_every_second_of_a_step_is_claimed_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("jepa_fast.clock.time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    clock = Clock(World(0, 1, torch.device("cpu")))

    def spend(seconds):
        now[0] += seconds

    def target(seconds):
        with clock.phase_of_forward("target"):
            spend(seconds)

    for step in range(2):
        spend(1.0)
        clock.begin(step, 1.0)
        with clock.phase("examine"):
            target(100.0)  # no part of a training step's forward
        with clock.phase("forward"):
            target(2.0)
            spend(3.0)
        for i, name in enumerate(("backward", "optimizer", "ema", "checkpoint")):
            with clock.phase(name):
                spend(4.0 + i)
        spend(0.5)
    clock.count(num_tokens=46)
    record = clock.report()
    times = {
        "target": 2,
        "context": 3,
        "backward": 4,
        "optimizer": 5,
        "ema": 6,
        "checkpoint": 7,
        "other": 0.5,
        "skew": 0,
    }
    assert {k: v for k, v in record.items() if k.startswith("time/")} == {f"time/{k}": v for k, v in times.items()}
    assert record["tokens_per_s"] == pytest.approx(46 / (2 * 28.5))


def test_the_longest_of_several_processes_is_told(monkeypatch):
    clock = Clock(World(0, 2, torch.device("cpu")))
    mine, other = (
        dict.fromkeys(("data_wait", "examine", "target", "context", "backward", "optimizer", "ema", "checkpoint"), t)
        for t in (1.0, 3.0)
    )
    monkeypatch.setattr("jepa_fast.parallel.gather", lambda own, world: [mine, other])
    clock.begin(0)
    clock.begin(1)
    record = clock.report()
    assert record["time/skew"] == pytest.approx((9 - 6) / 2) and record["time/backward"] == pytest.approx(2 / 2)
