"""Regression targets: each norm against its formula in float64, on one process and two, and in training."""

import json

import pytest
import torch
from together import together

from jepa_fast import checkpoint, train
from jepa_fast.config import check, from_json, replace, to_json
from jepa_fast.errors import UsageError
from jepa_fast.model.jepa import token_loss
from jepa_fast.model.targets import (
    EPS,
    FROM_BATCH,
    MOMENTUM,
    Targets,
    centred_by_own,
    norm_of,
    regress,
    statistics,
)
from jepa_fast.monitor import CollapseMonitor
from jepa_fast.monitor.measures.skill import trivial_skills
from jepa_fast.parallel.world import check_split
from jepa_fast.presets import preset

NORMS = ["layer", "batch", "position", "centre", "none"]
TINY = ["--train.steps", "6", "--log.every", "1", "--monitor.every", "6", "--monitor.probe_train", "20", "--monitor.probe_test", "20",
        "--checkpoint.every", "3", "--checkpoint.keep", "0", "--data.workers", "1", "--train.batch_size", "8", "--model.width", "16",
        "--model.depth", "1", "--model.predictor_width", "12", "--model.predictor_heads", "2", "--parallel.threads", "1"]  # fmt: skip


def features(seed=0, inputs=16, offset=0.0):
    """float32 [inputs, 5, 8], every feature and position with a mean and a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    scale, mean = draw(5, 8).exp(), 3 * draw(5, 8)
    return draw(inputs, 5, 8) * scale + mean + offset


def reference(x, norm):
    """The formula, in float64."""
    x = x.double()
    dims = {"layer": (2,), "batch": (0, 1), "position": (0,), "centre": (0,)}
    if norm == "none":
        return x
    mean = x.mean(dims[norm], keepdim=True)
    if norm == "centre":
        return x - mean
    return (x - mean) / (((x - mean) ** 2).mean(dims[norm], keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_targets_are_their_formula(norm, offset):
    x = features(offset=offset)
    got = regress(x, norm)
    assert got.dtype == torch.float32 and regress(x.bfloat16(), norm).dtype == torch.float32
    torch.testing.assert_close(got.double(), reference(x, norm), rtol=1e-4, atol=3e-4 if offset else 1e-5)


def test_a_feature_without_variance_is_zero():
    for norm in ("batch", "position"):
        assert regress(torch.full((4, 5, 8), 7.3), norm).abs().max() < 1e-3


@pytest.mark.dist
def test_two_processes_have_the_statistics_of_one():
    x = features(offset=30.0)
    found = together(2, half_of_the_batch, x)
    for norm in NORMS:
        whole = regress(x, norm)
        halves = torch.cat([torch.tensor(one[norm]) for one in found])
        torch.testing.assert_close(halves, whole, rtol=1e-5, atol=1e-5)
        if norm in FROM_BATCH:
            single = Targets(norm, "running", 5, 8)
            single.statistics(x)
            single.update(torch.tensor(True))
            for one in found:
                held = torch.tensor(one[f"running/{norm}"], dtype=torch.float64)
                torch.testing.assert_close(held, single.square, rtol=1e-6, atol=1e-6)


def half_of_the_batch(rank, x):
    torch.distributed.init_process_group("gloo")
    mine = x[8 * rank : 8 * rank + 8]
    out = {}
    for norm in NORMS:
        out[norm] = regress(mine, norm).tolist()
        if norm in FROM_BATCH:
            targets = Targets(norm, "running", 5, 8)
            targets.statistics(mine)
            targets.update(torch.tensor(True))
            out[f"running/{norm}"] = targets.square.tolist()
    torch.distributed.destroy_process_group()
    return out


# ---- running statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", FROM_BATCH)
def test_running_statistics_are_the_averages_they_say(norm):
    targets, dims = Targets(norm, "running", 5, 8), (0, 1) if norm == "batch" else (0,)
    mean = square = None
    for step in range(150):
        x = features(seed=step % 7, inputs=2)
        used = targets.statistics(x)
        now, now2 = x.double().mean(dims), x.double().square().mean(dims)
        if step == 0:
            mean, square = now, now2
        std = (square - mean**2 + EPS).sqrt()
        torch.testing.assert_close(used.mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(used.std.double(), std, rtol=1e-4, atol=1e-5)
        weight = max(1 - MOMENTUM, 1 / (step + 1))
        mean, square = mean + weight * (now - mean), square + weight * (now2 - square)
        targets.update(torch.tensor(True))


def test_running_statistics_take_micro_batches_for_one_batch_and_leave_out_bad_steps():
    whole, parts = Targets("position", "running", 5, 8), Targets("position", "running", 5, 8)
    for step in range(4):
        x = features(seed=step, inputs=6)
        whole.statistics(x)
        used = [parts.statistics(part) for part in x.split((4, 2))]
        assert torch.equal(used[0].mean, used[1].mean)  # one step has one normalisation
        for targets in (whole, parts):
            targets.update(torch.tensor(step != 2))
    bad = features()
    bad[0, 0, 0] = float("nan")
    parts.statistics(bad)
    parts.update(torch.tensor(True))
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.square, whole.square, rtol=1e-5, atol=1e-5)
    assert float(parts.steps) == 3


def test_what_a_warm_up_has_seen_is_forgotten():
    seen, fresh = Targets("batch", "running", 5, 8), Targets("batch", "running", 5, 8)
    seen.statistics(torch.zeros(4, 5, 8))
    seen.forget()
    assert torch.equal(seen.statistics(features()).mean, fresh.statistics(features()).mean)


# ---- what a constant earns, and the skill ----------------------------------------------------------


@pytest.mark.parametrize("norm", FROM_BATCH)
def test_a_constant_of_each_position_has_no_skill(norm):
    """Mean over batches of the skill of a predictor that gives each position's true mean."""
    found, rows, weight = [], torch.arange(8 * 5), torch.full((40,), 1 / 40)
    for seed in range(400):
        x = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(seed)) + torch.arange(5.0)[:, None]
        used = statistics(x, norm)
        regression, position = regress(x, norm, used), torch.arange(5.0)[:, None].expand(5, 8)
        best = (position - used.mean) / used.std if norm == "batch" else torch.zeros(5, 8)
        loss, centred = (regression - best).square().mean(), centred_by_own(norm, used)
        skills = trivial_skills(loss, regression, x.flatten(0, 1), rows, rows, weight, "l2", (5,), centred=centred)
        found.append(float(skills["skill/constant"]))
    assert abs(sum(found) / len(found)) < 0.01  # off by 1/8 with the wrong correction


