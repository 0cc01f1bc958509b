"""One run, whatever the number of processes and however the model is cut: the same data, masks, losses and distances."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from together import together
from torch.distributed.tensor import DTensor

from jepa_fast import checkpoint, flops, optim, parallel, report, train
from jepa_fast.config import replace
from jepa_fast.log import read, repeatable
from jepa_fast.masks import packing
from jepa_fast.masks.sample import sample_masks
from jepa_fast.model.jepa import JEPA
from jepa_fast.monitor import Examination
from jepa_fast.monitor.fixed_masks import FixedMasks
from jepa_fast.parallel import memory, wrap
from jepa_fast.presets import preset

TINY = ["--train.steps", "6", "--log.every", "1", "--monitor.every", "3", "--monitor.probe_train", "20", "--monitor.probe_test", "20",
        "--checkpoint.every", "3", "--data.workers", "1", "--train.batch_size", "8", "--model.width", "16", "--model.depth", "2",
        "--model.predictor_width", "12", "--model.predictor_heads", "2", "--parallel.threads", "1"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(report, "write", lambda folder: folder)  # figures cost more than these runs
    return tmp_path


def go(*args):
    assert train.main([*TINY, *args]) == 0


def runs(rank, cases):
    """Train case after case in this process."""
    port = int(os.environ["MASTER_PORT"])
    report.write = lambda folder: folder
    for i, case in enumerate(cases):
        os.environ["MASTER_PORT"] = str(port + i)
        assert train.main([*TINY, *case]) == 0, case


@pytest.mark.dist
def test_every_mode_on_two_processes_trains_what_one_process_trains():
    """Gradient accumulation with a last micro batch that is smaller rides along."""
    modes = {
        "ddp": ["--parallel.mode", "ddp", "--parallel.micro_batch", "3"],
        "fsdp": ["--parallel.mode", "fsdp", "--parallel.micro_batch", "3", "--optim.clip", "0.05"],
        "zero2": ["--parallel.mode", "fsdp", "--parallel.reshard_after_forward", "False", "--parallel.prefetch", "0"],
        "hsdp": ["--parallel.mode", "hsdp", "--parallel.shards", "1"],
    }
    go("--run.dir", "one")
    go("--run.dir", "clipped", "--optim.clip", "0.05")
    go("--run.dir", "batch", "--objective.target_norm", "batch")
    modes["ddp-batch"] = ["--parallel.mode", "ddp", "--objective.target_norm", "batch"]
    together(2, runs, [["--run.dir", name, *args] for name, args in modes.items()])
    for name in modes:
        agree(name, {"fsdp": "clipped", "ddp-batch": "batch"}.get(name, "one"))
        assert [r["step"] for r in metrics(name) if "loss/heldout" in r] == [0, 3, 6]


@pytest.mark.dist
@pytest.mark.slow
def test_every_mode_on_four_processes_trains_what_one_process_trains_for_twenty_steps():
    modes = {
        "ddp": ["--parallel.mode", "ddp"],
        "fsdp": ["--parallel.mode", "fsdp", "--parallel.micro_batch", "1"],
        "zero2": ["--parallel.mode", "fsdp", "--parallel.reshard_after_forward", "False"],
        "hsdp": ["--parallel.mode", "hsdp", "--parallel.shards", "2"],
    }
    longer = ["--train.steps", "20"]
    go("--run.dir", "one", *longer)
    together(4, runs, [["--run.dir", name, *args, *longer] for name, args in modes.items()], timeout=1200)
    for name in modes:
        agree(name, "one", tolerance=1e-3)


def test_micro_batches_of_images_add_up_to_the_whole_batch_in_every_mask_mode():
    """Masks of a group, cut to the shortest context or not, are those of the global batch; loss weights are per image."""
    image = ["--train.steps", "2", "--monitor.every", "5", "--model.heads", "2", "--masks.group", "4", "--train.batch_size", "6",
             "--monitor.probe_train", "20", "--monitor.probe_test", "20", "--log.every", "1", "--data.workers", "1",
             "--model.width", "16", "--model.depth", "1", "--model.predictor_depth", "1", "--model.predictor_width", "16"]  # fmt: skip
    for mode in ("reference", "packed"):
        for name, micro in ((f"{mode}-whole", "0"), (f"{mode}-parts", "4")):
            args = ["--masks.mode", mode, "--parallel.micro_batch", micro, "--run.dir", name]
            assert train.main(["digits", *image, *args]) == 0
        agree(f"{mode}-parts", f"{mode}-whole", tolerance=1e-4)
        for a, b in zip(metrics(f"{mode}-parts"), metrics(f"{mode}-whole"), strict=True):
            for key in ("discrepancy/visible", "spread", "skill"):
                assert a[key] == pytest.approx(b[key], rel=1e-4), (mode, key)


# ---- one process that is sharded for real ---------------------------------------------------------


@pytest.fixture
def world():
    joined = parallel.join(replace(preset("demo"), {"parallel.mode": "fsdp", "parallel.threads": 1}))
    yield joined
    parallel.leave()


SMALL = {
    "model.width": 16,
    "model.predictor_width": 16,
    "model.depth": 2,
    "train.batch_size": 4,
    "parallel.mode": "fsdp",
    "data.channels": 1,
    "data.series_length": 500,
}


def sharded(world, **changes):
    config = replace(preset("demo"), SMALL | {k.replace("__", "."): v for k, v in changes.items()})
    torch.manual_seed(0)
    return config, parallel.build(config, world, parallel.choose(config, world))


def a_batch(config):
    samples = np.arange(config.train.batch_size)
    masks = sample_masks(config.masks, config.grid, 0, 0, np.zeros_like(samples), samples)
    inputs = torch.randn(len(samples), 1, config.data.series_length, generator=torch.Generator().manual_seed(1))
    return inputs, packing.plan(masks, config.num_tokens)


def test_fsdp_on_one_process_wraps_for_real_with_the_numbers_of_one_that_is_not(world):
    config, jepa = sharded(world)
    assert all(isinstance(p, DTensor) for p in jepa.parameters())
    assert len(parallel.roots(jepa)) == 3 and not jepa.target_encoder.norm.weight.requires_grad
    torch.manual_seed(0)
    plain = JEPA(config)
    batch = a_batch(config)
    assert torch.equal(jepa(*batch).loss, plain(*batch).loss)
    parallel.settle(jepa)
    for name, value in parallel.full(jepa.state_dict()).items():
        assert torch.equal(value, plain.state_dict()[name]), name
    for name, value in jepa.named_buffers():
        assert torch.equal(value, dict(plain.named_buffers())[name]), name


def test_the_target_encoder_reads_what_the_ema_wrote_into_its_shards(world):
    """FSDP2 keeps a root gathered after a forward without a backward, and then neither sees nor shows its shards."""
    config, jepa = sharded(world)
    batch = a_batch(config)
    before = jepa(*batch).target
    held = list(jepa.target_encoder.parameters())
    assert all(isinstance(p, DTensor) for p in held)  # also those of the root: patch embedding and last norm
    with torch.no_grad():
        for p in held:
            p.to_local().add_(0.1)
    after = jepa(*batch).target
    for p in held:
        with torch.no_grad():
            p.to_local().sub_(0.1)
    torch.manual_seed(0)
    plain = JEPA(config)
    with torch.no_grad():
        for p in plain.target_encoder.parameters():
            p.add_(0.1)
    torch.testing.assert_close(after, plain(*batch).target)
    assert not torch.equal(before, after)


def test_what_is_never_initialised_is_found(world, monkeypatch):
    real = wrap._hand_out

    def forgetful(jepa, whole, world):
        real(jepa, whole, world)
        jepa.predictor.positions.fill_(float("nan"))

    monkeypatch.setattr(wrap, "_hand_out", forgetful)
    with pytest.raises(AssertionError, match=r"never initialised: predictor\.positions"):
        sharded(world)
    monkeypatch.setattr(wrap, "_hand_out", lambda *_: None)
    with pytest.raises(AssertionError, match=r"context_encoder\.patch_embed\.weight.*target_encoder\.positions"):
        sharded(world)


def test_a_bad_step_under_fsdp_leaves_every_shard_bit_identical(world):
    config, jepa = sharded(world)
    optimizer = optim.build(jepa, config.optim)
    optim.set_rates(optimizer, 0.1, 0.1)
    batch = a_batch(config)
    for bad in (False, True):
        output = jepa(*batch)
        output.loss.backward()
        before = {n: t.clone() for n, t in (jepa.state_dict() | optim.moments(optimizer, jepa)).items()}
        loss = output.loss.detach() * (float("nan") if bad else 1)
        assert bool(optim.step_if_finite(optimizer, loss, clip=1.0)) is not bad
        parallel.settle(jepa)
        after = jepa.state_dict() | optim.moments(optimizer, jepa)
        changed = {n for n in before if not torch.equal(_local(before[n]), _local(after[n]))}
        assert bool(changed) is not bad


def _local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def test_bf16_weights_and_recomputed_blocks_change_the_loss_by_rounding_at_most(world):
    reference = None
    for changes in (
        {},
        {"parallel__recompute": "full"},
        {"train__precision": "bf16"},
        {"train__precision": "bf16", "parallel__reduce": "bf16"},
    ):
        config, jepa = sharded(world, **changes)
        with parallel.precision(config, world):
            output = jepa(*a_batch(config))
        output.loss.backward()
        gradients = parallel.full({n: p.grad for n, p in jepa.named_parameters() if p.grad is not None})
        assert all(g.dtype == torch.float32 for g in gradients.values())
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        reference = reference or (output.loss.item(), norm.item(), gradients)
        half = "train__precision" in changes
        assert output.loss.item() == pytest.approx(reference[0], rel=2e-2 if half else 0)
        assert norm.item() == pytest.approx(reference[1], rel=5e-2 if half else 1e-6)


@pytest.mark.parametrize("mode", ["fsdp", "hsdp"])
def test_an_examination_runs_on_blocks_that_are_gathered_in_bf16(world, monkeypatch, mode):
    """As on CUDA. A CPU's layer norm takes bf16 weights beside a bf16 residual stream, which autocast makes."""
    on_cuda = wrap.policies
    monkeypatch.setattr(wrap, "policies", lambda config, _: on_cuda(config, "cuda"))
    config, jepa = sharded(world, parallel__mode=mode, train__precision="bf16", model__residual="bf16")
    examination = Examination(
        jepa.context_encoder, jepa.target_encoder, a_batch(config)[0], views=FixedMasks(config), everywhere=True,
        around=partial(parallel.gathered, jepa, config),
    )  # fmt: skip
    looked = examination.look(0)
    assert looked["discrepancy/full"] == 0, looked
    assert all(p.dtype == torch.float32 for p in jepa.parameters()), "the shards are float32 again"


