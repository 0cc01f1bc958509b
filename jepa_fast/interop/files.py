"""Weight files of any project -> dicts of tensors. Code that a file may hold is never executed."""

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from jepa_fast.bounded import read_text
from jepa_fast.errors import MALFORMED, UsageError


def load(file: Path) -> dict[str, Any]:
    """The dict in a .safetensors file or a file that torch.save wrote. Raises UsageError."""
    if not file.is_file():
        raise UsageError(f"{file} does not exist or is no file; give a checkpoint (.pth.tar, .pt, .bin, .safetensors)")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file} is damaged or no safetensors file ({str(error).splitlines()[0]})") from None
    try:
        with warnings.catch_warnings():  # about pickle protocols: the one line below says what matters
            warnings.simplefilter("ignore")
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        wants = re.search(r"GLOBAL ([\w.]+)", str(error))
        code = f" ({wants[1]})" if wants else ""
        raise UsageError(
            f"{file} holds more than tensors{code}, or is no checkpoint; nothing in it was executed: save its state dicts again"
        ) from None
    except (OSError, *MALFORMED) as error:
        said = str(error).splitlines()[0] if isinstance(error, (OSError, RuntimeError)) and str(error) else ""
        raise UsageError(
            f"{file} cannot be read as a checkpoint ({said or 'neither a torch file nor safetensors'}); "
            "give a .pth.tar, .pt, .bin or .safetensors"
        ) from None
    if _inflated(state, set()):
        raise UsageError(f"{file} holds tensors that are larger than the file; save its state dicts again")
    if not isinstance(state, dict):
        raise UsageError(f"{file} holds a {type(state).__name__}, not a dict of weights; give a trainer's checkpoint")
    return state


def _inflated(state: Any, seen: set[int]) -> bool:
    """Whether a tensor is larger than what is stored of it: with a stride of 0 one number can stand for a terabyte."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size() > state.untyped_storage().nbytes()
    if not isinstance(state, (dict, list, tuple)) or id(state) in seen:
        return False
    seen.add(id(state))
    return any(_inflated(value, seen) for value in (state.values() if isinstance(state, dict) else state))


def metadata(file: Path) -> dict[str, str]:
    """The text that stands in the header of a .safetensors file; {} of any other."""
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, "pt") as held:
            return held.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} is damaged or no safetensors file ({str(error).splitlines()[0]})") from None


def load_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder that transformers or timm wrote, in one file or several. Raises UsageError."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            try:
                parts = sorted(set(json.loads(read_text(folder / index))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise UsageError(f"{folder / index} is damaged ({error}); copy the folder again") from None
            return {name: value for part in parts for name, value in load(folder / Path(part).name).items()}
    for name in ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return load(folder / name)
    raise UsageError(f"{folder} holds no model.safetensors and no pytorch_model.bin; give the folder of a saved model")


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict itself, or the one that `state` holds under a usual name."""
    for name in ("state_dict", "model", "model_state_dict", "module"):
        if isinstance(state.get(name), dict):
            state = state[name]
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
