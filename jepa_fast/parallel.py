"""How many devices there are, and what follows: the only file that knows.

Joins the process group, shares out CPU threads, wraps the model, and averages what is logged.
"""

import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jepa_fast.config import Config
from jepa_fast.errors import UsageError


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join(config: Config) -> World:
    """Enter the process group that torchrun described (NCCL on CUDA, gloo on CPU), or be alone.

    Raises UsageError if the batch cannot be shared out or `single` is asked of several processes.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if config.train.batch_size % size:
        raise UsageError(
            f"--train.batch_size {config.train.batch_size} is the global batch: {size} processes do not divide it"
        )
    if config.parallel.mode == "single" and size > 1:
        raise UsageError(f"--parallel.mode single, but {size} processes were started; use auto or ddp")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    share = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(config.parallel.threads or share)
    if size > 1 or config.parallel.mode == "ddp":
        if "MASTER_ADDR" not in os.environ:
            raise UsageError("--parallel.mode ddp needs torchrun: torchrun --nproc_per_node=N -m jepa_fast.train ...")
        dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=size)
    return World(rank, size, device)


def here() -> World:
    """This process in a group that somebody else made; alone if there is none. The device is not looked into."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return World(rank, size, torch.device("cpu"))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def distribute(model: nn.Module, world: World) -> nn.Module:
    """The model as the loop calls it: itself, or wrapped so that gradients are averaged over processes."""
    if not dist.is_initialized():
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    # The position tables are the same everywhere. torch 2.13 renamed the argument.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    never: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **never)


def precision(config: Config, world: World) -> torch.autocast:
    """bf16 autocast for the forward, if configured. Weights, loss, targets, optimizer and EMA are fp32 either way."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=config.train.precision == "bf16")


def average(values: dict[str, Tensor], world: World) -> dict[str, float]:
    """Scalars on the device -> means over processes on the host: one collective, one synchronisation."""
    if not values:
        return {}
    stacked = torch.stack([v.detach().float().reshape(()) for v in values.values()])
    if world.size > 1:
        dist.all_reduce(stacked)
        stacked /= world.size
    return dict(zip(values, stacked.tolist(), strict=True))


def same_everywhere(value: Any, world: World) -> Any:
    """Rank 0's value, on every process."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
