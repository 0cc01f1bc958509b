"""What a call must satisfy before anything is written: every refusal names the tensor."""

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_pairs(targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Raises ValueError or TypeError naming the first tensor that cannot be averaged."""
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        check_pair(f"target {i}", target, f"source {i}", source)
        if target.device != targets[0].device:
            raise ValueError(
                f"target {i} is on {target.device}, target 0 on {targets[0].device}; one call serves one device"
            )
    for i, copy in enumerate(copies):
        check_pair(f"copy {i}", copy, f"target {i}", targets[i])
    written = [(f"target {i}", t) for i, t in enumerate(targets)] + [(f"copy {i}", c) for i, c in enumerate(copies)]
    check_overlap(written, [(f"source {i}", s) for i, s in enumerate(sources)])


def check_materialised(targets: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Apart from the rest, because one meta tensor would send the whole call to the shape-only implementation."""
    for role, tensors in (("target", targets), ("source", sources), ("copy", copies)):
        for i, tensor in enumerate(tensors):
            if tensor.is_meta:
                raise ValueError(f"{role} {i} is on the meta device; materialise it first")


def check_pair(name: str, written: Tensor, other_name: str, other: Tensor) -> None:
    """One pair: dense, of a float dtype, of one shape and device, and the written one not inside a graph."""
    for label, tensor in ((name, written), (other_name, other)):
        if tensor.layout != torch.strided:
            raise TypeError(f"{label} is {tensor.layout}; only dense tensors can be averaged")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{label} is {tensor.dtype}; float32, bfloat16 or float16 is needed")
    if written.shape != other.shape:
        raise ValueError(f"{name} has shape {list(written.shape)}, {other_name} {list(other.shape)}")
    if written.device != other.device:
        raise ValueError(f"{name} is on {written.device}, {other_name} on {other.device}")
    if written.requires_grad and not written.is_leaf:
        raise ValueError(f"{name} is part of an autograd graph; detach it")


def check_layers(layers: Sequence[int], num_tensors: int) -> None:
    if len(layers) != num_tensors:
        raise ValueError(f"{len(layers)} layer numbers for {num_tensors} tensors")
    for i, layer in enumerate(layers):
        if isinstance(layer, bool) or not isinstance(layer, numbers.Integral):
            raise TypeError(f"layers[{i}] is {layer!r}; layer numbers are whole numbers from 0")
        if layer < 0:
            raise ValueError(f"layers[{i}] is {layer}; layer numbers are whole numbers from 0")


def check_decay(decay: float) -> None:
    if isinstance(decay, bool) or not isinstance(decay, numbers.Real):
        raise TypeError(f"decay must be a number in [0, 1] or a 0-dim float64 tensor, got {type(decay).__name__}")
    if not 0.0 <= decay <= 1.0:  # nor is NaN
        raise ValueError(f"decay is {decay}; it must lie in [0, 1]")


def check_gate(gate: Tensor, device: torch.device) -> None:
    if not isinstance(gate, Tensor) or gate.dtype != torch.bool or gate.ndim:
        what = f"{gate.dtype} {list(gate.shape)}" if isinstance(gate, Tensor) else type(gate).__name__
        raise TypeError(f"gate must be a 0-dim bool tensor, got {what}")
    if gate.device != device:
        raise ValueError(f"gate is on {gate.device}, the targets on {device}")


def check_overlap(written: Sequence[tuple[str, Tensor]], read: Sequence[tuple[str, Tensor]]) -> None:
    """Writing one place twice would average twice; reading a place that is written would depend on the order."""
    spans = []
    for tensors, writes in ((written, True), (read, False)):
        for name, tensor in tensors:
            if not tensor.numel():
                continue
            if writes and _overlaps_itself(tensor):
                raise ValueError(f"{name} overlaps itself (an expanded view); give it storage of its own")
            spans.append((*_span(tensor), name, tensor, writes))
    spans.sort(key=lambda span: span[0])
    reaching: list[tuple[int, int, str, Tensor, bool]] = []
    for span in spans:
        begin, _, name, tensor, writes = span
        reaching = [earlier for earlier in reaching if earlier[1] > begin]
        for _, _, other_name, other, other_writes in reaching:
            if (writes or other_writes) and not _interleaved(other, tensor):
                one, two = (name, other_name) if writes and not other_writes else (other_name, name)
                mend = "pass shared storage once" if writes and other_writes else "the average needs storage of its own"
                raise ValueError(f"{one} and {two} overlap in memory; {mend}")
        reaching.append(span)


def _overlaps_itself(tensor: Tensor) -> bool:
    return _extent(tensor) < tensor.numel() or any(
        s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _extent(tensor: Tensor) -> int:
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def _span(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    return begin, begin + _extent(tensor) * tensor.element_size()


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Columns of one matrix share a span of memory but no element: equal strides, offsets that never meet."""
    if a.dtype != b.dtype or a.stride() != b.stride():
        return False
    size = a.element_size()
    shift, rest = divmod(b.data_ptr() - a.data_ptr(), size)
    if rest:
        return False
    widest = max(a.stride(), default=1)
    inner_a = _inner_extent(a, widest)
    return inner_a <= shift % widest and (shift % widest) + _inner_extent(b, widest) <= widest


def _inner_extent(tensor: Tensor, widest: int) -> int:
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s < widest) + 1
