"""What sharded parameters (DTensor: FSDP2, HSDP, tensor parallel) need: sums over shards, and settled shards."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Process groups over which this tensor is cut; none for a plain or replicated one."""
    placements, mesh = getattr(tensor, "placements", ()), getattr(tensor, "device_mesh", None)
    if mesh is None:
        return ()
    return tuple(mesh.get_group(axis) for axis, placement in enumerate(placements) if not placement.is_replicate())


def sum_over_shards(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Add up each tensor's value (last dimension: one per tensor) over its shards; replicas are counted once.

    One all-reduce for each way of sharding: one in all under FSDP2 and HSDP. Every rank must call it.
    """
    together: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups = shard_groups(tensor)
        if groups:
            together.setdefault(groups, []).append(i)
    if not together:
        return values
    total = values.clone()
    for groups, indices in together.items():
        where = torch.tensor(indices, device=values.device)
        part = values.index_select(-1, where)
        for group in groups:
            dist.all_reduce(part, group=group)
        total.index_copy_(-1, where, part)
    return total


def fsdp_modules(*modules: nn.Module) -> list[nn.Module]:
    return [m for module in modules for m in module.modules() if hasattr(m, "reshard") and hasattr(m, "unshard")]


def reshard(modules: Sequence[nn.Module]) -> None:
    """Free gathered parameters, so that the shards are what the modules hold and what the next forward gathers.

    FSDP2 keeps the root's parameters gathered after a forward without a backward, which is all a target encoder does:
    an update of the shards alone would not be seen.
    """
    for module in modules:
        module.reshard()  # type: ignore[operator]