@pytest.mark.parametrize("kind", ["l2", "l1", "smooth_l1"])
def test_skill_is_zero_for_the_best_constant_and_one_for_a_perfect_predictor(kind):
    x = 2 * torch.randn(400, 6, 16, generator=torch.Generator().manual_seed(0))
    rows, weight = torch.arange(400 * 6), torch.full((400 * 6,), 1 / (400 * 6))
    centre = x.median(0, keepdim=True).values if kind == "l1" else x.mean(0, keepdim=True)
    constant = token_loss(centre.expand_as(x), x, kind).mean()

    def skill(loss):
        return float(trivial_skills(loss, x, x.flatten(0, 1), rows, rows, weight, kind, (6,))["skill/constant"])

    assert skill(constant) == pytest.approx(0, abs=0.01) and skill(torch.tensor(0.0)) == 1
    assert skill(2 * constant) == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize("norm", [*NORMS, True, False])
@pytest.mark.parametrize("own", [True, False])
def test_a_monitor_measures_skill_on_the_targets_of_the_loss(norm, own):
    """Against the definition, in float64; the copied context features are normalised like the targets at their place."""
    x, z, named = features(), features(seed=1)[:, :2], norm_of(norm)
    given = None if own else statistics(features(seed=3), named)
    given = given and given._replace(own=False)
    visible, hidden = torch.tensor([[0, 1]] * 16), torch.tensor([[2, 3, 4]] * 16)
    record = CollapseMonitor(None, loss="l2", target_norm=norm).observe(0.7, z, x, visible, hidden, statistics=given)

    used = given or statistics(x, named)
    full = torch.cat([z, x[:, 2:]], dim=1)  # so that a token stands at its position
    wanted, copied = (regress(v, named, used).double() for v in (x, full))
    wanted, copied = wanted[:, 2:], copied[:, 1:2].expand(16, 3, 8)
    assert 1 - record["skill/copy"] == pytest.approx(0.7 / float((wanted - copied).square().mean()), rel=1e-4)
    factor = 1 if own and named in ("position", "centre") else 16 / 15
    constant = float((wanted - wanted.mean(0)).square().mean()) * factor
    assert 1 - record["skill/constant"] == pytest.approx(0.7 / constant, rel=1e-4)


