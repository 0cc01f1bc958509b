"""ema_update_: values, distances and gate, for every backend this machine has, against float64."""

import pytest
import torch

from fused_ema import LayerStats, available_backends, ema_distances, ema_update_, ema_update_reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# 0: an empty shard; 15..17: around a vector register; 1023..1025 and 16383..16385: around a block and a chunk
LENGTHS = [0, 1, 15, 16, 17, 1023, 1024, 1025, 16383, 16384, 16385, 40001]
BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(b not in available_backends(), reason=f"{b} is not installed"))
    for b in ("cpp", "torch")
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def make(lengths, target_dtype=torch.float32, source_dtype=torch.float32, seed=0, gap=0.1):
    g = torch.Generator().manual_seed(seed)
    theta = [torch.randn(n, generator=g) for n in lengths]
    average = [s + gap * torch.randn(s.shape, generator=g) for s in theta]
    return [a.to(target_dtype) for a in average], [s.to(source_dtype) for s in theta]


def ulp32(values):
    return torch.nextafter(values, torch.tensor(torch.inf)) - values


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.996, 0.99999, 1.0])
def test_values_are_within_two_ulp_of_float64(backend, decay):
    targets, sources = make(LENGTHS)
    exact = [t.double() + (1 - decay) * (s.double() - t.double()) for t, s in zip(targets, sources, strict=True)]
    largest = [torch.maximum(t.abs(), s.abs()) for t, s in zip(targets, sources, strict=True)]
    ema_update_(targets, sources, decay, backend=backend)
    for target, want, top in zip(targets, exact, largest, strict=True):
        assert ((target.double() - want).abs() <= 2 * ulp32(top).double()).all()


