"""Which tensor of one module is averaged into which of the other: by name, every storage once."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from fused_ema.op import local, locals_of


class Slot(NamedTuple):
    """Where a module keeps a tensor. Looked up at each use: FSDP and load_state_dict(assign=True) replace the object."""

    table: Mapping[str, Tensor | None]  # the owner's _parameters or _buffers
    key: str

    @property
    def tensor(self) -> Tensor:
        tensor = self.table[self.key]
        assert tensor is not None
        return tensor


def locals_in(slots: Iterable[Slot]) -> list[Tensor]:
    """What the slots hold now, DTensors as their shards."""
    return locals_of([slot.table[slot.key] for slot in slots])  # type: ignore[misc]


class Pair(NamedTuple):
    name: str
    source: Slot
    target: Slot


def parameter_slots(module: nn.Module) -> dict[str, Slot]:
    return {prefix + key: Slot(owner._parameters, key) for prefix, owner in _owners(module) for key in owner._parameters
            if owner._parameters[key] is not None}  # fmt: skip


def buffer_slots(module: nn.Module) -> dict[str, Slot]:
    return {prefix + key: Slot(owner._buffers, key) for prefix, owner in _owners(module) for key in owner._buffers
            if owner._buffers[key] is not None}  # fmt: skip


def _owners(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, owner in module.named_modules(remove_duplicate=False):
        # torch.compile, DDP and activation checkpointing wrap a module and put their own word into its names
        name = name.replace("_orig_mod", "").replace("_checkpoint_wrapped_module", "")
        parts = [part for part in name.split(".") if part]
        yield "".join(part + "." for part in parts), owner


def pair_slots(kind: str, mine: dict[str, Slot], theirs: dict[str, Slot]) -> list[Pair]:
    """Pairs by name; tensors tied in the target (one storage, several names) once, under their first name.

    Raises ValueError on a name that only one module has, a shape, placement or tying that differs, shared memory.
    """
    lone = sorted(set(mine) ^ set(theirs))
    if lone:
        raise ValueError(f"{kind} {lone[0]!r} is in only one of the two modules ({len(lone)} such)")
    pairs: list[Pair] = []
    seen: dict[tuple, Pair] = {}
    for name, source in mine.items():
        pair = Pair(name, source, theirs[name])
        target_key, source_key = storage_key(pair.target.tensor), storage_key(source.tensor)
        _check_alike(kind, pair)
        first = seen.setdefault(target_key, pair)
        if first is pair:
            pairs.append(pair)
        elif storage_key(first.source.tensor) != source_key:
            raise ValueError(f"{kind} {first.name!r} and {name!r} are tied in the target but not in the model")
    return pairs


def storage_key(tensor: Tensor) -> tuple:
    """Equal for tensors that are the same memory.

    Where there is none (empty shards, meta) the object itself: what one process ties, all tie, or they would not agree on
    the names.
    """
    shard = local(tensor)
    if shard.device.type == "meta" or not shard.numel():
        return (id(tensor),)
    return (shard.device, shard.data_ptr(), tuple(shard.shape), shard.stride())


def _check_alike(kind: str, pair: Pair) -> None:
    source, target = pair.source.tensor, pair.target.tensor
    if source.shape != target.shape:
        raise ValueError(
            f"{kind} {pair.name!r} is {list(source.shape)} in the model and {list(target.shape)} in the target"
        )
    if storage_key(source) == storage_key(target):
        raise ValueError(
            f"{kind} {pair.name!r} is the same tensor in both modules; the average needs storage of its own"
        )
    mine, theirs = getattr(source, "placements", None), getattr(target, "placements", None)
    if mine != theirs or getattr(source, "device_mesh", None) != getattr(target, "device_mesh", None):
        raise ValueError(
            f"{kind} {pair.name!r} is sharded as {mine} in the model and {theirs} in the target; shard both alike"
        )
    if mine and any(p.is_partial() for p in mine):
        raise ValueError(f"{kind} {pair.name!r} holds partial sums ({mine}); redistribute it first")