# ---- arithmetic -----------------------------------------------------------------------------------


def test_the_arithmetic_is_that_of_the_published_sizes():
    """16 bytes a trained parameter and 4 a target's: ViT-H/14 is 631 M and its predictor 22 M, so 13.0 GB."""
    config = preset("in1k-vith14")
    whole = memory.need(config, "ddp", 8, 1)
    assert whole.state / 1e9 == pytest.approx(13.0, abs=0.1)
    cut = memory.need(config, "fsdp", 8, 8)
    assert cut.state == pytest.approx(whole.state / 8) and cut.gathered > 0 and whole.gathered == 0
    assert whole.traffic == pytest.approx(2 * 7 / 8 * 4 * (631e6 + 22e6), rel=0.02)
    assert memory.need(config, "fsdp", 8, 8).traffic > whole.traffic / 2
    hybrid = memory.need(config, "hsdp", 16, 8)
    assert hybrid.state == pytest.approx(cut.state)
    fewer = memory.need(replace(config, {"parallel.micro_batch": 32}), "ddp", 8, 1)
    assert 1 < 8 * fewer.activations / whole.activations < 1.3  # the longest of smaller batches is longer an input


def test_the_need_is_that_of_the_longest_batch_a_run_draws():
    config = replace(preset("in1k-vitb16"), {"train.batch_size": 128})
    context, sequences = memory._longest_batch(config, 128)
    drawn = [flops.batch_rows(each)[1:] for each in flops.usual_plan(config, 128, 200)]
    longest, usual = np.max(drawn, 0), np.mean(drawn, 0)
    assert (longest <= (context, sequences)).all() and (longest > 1.2 * usual).all()
    most = memory.need(config, "single", 1, 1).activations
    assert most == flops.activation_bytes(config, 128, context, sequences)


