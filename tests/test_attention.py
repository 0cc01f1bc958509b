"""Backends: what a variable-length kernel is called with, what is chosen where, and that the model's values are the same."""

import inspect
import math

import numpy as np
import pytest
import torch

from jepa_fast.config import replace
from jepa_fast.masks.ladder import Ladder
from jepa_fast.masks.packing import plan
from jepa_fast.masks.sample import sample_masks
from jepa_fast.model import attention, predictor, vit
from jepa_fast.model.attention import Sequences, attend
from jepa_fast.model.jepa import JEPA
from jepa_fast.presets import preset


class FlashAttn:
    """A stand-in with the signature and the contract of flash_attn 2.7's flash_attn_varlen_func; records its calls."""

    def __init__(self):
        self.calls = []

    def __call__(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert q.dim() == k.dim() == v.dim() == 3 and k.shape == v.shape and q.shape[1:] == k.shape[1:]
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
        for cu, total, longest in ((cu_seqlens_q, len(q), max_seqlen_q), (cu_seqlens_k, len(k), max_seqlen_k)):
            assert cu.dtype == torch.int32 and cu.is_contiguous() and cu.dim() == 1
            assert cu[0] == 0 and cu[-1] == total and 1 <= cu.diff().min() <= cu.diff().max() <= longest
        assert len(cu_seqlens_q) <= len(cu_seqlens_k) or len(cu_seqlens_q) == len(cu_seqlens_k)
        self.calls.append((len(q), len(k), len(cu_seqlens_k) - 1, max_seqlen_q, max_seqlen_k))
        out = torch.full_like(q, torch.nan)  # what no sequence covers is never written
        parts = []
        for begin in range(len(cu_seqlens_q) - 1):
            rows, keys = slice(*cu_seqlens_q[begin : begin + 2]), slice(*cu_seqlens_k[begin : begin + 2])
            scores = torch.einsum("nhd,mhd->hnm", q[rows], k[keys]) / math.sqrt(q.shape[-1])
            parts.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v[keys]))
        return out.copy_(torch.cat(parts)) if not q.requires_grad else torch.cat(parts)


@pytest.fixture
def flash(monkeypatch):
    stand_in = FlashAttn()
    monkeypatch.setattr(attention, "_VARLEN", stand_in)
    for module in (vit, predictor):
        monkeypatch.setattr(module, "uses_varlen", lambda x, head_width: True)
    return stand_in


def _case():
    small = {"model.width": 32, "model.predictor_width": 16, "model.predictor_heads": 2, "model.init_std": 0.2}
    config = replace(preset("digits"), small)
    torch.manual_seed(0)
    samples = np.arange(4)
    masks = sample_masks(replace(config, {"masks.group": 2}).masks, (8, 8), 0, 0, np.zeros_like(samples), samples)
    return JEPA(config), torch.randn(4, 1, 32, 32), masks


def _values(jepa, inputs, chosen):
    jepa.zero_grad()
    output = jepa(inputs, chosen)
    output.loss.backward()
    return [output.loss.detach(), output.context, *(p.grad.clone() for p in jepa.parameters() if p.requires_grad)]


