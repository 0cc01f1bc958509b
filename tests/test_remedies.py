"""What may shorten the phase: regularisers, teachers, schedules, pixel targets, each against its formula."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm as gauss
from together import together

from jepa_fast import checkpoint, optim, schedules, train
from jepa_fast.config import EMA, check, replace
from jepa_fast.ema import TargetEMA
from jepa_fast.errors import UsageError
from jepa_fast.masks.packing import plan
from jepa_fast.masks.sample import sample_masks
from jepa_fast.model.jepa import JEPA
from jepa_fast.model.regularizers import PUBLISHED, Regularizer, pool, sigreg, vicreg, visreg
from jepa_fast.parallel.world import World, check_split
from jepa_fast.presets import preset

ALONE = World(0, 1, torch.device("cpu"))
SENSOR = {"data.embedded": "sensor", "data.channels": 1, "data.series_length": 500}
TINY = ["--data.embedded", "sensor", "--train.steps", "4", "--log.every", "1", "--monitor.every", "4", "--monitor.probe_train", "20",
        "--monitor.probe_test", "20", "--checkpoint.every", "2", "--checkpoint.keep", "0", "--data.workers", "1",
        "--train.batch_size", "8", "--model.width", "16", "--model.depth", "1", "--model.predictor_width", "12",
        "--model.predictor_heads", "2", "--parallel.threads", "1"]  # fmt: skip


def embeddings(inputs=12, width=6):
    z = np.random.default_rng(0).normal(size=(inputs, width)) @ np.random.default_rng(1).normal(size=(width, width))
    return z + 0.3


def unit_vectors(width=6, count=9):
    a = np.random.default_rng(2).normal(size=(width, count))
    return a / np.linalg.norm(a, axis=0)


# ---- regularisers ---------------------------------------------------------------------------------


def reference(kind, z, a):
    """The formulas, input by input and direction by direction, in float64."""
    n, d = z.shape
    if kind == "vicreg":
        covariance = np.cov(z, rowvar=False)
        hinge = np.mean([max(0.0, 1 - math.sqrt(covariance[j, j] + 1e-4)) for j in range(d)])
        return 25 * hinge + sum(covariance[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d
    if kind == "sigreg":
        t = np.linspace(-3, 3, 33)  # the whole line, by the trapezoid rule
        per_direction = []
        for direction in a.T:
            empirical = np.mean([np.exp(1j * t * (direction @ row)) for row in z], axis=0)
            per_direction.append(np.trapezoid(np.abs(empirical - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2), t))
        return np.mean(per_direction)
    sigma = np.sqrt(z.var(0, ddof=1) + 1e-4)
    slices = np.sort(((z - z.mean(0)) / sigma) @ a, axis=0)
    quantiles = gauss.ppf((np.arange(n) + 0.5) / n)
    return np.mean((1 - sigma) ** 2) + np.mean((slices - quantiles[:, None]) ** 2)


def ours(kind, z, a):
    return vicreg(z) if kind == "vicreg" else (sigreg if kind == "sigreg" else visreg)(z, a)


KINDS = ["vicreg", "sigreg", "visreg"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_regularizer_is_its_formula(kind):
    z, a = embeddings(), unit_vectors()
    got = ours(kind, torch.from_numpy(z).float(), torch.from_numpy(a).float())
    assert float(got) == pytest.approx(reference(kind, z, a), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_regularizer_pushes_against_collapse_and_is_small_for_a_gaussian(kind):
    regularizer = Regularizer(kind, 0, seed=0)
    gaussian = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))
    nearly = (1e-2 * gaussian[:32]).requires_grad_()
    regularizer(nearly).backward()
    assert float(regularizer(gaussian)) < 0.1 * float(regularizer(nearly))
    assert (nearly.grad * (nearly - nearly.mean(0))).sum() < 0  # a descent step spreads the inputs
    assert regularizer.weight == PUBLISHED[kind] and Regularizer(kind, 3.0, 0).weight == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_means_the_same_for_every_batch_size(kind):
    regularizer, z = (
        Regularizer(kind, 0, seed=0),
        torch.randn(2048, 5, generator=torch.Generator().manual_seed(1)) * 0.3,
    )
    assert float(regularizer(z[:512])) == pytest.approx(float(regularizer(z)), rel=0.1)


def test_directions_change_with_the_step_and_repeat():
    regularizer, z = Regularizer("sigreg", 0, seed=3), torch.from_numpy(embeddings()).float()
    first = regularizer(z)
    regularizer.step = 1
    assert regularizer(z) != first
    regularizer.step = 0
    assert torch.equal(regularizer(z), first)


def test_pooling_is_the_mean_over_each_inputs_visible_tokens():
    context, rows = torch.arange(10.0).view(5, 2), torch.tensor([0, 2, 3, 5, 6])  # of inputs 0, 0, 0, 1, 1 at N = 4
    assert torch.equal(pool(context, rows, 2, 4), torch.stack([context[:3].mean(0), context[3:].mean(0)]))


@pytest.mark.dist
def test_two_processes_have_the_term_and_the_averaged_gradient_of_one():
    z, a = (torch.from_numpy(x).float() for x in (embeddings(), unit_vectors()))
    found = together(2, half_of_the_batch, z, a)
    for kind in KINDS:
        whole = z.clone().requires_grad_()
        value = ours(kind, whole, a)
        value.backward()
        gradient = torch.cat([torch.tensor(one[kind][1]) for one in found]) / 2  # as DDP averages
        assert [one[kind][0] for one in found] == pytest.approx([float(value.detach())] * 2, rel=1e-5)
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-4, atol=1e-6)


def half_of_the_batch(rank, z, a):
    torch.distributed.init_process_group("gloo")
    out = {}
    for kind in KINDS:
        mine = z[6 * rank : 6 * rank + 6].clone().requires_grad_()
        value = ours(kind, mine, a)
        value.backward()
        out[kind] = float(value.detach()), mine.grad.tolist()
    torch.distributed.destroy_process_group()
    return out


# ---- schedules and the teacher --------------------------------------------------------------------


def test_the_power_ramp_rises_from_0_to_the_decay():
    ramp = [schedules.ema_decay(EMA(decay=0.996, schedule="power"), step, 10) for step in (0, 100, 1000, 10**6)]
    assert ramp == pytest.approx([0, 1 - 101 ** (-2 / 3), 1 - 1001 ** (-2 / 3), 0.996])
    slower = EMA(decay=0.996, schedule="power", gamma=10.0, power=0.5)
    assert schedules.ema_decay(slower, 100, 10) == pytest.approx(1 - 11**-0.5)


def a_jepa(**changes):
    config = check(replace(preset("demo"), SENSOR | {"model.width": 16, "train.batch_size": 4} | changes))
    torch.manual_seed(0)
    return config, JEPA(config)


def test_an_escape_teacher_waits_until_skill_is_surely_above_0_and_never_waits_again():
    config, jepa = a_jepa(**{"ema.schedule": "escape", "ema.decay": 0.9})
    ema = TargetEMA(jepa, config)
    doubtful = [{"step": 0}, {"step": 10, "skill/smooth": 0.3}, {"step": 20, "skill/smooth": 0.1, "skill/error": 0.06}]
    for record in doubtful:
        assert not ema.look(record, ALONE) and ema.decay(record["step"], 100) == 1
    assert ema.look({"step": 30, "skill/smooth": 0.13, "skill/error": 0.06}, ALONE)
    assert ema.released == 30 and ema.decay(30, 100) == 0.9
    assert not ema.look({"step": 40, "skill/smooth": -1.0, "skill/error": 0.01}, ALONE) and ema.decay(40, 100) == 0.9


def test_frozen_and_no_teacher_are_decays_of_1_and_0():
    for kind, decay in (("frozen", 1), ("none", 0), ("ema", 0.996)):
        config, jepa = a_jepa(**{"teacher.kind": kind})
        assert TargetEMA(jepa, config).decay(50, 100) == decay


def test_the_predictor_has_its_own_learning_rate():
    config, jepa = a_jepa(**{"optim.predictor_lr": 0.25})
    optimizer = optim.build(jepa, config.optim)
    optim.set_rates(optimizer, 0.4, 0.0)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in jepa.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(0.1 if name.startswith("predictor.") else 0.4)


def test_pixel_targets_are_the_patches_standardised_each():
    config, jepa = a_jepa(**{"objective.target": "pixels", "objective.loss": "l2"})
    inputs = torch.randn(4, 1, 500)
    chosen = plan(sample_masks(config.masks, config.grid, 0, 0, np.zeros(4, np.int64), np.arange(4)), 10)
    output = jepa(inputs, chosen)
    patches = inputs.view(4, 10, 50).double()
    std = patches.std(-1, correction=0, keepdim=True)
    wanted = ((patches - patches.mean(-1, keepdim=True)) / (std**2 + 1e-5).sqrt()).flatten(0, 1)[chosen.target_rows]
    with torch.no_grad():
        prediction = jepa.predictor.packed(output.context, chosen).double()
    assert prediction.shape[1] == 50
    assert float(output.loss.detach()) == pytest.approx(float((prediction - wanted).square().mean()), rel=1e-5)


# ---- runs -----------------------------------------------------------------------------------------


def go(name, *args):
    assert train.main([*TINY, "--run.dir", name, *args]) == 0
    return checkpoint.load(Path(name) / "checkpoints/step-4")["model"]


def metrics(name):
    with open(f"{name}/metrics.jsonl") as stream:
        return [json.loads(line) for line in stream]


def encoder(weights, which):
    return {name.removeprefix(f"{which}_encoder."): w for name, w in weights.items() if name.startswith(f"{which}_")}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_salt_is_two_commands_and_its_teacher_does_not_move(alone, capsys):
    first = go("pixels", "--objective.target", "pixels")
    second = go("latent", "--teacher.kind", "frozen", "--teacher.from", "pixels", "--train.seed", "1")
    assert same(encoder(first, "target"), encoder(second, "target"))
    assert not same(encoder(second, "target"), encoder(second, "context"))
    assert all(math.isfinite(r["skill"]) for r in metrics("pixels"))
    capsys.readouterr()
    assert train.main([*TINY, "--teacher.kind", "frozen", "--teacher.from", "pixels", "--model.width", "32"]) == 2
    assert "--teacher.from pixels has width 16, this run 32" in capsys.readouterr().err


def test_without_a_teacher_the_target_is_the_context_encoder(alone):
    weights = go("none", "--teacher.kind", "none", "--regularizer.kind", "sigreg")
    assert same(encoder(weights, "target"), encoder(weights, "context"))
    records = metrics("none")
    assert all(r["loss/regularizer_weighted"] == pytest.approx(5 * r["loss/regularizer"]) for r in records)
    plain = go("plain", "--teacher.kind", "none")
    assert not same(encoder(weights, "context"), encoder(plain, "context"))
    assert records[0]["loss"] == metrics("plain")[0]["loss"]  # the prediction's alone


def two(rank):
    go("two", "--regularizer.kind", "visreg", "--objective.target_norm", "batch")


@pytest.mark.dist
def test_a_regularized_run_on_two_processes_is_that_of_one(alone):
    one = go("one", "--regularizer.kind", "visreg", "--objective.target_norm", "batch")
    together(2, two)
    other = checkpoint.load(alone / "two/checkpoints/step-4")["model"]
    for name, value in one.items():  # AdamW turns the rounding of a gradient that is 0 into a part of a step of 1e-4
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)
    for a, b in zip(metrics("one"), metrics("two"), strict=True):
        for key in ("loss", "loss/regularizer", "skill"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key


def test_a_teacher_that_was_released_is_so_after_a_resume(alone, monkeypatch):
    monkeypatch.setattr(TargetEMA, "look", release_at_1)
    go("whole", "--ema.schedule", "escape", "--ema.decay", "0.5")
    assert (
        train.main(
            [*TINY, "--run.dir", "parts", "--ema.schedule", "escape", "--ema.decay", "0.5", "--train.steps", "2"]
        )
        == 0
    )
    monkeypatch.setattr(TargetEMA, "look", lambda self, record, world: False)
    parts = go("parts", "--ema.schedule", "escape", "--ema.decay", "0.5", "--resume", "auto")
    assert same(parts, checkpoint.load(alone / "whole/checkpoints/step-4")["model"])
    decays = [r["schedule/ema_decay"] for r in metrics("parts")]
    assert decays == [1, 1, 0.5, 0.5, 0.5]


def release_at_1(self, record, world):
    if self.waits and record["step"] == 1:
        self.released = 1
        record |= {"skill/smooth": 0.2, "skill/error": 0.01}
        return True
    return False


# ---- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "says"), [
    ({"regularizer.kind": "sigreg", "regularizer.weight": -1.0}, "regularizer.weight is -1.0: it cannot be negative"),
    ({"regularizer.weight": 1.0}, "there is no regulariser"),
    ({"regularizer.kind": "vicreg", "train.batch_size": 1}, "--train.batch_size of 2 or more"),
    ({"teacher.from": "x"}, "give --teacher.kind frozen"),
    ({"teacher.kind": "frozen", "ema.schedule": "escape"}, "no decay to wait for"),
    ({"ema.power": 0.0}, "give a number above 0"),
])  # fmt: skip
def test_what_cannot_work_is_one_line(changes, says):
    with pytest.raises(UsageError, match=says):
        check(replace(preset("demo"), SENSOR | changes))


def test_a_regularizer_needs_the_whole_batch():
    config = replace(preset("demo"), SENSOR | {"regularizer.kind": "sigreg", "parallel.micro_batch": 8})
    with pytest.raises(UsageError, match="needs the whole batch at once"):
        check_split(check(config), 1)