def test_an_unknown_norm_is_refused_by_name():
    with pytest.raises(ValueError, match="target_norm is 'layers'; give one of layer, batch"):
        CollapseMonitor(None, target_norm="layers")


# ---- configurations and runs ----------------------------------------------------------------------


def test_configurations_of_old_runs_still_load():
    for old, name in ((True, "layer"), (False, "none")):
        raw = json.loads(to_json(preset("demo")))
        raw["objective"] = {"loss": "l2", "target_norm": old}
        assert from_json(json.dumps(raw)).objective.target_norm == name
        assert replace(preset("demo"), {"objective.target_norm": old}).objective.target_norm == name


@pytest.mark.parametrize(("changes", "size", "says"), [
    ({"objective.target_norm": "position", "train.batch_size": 1}, 1, "a batch of 1 has no statistics"),
    ({"objective.target_norm": "batch", "parallel.micro_batch": 4}, 2, "give --objective.target_stats running"),
])  # fmt: skip
def test_what_has_no_statistics_is_refused(changes, size, says):
    config = replace(preset("demo"), changes)
    with pytest.raises(UsageError, match=says):
        check_split(check(config), size)
    check_split(check(replace(config, {"objective.target_stats": "running"})), 1)


def go(*args):
    assert train.main([*TINY, *args]) == 0


def metrics(name):
    with open(f"{name}/metrics.jsonl") as stream:
        return [json.loads(line) for line in stream]


def runs(rank, args):
    go("--run.dir", "two", *args)


@pytest.mark.dist
@pytest.mark.parametrize("args", [
    ["--objective.target_norm", "batch"],
    ["--objective.target_norm", "position", "--objective.target_stats", "running", "--parallel.mode", "fsdp"],
])  # fmt: skip
def test_two_processes_train_on_the_targets_of_one(alone, args):
    go("--run.dir", "one", *args[:4])
    together(2, runs, args)
    one, two = (checkpoint.load(alone / name / "checkpoints/step-6")["model"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    for a, b in zip(metrics("one"), metrics("two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_running_statistics_make_micro_batches_and_resumed_runs_exact(alone):
    args = ["--objective.target_norm", "batch", "--objective.target_stats", "running"]
    go("--run.dir", "whole", *args)
    go("--run.dir", "parts", *args, "--parallel.micro_batch", "3")
    go("--run.dir", "first", *args, "--train.steps", "3")
    go("--run.dir", "first", *args, "--resume", "auto")
    whole, first = (checkpoint.load(alone / name / "checkpoints/step-6")["model"] for name in ("whole", "first"))
    assert whole["targets.steps"] == 6 and all(torch.equal(first[name], value) for name, value in whole.items())
    for a, b in zip(metrics("whole")[1:], metrics("parts")[1:], strict=True):  # step 0: the first micro batch's own
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_a_run_starts_from_another_ones_weights_with_statistics_of_its_own(alone):
    short, running = ["--train.steps", "3"], ["--objective.target_norm", "batch", "--objective.target_stats", "running"]
    go("--run.dir", "running", *short, *running)
    go("--run.dir", "layer", *short, "--init.from", "running")
    go("--run.dir", "again", *short, *running, "--init.from", "layer")
    assert checkpoint.load(alone / "again/checkpoints/step-3")["model"]["targets.steps"] == 3
