"""Which tensor of one module is averaged into which of the other: by name, every storage once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fused_ema.check import address, check_dense, check_dtype, check_overlap, check_placements
from fused_ema.op import local, shards

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # what torch.compile and activation checkpointing put into names


class Slot(NamedTuple):
    """Where a module keeps a tensor. Looked up at each use: FSDP and load_state_dict(assign=True) replace the object."""

    table: Mapping[str, Tensor | None]  # the owner's _parameters or _buffers
    key: str

    @property
    def tensor(self) -> Tensor:
        """None, which checks refuse, if the owner has dropped it."""
        return self.table.get(self.key)  # type: ignore[return-value]


class Pair(NamedTuple):
    kind: str  # parameter or buffer
    name: str
    source: Slot
    target: Slot

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


def locals_in(slots: Iterable[Slot]) -> list[Tensor]:
    """What the slots hold now, DTensors as their shards."""
    return shards([slot.table[slot.key] for slot in slots])  # type: ignore[misc]


def parameter_slots(module: nn.Module) -> dict[str, Slot]:
    return _slots(module, lambda owner: owner._parameters)


def buffer_slots(module: nn.Module) -> dict[str, Slot]:
    return _slots(module, lambda owner: owner._buffers)


def _slots(module: nn.Module, table_of: Callable[[nn.Module], Mapping[str, Tensor | None]]) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    for prefix, owner in _owners(module):
        for key, tensor in table_of(owner).items():
            if tensor is None:
                continue
            if prefix + key in slots:
                raise ValueError(f"two tensors are called {prefix + key!r} once wrappers are taken out of their names")
            slots[prefix + key] = Slot(table_of(owner), key)
    return slots


def _owners(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every submodule and the prefix of its tensors' names, wrappers (compile, DDP, checkpointing) left out."""
    yield prefix, module
    for key, child in module._modules.items():
        if child is not None:
            wraps = key in _WRAPPED or (key == "module" and isinstance(module, DistributedDataParallel | DataParallel))
            yield from _owners(child, prefix if wraps else f"{prefix}{key}.")


