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
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{where} is not a configuration of this version ({error}); start a new run folder") from None


def _build(cls: type, raw: dict[str, Any]) -> Any:
    hints = {name.rstrip("_"): (name, kind) for name, kind in typing.get_type_hints(cls).items()}
    unknown = set(raw) - set(hints)
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]}")
    values = {}
    for key, value in raw.items():
        name, kind = hints[key]
        if dataclasses.is_dataclass(kind):
            value = _build(typing.cast(type, kind), value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