def test_auto_takes_the_least_communication_that_fits_and_says_why():
    config = replace(preset("in1k-vith14"), {"train.batch_size": 2048, "masks.mode": "packed"})
    whole, cut = (memory.need(config, mode, 16, shards).total for mode, shards in (("ddp", 1), ("hsdp", 8)))
    cases = {"ddp": whole * 1.01, "hsdp": (whole + cut) / 2, "fsdp": cut * 0.99}
    for mode, room in cases.items():
        choice = memory._choose(config, 16, 8, room / memory.USABLE)
        assert choice.mode == mode and (mode == "ddp" or "ddp needs" in choice.reason)
    alone = memory._choose(config, 1, 1, 80e9)
    assert alone.mode == "single" and "GB: give --parallel.micro_batch 128" in alone.reason
    assert "too much for so few devices" in memory._choose(config, 1, 1, 1e9).reason


def test_where_activations_alone_are_too_many_auto_says_which_micro_batch_would_do():
    """256 inputs of ViT-H/14 a device: more than 80 GB however the weights are cut; half of them fit, uncut."""
    config = replace(preset("in1k-vith14"), {"train.batch_size": 2048, "masks.mode": "packed"})
    room = memory.USABLE * 80e9
    assert memory.need(config, "fsdp", 8, 8).total > room
    assert memory._choose(config, 8, 8, 80e9).reason.endswith("give --parallel.micro_batch 128, with which ddp fits")
    assert memory.need(replace(config, {"parallel.micro_batch": 128}), "ddp", 8, 1).total < room


