"""The real libraries, for tests of what we write for them and read of them; a test is skipped, with the reason, without one."""

import importlib.abc
import importlib.machinery
import sys
import types

import pytest


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A torchvision of names only. timm and lightly import it for image transforms, which no test here uses."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = _StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


def without_torchvision(name):
    """Import `name` where torchvision's wheel does not fit the installed torch. Skips the test if `name` is not there."""
    finder = _Finder()
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, AttributeError):
        sys.meta_path.insert(0, finder)
    try:
        return pytest.importorskip(name, reason=f"{name} is not installed")
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)


def transformers():
    """Offline: nothing is asked of the hub."""
    return pytest.importorskip("transformers", reason="transformers is not installed")