def plain_name(name: str) -> str:
    """A name of a state dict without what torch.compile and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


class Built(NamedTuple):
    """How modules were put together when they were paired: their children, and how many parameters and buffers they had."""

    children: Sequence[tuple[Mapping[str, nn.Module | None], tuple[nn.Module | None, ...]]]
    tables: list[Mapping[str, Any]]  # _parameters and _buffers
    tensors: int

    def holds(self) -> bool:
        """Whether they still are. Cheap: it runs before every update."""
        for table, held in self.children:
            if tuple(table.values()) != held:
                return False
        return sum(map(len, self.tables)) == self.tensors


def built_of(modules: Iterable[nn.Module]) -> Built:
    owners = [owner for module in modules for _, owner in _owners(module)]
    children = [(owner._modules, tuple(owner._modules.values())) for owner in owners if owner._modules]
    tables: list[Mapping[str, Any]] = [table for owner in owners for table in (owner._parameters, owner._buffers)]
    return Built(children, tables, sum(map(len, tables)))


Roles = tuple[str, str]  # what errors call the two modules


def check_module(role: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"the {role} is a {type(module).__name__}, not a torch.nn.Module")


def check_model(model: nn.Module, buffers: bool) -> None:
    """Raises ValueError or TypeError, naming the tensor, if the model cannot be copied."""
    check_module("model", model)
    for kind, slots in (("parameter", parameter_slots(model)), ("buffer", buffer_slots(model) if buffers else {})):
        for name, slot in slots.items():
            check_dense(f"{kind} {name!r} of the model", slot.tensor)


def pair_modules(model: nn.Module, target: nn.Module, buffers: bool, roles: Roles = ("model", "target")) -> list[Pair]:
    """All parameters and then, if wished, all buffers."""
    pairs = _pair_slots("parameter", parameter_slots(model), parameter_slots(target), roles)
    return pairs + (_pair_slots("buffer", buffer_slots(model), buffer_slots(target), roles) if buffers else [])


def _pair_slots(kind: str, mine: dict[str, Slot], theirs: dict[str, Slot], roles: Roles) -> list[Pair]:
    """Pairs by name; tensors tied in the target (one storage, several names) once, under their first name.

    Raises ValueError or TypeError on a name that only one module has, a shape, placement or tying that differs, what is
    not dense.
    """
    lone = sorted(set(mine) ^ set(theirs))
    if lone:
        has, lacks = roles if lone[0] in mine else roles[::-1]
        raise ValueError(
            f"{kind} {lone[0]!r} is in the {has} and not in the {lacks} ({len(lone)} such); "
            "give the modules, or submodules, that have the same names"
        )
    pairs: list[Pair] = []
    seen: dict[tuple, Pair] = {}
    for name, source in mine.items():
        pair = Pair(kind, name, source, theirs[name])
        check_alike(pair, roles)
        if storage_key(source.tensor) == storage_key(pair.target.tensor):
            raise ValueError(f"{pair} is the same tensor in both modules; the average needs storage of its own")
        first = seen.setdefault(storage_key(pair.target.tensor), pair)
        if first is pair:
            pairs.append(pair)
        elif storage_key(first.source.tensor) != storage_key(source.tensor):
            raise ValueError(f"{first} and {name!r} are tied in the {roles[1]} but not in the {roles[0]}")
    return pairs


def storage_key(tensor: Tensor) -> tuple:
    """Equal for tensors that are the same memory.

    Where there is none (empty shards) the object itself: what one process ties, all tie, or they would not agree on the
    names.
    """
    shard = local(tensor)
    if not shard.numel():
        return (id(tensor),)
    return (shard.device, address(shard), tuple(shard.shape), shard.stride())


def check_alike(pair: Pair, roles: Roles = ("model", "target")) -> None:
    """Raises ValueError or TypeError, naming the pair, if the one cannot be copied or averaged into the other."""
    role, other_role = roles
    source, target = pair.source.tensor, pair.target.tensor
    mine, theirs = f"{pair} of the {role}", f"{pair} of the {other_role}"
    for name, tensor in ((mine, source), (theirs, target)):
        if tensor is None:
            raise ValueError(f"{name} is gone since the two modules were paired; pair them anew")
        check_dense(name, tensor)
    if source.shape != target.shape:
        raise ValueError(f"{pair} is {list(source.shape)} in the {role} and {list(target.shape)} in the {other_role}")
    if source.is_floating_point() != target.is_floating_point() or source.is_complex() != target.is_complex():
        raise TypeError(f"{pair} is {source.dtype} in the {role} and {target.dtype} in the {other_role}")
    if hasattr(source, "placements") != hasattr(target, "placements"):
        cut, whole = (role, other_role) if hasattr(source, "placements") else (other_role, role)
        raise ValueError(f"{pair} is sharded in the {cut} and not in the {whole}; shard both alike")
    check_placements(mine, source, theirs, target)


def part(pairs: Iterable[Pair], average_buffers: bool) -> tuple[list[Pair], list[Pair]]:
    """(averaged, copied): floating parameters, and floating buffers if wished, are averaged; all else is copied.

    Raises TypeError on a complex parameter: copied it would be no average, and nobody would notice.
    """
    averaged: list[Pair] = []
    copied: list[Pair] = []
    for pair in pairs:
        tensor = pair.source.tensor
        if pair.kind == "parameter" and tensor.is_complex():
            check_dtype(str(pair), tensor)
        moves = tensor.is_floating_point() and (pair.kind == "parameter" or average_buffers)
        if moves:
            check_dtype(f"{pair} of the model", tensor)
            check_dtype(f"{pair} of the target", pair.target.tensor)
        (averaged if moves else copied).append(pair)
    return averaged, copied


def part_alike(mirrored: list[Pair], averaged: list[Pair], copied: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs of the averaged module and its mirror in the order of the averaged, and of the copied pairs."""
    by_name = {str(pair): pair for pair in mirrored}
    if by_name.keys() != {str(pair) for pair in averaged + copied}:
        raise ValueError("the mirror's parameters or buffers are tied otherwise than the averaged module's")
    for pair in averaged:
        check_dtype(f"{pair} of the mirror", by_name[str(pair)].target.tensor)
    return [by_name[str(p)] for p in averaged], [by_name[str(p)] for p in copied]


def check_apart(pairs: Iterable[Pair], mirrored: Iterable[Pair]) -> None:
    """Nothing that is written may be read, or written twice."""
    pairs, mirrored = list(pairs), list(mirrored)
    written = [(f"{p} of the target", local(p.target.tensor)) for p in pairs]
    written += [(f"{p} of the mirror", local(p.target.tensor)) for p in mirrored]
    check_overlap(written, [(f"{p} of the model", local(p.source.tensor)) for p in pairs])
