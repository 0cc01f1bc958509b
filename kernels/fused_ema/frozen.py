"""The copy of a model that holds its average: frozen, half precision in float32, tied as the model is."""

import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fused_ema.op import local
from fused_ema.pairs import buffer_slots, parameter_slots


def frozen_copy(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    """Of what DDP wraps the module inside. device: None where each tensor is; the CPU's memory is pinned beside CUDA.

    Raises ValueError for a sharded model: FSDP does not support deepcopy.
    """
    while isinstance(model, DistributedDataParallel | DataParallel):
        model = model.module
    if any(local(p) is not p for p in model.parameters()):
        raise ValueError(
            "the model is sharded: build the averaged module, shard it the same way and pass it as target="
        )
    modes = (t.fake_mode for t in model.state_dict().values() if isinstance(t, FakeTensor))
    averaged = copy.deepcopy(model, {id(mode): mode for mode in modes}).requires_grad_(False)  # fake in the same mode
    if device is not None:
        averaged = averaged.to(device)
    float32: dict[int, Tensor] = {}  # tied parameters stay tied
    for slot in (*parameter_slots(averaged).values(), *buffer_slots(averaged).values()):
        p = slot.tensor
        if p.is_floating_point() and p.dtype.itemsize < 4:
            float32.setdefault(id(p), p.detach().float())
            p.data = float32[id(p)]
    if device is not None and torch.device(device).type == "cpu" and torch.cuda.is_available():
        for p in averaged.parameters():
            p.data = p.data.pin_memory()
    return averaged
