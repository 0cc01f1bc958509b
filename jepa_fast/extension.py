"""jepa_fast_C, the C++ part of the data pipeline, where it was built: tar headers, resize, mask sampler, packing."""

import importlib
import warnings
from functools import cache
from types import ModuleType

ABI = 3  # of jepa_fast_C; raised together with csrc/jepa_fast/module.cpp


@cache
def extension() -> ModuleType | None:
    """jepa_fast_C, or None after one warning that says what to do. The same results come without, slower."""
    try:
        module = importlib.import_module("jepa_fast_C")
    except ImportError as error:
        _warn(
            f"the C++ part of the data pipeline cannot be used ({error}); Python and Pillow serve, slower; for speed install a C++ compiler, then this package again"
        )
        return None
    if getattr(module, "ABI", None) != ABI:
        found = f"jepa_fast_C is version {getattr(module, 'ABI', None)} and this package needs {ABI}"
        _warn(f"{found}; reinstall (pip install .); Python and Pillow serve, slower")
        return None
    return module


def _warn(message: str) -> None:
    warnings.warn(f"jepa_fast: {message}", RuntimeWarning, stacklevel=5)
