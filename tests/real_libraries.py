"""The real libraries, for tests of what we write for them and read of them. A test is skipped, with the reason, without one.

torchvision, timm, lightly and Lightning lie in .venv/real-libraries (tests/real-libraries.txt), off the usual path.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

FOLDER = Path(sys.prefix) / "real-libraries"


@cache
def _library() -> torch.library.Library | None:
    """Make the folder importable. torchvision's compiled half does not load beside another torch; its Python half, which
    is all that is used here, asks only that these two operators be declared."""
    if importlib.util.find_spec("torchvision") is not None or not FOLDER.is_dir():
        return None
    sys.path.append(str(FOLDER))
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def require(name: str):
    """The module `name`, or the test is skipped."""
    _library()
    return pytest.importorskip(name, reason=f"{name} is not installed (tests/real-libraries.txt)", exc_type=ImportError)
