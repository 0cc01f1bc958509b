"""A plan: everything about a list of tensors that does not change from step to step, kept until an address changes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from torch import Tensor


class Plan(Protocol):
    """One backend's prepared call."""

    def run(
        self,
        targets: Sequence[Tensor],
        sources: Sequence[Tensor],
        copies: Sequence[Tensor],
        weight: Tensor,
        gate: Tensor | None,
        measure: bool,
    ) -> Tensor:
        """Update in place; returns float64 [3, num_layers] on the targets' device, of any content unless `measure`."""
        ...


class PlanCache:
    """Plans by what they depend on: addresses, lengths, dtypes and layout of every tensor, and the layers.

    A tensor freed and replaced by another at the same address with the same description needs the same plan, so an
    entry never goes stale. Non-contiguous views are planned anew each time.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._entries: OrderedDict[Hashable, Plan] = OrderedDict()

    def get(
        self,
        backend: str,
        targets: Sequence[Tensor],
        sources: Sequence[Tensor],
        copies: Sequence[Tensor],
        layers: Sequence[int],
        build: Callable[[], Plan],
    ) -> Plan:
        tensors = [*targets, *sources, *copies]
        if not all([t.is_contiguous() for t in tensors]):  # noqa: C419  a list is the faster of the two here
            return build()
        pointers, shapes = [t.data_ptr() for t in tensors], [t.shape for t in tensors]
        key = (backend, len(targets), *pointers, *shapes, *[t.dtype for t in tensors], *layers)
        key += tuple({t.device for t in tensors}) + tuple(t.requires_grad and not t.is_leaf for t in targets)
        plan = self._entries.get(key)
        if plan is None:
            plan = self._entries[key] = build()
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        else:
            self._entries.move_to_end(key)
        return plan
