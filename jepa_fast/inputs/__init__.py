"""Kinds of input: images, series. `find(config.data.kind)` gives the record; a new kind calls `register`.

How files of a kind are read is in `jepa_fast.data.by_kind`.
"""

from jepa_fast.errors import UsageError, suggest
from jepa_fast.inputs.images import Images
from jepa_fast.inputs.kind import Kind, Require
from jepa_fast.inputs.series import Series

__all__ = ["KINDS", "Kind", "Require", "find", "register"]

KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> None:
    KINDS[kind.name] = kind


def find(name: str) -> Kind:
    """The record of a kind. Raises UsageError if there is none of that name."""
    if name not in KINDS:
        raise UsageError(f"--data.kind is {name!r}{suggest(name, KINDS)}: give one of {', '.join(KINDS)}")
    return KINDS[name]


register(Images())
register(Series())