def test_copies_are_of_one_machine_only_where_machines_are_alike():
    config = preset("in1k-vith14")
    assert [memory._copy_size(config, *sizes) for sizes in ((64, 8), (12, 8), (8, 8), (4, 1))] == [8, 12, 8, 4]
    assert memory._copy_size(replace(config, {"parallel.shards": 4}), 64, 8) == 4


def test_blocks_are_gathered_in_bf16_and_gradients_added_in_float32():
    config = replace(preset("demo"), {"train.precision": "bf16"})
    inner, outer = wrap.policies(config, "cuda")
    assert (inner.param_dtype, inner.reduce_dtype, outer.param_dtype) == (torch.bfloat16, torch.float32, None)
    assert wrap.policies(replace(config, {"parallel.reduce": "bf16"}), "cuda")[0].reduce_dtype == torch.bfloat16
    assert wrap.policies(preset("demo"), "cuda")[0].param_dtype is None


def test_a_dry_run_needs_no_device_no_data_and_no_folder(capsys, tmp_path):
    assert train.main(["in1k-vith14", "--dry-run", "64"]) == 0
    said = capsys.readouterr().out
    assert "64 process(es), 8 to a machine: global batch 2048, 32 a process" in said
    assert all(word in said for word in ("fsdp", "hsdp over 8", "ddp", "--parallel.mode auto: ddp (everything fits"))
    assert train.main(["--dry-run", "3", "in1k-vith14"]) == 2
    assert "3 processes do not divide it; give 2046 or 2049" in capsys.readouterr().err
    assert train.main(["--dry-run=x"]) == 2
    assert not list(tmp_path.iterdir())


def agree(a, b, tolerance=2e-4):
    ours, theirs = metrics(a), metrics(b)
    assert [r.keys() for r in ours] == [r.keys() for r in theirs]
    for x, y in zip(ours, theirs, strict=True):
        for key in ("loss", *(k for k in x if k.startswith(("drift/", "probe/", "rankme", "discrepancy/full")))):
            if key in x:
                assert x[key] == pytest.approx(y[key], rel=tolerance, abs=1e-6), (a, x["step"], key)
    mine, other = (checkpoint.load_newest(Path(r), fall_back=False)[1]["model"] for r in (a, b))
    for key, value in mine.items():
        torch.testing.assert_close(value, other[key], rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{a} {k}: {m}")


def metrics(run_dir):
    return repeatable(read(Path(run_dir) / "metrics.jsonl"))
