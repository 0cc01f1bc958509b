"""FusedEMA in a training loop: it follows, measures, swaps, and keeps its state."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_ema import FusedEMA, available_backends, warmup


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))


def move(model, amount=0.1):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount)


def test_the_average_starts_as_a_frozen_copy_and_follows():
    model = network()
    ema = FusedEMA(model, decay=0.9)
    assert not any(p.requires_grad for p in ema.module.parameters())
    start = [p.clone() for p in ema.module.parameters()]
    move(model)
    ema.update()
    for before, average in zip(start, ema.module.parameters(), strict=True):
        torch.testing.assert_close(average, before + 0.01)
    for name, distance in ema.distances().items():
        assert distance == pytest.approx(0.09 * math.sqrt(model.get_parameter(name).numel()), rel=1e-4)


def test_update_keeps_its_squared_distances_by_name():
    model = network()
    ema = FusedEMA(model, target=copy.deepcopy(model), decay=0.5)
    move(model)
    stats = ema.update()
    assert ema.stats is stats and ema.names == [n for n, _ in model.named_parameters()]
    assert len(stats.distance_sq) == len(ema.names)


def test_distances_group_by_block_or_by_a_function():
    model = network()
    ema = FusedEMA(model)
    move(model)
    ema.update()
    single, blocks = ema.distances(), ema.distances(group_by="block")
    assert list(blocks) == ["0", "1", "2.0", "2.1"]
    total = ema.distances(group_by=lambda name: "all")["all"]
    assert total == pytest.approx(math.sqrt(sum(d * d for d in single.values())))
    assert math.sqrt(sum(d * d for d in blocks.values())) == pytest.approx(total)
    with pytest.raises(ValueError, match="group_by='layer'"):
        ema.distances(group_by="layer")


def test_distances_before_any_update_are_those_of_now_and_write_nothing():
    model = network()
    ema = FusedEMA(model)
    move(model, 1.0)
    before, versions = copy.deepcopy(ema.module.state_dict()), [p._version for p in ema.module.parameters()]
    assert ema.distances()["0.bias"] == pytest.approx(math.sqrt(8), rel=1e-4)
    assert all(torch.equal(before[k], v) for k, v in ema.module.state_dict().items()) and ema.num_updates == 0
    assert [p._version for p in ema.module.parameters()] == versions


def test_half_precision_models_get_a_float32_average_that_moves():
    model = network().bfloat16()
    ema = FusedEMA(model, decay=0.9999)
    before = ema.module[0].weight.clone()
    move(model, 1.0)
    for _ in range(10):
        ema.update()
    assert ema.module[0].weight.dtype == torch.float32
    torch.testing.assert_close(ema.module[0].weight - before, torch.full((8, 6), 1e-3), rtol=0.02, atol=0)


def test_frozen_parameters_stay_bit_identical():
    model = network()
    ema = FusedEMA(model, decay=0.9)
    before = ema.module[0].weight.clone()
    for _ in range(100):
        ema.update()
    assert torch.equal(ema.module[0].weight, before)


@pytest.mark.parametrize("mode, mean, count", [("copy", 1.0, 3), ("ema", 0.5, 3), ("ignore", 0.0, 0)])
def test_buffers_are_copied_averaged_or_ignored(mode, mean, count):
    model = network()
    ema = FusedEMA(model, decay=0.5, buffers=mode)
    model[1].running_mean.fill_(1.0)
    model[1].num_batches_tracked.fill_(3)
    ema.update()
    assert ema.module[1].running_mean[0] == mean and ema.module[1].num_batches_tracked == count


@pytest.mark.parametrize("mode", ["copy", "ema"])
def test_a_closed_gate_leaves_the_whole_module_as_it_is(mode):
    model = network()
    ema = FusedEMA(model, decay=0.5, buffers=mode)
    before = copy.deepcopy(ema.module.state_dict())
    move(model, math.nan)
    model[1].running_mean.fill_(math.nan)
    model[1].num_batches_tracked.fill_(3)
    stats = ema.update(gate=torch.tensor(False))
    assert all(torch.equal(before[k], v) for k, v in ema.module.state_dict().items())
    assert stats.nonfinite.sum() == sum(p.numel() for p in model.parameters())


def test_decay_is_read_at_every_update():
    model = nn.Linear(1, 1, bias=False)
    ema = FusedEMA(model, decay=lambda t: [0.0, 1.0][t])
    move(model)
    ema.update()
    assert torch.equal(ema.module.weight, model.weight)
    kept = model.weight.detach().clone()
    move(model)
    ema.update()
    assert torch.equal(ema.module.weight, kept)
    ema.decay = 0.0
    ema.update(decay=1.0)
    assert torch.equal(ema.module.weight, kept)
    ema.update()
    assert torch.equal(ema.module.weight, model.weight)


def test_swap_lends_the_average_and_gives_the_weights_back_even_after_an_error():
    model = network().bfloat16()
    ema = FusedEMA(model, decay=0.9)
    move(model, 1.0)
    ema.update()
    own, average = copy.deepcopy(model.state_dict()), copy.deepcopy(ema.module.state_dict())
    with pytest.raises(RuntimeError, match="inside"), ema.swap() as lent:
        assert lent is model and torch.equal(model[0].weight, average["0.weight"].bfloat16())
        raise RuntimeError("inside")
    assert all(torch.equal(own[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(average[k], v) for k, v in ema.module.state_dict().items())


def test_swap_gives_the_weights_back_when_lending_itself_fails():
    model = network()
    ema = FusedEMA(model, decay=0.9)
    move(model)
    ema.update()
    own = copy.deepcopy(model.state_dict())
    ema.module[2][1].weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"parameter '2\.1\.weight' is \[3, 8\] in the model"), ema.swap():
        pass
    assert all(torch.equal(own[k], v) for k, v in model.state_dict().items())


def test_a_gate_or_decay_of_the_wrong_kind_is_refused():
    ema = FusedEMA(network())
    with pytest.raises(TypeError, match="gate must be a 0-dim bool tensor, got bool"):
        ema.update(gate=True)
    with pytest.raises(ValueError, match="decay is nan"):
        ema.update(decay=torch.tensor(math.nan, dtype=torch.float64))
    ema.decay = lambda t: 1.5
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        ema.update()
    assert ema.num_updates == 0


def test_a_module_without_parameters_is_no_special_case():
    ema = FusedEMA(nn.ReLU())
    ema.update()
    with ema.swap():
        pass
    assert ema.distances() == ema.spectral_distances() == {}


def test_an_update_compiles_as_a_whole():
    model = network()
    ema, plain = FusedEMA(model, decay=0.9), FusedEMA(model, decay=0.9)
    step = torch.compile(lambda: ema.update(), backend="eager", fullgraph=True)
    for _ in range(3):
        move(model)
        step(), plain.update()
    assert ema.num_updates == 3 and ema.distances() == plain.distances()


def test_state_holds_the_average_alone_and_continues_exactly():
    model = network()
    ema = FusedEMA(model, decay=warmup(0.999))
    for _ in range(3):
        move(model)
        ema.update()
    state = copy.deepcopy(ema.state_dict())
    assert set(state) == {"module", "num_updates"}
    other = FusedEMA(network(), decay=warmup(0.999))
    other.load_state_dict(state)
    other.model.load_state_dict(model.state_dict())
    ema.update(), other.update()
    assert all(torch.equal(a, b) for a, b in zip(ema.module.parameters(), other.module.parameters(), strict=True))
    with pytest.raises((KeyError, RuntimeError)):
        other.load_state_dict({"module": {}, "num_updates": 0})


def test_the_mirror_is_the_rounded_average():
    model = network()
    mirror = copy.deepcopy(model).bfloat16().requires_grad_(False)
    ema = FusedEMA(model, decay=0.9, mirror=mirror)
    move(model)
    ema.update()
    assert all(torch.equal(m, a.bfloat16()) for m, a in zip(mirror.parameters(), ema.module.parameters(), strict=True))


# ---- devices ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_an_average_in_host_memory_follows_weights_on_the_device():
    model = network().cuda()
    ema = FusedEMA(model, decay=0.9, device="cpu")
    start = ema.module[0].weight.clone()
    move(model)
    ema.update()
    assert ema.module[0].weight.is_pinned() and "cpp" in available_backends()
    torch.testing.assert_close(ema.module[0].weight, start + 0.01)


@pytest.mark.gpu
def test_update_makes_no_host_synchronisation():
    model = network().cuda()
    ema = FusedEMA(model, decay=0.9)
    ema.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update(gate=torch.ones((), dtype=torch.bool, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_mirror_holds_the_average_from_the_start_and_after_loading():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    mirror = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        model[0].weight.add_(1)
    ema = FusedEMA(model, decay=0.5, mirror=mirror)
    assert torch.equal(mirror[0].weight, ema.module[0].weight.bfloat16())
    model(torch.randn(8, 4))
    state = copy.deepcopy(ema.state_dict())
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update()
    assert torch.equal(mirror[1].running_mean, model[1].running_mean.bfloat16())
    ema.load_state_dict(state)
    assert torch.equal(mirror[0].weight, ema.module[0].weight.bfloat16())


def test_it_is_built_and_updated_under_fake_tensors_and_still_sees_what_is_shared():
    """Fake tensors have no addresses: what is one tensor is told by its storage."""
    with FakeTensorMode():
        model, target = network(), network()
        for averaged, ema in (  # torch copies no fake buffer, so BatchNorm's average is given
            (model, FusedEMA(model, decay=0.9, target=target)),
            (model[2], FusedEMA(model[2], decay=0.9)),
        ):
            assert ema.update(gate=torch.ones((), dtype=torch.bool)).distance_sq.shape == (len(ema.names),)
            assert ema.names == [name for name, _ in averaged.named_parameters()]
        model[2][1].weight = nn.Parameter(torch.empty(8, 8))
        model[2][0].weight = model[2][1].weight
        assert FusedEMA(model[2], decay=0.9).names == ["0.weight", "0.bias", "1.bias"]
        target[0].weight = model[0].weight
        with pytest.raises(ValueError, match=r"'0\.weight' is the same tensor in both"):
            FusedEMA(model, decay=0.9, target=target)


def test_a_default_device_or_dtype_of_the_process_changes_nothing():
    model = nn.Linear(4, 4)
    ema = FusedEMA(model, decay=0.5)
    with torch.no_grad():
        model.weight.add_(1)
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        ema.update()
        assert ema.distances()["weight"] == pytest.approx(2.0) and ema.spectral_distances()["weight"] > 0
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
