"""Compiled blocks: the values of eager ones, every graph before the first step, none after it, no break in a block."""

import contextlib
from functools import partial

import numpy as np
import pytest
import torch

from jepa_fast import parallel, schedules
from jepa_fast.config import check, replace
from jepa_fast.errors import UsageError
from jepa_fast.masks.ladder import Ladder, ladder
from jepa_fast.masks.packing import plan
from jepa_fast.masks.sample import sample_masks
from jepa_fast.model import compile
from jepa_fast.model.attention import Sequences
from jepa_fast.model.compile import compile_blocks, compiles, num_graphs, warm_up
from jepa_fast.model.jepa import JEPA
from jepa_fast.monitor import Examination
from jepa_fast.monitor.fixed_masks import FixedMasks
from jepa_fast.presets import preset

RUNGS = Ladder((260, 504), (1300, 2496), 64, 79, 16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _config(**changes):
    small = {
        "model.width": 16, "model.depth": 2, "model.heads": 2, "model.predictor_width": 16, "model.predictor_heads": 2,
        "train.batch_size": 8, "masks.group": 4, "model.init_std": 0.2,
    }  # fmt: skip
    return check(replace(preset("digits"), small | changes))


def _masks(config, step):
    samples = np.arange(8) + 8 * step
    return sample_masks(config.masks, config.grid, 0, step, np.zeros_like(samples), samples)


def _gradients(jepa, inputs, chosen):
    jepa.zero_grad()
    output = jepa(inputs, chosen)
    output.loss.backward()
    return [output.loss.detach(), output.context, *(p.grad.clone() for p in jepa.parameters() if p.requires_grad)]


@pytest.mark.parametrize("norm", ["layer", "position"])
def test_after_warm_up_nothing_is_compiled_and_values_are_those_of_eager_blocks(norm):
    config = _config(**{"objective.target_norm": norm})
    jepa, twin = JEPA(config), JEPA(config)
    twin.load_state_dict(jepa.state_dict())
    names, before = list(jepa.state_dict()), {n: v.clone() for n, v in jepa.state_dict().items()}
    random = torch.get_rng_state()
    torch._dynamo.utils.counters.clear()

    compile_blocks(jepa, backend="aot_eager")
    warm_up(jepa, config, RUNGS, 8, CPU, contextlib.nullcontext)

    # Context encoder: a graph a rung. Target encoder: one. Predictor: a graph a rung, and one for its last block.
    graphs = num_graphs()
    assert graphs == 2 + 1 + 2 + 1
    assert list(jepa.state_dict()) == names and all(torch.equal(v, before[n]) for n, v in jepa.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in jepa.parameters())

    inputs, totals = torch.randn(8, 1, 32, 32), set()
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(12):
            masks = _masks(config, step)
            got = _gradients(jepa, inputs, plan(masks, 64, RUNGS))
            totals.add(len(masks.context))
            if step % 4 == 0:
                for a, b in zip(got, _gradients(twin, inputs, plan(masks, 64)), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(totals) > 5 and num_graphs() == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_warm_up_takes_a_usual_batchs_memory_whatever_the_largest_rung():
    """What is kept for the backward: the largest rungs, twice a usual batch and more, are met by one block of each kind."""
    config = _config(**{"model.depth": 6, "model.predictor_depth": 6})
    jepa, kept, most = JEPA(config), 0, list[int]()

    def note(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    def precision():
        nonlocal kept
        most.append(kept)
        kept = 0
        return contextlib.nullcontext()

    roomy = Ladder((260, 504), (1300, 3200), 64, 79, 16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        passes = warm_up(jepa, config, roomy, 8, CPU, precision)
    *rungs, usual = [*most[1:], kept]
    assert passes == 2 + 2 + 1 and max(rungs) < usual
    assert len(jepa.context_encoder.blocks) == len(jepa.predictor.blocks) == 6


def _paths(chosen):
    """Whether attention takes the dense path in the encoder, the predictor and its last block: a graph depends on it."""
    total, bucket = len(chosen.predictor_order), chosen.predictor_bucket
    inner, last = (
        Sequences.of(chosen.predictor_cu, chosen.predictor_max, total, b, compiled=True) for b in (bucket, 0)
    )
    queries = Sequences.of(chosen.target_cu, chosen.target_max, len(chosen.target_index), compiled=True)
    return inner.uniform, last.uniform, queries.uniform


def _context_path(chosen):
    return Sequences.of(chosen.context_cu, chosen.context_max, len(chosen.context_index), chosen.context_bucket).uniform


@pytest.mark.parametrize(
    "name, changes, dense",
    [
        ("textures", {"masks.mode": "packed"}, (False, False, False, False)),  # some batches have only largest targets
        ("textures", {"masks.mode": "fixed"}, (False, False, False, False)),
        ("textures", {"masks.mode": "subsampled"}, (True, False, False, False)),
        ("demo", {}, (True, True, True, True)),
        ("demo", {"masks.schedule": "linear", "masks.final_ratio": 0.5}, (False, True, True, False)),
        ("demo", {"masks.mode": "bernoulli", "masks.min_keep": 2}, (False, True, True, False)),
    ],
)
def test_a_batch_that_happens_to_be_dense_takes_the_path_of_the_others(name, changes, dense):
    config = check(replace(preset(name), {"train.batch_size": 16} | changes))
    rungs, steps = ladder(config, 16), 60
    usual = compile._usual(config, rungs, 16)
    plans = [plan(usual, config.num_tokens, rungs)]
    contexts, predictors = (
        list(made(config, rungs, 16, usual.num_targets)) for made in (compile._contexts, compile._predictors)
    )
    assert [p.context_bucket for p in contexts] == ([*rungs.context] if len(rungs.context) > 1 else [])
    assert {p.predictor_bucket for p in predictors} <= {*rungs.predictor}
    warmed = {p.predictor_bucket for p in [*plans, *predictors]}
    for step in range(steps + 1):
        samples = np.arange(16) + 16 * step
        masks = schedules.masks(config.masks, step, steps)
        drawn = sample_masks(masks, config.grid, config.train.seed, step, np.zeros_like(samples), samples)
        plans.append(plan(drawn, config.num_tokens, rungs))
    assert {p.predictor_bucket for p in plans} <= warmed
    assert {_paths(each) for each in plans + predictors} == {dense[1:]}
    assert {_context_path(each) for each in plans + contexts} == {dense[0]}


def test_an_examination_compiles_nothing():
    config = _config(**{"model.compile": "on"})
    jepa = JEPA(config)
    compile_blocks(jepa, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    examination = Examination(
        jepa.context_encoder, jepa.target_encoder, torch.randn(5, 1, 32, 32), views=FixedMasks(config),
        around=partial(parallel.gathered, jepa, config),
    )  # fmt: skip
    assert examination.look(0)["discrepancy/full"] == 0
    assert num_graphs() == 0


def test_blocks_are_compiled_where_it_pays_or_is_asked_for():
    cuda, wide = torch.device("cuda"), preset("in1k-vitb16")
    assert compiles(wide, cuda) and not compiles(wide, CPU)
    assert not compiles(preset("demo"), cuda), "a tiny model is done before it is compiled"
    assert compiles(_config(**{"model.compile": "on"}), CPU)
    assert not compiles(replace(wide, {"model.compile": "off"}), cuda)
    with pytest.raises(UsageError, match=r"--model\.cuda_graphs.*--model\.compile"):
        _config(**{"model.cuda_graphs": True, "model.compile": "off"})


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "selective"])
def test_inductors_blocks_give_eager_values(how):
    config = _config()
    jepa, twin = JEPA(config), JEPA(config)
    for block in (*jepa.context_encoder.blocks, *jepa.predictor.blocks):
        block.recompute = how
    twin.load_state_dict(jepa.state_dict())
    compile_blocks(jepa)
    inputs, masks = torch.randn(8, 1, 32, 32), _masks(config, 0)
    got = _gradients(jepa, inputs, plan(masks, 64, Ladder((504,), (2496,), 63, 78, 15)))
    for a, b in zip(got, _gradients(twin, inputs, plan(masks, 64)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
