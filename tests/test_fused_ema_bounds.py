"""Error bounds of `ema_update_` against float64, for any list: values 2 ulp, squared norms 1e-6.

Under TRITON_INTERPRET=1 the Triton kernel is held to them (test_fused_ema_triton starts that process).
"""

import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fused_ema import available_backends, ema_update_

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["triton"] if INTERPRETING else [b for b in available_backends() if b != "triton"]


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance to the next number of `dtype` above |values|, float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().double().clamp_min(info.smallest_normal)).exponent
    return torch.ldexp(torch.full(exponent.shape, info.eps / 2, dtype=torch.float64), exponent)


def check(targets, sources, decay, backend, layers=None):
    """One update held to the bounds; returns its statistics."""
    before = [t.double() for t in targets]
    stats = ema_update_(targets, sources, decay, layers=layers, backend=backend)
    layers = range(len(targets)) if layers is None else layers
    want = torch.zeros(2, len(stats.distance_sq), dtype=torch.float64)
    for old, target, source, layer in zip(before, targets, sources, layers, strict=True):
        theta = source.double()
        exact = old + (1 - decay) * (theta - old)
        allowed = 2 * ulp(torch.maximum(old.abs(), theta.abs()), target.dtype)
        assert ((target.double() - exact).abs() <= allowed).all()
        want[0, layer] += (theta - target.double()).square().sum()
        want[1, layer] += theta.square().sum()
    got = torch.stack([stats.distance_sq, stats.source_sq])
    # below 1e-30 float32 has too few digits left for a square
    assert ((got - want).abs() <= 1e-6 * want + 1e-30).all(), (got / want - 1).abs().max()
    assert not stats.nonfinite.any()
    return stats


@st.composite
def lists(draw):
    """Lengths around vectors and blocks, magnitudes from 1e-6 to 1e4, gaps down to the last bit, constant tensors."""
    lengths = draw(st.lists(st.one_of(st.integers(0, 40), st.integers(250, 2100)), min_size=1, max_size=5))
    target_dtype = (
        torch.float32 if INTERPRETING else draw(st.sampled_from(FLOATS))
    )  # it cuts halves off, unlike a device
    source_dtype = draw(st.sampled_from(FLOATS))
    scale = 10.0 ** draw(st.floats(-6, 2 if torch.float16 in (target_dtype, source_dtype) else 4))
    gap = 10.0 ** draw(st.floats(-8, 1))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    constant = draw(st.booleans())
    targets, sources = [], []
    for n in lengths:
        theta = scale * (torch.randn(1, generator=g).expand(n) if constant else torch.randn(n, generator=g))
        average = theta * (1 + gap * (torch.randn(1, generator=g) if constant else torch.randn(n, generator=g)))
        targets.append(average.clamp(-6e4, 6e4).to(target_dtype))
        sources.append(theta.clamp(-6e4, 6e4).to(source_dtype))
    layers = draw(st.one_of(st.none(), st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths))))
    return targets, sources, layers


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12 if INTERPRETING else 60, deadline=None)
@given(lists(), st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.996, 0.9999, 1.0])))
def test_any_list_stays_within_the_bounds(backend, drawn, decay):
    targets, sources, layers = drawn
    check([t.clone() for t in targets], sources, decay, backend, layers)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=5 if INTERPRETING else 25, deadline=None)
@given(st.floats(0.01, 10), st.floats(1e-4, 1))
@example(1 / 3, 0.1)
def test_a_long_constant_tensor_rounds_one_way_and_still_stays_within(backend, value, gap):
    """Where every rounding error has the same sign: the worst case of a sum."""
    source = torch.full((40_000,), value)
    check([source + gap], [source], 0.996, backend)