@pytest.mark.parametrize("rungs", [None, Ladder((200,), (900,), 63, 80, 20)])
def test_a_variable_length_kernel_is_called_by_its_contract_and_gives_the_padded_values(flash, monkeypatch, rungs):
    jepa, inputs, masks = _case()
    chosen = plan(masks, 64, rungs)
    got = _values(jepa, inputs, chosen)
    depth = len(jepa.context_encoder.blocks)
    total = 200 if rungs else len(masks.context)
    assert len(flash.calls) == depth + len(jepa.predictor.blocks)
    assert all(call[0] == call[1] == total for call in flash.calls[:depth])
    assert flash.calls[-1][:2] == (
        len(masks.targets),
        len(chosen.predictor_order),
    )  # the last block: targets ask, all answer
    if rungs:  # shapes, lengths and the number of sequences are the bucket's, whatever the batch
        assert {call[3:] for call in flash.calls[:depth]} == {(63, 63)}
        assert {call[2] for call in flash.calls[:depth]} == {4 + math.ceil(200 / 2 / 63)}

    for module in (vit, predictor):
        monkeypatch.setattr(module, "uses_varlen", lambda x, head_width: False)
    for a, b in zip(got, _values(jepa, inputs, plan(masks, 64)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class FlashFunction(torch.autograd.Function):
    """flash-attn's kernel as its wrapper calls it: Dynamo takes no tensor twice among a Function's inputs."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k):
        ctx.save_for_backward(cu_q, cu_k)
        return q + k + v

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient, gradient, None, None, None, None


def test_a_block_compiles_around_a_kernel_that_is_an_autograd_function(monkeypatch):
    monkeypatch.setattr(attention, "_VARLEN", FlashFunction.apply)
    torch._dynamo.reset()
    block, x = vit.Block(16, 2, 2.0, 1e-6), torch.randn(10, 16, requires_grad=True)
    sequences = Sequences(torch.tensor([0, 4, 10], dtype=torch.int32), 2, 6, uniform=False, varlen=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(block(x, sequences).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x, sequences).square().sum(), x)[0], expected)
    torch._dynamo.reset()


def test_torchs_own_kernel_takes_the_same_seven_arguments():
    varlen = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    names = list(inspect.signature(varlen).parameters.values())
    assert [p.name for p in names[:5]] == ["query", "key", "value", "cu_seq_q", "cu_seq_k"]
    assert all(p.default is not inspect.Parameter.empty for p in names[7:]), "no further argument is required"


def test_it_has_no_cpu_kernel_which_is_why_cpus_take_padded_batches():
    assert attention.choose_backend.__wrapped__(torch.device("cpu"), True) == ("sdpa", "no CUDA device: padded batches")
    assert not attention.uses_varlen(torch.zeros(2, 2, dtype=torch.bfloat16), 64)


def test_the_backend_and_its_reason_on_cuda(monkeypatch):
    cuda, choose = torch.device("cuda", 0), attention.choose_backend.__wrapped__
    import torch.nn.attention as torch_attention
    from torch.nn.attention import varlen

    for name, value in (("_NAME", "varlen_attn"), ("_VARLEN", FlashAttn()), ("_REASON", "torch's")):
        monkeypatch.setattr(attention, name, value)
    attention._has_flash.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda index: False, raising=False)
    assert choose(cuda, False)[0] == "sdpa"
    assert choose(cuda, True) == ("varlen_attn", "torch's: FlashAttention 2")

    activated = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", activated.append, raising=False)
    assert choose(cuda, True)[1].endswith("FlashAttention 3") and activated == ["FA3"]

    def absent(name):
        raise ModuleNotFoundError("No module named 'flash_attn_interface'")

    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", absent, raising=False)
    assert "FlashAttention 2 (3 is not available: No module named 'flash_attn_interface')" in choose(cuda, True)[1]

    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda index: index == 0, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92400)
    assert choose(cuda, True)[1].startswith(
        "torch's: cuDNN 9.24 where a sequence may have over 128 queries, else FlashAttention 2 (3"
    )
    monkeypatch.delattr(varlen, "_should_use_cudnn")  # torch 2.13 and before
    assert "cuDNN" not in choose(cuda, True)[1]


def test_heads_and_gpus_that_the_kernel_refuses_take_padded_batches(monkeypatch):
    class OnCuda:
        is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda")

    monkeypatch.setattr(attention, "_VARLEN", FlashAttn())
    for capability, wide in (((8, 0), True), ((7, 5), False)):
        attention._has_flash.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert [attention.uses_varlen(OnCuda(), width) for width in (24, 64, 256)] == [wide] * 3
        assert not any(attention.uses_varlen(OnCuda(), width) for width in (25, 12, 264))
    assert attention.choose_backend.__wrapped__(OnCuda.device, True)[1].startswith("a GPU before Ampere")
    attention._has_flash.cache_clear()


@pytest.mark.parametrize("bucket, long", [(0, 64), (30, 64), (0, 1)])
def test_queries_may_be_fewer_than_keys(bucket, long, monkeypatch):
    monkeypatch.setattr(attention, "LONG", long)
    torch.manual_seed(0)
    cu_q, cu_k = torch.tensor([0, 2, 3, 7], dtype=torch.int32), torch.tensor([0, 5, 6, 23], dtype=torch.int32)
    q, k, v = torch.randn(7, 2, 8), torch.randn(bucket or 23, 2, 8), torch.randn(bucket or 23, 2, 8)
    got = attend(q, k, v, Sequences.of(cu_q, 4, 7), Sequences.of(cu_k, 20, 23, bucket))
    assert (Sequences.of(cu_k, 20, 23, bucket).lengths is not None) == (long == 1)
    for s in range(3):
        rows, keys = slice(*cu_q[s : s + 2]), slice(*cu_k[s : s + 2])
        scores = torch.einsum("nhd,mhd->hnm", q[rows], k[keys]) / math.sqrt(8)
        torch.testing.assert_close(
            got[rows], torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v[keys]), rtol=1e-4, atol=1e-5
        )


def test_sequences_of_one_length_share_a_call_and_gradients_are_those_of_a_padded_batch(monkeypatch):
    lengths = [40, 40, 40, 7, 7, 90, 40]
    cu, total = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), sum(lengths)
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(q, *args, **kwargs):
        calls.append(tuple(q.shape))
        return original(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    torch.manual_seed(0)
    qkv, results = torch.randn(total, 3, 2, 8, requires_grad=True), []
    for bucket in (0, total):
        sequences = Sequences.of(cu, 90, total, bucket)
        out = attend(*qkv.unbind(1), sequences, sequences)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    assert calls == [(3, 2, 40, 8), (2, 2, 7, 8), (1, 2, 90, 8), (1, 2, 40, 8), (7, 2, 90, 8)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "asking, answering",
    [
        ([90, 90, 80, 80], [120, 120, 120, 120]),  # two groups whose contexts and targets add up to the same
        ([90, 90, 80, 80], [97, 98, 99, 96]),
        ([9] * 30, list(range(30, 60))),
        ([70] * 15 + [71] * 15, list(range(80, 110))),  # keys too ragged for calls of their own, queries not
    ],
)
def test_queries_and_keys_may_differ_in_how_ragged_they_are(asking, answering, monkeypatch):
    """Whichever of a dense batch, calls of their own or padding either would take by itself."""
    cu_q, cu_k = (torch.tensor([0, *np.cumsum(n)], dtype=torch.int32) for n in (asking, answering))
    torch.manual_seed(0)
    q = torch.randn(sum(asking), 2, 8)
    k, v = torch.randn(2, sum(answering), 2, 8).unbind(0)
    for long in (1, 64, 10**6):
        monkeypatch.setattr(attention, "LONG", long)
        got = attend(q, k, v, Sequences.of(cu_q, max(asking), len(q)), Sequences.of(cu_k, max(answering), len(k)))
        for s in range(len(asking)):
            rows, keys = slice(*cu_q[s : s + 2]), slice(*cu_k[s : s + 2])
            scores = torch.einsum("nhd,mhd->hnm", q[rows], k[keys]) / math.sqrt(8)
            expected = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v[keys])
            torch.testing.assert_close(got[rows], expected, rtol=1e-4, atol=1e-5)


def test_cpu_tensors_never_reach_the_gpus_kernel(monkeypatch):
    """On a machine that has one: an encoder used on the CPU, ragged or padded."""

    def on_cpu(*_args):
        raise AssertionError("a CPU tensor in a CUDA kernel")

    monkeypatch.setattr(attention, "_VARLEN", on_cpu)
    q = torch.randn(23, 2, 8)
    for long, cu in ((1, [0, 5, 6, 23]), (64, [0, 5, 6, 23]), (64, [0, 23])):
        monkeypatch.setattr(attention, "LONG", long)
        sequences = Sequences.of(torch.tensor(cu, dtype=torch.int32), 23, 23, varlen=attention.uses_varlen(q, 8))
        assert attend(q, q, q, sequences, sequences).isfinite().all()
