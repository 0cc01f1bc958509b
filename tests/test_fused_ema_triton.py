"""The Triton kernel: values in Triton's interpreter, machine code for sm_80 and sm_90, and on a GPU where there is one.

The interpreter must be chosen before Triton is imported and spoils compilation, so each has a process of its own.
Triton 3.6 is tested too where it is found: `pip install --no-deps --target DIR triton==3.6.0`, TRITON_36=DIR.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from fused_ema import FusedEMA, ema_update_, ema_update_reference

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CHUNK = 32768


def make(lengths, target_dtype=torch.float32, source_dtype=torch.float32, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    theta = [torch.randn(n, generator=g) for n in lengths]
    average = [t + 0.1 * torch.randn(t.shape, generator=g) for t in theta]
    return [a.to(device, target_dtype) for a in average], [t.to(device, source_dtype) for t in theta]


def check_against_reference(targets, sources, decay=0.9, ulps=1, **kwargs):
    """Values to a few units of the target's last place; sums exactly those of what was stored."""
    want = [t.clone() for t in targets]
    weight = torch.tensor(1 - decay, dtype=torch.float64, device=targets[0].device)
    ema_update_reference(want, sources, weight, range(len(want)), len(want))
    stats = ema_update_(targets, sources, decay, backend="triton", **kwargs)
    for i, (target, reference, source) in enumerate(zip(targets, want, sources, strict=True)):
        eps = torch.finfo(target.dtype).eps
        torch.testing.assert_close(target.float(), reference.float(), rtol=ulps * eps, atol=2.0**-22)
        gap, norm = (source.double() - target.double()).square().sum(), source.double().square().sum()
        assert abs(stats.distance_sq[i] - gap) <= 1e-6 * gap
        assert abs(stats.source_sq[i] - norm) <= 1e-6 * norm
    return stats


