"""What a call must satisfy before anything is written: every refusal names the tensor."""

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

MAX_LAYER = 2**24 - 1  # the result has an entry for every number up to the largest
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels take; float64 is plain torch's


def label(role: str, i: int, names: Sequence[str] | None) -> str:
    """What an error calls a tensor: "target 3", or with a name "target parameter 'head.weight'"."""
    return f"{role} {names[i] if names else i}"


def check_pairs(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    copies: Sequence[Tensor],
    names: Sequence[str] | None = None,
) -> None:
    """Raises ValueError or TypeError naming the first tensor that cannot be averaged. Looks at no address."""
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        name = label("target", i, names)
        check_pair(name, target, label("source", i, names), source)
        if target.device != targets[0].device:
            first = label("target", 0, names)
            raise ValueError(
                f"{name} is on {target.device}, {first} on {targets[0].device}; one call serves one device"
            )
    for i, copy in enumerate(copies):
        check_pair(label("copy", i, names), copy, label("target", i, names), targets[i])


def check_pair(name: str, written: Tensor, other_name: str, other: Tensor) -> None:
    """One pair: dense, of a float dtype, of one shape and device, and the written one not inside a graph."""
    for label, tensor in ((name, written), (other_name, other)):
        check_dense(label, tensor)
        check_dtype(label, tensor)
    if written.shape != other.shape:
        raise ValueError(f"{name} has shape {list(written.shape)}, {other_name} {list(other.shape)}")
    if written.device != other.device:
        raise ValueError(f"{name} is on {written.device}, {other_name} on {other.device}")
    check_writable(name, written)