@pytest.mark.parametrize("target_dtype", FLOATS)
@pytest.mark.parametrize("source_dtype", FLOATS)
def test_every_pair_of_dtypes_rounds_once_to_nearest(backend, target_dtype, source_dtype):
    targets, sources = make(LENGTHS, target_dtype, source_dtype)
    want = [t.clone() for t in targets]
    weight = torch.tensor(1 - 0.9, dtype=torch.float64)
    expected = ema_update_reference(want, sources, weight, range(len(want)), len(want))
    stats = ema_update_(targets, sources, 0.9, backend=backend)
    for target, reference in zip(targets, want, strict=True):
        # a fused multiply-add may move the last bit of float32 and so, rarely, flip a tie
        assert torch.allclose(target.float(), reference.float(), rtol=torch.finfo(target_dtype).eps, atol=1e-7)
        assert (target != reference).float().mean().nan_to_num() < (1 if target_dtype == torch.float32 else 0.01)
    torch.testing.assert_close(
        torch.stack(stats), expected, rtol=2e-3 if target_dtype != torch.float32 else 1e-5, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_conversions_are_those_of_torch_for_all_values(backend, dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = bits[bits.isfinite()]
    widened = torch.zeros(len(finite))
    ema_update_([widened], [finite], 0.0, backend=backend)  # decay 0 copies
    assert torch.equal(widened, finite.float())
    # midpoints and their neighbours: where rounding is decided
    middle = (finite.double().sort().values[:-1] + finite.double().sort().values[1:]).div(2).float()
    probes = torch.cat(
        [middle, torch.nextafter(middle, torch.tensor(torch.inf)), torch.nextafter(middle, torch.tensor(-torch.inf))]
    )
    probes = probes[(probes == 0) | (probes.abs() >= torch.finfo(torch.float32).tiny)]
    copied, average = torch.zeros(len(probes), dtype=dtype), probes.clone()
    ema_update_([average], [probes], 0.5, backend=backend, copies=[copied])
    assert torch.equal(copied, probes.to(dtype))


@pytest.mark.parametrize("target_dtype", FLOATS)
def test_distances_are_those_of_the_stored_values(backend, target_dtype):
    targets, sources = make([5, 70000, 0], target_dtype)
    stats = ema_update_(targets, sources, 0.99, backend=backend)
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        exact = (source.double() - target.double()).square().sum()
        assert abs(stats.distance_sq[i] - exact) <= 1e-6 * exact
        norm = source.double().square().sum()
        assert abs(stats.source_sq[i] - norm) <= 1e-6 * norm


def test_squared_norm_of_four_million_elements_is_accurate_to_1e_6(backend):
    targets, sources = make([1 << 22], gap=1e-3)
    stats = ema_update_(targets, sources, 0.996, backend=backend)
    exact = (sources[0].double() - targets[0].double()).square().sum()
    assert abs(stats.distance_sq[0] / exact - 1) <= 1e-6


def test_layers_add_up_their_tensors_and_missing_numbers_are_zero(backend):
    targets, sources = make([3, 50, 7])
    stats = ema_update_(targets, sources, 0.9, layers=[3, 0, 3], backend=backend)
    alone = ema_update_([t.clone() for t in targets], sources, 1.0, backend=backend)
    assert stats.distance_sq.shape == (4,)
    torch.testing.assert_close(stats.distance_sq[3], alone.distance_sq[0] + alone.distance_sq[2])
    assert stats.distance_sq[1] == stats.source_sq[2] == 0


def test_closed_gate_leaves_targets_and_copies_bit_identical_but_measures(backend):
    targets, sources = make([17, 20000])
    sources[0][3] = torch.nan
    targets[1][5], targets[1][6] = -0.0, torch.inf
    copies = [torch.randn(t.shape).bfloat16() for t in targets]
    before = [t.view(torch.uint8).clone() for t in (*targets, *copies)]
    stats = ema_update_(targets, sources, 0.5, gate=torch.tensor(False), backend=backend, copies=copies)
    assert all(torch.equal(t.view(torch.uint8), b) for t, b in zip((*targets, *copies), before, strict=True))
    assert stats.nonfinite.tolist() == [1, 0]


@pytest.mark.parametrize("gate", [None, True, False])
@pytest.mark.parametrize("target_dtype", FLOATS)
def test_without_stats_the_same_bits_are_written_and_nothing_is_claimed(backend, target_dtype, gate):
    a, sources = make(LENGTHS, target_dtype)
    b, before = [t.clone() for t in a], [t.clone() for t in a]
    ca, cb = ([torch.zeros(t.shape, dtype=torch.bfloat16) for t in a] for _ in range(2))
    gate = None if gate is None else torch.tensor(gate)
    ema_update_(a, sources, 0.9, gate=gate, backend=backend, copies=ca)
    stats = ema_update_(b, sources, 0.9, gate=gate, backend=backend, copies=cb, stats=False)
    assert all(torch.equal(x, y) for x, y in zip((*a, *ca), (*b, *cb), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(b, before, strict=True)) == (gate is not None and not gate)
    assert all(s.shape == (len(LENGTHS),) and s.isnan().all() for s in stats)


def test_open_gate_is_no_gate(backend):
    a, sources = make([17, 20000])
    b = [t.clone() for t in a]
    first, second = (
        ema_update_(a, sources, 0.9, backend=backend),
        ema_update_(b, sources, 0.9, gate=torch.tensor(True), backend=backend),
    )
    assert all(torch.equal(x, y) for x, y in zip((*a, *first), (*b, *second), strict=True))


def test_equal_operands_never_move_and_the_ends_are_exact(backend):
    _, sources = make([1000])
    frozen = sources[0].clone()
    for decay in (0.9999, 0.7, 0.2):
        for _ in range(50):
            stats = ema_update_([frozen], sources, decay, backend=backend)
    assert torch.equal(frozen, sources[0]) and stats.distance_sq[0] == 0
    targets, sources = make([1000])
    before = targets[0].clone()
    ema_update_(targets, sources, 1.0, backend=backend)
    assert torch.equal(targets[0], before)
    ema_update_(targets, sources, 0.0, backend=backend)
    assert torch.equal(targets[0], sources[0])


def bits(tensor):
    return tensor.view(torch.int32)


def test_signed_zeros_and_infinities_stay_where_nothing_moves(backend):
    still = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, 1.0] * 9)
    for decay in (0.999, 0.2):
        average = still.clone()
        ema_update_([average], [still], decay, backend=backend)
        assert torch.equal(bits(average), bits(still))
    wild = torch.tensor([torch.nan, torch.inf, -0.0, 2.0, -0.0] * 9)
    for decay, kept in ((1.0, wild), (0.0, still)):  # the ends keep and copy whatever there is
        average = wild.clone()
        ema_update_([average], [still], decay, backend=backend)
        assert torch.equal(bits(average), bits(kept))


def test_float64_is_averaged_in_float64_beside_the_rest(backend):
    targets, sources = make([50, 60, 70], gap=1.0)
    targets[1], sources[1] = targets[1].double(), sources[1].double()
    sources[2] = sources[2].double()
    exact = [t.double() + 0.1 * (s.double() - t.double()) for t, s in zip(targets, sources, strict=True)]
    copies = [torch.zeros(t.shape, dtype=torch.bfloat16) for t in targets]
    stats = ema_update_(targets, sources, 0.9, backend=backend, copies=copies)
    torch.testing.assert_close(targets[1], exact[1], rtol=1e-15, atol=1e-16)
    assert all(torch.equal(c, t.bfloat16()) for c, t in zip(copies, targets, strict=True))
    gaps = [(s.double() - t.double()).square().sum() for t, s in zip(targets, sources, strict=True)]
    torch.testing.assert_close(stats.distance_sq, torch.stack(gaps), rtol=1e-6, atol=0)


def test_channels_last_is_flat_memory_where_both_have_it(backend):
    theta, average = (torch.randn(8, 5, 3, 3).to(memory_format=torch.channels_last) for _ in range(2))
    plain = average.contiguous()
    copy = torch.zeros_like(average, dtype=torch.bfloat16)
    mixed = ema_update_([plain], [theta], 0.9, backend=backend)
    stats = ema_update_([average], [theta], 0.9, backend=backend, copies=[copy])
    assert torch.equal(average, plain) and torch.equal(copy, average.bfloat16())
    torch.testing.assert_close(stats.distance_sq, mixed.distance_sq, rtol=1e-6, atol=0)


def test_negated_views_are_read_and_written_by_value(backend):
    source, base = torch.randn(40), torch.zeros(40)
    for _ in range(2):  # planned, then by the plan
        ema_update_([base], [source], 0.0, backend=backend)
        assert torch.equal(base, source)
        ema_update_([base], [torch._neg_view(source)], 0.0, backend=backend)
        assert torch.equal(base, -source)
        ema_update_([torch._neg_view(base)], [source], 0.0, backend=backend)
        assert torch.equal(base, -source)
    spectrum = torch.randn(6, dtype=torch.complex64)
    ema_update_([base[:6]], [spectrum.conj().imag], 0.0, backend=backend)
    assert torch.equal(base[:6], -spectrum.imag)


def test_distances_alone_write_nothing_and_autograd_sees_no_write(backend):
    targets, sources = make([17, 2000])
    before, versions = [t.clone() for t in targets], [t._version for t in targets]
    stats = ema_distances(iter(targets), iter(sources), layers=[1, 0], backend=backend)
    assert all(torch.equal(t, b) for t, b in zip(targets, before, strict=True))
    assert [t._version for t in targets] == versions
    ema_update_(targets, sources, 1.0, backend=backend)
    assert all(t._version > v for t, v in zip(targets, versions, strict=True))
    torch.testing.assert_close(stats.distance_sq[1], (sources[0] - targets[0]).double().square().sum())


def test_nonfinite_values_are_counted_in_their_layer(backend):
    targets, sources = make([100, 100])
    sources[1][:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    stats = ema_update_(targets, sources, 0.9, backend=backend)
    assert stats.nonfinite.tolist() == [0, 3]
    assert stats.distance_sq[0].isfinite() and not stats.distance_sq[1].isfinite()


def test_decay_tensor_does_what_the_number_does(backend):
    a, sources = make([500])
    b = [a[0].clone()]
    ema_update_(a, sources, 0.9999, backend=backend)
    ema_update_(b, sources, torch.tensor(0.9999, dtype=torch.float64), backend=backend)
    assert torch.equal(a[0], b[0])


def test_slow_decays_make_the_progress_they_should(backend):
    average, theta = [torch.ones(64)], [torch.full((64,), 1.1)]
    for _ in range(300):
        ema_update_(average, theta, 0.9999, backend=backend)
    moved = (average[0].double() - 1) / (theta[0].double() - 1)
    assert ((moved / (1 - 0.9999**300) - 1).abs() < 1e-3).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_views_are_written_in_place_and_their_surroundings_are_not(backend, dtype):
    base, source = torch.randn(8, 10).to(dtype), torch.randn(10, 8).to(dtype)
    want = base.clone()
    want[:, 1:9:2] = source.t()[:, 1:9:2]
    ema_update_([base[:, 1:9:2]], [source.t()[:, 1:9:2]], 0.0, backend=backend)
    assert torch.equal(base, want)
    odd = torch.zeros(101, dtype=dtype)  # one element past a 16-byte boundary
    ema_update_([odd[1:]], [torch.ones(100, dtype=dtype)], 0.0, backend=backend)
    assert odd[0] == 0 and (odd[1:] == 1).all()


def test_columns_of_one_matrix_are_separate_targets(backend):
    base, source = torch.zeros(4, 6), torch.ones(4, 3)
    ema_update_([base[:, :3], base[:, 3:]], [source, 2 * source], 0.0, backend=backend)
    assert base[0].tolist() == [1, 1, 1, 2, 2, 2]


def test_ten_thousand_tiny_tensors_and_none_at_all(backend):
    targets, sources = make([3] * 10_000)
    stats = ema_update_(targets, sources, 0.0, backend=backend)
    assert torch.equal(torch.cat(targets), torch.cat(sources)) and stats.distance_sq.shape == (10_000,)
    assert ema_update_([], [], 0.5, backend=backend).distance_sq.shape == (0,)


@pytest.mark.skipif("cpp" not in available_backends(), reason="cpp is not installed")
def test_any_number_of_threads_gives_the_same_bits():
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            targets, sources = make([100_000, 5, 33_333], seed=3)
            results.append([*targets, *ema_update_(targets, sources, 0.99, backend="cpp")])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif("cpp" not in available_backends(), reason="cpp is not installed")
def test_every_instruction_set_of_this_processor_sums_in_the_same_order():
    import fused_ema_C

    names, results = fused_ema_C.instruction_sets(), {}
    assert names[0] == "baseline"
    for name in names:
        targets, sources = make([100_003], seed=4)
        stats = torch.empty(3, 1, dtype=torch.float64)
        row = (sources[0].data_ptr(), targets[0].data_ptr(), 0, len(targets[0]), 0, 0, 0, 0)
        plan = fused_ema_C.Plan([row], 1, name)
        plan.run(0.004, False, stats.data_ptr(), 1)  # measured before, where no multiply-add can differ
        gap = (sources[0].double() - targets[0].double()).square().sum()
        assert abs(stats[0, 0] / gap - 1) < 1e-6
        before = targets[0].clone()
        plan.run(0.004, True, stats.data_ptr(), 1)
        torch.testing.assert_close(targets[0], torch.lerp(before, sources[0], 0.004), rtol=2e-7, atol=1e-9)
        results[name] = [*targets, stats]
    if "x86-64-v4" in names:  # both have fused multiply-adds
        assert all(torch.equal(a, b) for a, b in zip(results["x86-64-v3"], results["x86-64-v4"], strict=True))
    with pytest.raises(ValueError, match="this processor has no x86-64-v9"):
        fused_ema_C.Plan([], 0, "x86-64-v9")


def test_the_operator_passes_opcheck_and_compiles_without_a_break(backend):
    targets, sources = make([5, 40])
    weight = torch.tensor(0.1, dtype=torch.float64)
    args = (targets, sources, [], weight, torch.tensor(True), [0, 1], 2, backend, True)
    torch.library.opcheck(torch.ops.fused_ema.update_.default, args)
    parameters = [torch.nn.Parameter(s.clone()) for s in sources]
    eager = [t.clone() for t in targets]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(targets, sources, decay, gate):
        stats = ema_update_(targets, sources, decay, layers=[0, 0], gate=gate, backend=backend)
        return stats.distance_sq.sqrt()

    decay = torch.tensor(0.9, dtype=torch.float64)
    distance = step(targets, parameters, decay, torch.tensor(True))
    stats = ema_update_(eager, sources, 0.9, layers=[0, 0], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(targets, eager, strict=True))
    assert torch.equal(distance, stats.distance_sq.sqrt())


def test_a_tensor_replaced_at_the_same_address_is_checked_anew():
    storage = torch.zeros(12)
    source = torch.ones(12)
    ema_update_([storage], [source], 0.0)
    with pytest.raises(ValueError, match="shape"):
        ema_update_([storage.view(3, 4)], [source], 0.0)
    ema_update_([storage[:6]], [2 * source[:6]], 0.0)
    assert storage.tolist() == [2] * 6 + [1] * 6


def test_result_is_a_named_tuple_of_float64_on_the_device():
    stats = ema_update_(*make([4]), 0.9)
    assert isinstance(stats, LayerStats) and all(x.dtype == torch.float64 and x.shape == (1,) for x in stats)
