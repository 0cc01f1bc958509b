"""A plan: everything about a list of tensors that does not change from step to step, kept until an address changes."""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
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
    """Plans by what they depend on: address, shape, strides and dtype of every tensor, and the layers.

    A tensor freed and replaced by another at the same address with the same description needs the same plan, so an
    entry never goes stale. No device: an address says it.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._entries: dict[Hashable, Plan] = {}
        self._captured: list[Plan] = []  # a CUDA graph holds addresses of theirs and no reference: kept for good

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
        try:
            described = _described(tensors)
        except RuntimeError:  # a tensor without an address
            return build()
        in_graph = any(not t.is_leaf for t in (*targets, *copies) if t.requires_grad)
        key = (backend, len(targets), described, tuple(layers), in_graph)
        plan = self._entries.pop(key, None) or build()
        self._entries[key] = plan  # as the youngest
        if tensors and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured.append(plan)
        if len(self._entries) > self._capacity:
            self._entries.pop(next(iter(self._entries)), None)
        return plan


def _described(tensors: list[Tensor]) -> Hashable:
    """Raises RuntimeError for tensors that have no address (sparse, nested)."""
    addresses, shapes = tuple(map(Tensor.data_ptr, tensors)), tuple([t.shape for t in tensors])
    dtypes = tuple([t.dtype for t in tensors])
    if all(map(Tensor.is_contiguous, tensors)) and not any(map(Tensor.is_neg, tensors)):
        return addresses, shapes, dtypes
    return addresses, shapes, dtypes, tuple(map(Tensor.stride, tensors)), tuple(map(Tensor.is_neg, tensors))
