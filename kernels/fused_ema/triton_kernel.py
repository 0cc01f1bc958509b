"""The GPU kernel: many tensors in one launch, 128-bit accesses, distances from the same pass, no atomics.

In: a table on the device with one row a chunk (address of theta, of theta_bar, of the copy, elements), built when
addresses change. Out: theta_bar moved in place, three partial sums a chunk; a second small kernel adds the partials
of each layer in float64, in a fixed order. Decay and gate are read on the device, so a captured CUDA graph replays
with new values.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32768  # elements; every row but a tensor's last has this many
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}  # set, because the default differs between versions
PROGRAMS_PER_SM = 4  # of 256 threads and 64 registers: all resident at once, 64 KiB in flight on each SM
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def block_size(source: torch.dtype, copied: bool) -> int:
    """Elements a program handles at a time: four (or, with a half-precision theta, four and 64-bit loads) a thread."""
    return 1024 if source != torch.float32 or copied else 2048


@triton.jit
def _step(
    theta_ptr, average_ptr, copy_ptr, offsets, mask, from_target, factor, is_open,
    HAS_COPY: tl.constexpr, HAS_GATE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if MASKED:
        theta = tl.load(theta_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        stored = tl.load(average_ptr + offsets, mask=mask, other=0.0)
    else:
        theta = tl.load(theta_ptr + offsets, eviction_policy="evict_first").to(tl.float32)
        stored = tl.load(average_ptr + offsets, eviction_policy="evict_first")
    average = stored.to(tl.float32)
    base = tl.where(from_target, average, theta)
    moved = tl.where(theta == average, base, base + factor * (theta - average))  # signed zeros and infinities stay
    after = tl.where(factor == 0.0, base, moved).to(stored.dtype)
    if HAS_GATE:
        after = tl.where(is_open, after, stored)
    if MASKED:
        tl.store(average_ptr + offsets, after, mask=mask)
    else:
        tl.store(average_ptr + offsets, after)
    if HAS_COPY:
        new_copy = after.to(tl.float32).to(copy_ptr.dtype.element_ty)
        keep = mask
        if HAS_GATE:
            keep = mask & is_open
        if MASKED or HAS_GATE:
            tl.store(copy_ptr + offsets, new_copy, mask=keep)
        else:
            tl.store(copy_ptr + offsets, new_copy)
    gap = theta - after.to(tl.float32)
    return gap * gap, theta * theta


@triton.jit
def _is_nonfinite(x):
    return ((x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)


@triton.jit
def update_kernel(
    table, partials, weight_ptr, gate_ptr, first, num_chunks, total,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, COPY: tl.constexpr, HAS_COPY: tl.constexpr, HAS_GATE: tl.constexpr,
    MEASURE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """table: int64 [total, 4], rows first .. first + num_chunks are this launch's; partials: float32 [3, total].

    Without MEASURE the sums are dead code to the compiler, and partials is not touched.
    """
    weight = tl.load(weight_ptr)
    from_target = weight < 0.5  # the nearer end is the base: weights 0 and 1 are exact, equal operands never move
    factor = tl.where(from_target, weight, weight - 1.0).to(tl.float32)
    is_open = True
    if HAS_GATE:
        is_open = tl.load(gate_ptr).to(tl.int1)
    lanes = tl.arange(0, BLOCK)
    chunk = tl.program_id(0)
    while chunk < num_chunks:
        row = table + (first + chunk).to(tl.int64) * 4
        theta_ptr = tl.load(row).to(tl.pointer_type(SOURCE))
        average_ptr = tl.load(row + 1).to(tl.pointer_type(TARGET))
        copy_ptr = tl.load(row + 2).to(tl.pointer_type(COPY))
        count = tl.load(row + 3).to(tl.int32)
        if ALIGNED:  # a pointer out of a table is all scalar accesses without this
            theta_ptr = tl.multiple_of(theta_ptr, 16)
            average_ptr = tl.multiple_of(average_ptr, 16)
            copy_ptr = tl.multiple_of(copy_ptr, 16)
        distance = tl.zeros([BLOCK], tl.float32)
        norm = tl.zeros([BLOCK], tl.float32)
        if count == CHUNK:
            for start in tl.range(0, CHUNK, BLOCK):
                d, q = _step(theta_ptr, average_ptr, copy_ptr, start + lanes, lanes >= 0, from_target, factor, is_open,
                                HAS_COPY, HAS_GATE, False)  # fmt: skip
                distance += d
                norm += q
        else:
            start = 0
            while start < count:
                offsets = start + lanes
                d, q = _step(theta_ptr, average_ptr, copy_ptr, offsets, offsets < count, from_target, factor, is_open,
                                HAS_COPY, HAS_GATE, True)  # fmt: skip
                distance += d
                norm += q
                start += BLOCK
        if MEASURE:
            slot = partials + first + chunk
            norm_sum = tl.sum(norm)
            tl.store(slot, tl.sum(distance))
            tl.store(slot + total, norm_sum)
            num_bad = tl.zeros([], tl.int32)
            if _is_nonfinite(norm_sum) != 0:  # else there is nothing to count: a rare second look keeps registers free
                start = 0
                while start < count:
                    offsets = start + lanes
                    theta = tl.load(theta_ptr + offsets, mask=offsets < count, other=0.0).to(tl.float32)
                    num_bad += tl.sum(_is_nonfinite(theta))
                    start += BLOCK
            tl.store(slot + 2 * total, num_bad.to(tl.float32))
        chunk += tl.num_programs(0)


@triton.jit
def layer_kernel(partials, slots, begin, stats, total, num_layers, BLOCK: tl.constexpr):
    """stats [3, num_layers] float64: row program_id(1) of layer program_id(0), from slots[begin[layer] : begin[layer + 1]]."""
    layer = tl.program_id(0)
    quantity = tl.program_id(1)
    low = tl.load(begin + layer)
    high = tl.load(begin + layer + 1)
    lanes = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float64)
    while low < high:
        where = low + lanes
        slot = tl.load(slots + where, mask=where < high, other=0)
        acc += tl.load(partials + quantity * total + slot, mask=where < high, other=0.0).to(tl.float64)
        low += BLOCK
    tl.store(stats + quantity * num_layers + layer, tl.sum(acc))


class TritonPlan:
    """Chunk tables on the device for one list of contiguous tensors."""

    def __init__(
        self,
        targets: Sequence[Tensor],
        sources: Sequence[Tensor],
        copies: Sequence[Tensor],
        layers: Sequence[int],
        num_layers: int,
    ):
        self._device = targets[0].device if targets else torch.device("cpu")
        self._num_layers = num_layers
        kinds: dict[tuple, list[tuple[int, int, int, int, int]]] = {}
        for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
            copy = copies[i] if copies else target
            tensors = (source, target, copy)
            kind = (source.dtype, target.dtype, copy.dtype, bool(copies), all(t.data_ptr() % 16 == 0 for t in tensors))
            widths = [t.element_size() for t in tensors]
            for at in range(0, target.numel(), CHUNK):
                addresses = [t.data_ptr() + at * w for t, w in zip(tensors, widths, strict=True)]
                kinds.setdefault(kind, []).append((*addresses, min(CHUNK, target.numel() - at), layers[i]))  # type: ignore[arg-type]
        rows: list[tuple[int, int, int, int, int]] = []
        self._launches: list[tuple] = []
        for kind, chunks in kinds.items():
            chunks.sort(key=lambda row: -row[3])  # short ones last, to even out the programs' ends
            self._launches.append((*kind, len(rows), len(chunks)))
            rows += chunks
        self._total = len(rows)
        order = sorted(range(len(rows)), key=lambda slot: rows[slot][4])
        begin = [0] * (num_layers + 1)
        for row in rows:
            begin[row[4] + 1] += 1
        for layer in range(num_layers):
            begin[layer + 1] += begin[layer]
        self._table = torch.tensor([row[:4] for row in rows], dtype=torch.int64).reshape(-1, 4).to(self._device)
        self._slots = torch.tensor(order, dtype=torch.int32).to(self._device)
        self._begin = torch.tensor(begin, dtype=torch.int32).to(self._device)
        self._programs = 8
        if self._device.type == "cuda":
            self._programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(self._device).multi_processor_count

    def run(self, targets, sources, copies, weight: Tensor, gate: Tensor | None, measure: bool) -> Tensor:
        """Launches only; fresh partials each time, so that calls on several streams do not meet."""
        stats = torch.empty(3, self._num_layers, dtype=torch.float64, device=self._device)
        if not self._num_layers:
            return stats
        partials = torch.empty(3, self._total, dtype=torch.float32, device=self._device)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else torch.no_grad():
            for source, target, copy, has_copy, aligned, first, num_chunks in self._launches:
                update_kernel[(min(num_chunks, self._programs),)](
                    self._table, partials, weight, weight if gate is None else gate, first, num_chunks, self._total,
                    SOURCE=DTYPES[source], TARGET=DTYPES[target], COPY=DTYPES[copy], HAS_COPY=has_copy,
                    HAS_GATE=gate is not None, MEASURE=measure, ALIGNED=aligned, CHUNK=CHUNK, BLOCK=block_size(source, has_copy),
                    **OPTIONS,
                )  # fmt: skip
            if measure:
                layer_kernel[(self._num_layers, 3)](
                    partials, self._slots, self._begin, stats, self._total, self._num_layers,
                    BLOCK=128, num_warps=4, enable_fp_fusion=True,
                )  # fmt: skip
        return stats
