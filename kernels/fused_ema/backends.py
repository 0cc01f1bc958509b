"""Which kernels this machine has, and which one serves a call: Triton on CUDA, C++ on the CPU, else plain torch."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fused_ema.check import FLOATS, is_dense
from fused_ema.plan import Plan
from fused_ema.reference import ema_update_reference

EXTENSION_ABI = 4  # of fused_ema_C; raised together with the C++ side
BACKENDS = ("auto", "triton", "cpp", "torch")


def available_backends() -> tuple[str, ...]:
    """Backends that work on this machine, fastest first: `triton` serves CUDA tensors, `cpp` CPU tensors, `torch` all."""
    found = (("triton", _triton_works()), ("cpp", extension() is not None), ("torch", True))
    return tuple(name for name, works in found if works)


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend for tensors on `device`. Raises ValueError if the one asked for cannot serve them."""
    if backend == "auto":
        if device.type == "cuda":
            return "triton" if _triton_works() else "torch"
        return "cpp" if device.type == "cpu" and extension() is not None else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "cpp" and device.type != "cpu":
        raise ValueError(f"backend 'cpp' serves CPU tensors; these are on {device}")
    if backend == "triton" and device.type != "cuda" and not _interpreting():
        raise ValueError(f"backend 'triton' serves CUDA tensors; these are on {device}")
    if backend not in available_backends():
        raise ValueError(f"backend {backend!r} is not installed; available: {', '.join(available_backends())}")
    return backend


def make_plan(
    backend: str,
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    copies: Sequence[Tensor],
    layers: Sequence[int],
    num_layers: int,
) -> Plan:
    """Kernels see flat memory: views with gaps go to them in dense copies, float64 to plain torch."""
    if backend == "torch":
        return _TorchPlan(list(layers), num_layers)
    flat: list[int] = []
    views: list[int] = []
    doubles: list[int] = []
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        together = [target, source, copies[i]] if copies else [target, source]
        kind = doubles if any(t.dtype == torch.float64 for t in together) else flat if _flat(together) else views
        kind.append(i)
    if len(flat) == len(targets):
        return _kernel_plan(backend, targets, sources, copies, layers, num_layers)
    parts: list[tuple[list[int], Plan]] = []
    if flat:
        lists = _take(targets, flat), _take(sources, flat), _take(copies, flat), _take(layers, flat)
        parts.append((flat, _kernel_plan(backend, *lists, num_layers)))
    if views:
        parts.append((views, _DensePlan(backend, _take(layers, views), num_layers)))
    if doubles:
        parts.append((doubles, _TorchPlan(_take(layers, doubles), num_layers)))
    return _SplitPlan(parts)


def _kernel_plan(backend: str, targets, sources, copies, layers, num_layers: int) -> Plan:
    if backend == "cpp":
        return _CppPlan(targets, sources, copies, layers, num_layers)
    from fused_ema.triton_kernel import TritonPlan

    return TritonPlan(targets, sources, copies, layers, num_layers)


def _flat(together: Sequence[Tensor]) -> bool:
    """Whether the tensors hold the same elements in the same order of memory (channels_last too), as stored."""
    if any(t.is_neg() for t in together):  # a negated view: memory holds the other sign
        return False
    if all(t.is_contiguous() for t in together):
        return True
    orders = {tuple(s for n, s in zip(t.shape, t.stride(), strict=True) if n != 1) for t in together}
    return len(orders) == 1 and is_dense(together[0])


def _take(items: Sequence, indices: Sequence[int]) -> list:
    """Of an empty list, nothing: there are copies of all tensors or of none."""
    return [items[i] for i in indices] if items else []


@cache
def extension() -> ModuleType | None:
    """fused_ema_C, or None after one warning that says what to do."""
    try:
        module = importlib.import_module("fused_ema_C")  # after torch, whose OpenMP runtime it then shares
    except ImportError as error:
        warnings.warn(
            f"fused_ema: the C++ kernel cannot be used ({error}); plain torch serves CPU tensors, slower; "
            "for speed install a C++ compiler, then the package again",
            stacklevel=4,
        )
        return None
    if getattr(module, "ABI", None) != EXTENSION_ABI:
        warnings.warn(
            f"fused_ema: fused_ema_C is version {getattr(module, 'ABI', None)} and this package needs {EXTENSION_ABI}; "
            "reinstall (pip install .); plain torch serves CPU tensors meanwhile, slower",
            stacklevel=4,
        )
        return None
    return module


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_works() -> bool:
    installed = importlib.util.find_spec("triton") is not None
    return installed and (_interpreting() or (torch.cuda.is_available() and torch.version.hip is None))


class _TorchPlan:
    def __init__(self, layers: list[int], num_layers: int):
        self._layers, self._num_layers = layers, num_layers

    def run(self, targets, sources, copies, weight, gate, measure) -> Tensor:
        return ema_update_reference(targets, sources, weight, self._layers, self._num_layers, gate, copies, measure)


class _CppPlan:
    def __init__(self, targets, sources, copies, layers, num_layers: int):
        module = extension()
        assert module is not None
        type_of = [(FLOATS.index(s.dtype), FLOATS.index(t.dtype)) for s, t in zip(sources, targets, strict=True)]
        copied = [(c.data_ptr(), FLOATS.index(c.dtype)) for c in copies] or [(0, 0)] * len(targets)
        rows = [
            (s.data_ptr(), t.data_ptr(), copy, t.numel(), *types, copy_type, layer)
            for s, t, types, (copy, copy_type), layer in zip(sources, targets, type_of, copied, layers, strict=True)
        ]
        self._plan, self._num_layers = module.Plan(rows, num_layers), num_layers

    def run(self, targets, sources, copies, weight, gate, measure) -> Tensor:
        stats = torch.empty(3, self._num_layers, dtype=torch.float64, device="cpu")
        address = stats.data_ptr() if measure else 0
        self._plan.run(weight.item(), gate is None or bool(gate), address, torch.get_num_threads())
        return stats


class _DensePlan:
    """Views with gaps, laid out differently or negated: worked on in dense copies, written back."""

    def __init__(self, backend: str, layers: list[int], num_layers: int):
        self._backend, self._layers, self._num_layers = backend, layers, num_layers

    def run(self, targets, sources, copies, weight, gate, measure) -> Tensor:
        dense_targets, dense_sources, dense_copies = [
            [t.resolve_neg().contiguous() for t in tensors] for tensors in (targets, sources, copies)
        ]
        plan = _kernel_plan(self._backend, dense_targets, dense_sources, dense_copies, self._layers, self._num_layers)
        stats = plan.run(dense_targets, dense_sources, dense_copies, weight, gate, measure)
        for original, copy in zip((*targets, *copies), (*dense_targets, *dense_copies), strict=True):
            if original is not copy:
                original.copy_(copy)
        return stats


class _SplitPlan:
    """A list whose members need different treatment: each part by its own plan, the sums added."""

    def __init__(self, parts: list[tuple[list[int], Plan]]):
        self._parts = parts

    def run(self, targets, sources, copies, weight, gate, measure) -> Tensor:
        sums = [
            plan.run(_take(targets, part), _take(sources, part), _take(copies, part), weight, gate, measure)
            for part, plan in self._parts
        ]
        return torch.stack(sums).sum(0)
