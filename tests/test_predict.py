"""Predictions are arithmetic that can be checked: against the model's own operations, and against bytes on a wire."""

import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import count_bytes, predict, work
from benchmarks.one_step import OneStep

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts by /proc")


def test_operations_are_those_the_model_performs():
    """An encoder on whole images, forward and backward. torch counts the small patch embedding too; the prediction has
    flash attention compute its scores again in the backward.
    """
    step = OneStep("textures", 8, torch.device("cpu"))
    m, inputs = step.config.model, step.images(8)
    with FlopCounterMode(display=False) as counter:
        step.jepa.context_encoder(inputs).sum().backward()
    ops = work.block_ops([step.config.num_tokens] * 8, m.width, 4 * m.width)
    forward = m.depth * sum(op.flops for op in ops)
    backward = m.depth * sum(op.flops for op in work.backward(ops))
    assert 0.95 < (forward + backward) / counter.get_total_flops() < 1.06


def test_token_counts_are_those_of_the_masks_drawn():
    counts = work.tokens("in1k-vitb16", "packed", images=8)
    assert counts.full == [196] * 8 and len(counts.context) == 8 and len(counts.predictor) == 32
    assert all(c < p for c, p in zip(np.repeat(counts.context, 4), counts.predictor, strict=True))
    shortest = work.tokens("in1k-vitb16", "reference", images=8)
    assert len(set(shortest.context)) == 1, "the reference cuts all contexts of a group to the shortest"


def test_a_ring_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    for ranks in (2, 8, 64):
        both = work.reduce_scatter(1e9, ranks) + work.all_gather(1e9, ranks)
        assert work.all_reduce(1e9, ranks) == pytest.approx(both)
    assert work.all_reduce(1e9, 1) == 0 == work.all_gather(1e9, 1)


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "fsdp-keep", "hsdp"])
def test_one_gpu_sends_nothing_and_one_node_nothing_outside(mode):
    assert set(work.communication(1000, 100, mode, 1).values()) == {0}
    assert work.communication(1000, 100, mode, 8)["between nodes"] == 0
    assert work.communication(1000, 100, mode, 64)["between nodes"] > 0


@pytest.mark.parametrize("name", predict.BLOCKS)
def test_every_table_is_a_table(name):
    lines = predict.BLOCKS[name]().splitlines()
    assert len(lines) > 3 and len({line.count("|") for line in lines}) == 1


@linux
@pytest.mark.dist
@pytest.mark.parametrize(
    "mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow), pytest.param("fsdp-keep", marks=pytest.mark.slow)]
)
def test_two_processes_send_the_bytes_predicted(mode):
    counted, predicted = count_bytes.count(mode, ranks=2)
    assert counted == pytest.approx(predicted, rel=0.01)
