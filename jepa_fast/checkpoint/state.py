"""The small part of a checkpoint, state.safetensors: numbers and text as JSON in the header, tensors as tensors."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

NAME = "state.safetensors"
_TENSOR = "$tensor"  # {"$tensor": name} stands for a tensor


def write(state: dict[str, Any], folder: Path) -> None:
    """state: str-keyed dicts and lists of numbers, text, None and tensors; tuples come back as lists."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_without_tensors(state, "", tensors))
    (folder / NAME).write_bytes(save(tensors, {"state": text}))


def read(folder: Path) -> dict[str, Any]:
    """Raises OSError, ValueError, SafetensorError."""
    with safe_open(folder / NAME, "pt") as held:
        state = json.loads((held.metadata() or {}).get("state", "null"))
        tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    if not isinstance(state, dict):
        raise ValueError(f"{NAME} holds no state")
    return _with_tensors(state, tensors)


def _without_tensors(value: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{at}"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"the keys of {at or 'the state'} are not text")
        return {key: _without_tensors(held, f"{at}.{key}", tensors) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(held, f"{at}.{i}", tensors) for i, held in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            name = value[_TENSOR]
            if not isinstance(name, str) or name not in tensors:
                raise ValueError(f"{NAME} lacks the tensor {str(name)[:80]}")
            return tensors[name]
        return {key: _with_tensors(held, tensors) for key, held in value.items()}
    return [_with_tensors(held, tensors) for held in value] if isinstance(value, list) else value
