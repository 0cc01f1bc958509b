"""Fields by their dotted names, as the command line has them, and the configuration as JSON."""

import dataclasses
import json
import typing
from typing import Any

from jepa_fast.config.sections import Config
from jepa_fast.errors import UsageError, suggest


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{'section.field': value}, the names the command line uses (`init.from` for `init.from_`)."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), prefix + f.name.rstrip("_")
        if dataclasses.is_dataclass(value):
            out |= flatten(value, name + ".")
        else:
            out[name] = value
    return out


def get(config: Config, name: str) -> Any:
    """The value of 'section.field'."""
    return flatten(config)[name]


def replace(config: Config, changes: dict[str, Any]) -> Config:
    """A copy with {'section.field': value} changed. Raises UsageError on an unknown name."""
    known = flatten(config)
    for name, value in changes.items():
        if name not in known:
            raise UsageError(f"unknown field {name}{suggest(name, known)}; --print-config lists all")
        head, _, leaf = name.rpartition(".")
        leaf = "from_" if leaf == "from" else leaf
        if head:
            section = dataclasses.replace(getattr(config, head), **{leaf: value})
            config = dataclasses.replace(config, **{head: section})
        else:
            config = dataclasses.replace(config, **{leaf: value})
    return config


def to_json(config: Config) -> str:
    """The configuration as config.json holds it: sections of fields, under their command-line names."""
    nested: dict[str, Any] = {}
    for name, value in flatten(config).items():
        section, _, leaf = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    return json.dumps(nested, indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Config:
    """Read a saved configuration back; fields that came later have their defaults. Raises UsageError if it is damaged or
    has a field that this version does not know."""
    try:
        return _build(Config, json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{where} is not a configuration of this version ({error}); start a new run folder") from None


def _build(cls: type, raw: dict[str, Any]) -> Any:
    if not isinstance(raw, dict):
        raise ValueError(f"{cls.__name__.lower()} is {str(raw)[:80]}, no section")
    hints = {name.rstrip("_"): (name, kind) for name, kind in typing.get_type_hints(cls).items()}
    unknown = set(raw) - set(hints)
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]}")
    values = {}
    for key, value in raw.items():
        name, kind = hints[key]
        if dataclasses.is_dataclass(kind):
            values[name] = _build(typing.cast(type, kind), value)
        else:
            values[name] = _typed(value, kind, key)
    return cls(**values)


def _typed(value: Any, kind: Any, key: str) -> Any:
    """The value as a field of type `kind` holds it; a whole number will do for a float. Raises ValueError."""
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if isinstance(value, list):
            kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
            if len(kinds) == len(value):
                return tuple(_typed(v, k, key) for v, k in zip(value, kinds, strict=True))
    elif typing.get_origin(kind) is typing.Literal:
        if value in typing.get_args(kind) or (key == "target_norm" and type(value) is bool):  # bool: of version 0.1
            return value
    elif type(value) is int and abs(value) >= 2**63:
        pass
    elif type(value) is kind or (kind is float and type(value) is int):
        return value
    wanted = kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")
    raise ValueError(f"{key} is {str(value)[:80]!r}, not {wanted}")
