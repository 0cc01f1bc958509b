"""Builds the model and cuts it up: recompute -> compile -> shard -> materialise -> initialise, in this order.

In: a configuration and a mode. Out: a JEPA whose parameters are tensors (`single`, `ddp`) or DTensors (`fsdp`, `hsdp`),
with the same numbers in them on any number of processes.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from jepa_fast.config import Config
from jepa_fast.model.compile import compile_blocks, compiles, eager
from jepa_fast.model.jepa import JEPA
from jepa_fast.model.vit import Block
from jepa_fast.parallel.memory import Layout
from jepa_fast.parallel.world import World


def build(config: Config, world: World, layout: Layout, weights: dict[str, Tensor] | None = None) -> JEPA:
    """A JEPA with `weights`, or initialised from torch's generator: where it is sharded, from the main process's."""
    if not layout.sharded:
        jepa = JEPA(config)
        if weights is not None:
            jepa.load_state_dict(jepa.state_dict() | weights)
        jepa.to(world.device)
        _prepare(jepa, config, world)
        return jepa
    whole = None
    if world.is_main:  # one copy on the host, handed out piece by piece
        whole = JEPA(config)
        if weights is not None:
            whole.load_state_dict(whole.state_dict() | weights)
    with torch.device("meta"):
        jepa = JEPA(config)
    _prepare(jepa, config, world)
    shard(jepa, config, _mesh(world, layout))
    jepa.to_empty(device=world.device)
    _poison(jepa)
    _hand_out(jepa, whole, world)
    _refuse_poison(jepa)
    return jepa


def _prepare(jepa: JEPA, config: Config, world: World) -> None:
    """What must happen before sharding, as the hooks of FSDP go round the outside."""
    for block in (*jepa.context_encoder.blocks, *jepa.predictor.blocks):
        assert isinstance(block, Block)
        block.recompute = config.parallel.recompute
    if compiles(config, world.device):
        compile_blocks(jepa, config.model.cuda_graphs)


# ---- FSDP2 ----------------------------------------------------------------------------------------


def _mesh(world: World, layout: Layout) -> DeviceMesh:
    kind, cuts = world.device.type, layout.shards
    if layout.mode == "hsdp":
        return init_device_mesh(kind, (world.size // cuts, cuts), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))


def shard(jepa: JEPA, config: Config, mesh: DeviceMesh) -> None:
    """Cut every block, then what is left of each part, over the mesh. Both encoders alike, so that their shards pair up."""
    inner, outer = policies(config, mesh.device_type)
    for part in (jepa.context_encoder, jepa.target_encoder, jepa.predictor):
        # No backward ever reshards the target encoder, and by default a root stays gathered after its forward: the EMA
        # would write into shards that the next forward does not read.
        reshard = config.parallel.reshard_after_forward or part is jepa.target_encoder
        blocks = [fully_shard(b, mesh=mesh, reshard_after_forward=reshard, mp_policy=inner) for b in part.blocks]
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard, mp_policy=outer)
        for method in ("encode", "encode_packed", "packed"):
            if hasattr(part, method):
                register_fsdp_forward_method(part, method)
        _prefetch(blocks, config.parallel.prefetch)


def policies(config: Config, device_type: str) -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy]:
    """(inside blocks, outside): weights of blocks are gathered in bf16 where training is, gradients added in float32.

    What lies outside blocks (patch embedding, last norm, mask token) is small and stays float32. On a CPU all does: its
    layer norm takes no bf16 weights beside a float32 residual stream. Autocast rules the products either way.
    """
    reduce = torch.bfloat16 if config.parallel.reduce == "bf16" else torch.float32
    half = torch.bfloat16 if config.train.precision == "bf16" and device_type == "cuda" else None
    outer = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=half, reduce_dtype=reduce, cast_forward_inputs=False), outer


def _prefetch(blocks: list[Any], ahead: int) -> None:
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + ahead])
        block.set_modules_to_backward_prefetch(blocks[max(0, i - ahead) : i][::-1])


def roots(model: nn.Module) -> list[FSDPModule]:
    """The sharded parts of a JEPA; none if it is not sharded."""
    return [part for part in model.children() if isinstance(part, FSDPModule)]


def settle(model: nn.Module) -> None:
    """Free all gathered weights, so that parameters are the shards, and the shards are what the next forward reads."""
    for part in _sharded(model):
        part.reshard()


@contextmanager
def gathered(jepa: JEPA, config: Config) -> Iterator[None]:
    """Inside, both encoders hold whole weights, for whoever looks at them other than by a step. All processes enter.

    Compiled blocks run as they are written: an examination has shapes of its own. Where blocks are gathered in bf16 the
    passes run under autocast, as training does: a layer norm takes no bf16 weights beside a float32 residual stream.
    """
    for part in (jepa.context_encoder, jepa.target_encoder):
        _reshard_after_forward(part, False)
        for module in _sharded(part):
            module.unshard()
    device = next(jepa.parameters()).device
    half = any(p.dtype == torch.bfloat16 for p in jepa.context_encoder.parameters())
    try:
        with (
            eager() if compiles(config, device) else nullcontext(),
            torch.autocast(device.type, torch.bfloat16) if half else nullcontext(),
        ):
            yield
    finally:
        for part in (jepa.context_encoder, jepa.target_encoder):
            _reshard_after_forward(part, config.parallel.reshard_after_forward or part is jepa.target_encoder)
        settle(jepa)


def _reshard_after_forward(part: nn.Module, reshard: bool) -> None:
    for module in _sharded(part):
        module.set_reshard_after_forward(reshard, recurse=False)


def _sharded(part: nn.Module) -> list[FSDPModule]:
    return [module for module in part.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def _poison(jepa: JEPA) -> None:
    """Fresh memory holds anything; NaN is found if it is forgotten."""
    for tensor in _tensors(jepa):
        tensor.fill_(float("nan"))


@torch.no_grad()
def _hand_out(jepa: JEPA, whole: JEPA | None, world: World) -> None:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(jepa, whole.state_dict() if whole is not None else {}, options=options)
    mine = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in jepa.named_buffers():  # position tables are in no state dict
        if mine:
            buffer.copy_(mine[name])
        dist.broadcast(buffer, src=0)


def _refuse_poison(jepa: JEPA) -> None:
    named = (*jepa.named_parameters(), *jepa.named_buffers())
    left = [name for name, t in named if t.is_floating_point() and _local(t).isnan().any()]
    assert not left, f"never initialised: {', '.join(left)}"


def _tensors(jepa: JEPA) -> Iterable[Tensor]:
    return (_local(t) for t in (*jepa.parameters(), *jepa.buffers()) if t.is_floating_point())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, gathered where they are sharded: every process calls it."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


# ---- the step -------------------------------------------------------------------------------------


def distribute(jepa: JEPA, world: World, layout: Layout) -> nn.Module:
    """The model as the loop calls it: itself, or wrapped so that gradients are averaged over processes."""
    if layout.mode != "ddp":
        return jepa
    devices = [world.device] if world.device.type == "cuda" else None
    # The position tables are the same everywhere. torch 2.13 renamed the argument.
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    never: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(jepa, device_ids=devices, gradient_as_bucket_view=True, **never)


def accumulating(model: nn.Module, more: bool) -> AbstractContextManager:
    """Inside, a backward leaves gradients on their process if `more` are to be added; the last one brings all together."""
    for part in roots(model):
        part.set_requires_gradient_sync(not more)
    return model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext()


def precision(config: Config, world: World) -> torch.autocast:
    """bf16 autocast for the forward, if configured. Weights, loss, targets, optimizer and EMA are fp32 either way."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=config.train.precision == "bf16")
