"""What happens in a run now and then: bad steps, spikes, traces."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from test_parallel import TINY, metrics
from together import together

from fused_ema.op import local
from jepa_fast import checkpoint, report, run, train
from jepa_fast.clock import Clock
from jepa_fast.log import read
from jepa_fast.monitor.spikes import loss_spike

pytestmark = pytest.mark.usefixtures("alone")


def go(*args):
    return train.main([*TINY, *args])


# ---- steps that change nothing, steps that stand out ------------------------------------------------


def spoiled(rank, cases):
    """In steps 2, 4, 5 and 6 rank 1 alone has a loss that is no number, or a good loss with such a gradient.

    Returns of each case its status, and of each step whether it changed any tensor of this process.
    """
    report.write = lambda folder: folder
    begin, forward, set_up = Clock.begin, run.JEPA.forward, train.set_up
    port, returned = int(os.environ["MASTER_PORT"]), []
    sys.stderr = open(f"said-{rank}", "w", buffering=1)  # noqa: SIM115
    for i, (kind, argv) in enumerate(cases):
        os.environ["MASTER_PORT"] = str(port + i)
        held, changed, now = {}, [], {}

        def watch(self, step, waited, held=held, changed=changed, now=now):
            begin(self, step, waited)
            now["step"] = step
            state = {n: local(t).clone() for n, t in run.tensors(now["run"].jepa, now["run"].optimizer).items()}
            if held:
                changed.append(any(not torch.equal(state[n], held[n]) for n in held))
            held |= state

        def spoil(self, inputs, plan, now=now, kind=kind):
            output = forward(self, inputs, plan)
            if rank == 0 or now.get("step") not in (2, 4, 5, 6):
                return output
            nan = float("nan")
            if kind == "loss":
                return output._replace(loss=output.loss * nan)
            output.loss.register_hook(lambda gradient: gradient * nan)
            return output

        def seen(*args, now=now):
            now["run"] = set_up(*args)
            return now["run"]

        Clock.begin, run.JEPA.forward, train.set_up = watch, spoil, seen
        try:
            status = train.main([*TINY, *argv])
        except SystemExit as ended:
            status = ended.code
        returned.append((status, changed))
    return returned


MODES = {
    "ddp": ["ddp"], "fsdp": ["fsdp"], "zero2": ["fsdp", "--parallel.reshard_after_forward", "False"],
    "hsdp": ["hsdp", "--parallel.shards", "1"],
}  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("kinds", [
    {"ddp": "loss", "fsdp": "gradient"},
    pytest.param({"ddp": "gradient", "fsdp": "loss", "zero2": "gradient", "hsdp": "loss"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_bad_step_on_one_process_changes_nothing_on_any_and_too_many_end_the_run(kinds):
    """Weights, moments, step counters and target encoder, of every process, bit for bit."""
    more = [
        "--train.steps",
        "12",
        "--train.max_bad_steps",
        "3",
        "--parallel.micro_batch",
        "3",
        "--perturb.noise",
        "0.001",
    ]
    cases = [(kind, ["--run.dir", mode, *more, "--parallel.mode", *MODES[mode]]) for mode, kind in kinds.items()]
    for statuses in together(2, spoiled, cases):
        assert statuses == [(2, [True, True, False, True, False, False, False])] * len(cases)
    said = Path("said-0").read_text().splitlines()
    for mode, line in zip(kinds, said, strict=True):  # one line each, and the other process says nothing
        assert (
            "were not finite for 3 steps up to step 7" in line and f"last checkpoint: {mode}/checkpoints/step-6" in line
        )
        assert all(w.isfinite().all() for w in checkpoint.load_newest(Path(mode), fall_back=False)[1]["model"].values())
        assert [e["count"] for e in read(Path(mode, "events.jsonl")) if e["kind"] == "skipped_step"] == [1, 1, 1, 1]
    assert not Path("said-1").read_text()


def test_a_loss_spike_is_an_event_with_its_level():
    calm = [{"step": i, "loss": 1.0 + 0.01 * (-1) ** i} for i in range(30)]
    assert loss_spike(calm, 1.02) is None and loss_spike(calm[:10], 9.0) is None
    spike = loss_spike(calm, 3.0)
    assert spike["level"] == pytest.approx(1.0, abs=0.02) and spike["sigmas"] > 8


def test_a_spike_between_two_records_is_recorded(monkeypatch):
    real, seen = run.JEPA.forward, {"steps": 0}

    def forward(self, inputs, plan):
        output = real(self, inputs, plan)
        seen["steps"] += 1
        return (
            output._replace(loss=output.loss * 50, terms={"prediction": output.terms["prediction"] * 50})
            if seen["steps"] == 23
            else output
        )

    monkeypatch.setattr(run.JEPA, "forward", forward)
    assert go("--run.dir", "x", "--train.steps", "24", "--monitor.every", "50", "--optim.lr", "1e-6") == 0
    spikes = [e for e in read(Path("x/events.jsonl")) if e["kind"] == "loss_spike"]
    assert [e["step"] for e in spikes] == [22] and spikes[0]["loss"] > 10 * spikes[0]["level"]


def test_deterministic_asks_torch_for_it_and_repeats(monkeypatch):
    try:
        for name in ("a", "b"):
            assert go("--run.dir", name, "--train.deterministic", "True", "--train.steps", "3") == 0
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert metrics("a") == metrics("b")


# ---- on request -----------------------------------------------------------------------------------


def test_traces_and_tensorboard_are_written_on_request(capsys):
    tensorboard = pytest.importorskip("tensorboard", reason="optional") if _has("tensorboard") else None
    more = ["--log.tensorboard", "True"] if tensorboard else []
    assert go("--run.dir", "x", "--train.steps", "9", "--profile.steps", "2", *more) == 0
    assert "traceEvents" in json.loads(Path("x/profile/rank0.json").read_text())
    assert "addmm" in Path("x/profile/kernels.txt").read_text()
    assert bool(list(Path("x").glob("tensorboard/events*"))) == bool(tensorboard)


def _has(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_tensorboard_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert go("--log.tensorboard", "True", "--run.dir", "x") == 2
    assert "pip install tensorboard" in capsys.readouterr().err