def check_placements(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Two DTensors must be cut alike, and hold values rather than parts of sums."""
    mine, theirs = getattr(tensor, "placements", None), getattr(other, "placements", None)
    for placed, placements in ((name, mine), (other_name, theirs)):
        if placements and any(p.is_partial() for p in placements):
            raise ValueError(f"{placed} holds partial sums ({placements}); redistribute it first")
    if mine is None or theirs is None:
        return  # one of the two may be the shard itself
    if mine != theirs or tensor.device_mesh != other.device_mesh:  # type: ignore[attr-defined]
        raise ValueError(f"{name} is sharded as {mine}, {other_name} as {theirs}; shard both alike")
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, {other_name} {list(other.shape)}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Strided memory that is there: not sparse, nested, on the meta device or waiting for a first forward."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        raise ValueError(f"{name} has no shape yet; run the module once first")
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor; only dense tensors can be averaged: pass its values()")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} is {tensor.layout}; only dense tensors can be averaged")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device; materialise it first")


def check_stored(name: str, tensor: Tensor) -> None:
    """The memory of every element is still there: a storage can be freed or shrunk under a tensor."""
    if not tensor.numel():
        return
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    need = (tensor.storage_offset() + reach + 1) * tensor.element_size()
    if tensor.untyped_storage().nbytes() < need:
        raise ValueError(f"the storage of {name} was freed or shrunk: {need} bytes are needed; give it memory first")


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.is_complex():
        raise TypeError(f"{name} is {tensor.dtype}; keep it as real numbers (torch.view_as_real) to average it")
    if tensor.dtype not in FLOATS and tensor.dtype != torch.float64:
        raise TypeError(f"{name} is {tensor.dtype}; float32, bfloat16, float16 or float64 is needed")


def check_writable(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and not tensor.is_leaf:
        raise ValueError(f"{name} is part of an autograd graph; detach it")
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} was made in inference mode and can only be written there; clone it outside")


def check_layers(layers: Sequence[int], num_tensors: int) -> None:
    if len(layers) != num_tensors:
        raise ValueError(f"{len(layers)} layer numbers for {num_tensors} tensors")
    for i, layer in enumerate(layers):
        if isinstance(layer, bool) or not isinstance(layer, numbers.Integral):
            raise TypeError(f"layers[{i}] is {layer!r}; layer numbers are whole numbers from 0")
        if not 0 <= layer <= MAX_LAYER:
            raise ValueError(f"layers[{i}] is {layer}; layer numbers are whole numbers from 0 to {MAX_LAYER}")


def check_decay(decay: float) -> None:
    if isinstance(decay, bool) or not isinstance(decay, numbers.Real):
        raise TypeError(f"decay must be a number in [0, 1] or a 0-dim float64 tensor, got {type(decay).__name__}")
    if not 0.0 <= decay <= 1.0:  # nor is NaN
        raise ValueError(f"decay is {decay}; it must lie in [0, 1]")


def check_gate(gate: Tensor) -> None:
    if not isinstance(gate, Tensor) or gate.dtype != torch.bool or gate.ndim:
        what = f"{gate.dtype} {list(gate.shape)}" if isinstance(gate, Tensor) else type(gate).__name__
        raise TypeError(f"gate must be a 0-dim bool tensor, got {what}; loss.isfinite() is one")


# ---- overlap -------------------------------------------------------------------------------------------


def check_overlap(written: Sequence[tuple[str, Tensor]], read: Sequence[tuple[str, Tensor]]) -> None:
    """Writing one place twice would average twice; reading a place that is written would depend on the order.

    written, read: (name, tensor). Exact: tensors that interleave without meeting, as columns of one matrix, may pass.
    """
    spans = []
    for tensors, writes in ((written, True), (read, False)):
        for name, tensor in tensors:
            if not tensor.numel():
                continue
            if not address(tensor):
                raise TypeError(f"{name} is a {type(tensor).__name__} without memory of its own; average what it wraps")
            if writes and _overlaps_itself(tensor):
                raise ValueError(f"{name} overlaps itself (an expanded view); give it storage of its own")
            spans.append((*_span(tensor), name, tensor, writes))
    spans.sort(key=lambda span: span[0])
    reaching: list[tuple[int, int, str, Tensor, bool]] = []
    for span in spans:
        begin, _, name, tensor, writes = span
        reaching = [earlier for earlier in reaching if earlier[1] > begin]
        for _, _, other_name, other, other_writes in reaching:
            if (writes or other_writes) and _meet(other, tensor):
                one, two = (name, other_name) if writes and not other_writes else (other_name, name)
                mend = "pass shared storage once" if writes and other_writes else "the average needs storage of its own"
                raise ValueError(f"{one} and {two} overlap in memory; {mend}")
        reaching.append(span)


def address(tensor: Tensor) -> int:
    """Of the first byte. A fake tensor has none: one made of its storage's identity, far from all others'."""
    if isinstance(tensor, FakeTensor):
        begin: int = tensor.untyped_storage()._cdata << 48
        return begin + int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, in any order of dimensions, without gap or overlap."""
    expected = 1
    for stride, length in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= length
    return True


def _overlaps_itself(tensor: Tensor) -> bool:
    if is_dense(tensor):
        return False
    if any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        return True
    begin, end = _span(tensor)
    touched = torch.zeros(end - begin, dtype=torch.bool, device="cpu")
    _bytes_in(touched, begin, tensor).fill_(True)
    return int(touched.sum()) < tensor.numel() * tensor.element_size()


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans intersect share a byte."""
    if is_dense(a) and is_dense(b):
        return True
    (begin_a, end_a), (begin_b, end_b) = _span(a), _span(b)
    begin = min(begin_a, begin_b)
    touched = torch.zeros(max(end_a, end_b) - begin, dtype=torch.bool, device="cpu")
    if any(s == 0 and n > 1 for n, s in zip(a.shape, a.stride(), strict=True)):
        a, b = b, a  # torch refuses to fill an expanded view; one of the two is written, so is none
    _bytes_in(touched, begin, a).fill_(True)
    return bool(_bytes_in(touched, begin, b).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one past the last."""
    begin = address(tensor)
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _bytes_in(memory: Tensor, begin: int, tensor: Tensor) -> Tensor:
    """The view of `memory`, one entry a byte from address `begin`, that the tensor's elements cover."""
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    return memory.as_strided((*tensor.shape, size), (*strides, 1), address(tensor) - begin)
