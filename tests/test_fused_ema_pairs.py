"""FusedEMA pairs tensors by name, once a storage, and refuses what does not pair before anything is written."""

import copy
import math

import pytest
import torch
from test_fused_ema_module import move, network
from torch import nn

from fused_ema import FusedEMA


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_updated_once_and_stay_tied():
    for dtype in (torch.float32, torch.bfloat16):
        model = Tied().to(dtype)
        with torch.no_grad():
            model.embed.weight.zero_()
        ema = FusedEMA(model, decay=0.9)
        move(model, 1.0)
        ema.update()
        assert ema.module.head.weight is ema.module.embed.weight and ema.names == ["embed.weight"]
        torch.testing.assert_close(ema.module.embed.weight, torch.full((7, 4), 0.1))


def test_ties_in_the_target_alone_are_refused():
    model = Tied()
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    with pytest.raises(ValueError, match="tied in the target but not in the model"):
        FusedEMA(model, target=Tied())


def test_tied_empty_tensors_are_one_pair():
    model, target = (nn.ModuleList([nn.Linear(0, 3, bias=False), nn.Linear(0, 3, bias=False)]) for _ in range(2))
    for pair in (model, target):
        pair[1].weight = pair[0].weight
    assert FusedEMA(model, target=target).names == ["0.weight"]


def test_replaced_parameters_are_found_again():
    model = network()
    ema = FusedEMA(model, decay=0.0)
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
    ema.update()
    assert torch.equal(ema.module[0].weight, model[0].weight)


def test_wrapped_models_pair_with_plain_ones():
    model = network()
    FusedEMA(torch.compile(model), target=network()).update()


def test_a_replaced_submodule_is_averaged_from_the_next_update_on():
    model = network()
    ema = FusedEMA(model, decay=0.5)
    before, model[0] = ema.module[0].weight.clone(), copy.deepcopy(model[0])
    with torch.no_grad():
        model[0].weight += 1
    ema.update()
    assert torch.allclose(ema.module[0].weight, before + 0.5)
    model[0] = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"0.weight"):
        ema.update()


def test_what_is_read_or_swapped_is_of_the_replaced_submodule_too():
    model = network()
    ema = FusedEMA(model, decay=0.5)
    ema.update()
    model[0] = copy.deepcopy(model[0])
    with torch.no_grad():
        model[0].weight += 3
    name, size = "0.weight", 3 * math.sqrt(model[0].weight.numel())
    assert ema.distances()[name] == pytest.approx(size) and {n: t for n, t, _ in ema.pairs()}[name] is model[0].weight
    trained = model[0].weight.clone()
    with ema.swap():
        assert torch.equal(model[0].weight, ema.module[0].weight)
    assert torch.equal(model[0].weight, trained)


def test_a_parameter_that_is_added_later_is_not_left_out_silently():
    model = network()
    ema = FusedEMA(model, decay=0.5)
    model[0].register_parameter("scale", nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match=r"'0.scale' is in the model and not in the target"):
        ema.update()


@pytest.mark.parametrize("saved_by_compiled", [True, False])
def test_a_state_loads_with_and_without_torch_compile(saved_by_compiled):
    plain, compiled = network(), torch.compile(network(), backend="eager")
    saved, loaded = (compiled, plain) if saved_by_compiled else (plain, compiled)
    state = FusedEMA(saved).state_dict()
    assert not any("_orig_mod" in name for name in state["module"])
    ema = FusedEMA(loaded)
    ema.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(ema.module.parameters(), saved.parameters(), strict=True))
    old = {"module": {f"_orig_mod.{name}": value for name, value in state["module"].items()}, "num_updates": 0}
    ema.load_state_dict(old)  # as versions before wrote it


def test_ddp_pairs_with_a_plain_target_and_is_copied_without_its_wrapper(one_process):
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    ema = FusedEMA(wrapped, target=network())
    assert ema.names == [name for name, _ in model.named_parameters()]
    copied = FusedEMA(wrapped)
    assert type(copied.module) is nn.Sequential and copied.names == ema.names


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_only_whole_words_of_wrappers_are_taken_out_of_names():
    model = nn.ModuleDict({"a_orig_mod": nn.Linear(2, 2, bias=False), "a": nn.Linear(2, 2, bias=False)})
    assert FusedEMA(model).names == ["a_orig_mod.weight", "a.weight"]
    clash = nn.Linear(2, 2)
    clash.add_module("_orig_mod", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="two tensors are called 'weight' once wrappers"):
        FusedEMA(clash)


def test_integer_parameters_are_copied_and_complex_ones_refused():
    model = nn.Linear(3, 3)
    model.codes = nn.Parameter(torch.arange(4), requires_grad=False)
    ema = FusedEMA(model, decay=0.5)
    model.codes.data.add_(5)
    ema.update(gate=torch.tensor(False))
    assert ema.module.codes.tolist() == [0, 1, 2, 3]
    ema.update()
    assert ema.module.codes.tolist() == [5, 6, 7, 8] and ema.names == ["weight", "bias"]
    model.spectrum = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"parameter 'spectrum' is torch\.complex64.*view_as_real"):
        FusedEMA(model)