def environment_with(version, **variables):
    """Of a process that imports this Triton: "" the one installed here, "3.6" that of the folder $TRITON_36."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    if version:
        folder = os.environ.get("TRITON_36")
        if not folder:
            pytest.skip("TRITON_36 names no folder with Triton 3.6 (pip install --no-deps --target DIR triton==3.6.0)")
        environment["PYTHONPATH"] = os.pathsep.join([folder, environment.get("PYTHONPATH", "")])
        code = "import triton; print(triton.__version__)"
        found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
        assert found.startswith(version), found
    elif importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (the test extra has it)")
    return environment


VERSIONS = pytest.mark.parametrize("version", ["", "3.6"], ids=["installed", "3.6"], scope="module")


@VERSIONS
@pytest.mark.skipif(INTERPRETING, reason="already inside")
def test_the_kernel_is_right_in_the_interpreter(version):
    environment = environment_with(version, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    bounds = os.path.join(os.path.dirname(__file__), "test_fused_ema_bounds.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestInterpreted", bounds]
    inner = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert inner.returncode == 0, inner.stdout[-3000:]  # 5 if nothing was collected


class TestInterpreted:
    __test__ = INTERPRETING

    @pytest.mark.parametrize("target_dtype", FLOATS)
    @pytest.mark.parametrize("source_dtype", FLOATS)
    def test_every_pair_of_dtypes(self, target_dtype, source_dtype):
        # around a vector and a block; the interpreter cuts bfloat16 off where the device rounds to nearest
        check_against_reference(*make([0, 1, 15, 16, 17, 1023, 1025, 2049], target_dtype, source_dtype))

    def test_around_a_chunk(self):
        check_against_reference(*make([CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK]))

    @pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999, 1.0])
    def test_ends_are_exact_and_slow_decays_move(self, decay):
        targets, sources = make([100])
        before = targets[0].clone()
        check_against_reference(targets, sources, decay)
        if decay in (0.0, 1.0):
            assert torch.equal(targets[0], before if decay else sources[0])

    def test_misaligned_views_keep_their_surroundings(self):
        base, source = torch.zeros(103), torch.randn(101)
        check_against_reference([base[1:102]], [source])
        assert base[0] == base[102] == 0

    def test_what_does_not_move_keeps_its_sign_and_its_infinity(self):
        still = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, 1.0])
        wild = torch.tensor([torch.nan, torch.inf, -0.0, 2.0, -0.0])
        for start, decay, end in ((still, 0.9, still), (still, 0.2, still), (wild, 1.0, wild), (wild, 0.0, still)):
            average = start.clone()
            ema_update_([average], [still], decay, backend="triton")
            assert torch.equal(average.view(torch.int32), end.view(torch.int32)), decay

    def test_channels_last_and_float64(self):
        theta, average = (torch.randn(4, 5, 3, 3).to(memory_format=torch.channels_last) for _ in range(2))
        check_against_reference([average, torch.zeros(9).double()], [theta, torch.ones(9).double()])

    def test_views_that_are_not_contiguous(self):
        base, source = torch.zeros(8, 10), torch.randn(8, 5)
        ema_update_([base[:, ::2]], [source], 0.0, backend="triton")
        assert torch.equal(base[:, ::2], source) and (base[:, 1::2] == 0).all()

    def test_closed_gate_writes_nothing_and_measures(self):
        targets, sources = make([5, 1025])
        sources[1][7] = torch.nan
        copies = [torch.randn(t.shape).bfloat16() for t in targets]
        before = [t.clone() for t in (*targets, *copies)]
        stats = ema_update_(targets, sources, 0.5, gate=torch.tensor(False), copies=copies, backend="triton")
        assert all(torch.equal(t, b) for t, b in zip((*targets, *copies), before, strict=True))
        assert stats.nonfinite.tolist() == [0, 1] and stats.distance_sq[0] > 0

    def test_only_what_is_not_finite_is_counted_even_where_squares_overflow(self):
        targets, sources = make([CHUNK + 5, 3, 3])
        sources[0][[0, 9, CHUNK + 1]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        sources[1][0] = 1e30
        assert ema_update_(targets, sources, 0.5, backend="triton").nonfinite.tolist() == [3, 0, 0]

    def test_copies_hold_the_average_to_their_precision(self):
        for gate in (None, torch.tensor(True)):
            targets, sources = make([5, 1025, CHUNK])
            copies = [torch.zeros(t.shape, dtype=torch.bfloat16) for t in targets]
            ema_update_(targets, sources, 0.5, copies=copies, gate=gate, backend="triton")
            for target, copy in zip(targets, copies, strict=True):
                torch.testing.assert_close(copy.float(), target, rtol=2**-7, atol=1e-30)

    def test_layers_add_up_their_tensors(self):
        targets, sources = make(
            [3, 40, 9] + [2] * 300
        )  # 300 chunks in one layer: more than a block of the second kernel
        stats = ema_update_(targets, sources, 0.9, layers=[3, 0, 3] + [1] * 300, backend="triton")
        gaps = [(s.double() - t.double()).square().sum() for s, t in zip(sources, targets, strict=True)]
        want = torch.stack([gaps[1], torch.stack(gaps[3:]).sum(), torch.zeros(()).double(), gaps[0] + gaps[2]])
        torch.testing.assert_close(stats.distance_sq, want, rtol=1e-6, atol=0)

    @pytest.mark.slow
    def test_ten_thousand_tiny_tensors(self):
        from fused_ema.triton_kernel import TritonPlan

        targets, sources = make([3] * 10_000)
        layers = [i % 7 for i in range(10_000)]
        # the sums would take the interpreter longer than the update: their table is read instead
        ema_update_(targets, sources, 0.0, layers=layers, backend="triton", stats=False)
        assert torch.equal(torch.cat(targets), torch.cat(sources))
        plan = TritonPlan(targets, sources, [], layers, 7)
        table, slots, begin = plan._table.tolist(), plan._slots.tolist(), plan._begin.tolist()
        for layer in range(7):
            summed = sorted(table[slot][1] for slot in slots[begin[layer] : begin[layer + 1]])
            assert summed == sorted(t.data_ptr() for t in targets[layer::7])

    def test_nothing_at_all(self):
        assert ema_update_([torch.zeros(0)], [torch.zeros(0)], 0.5, backend="triton").distance_sq.tolist() == [0]


@VERSIONS
@pytest.mark.skipif(INTERPRETING, reason="the interpreter spoils compilation")
def test_machine_code_moves_128_bits_at_a_time_without_spills_or_atomics(version):
    command = [sys.executable, "-m", "fused_ema.sass"]
    out = subprocess.run(command, env=environment_with(version), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    variants = [json.loads(line) for line in out.stdout.splitlines()]
    assert {r["arch"] for r in variants} == {80, 90}
    assert all(r["triton"].startswith(version) for r in variants)
    for r in variants:
        assert r["spills"] == r["stack"] == r["atomics"] == 0, r
        assert r["registers"] <= 64, r  # four programs of 256 threads on an SM
        assert r["fused_multiply_adds"] > 0 and r["load_narrow"] == 0, r
        if r["variant"] == "bf16-average":
            assert r["load_64"] >= 2 and r["load_64"] == 2 * r["store_64"] and r["rounds_bf16_to_nearest"], r
        elif r["variant"].startswith("fp32"):
            assert r["store_128"] >= 1 and r["load_128"] == 2 * r["store_128"], r  # theta and theta_bar; theta_bar
        else:
            assert r["store_128"] >= 1 and r["load_128"] == r["load_64"] == r["store_128"], r  # theta by 64 bits
        if "copy" in r["variant"]:
            assert r["store_64"] >= 1 and r["rounds_bf16_to_nearest"], r


# ---- on a device --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("target_dtype", FLOATS)
@pytest.mark.parametrize("source_dtype", FLOATS)
def test_device_values(target_dtype, source_dtype):
    lengths = [0, 1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 1_000_003]
    check_against_reference(*make(lengths, target_dtype, source_dtype, device="cuda"))


@pytest.mark.gpu
def test_device_misaligned_views_gate_and_determinism():
    base, source = torch.zeros(100_003, device="cuda"), torch.randn(100_001, device="cuda")
    check_against_reference([base[1:100_002]], [source])
    assert base[0] == base[-1] == 0
    targets, sources = make([100_000, 77], device="cuda")
    closed = torch.zeros((), dtype=torch.bool, device="cuda")
    before = [t.clone() for t in targets]
    first = ema_update_(targets, sources, 0.5, gate=closed)
    second = ema_update_(targets, sources, 0.5, gate=closed)
    assert all(torch.equal(t, b) for t, b in zip(targets, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_captured_graph_replays_with_a_new_decay_and_gate():
    targets, sources = make([5000, 70_000], device="cuda")
    decay = torch.tensor(0.9, dtype=torch.float64, device="cuda")
    gate = torch.ones((), dtype=torch.bool, device="cuda")
    eager = [t.clone() for t in targets]
    ema_update_(targets, sources, decay, gate=gate)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = ema_update_(targets, sources, decay, gate=gate)
    ema_update_(eager, sources, 0.9)
    for value, is_open in ((0.5, True), (0.99, False), (0.3, True)):
        decay.fill_(value), gate.fill_(is_open)
        graph.replay()
        expected = ema_update_(eager, sources, value, gate=gate)
        assert all(torch.equal(a, b) for a, b in zip((*targets, *stats), (*eager, *expected), strict=True))


@pytest.mark.gpu
def test_a_captured_graph_replays_after_many_other_lists():
    """More than the plans that are kept: what a graph was captured with must not be among those thrown away."""
    targets, sources = make([5000, 70_000], device="cuda")
    expected = [t.clone() for t in targets]
    ema_update_(targets, sources, 0.9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats = ema_update_(targets, sources, 0.9)
    others = [make([3000, 100 + i], device="cuda") for i in range(70)]
    for other in others:
        ema_update_(*other, 0.5)
    graph.replay()
    ema_update_(expected, sources, 0.9)
    wanted = ema_update_(expected, sources, 0.9)
    assert all(torch.equal(a, b) for a, b in zip((*targets, *stats), (*expected, *wanted), strict=True))


@pytest.mark.gpu
def test_a_module_on_the_device():
    model = torch.nn.Linear(300, 200).cuda()
    ema = FusedEMA(model, decay=0.5)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update()
    assert ema.distances()["weight"] == pytest.approx(0.5 * (300 * 200) ** 0.5, rel=1e-4)
