"""Decay over time, and the adaptor for torch's AveragedModel."""

import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fused_ema import multi_avg_fn, warmup


def test_warmup_rises_to_the_decay():
    decay = warmup(0.99)
    values = [decay(t) for t in range(2000)]
    assert values[0] == 0 and values == sorted(values) and values[-1] == 0.99
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        warmup(1.5)


def test_averaged_model_takes_the_fused_pass():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).bfloat16()
    averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn(0.5)).float()
    averaged.update_parameters(model)
    before = averaged.module[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module[0].weight, (before + model[0].weight.float()) / 2)


def test_multi_avg_fn_takes_a_schedule_and_integer_buffers():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    seen = []

    def decay(num_averaged):
        seen.append(num_averaged)
        return 0.5

    averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn(decay), use_buffers=True)
    for _ in range(3):
        model(torch.randn(8, 4))
        averaged.update_parameters(model)
    assert sorted(set(seen)) == [1, 2] and averaged.module[1].num_batches_tracked > 0


def test_decays_and_averages_can_be_pickled():
    decay = warmup(0.99)
    assert [pickle.loads(pickle.dumps(decay))(t) for t in range(9)] == [decay(t) for t in range(9)]
    averaged = AveragedModel(nn.Linear(2, 2), multi_avg_fn=multi_avg_fn(decay))
    again = pickle.loads(pickle.dumps(averaged))
    again.update_parameters(nn.Linear(2, 2))
    assert again.n_averaged == 1