@pytest.mark.filterwarnings("ignore")  # torch calls sparse and nested tensors young
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_model_that_cannot_be_averaged_is_refused_by_name(kind):
    def holding(tensor):
        model = nn.Linear(2, 2)
        if kind == "parameter":
            model.odd = nn.Parameter(tensor, requires_grad=False)
        else:
            model.register_buffer("odd", tensor)
        return model

    dense = torch.eye(3)
    for tensor in (dense.to_sparse(), dense.to_sparse_csr(), dense.to_mkldnn(), torch.nested.nested_tensor([dense[0]])):
        with pytest.raises(TypeError, match=f"{kind} 'odd' of the model is"):
            FusedEMA(holding(tensor))
    with pytest.raises(ValueError, match=f"{kind} 'odd' of the model is on the meta device"):
        FusedEMA(holding(dense.to("meta")))
    with pytest.raises(TypeError, match=f"{kind} 'odd' is torch.float32 in the model and torch.int64 in the target"):
        FusedEMA(holding(dense), target=holding(dense.long()))
    with pytest.raises(ValueError, match="parameter 'weight' of the model has no shape yet"):
        FusedEMA(nn.LazyLinear(3))


def spoil(model, how):
    norm = model[1]
    if how == "shape":
        norm.running_var = torch.zeros(9)
    elif how == "kind":
        norm.running_var = torch.zeros(8, dtype=torch.long)
    elif how == "sparse":
        norm.running_var = torch.ones(8).to_sparse()
    elif how == "gone":
        del norm.running_var
    else:
        del model[2][1].bias


@pytest.mark.parametrize("how", ["shape", "kind", "sparse", "gone", "parameter gone"])
@pytest.mark.parametrize("mode", ["copy", "ema"])
def test_an_update_that_cannot_be_finished_is_not_begun(mode, how):
    model = network()
    ema = FusedEMA(model, decay=0.5, buffers=mode)
    before = {k: v.clone() for k, v in ema.module.state_dict().items()}
    move(model)
    spoil(model, how)
    name = "parameter '2.1.bias'" if how == "parameter gone" else "buffer '1.running_var'"
    with pytest.raises((ValueError, TypeError), match=name):
        ema.update()
    assert all(torch.equal(before[k], v) for k, v in ema.module.state_dict().items()) and ema.num_updates == 0


@pytest.mark.parametrize("mode", ["copy", "ema"])
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_mirror_that_no_longer_fits_stops_an_update_before_it_begins(mode, kind):
    model, mirror = network(), network().bfloat16()
    ema = FusedEMA(model, decay=0.5, buffers=mode, mirror=mirror)
    before = {k: v.clone() for k, v in ema.module.state_dict().items()}
    move(model)
    if kind == "parameter":
        mirror[0].weight = nn.Parameter(torch.zeros(2, 2))
    else:
        mirror[1].running_var = torch.zeros(3)
    with pytest.raises(ValueError, match=r"0\.weight" if kind == "parameter" else r"1\.running_var"):
        ema.update()
    assert all(torch.equal(before[k], v) for k, v in ema.module.state_dict().items())


@pytest.mark.parametrize("mode", ["copy", "ema"])
def test_a_float64_buffer_is_served(mode):
    model = network()
    model[1].running_mean = model[1].running_mean.double()
    ema = FusedEMA(model, decay=0.5, buffers=mode)
    model[1].running_mean.fill_(1 / 3)
    ema.update()
    assert ema.module[1].running_mean[0] == (1 / 3 if mode == "copy" else 1 / 6)
    assert len(ema.stats.distance_sq) == len(ema.names) == len(ema.distances())


def test_float64_models_are_averaged_in_float64():
    model = network().double()
    ema = FusedEMA(model, decay=0.9)
    want = ema.module[0].weight + 0.1 * 1e-12
    move(model, 1e-12)
    ema.update()
    torch.testing.assert_close(ema.module[0].weight, want, rtol=1e-15, atol=1e-16)


def test_modules_that_do_not_match_are_refused_by_name():
    model = network()
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is the same tensor"):
        FusedEMA(model, target=model)
    with pytest.raises(ValueError, match=r"parameter '0\.bias' is in the model and not in the target \(10 such\)"):
        FusedEMA(model, target=model[0])
    with pytest.raises(ValueError, match="parameter 'weight' is"):
        FusedEMA(nn.Linear(3, 2), target=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        FusedEMA(model, decay=1.5)
    for arguments in ({"model": [torch.zeros(2)]}, {"model": model, "target": "x"}, {"model": model, "mirror": "x"}):
        with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
            FusedEMA(**arguments)
    with pytest.raises(ValueError, match="buffers='all'"):
        FusedEMA(model, buffers="all")
