"""The model on CUDA: variable-length kernels, compiled blocks and CUDA graphs give what a CPU gives."""

import contextlib

import numpy as np
import pytest
import torch

from jepa_fast.config import check, replace
from jepa_fast.masks.ladder import ladder
from jepa_fast.masks.packing import plan
from jepa_fast.masks.sample import sample_masks
from jepa_fast.model import attention
from jepa_fast.model.compile import compile_blocks, num_graphs, warm_up
from jepa_fast.model.jepa import JEPA
from jepa_fast.presets import preset

pytestmark = pytest.mark.gpu
CUDA, BATCH = torch.device("cuda"), 16


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _case(mode="packed", **changes):
    small = {"model.width": 128, "model.depth": 3, "model.heads": 4, "model.predictor_depth": 3, "model.init_std": 0.1}
    more = {
        "data.image_size": 112,
        "masks.mode": mode,
        "masks.min_keep": 2,
        "masks.group": 4,
        "train.batch_size": BATCH,
    }
    config = check(replace(preset("images"), small | more | changes))
    torch.manual_seed(0)
    jepa, inputs = JEPA(config), torch.randn(BATCH, 3, 112, 112)
    return config, jepa, inputs


def _masks(config, step=0):
    samples = np.arange(BATCH) + BATCH * step
    return sample_masks(config.masks, config.grid, 0, step, np.zeros_like(samples), samples)


def _values(jepa, inputs, chosen, half):
    jepa.zero_grad()
    with torch.autocast(inputs.device.type, torch.bfloat16) if half else contextlib.nullcontext():
        output = jepa(inputs, chosen)
    output.loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in jepa.parameters() if p.requires_grad])
    return float(output.loss.detach()), output.context.float().cpu(), gradients.float().cpu()


def _near(got, expected, tolerance):
    assert got[0] == pytest.approx(expected[0], rel=tolerance)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("mode", ["packed", "reference", "subsampled"])
@pytest.mark.parametrize("half, tolerance", [(False, 1e-3), (True, 0.06)])
def test_cuda_gives_what_a_cpu_gives(mode, half, tolerance):
    config, jepa, inputs = _case(mode)
    chosen = plan(_masks(config), config.num_tokens)
    expected = _values(jepa, inputs, chosen, False)
    print(attention.choose_backend(CUDA, half))
    _near(_values(jepa.to(CUDA), inputs.to(CUDA), chosen.to(CUDA), half), expected, tolerance)


def test_the_variable_length_kernel_gives_the_padded_batchs_values(monkeypatch):
    config, jepa, inputs = _case()
    chosen, jepa, inputs = plan(_masks(config), config.num_tokens).to(CUDA), jepa.to(CUDA), inputs.to(CUDA)
    assert attention.uses_varlen(torch.zeros(1, device=CUDA, dtype=torch.bfloat16), 64), "there is no kernel to test"
    ragged = _values(jepa, inputs, chosen, True)
    monkeypatch.setattr(attention, "_VARLEN", None)
    _near(ragged, _values(jepa, inputs, chosen, True), 0.02)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiled_buckets_give_eager_values_and_nothing_is_compiled_after_warm_up(cuda_graphs):
    config, twin, inputs = _case(**{"model.cuda_graphs": cuda_graphs, "train.precision": "bf16"})
    jepa = JEPA(config).to(CUDA)
    jepa.load_state_dict(twin.to(CUDA).state_dict())
    compile_blocks(jepa, cuda_graphs)
    rungs = ladder(config, BATCH)
    warm_up(jepa, config, rungs, BATCH, CUDA, lambda: torch.autocast("cuda", torch.bfloat16))
    graphs, inputs = num_graphs(), inputs.to(CUDA)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(8):
            masks = _masks(config, step)
            got = _values(jepa, inputs, plan(masks, config.num_tokens, rungs).to(CUDA), True)
            _near(got, _values(twin, inputs, plan(masks, config.num_tokens).to(CUDA), True), 0.03)
    assert num_graphs() == graphs


def test_a_step_reads_nothing_back():
    config, jepa, inputs = _case()
    chosen, jepa, inputs = plan(_masks(config), config.num_tokens).to(CUDA), jepa.to(CUDA), inputs.to(CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        jepa(inputs, chosen).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            jepa(inputs, chosen).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
