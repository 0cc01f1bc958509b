"""Other projects' checkpoints: facebookresearch/ijepa's files, read and written.

In: a .pth.tar as that project saves it, a dict of `encoder`, `predictor`, `target_encoder` and what its trainer needs.
Out: our modules, their sizes inferred from the tensors' shapes. The number of attention heads leaves no trace in them:
it is looked up by the encoder's width, as the published models have it, and can be given.
"""

import math
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jepa_fast.config import IMAGENET_MEAN, IMAGENET_STD, Config, Data, Masks, Model
from jepa_fast.errors import UsageError
from jepa_fast.interop.vit import HEADS  # the predictor's are the encoder's
from jepa_fast.model.jepa import JEPA
from jepa_fast.model.predictor import Predictor
from jepa_fast.model.tokens import Tokenizer, sincos_table
from jepa_fast.model.vit import Encoder

PARTS = {"context_encoder": "encoder", "target_encoder": "target_encoder", "predictor": "predictor"}  # ours: theirs
Part = Literal["context_encoder", "target_encoder", "predictor"]

# Their names of tensors -> ours, first match. `patch_embed.proj` is a convolution there and a matrix here.
_ENCODER = ((r"^pos_embed$", "positions"), (r"^patch_embed\.proj\.", "patch_embed."))
_PREDICTOR = ((r"^predictor_pos_embed$", "positions"), (r"^predictor_", ""))


def load_official(
    path: str | Path, which: Part | None = None, heads: int | None = None, predictor_heads: int | None = None
) -> JEPA | Encoder | Predictor:
    """A facebookresearch/ijepa checkpoint as a JEPA, or the part of it named `which`; float32, on the CPU.

    heads, predictor_heads: of encoder and predictor, where they are not the published models'.
    Raises UsageError, one line that names the file, if it is no such checkpoint or does not fit together.
    """
    if which is not None and which not in PARTS:
        raise UsageError(f"which={which!r}: give one of {', '.join(PARTS)}, or None for all three")
    where = str(path)
    raw = _read(Path(path))
    wanted = PARTS if which is None else {which: PARTS[which]}
    parts = {ours: _tensors(raw, theirs, where) for ours, theirs in wanted.items()}
    # One part alone still is built as a JEPA's, on the meta device, so that there is one way to build it.
    config = _config(parts, heads, predictor_heads, where)
    with torch.device("meta"):
        jepa = JEPA(config)
    for name, tensors in parts.items():
        _fill(getattr(jepa, name), tensors, config.data, f"{where}: {PARTS[name]}")
    if which is not None:
        return getattr(jepa, which)
    jepa.target_encoder.requires_grad_(False)
    return jepa


def save_official(jepa: JEPA, path: str | Path, epoch: int = 0) -> None:
    """Write `jepa` (of images) as facebookresearch/ijepa would, without an optimizer's state; whole or not at all.

    Raises UsageError if the model has no counterpart there, or the folder is not there.
    """
    tokenizer, path = jepa.context_encoder.tokenizer, Path(path)
    if tokenizer.kind != "images" or len(set(jepa.context_encoder.grid)) != 1:
        raise UsageError("facebookresearch/ijepa's format is for square images; this model is for other inputs")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder; make it first, or give another path")
    state: dict[str, Any] = {
        "encoder": _theirs(jepa.context_encoder, tokenizer.size),
        "predictor": _theirs(jepa.predictor, tokenizer.size),
        "target_encoder": _theirs(jepa.target_encoder, tokenizer.size),
        "opt": {"state": {}, "param_groups": []},
        "scaler": None, "epoch": epoch, "loss": 0.0, "batch_size": 0, "world_size": 1, "lr": 0.0,
    }  # fmt: skip
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(state, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# ---- reading -------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give the path of a .pth.tar of facebookresearch/ijepa")
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UsageError(
            f"{path} holds more than tensors and numbers, or is damaged; only plain weights are read"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UsageError(f"{path} is no checkpoint that torch can read ({_first_line(error)})") from None
    if not isinstance(raw, dict):
        raise UsageError(
            f"{path} holds a {type(raw).__name__}; a dict of encoder, predictor, target_encoder was expected"
        )
    return raw


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tensors(raw: dict[str, Any], part: str, where: str) -> dict[str, Tensor]:
    """The tensors of one part under our names, float32."""
    if not isinstance(raw.get(part), dict):
        held = ", ".join(sorted(map(str, raw))[:8]) or "nothing"
        raise UsageError(
            f"{where} has no {part!r} (it holds {held}); is it a checkpoint of facebookresearch/ijepa? which= reads one part"
        )
    tensors = {}
    for key, value in raw[part].items():
        name = re.sub(r"^(module\.|_orig_mod\.)+", "", str(key))
        if not isinstance(value, Tensor):
            raise UsageError(f"{where}: {part}: {key} is a {type(value).__name__}, not a tensor")
        if not value.isfinite().all():
            raise UsageError(f"{where}: {part}: {key} holds NaN or infinite weights; take another checkpoint")
        for pattern, ours in _PREDICTOR if part == "predictor" else _ENCODER:
            name, replaced = re.subn(pattern, ours, name)
            if replaced:
                break
        tensors[name] = value.float()
    return tensors


def _config(parts: dict[str, dict[str, Tensor]], heads: int | None, predictor_heads: int | None, where: str) -> Config:
    """The configuration whose JEPA has the shapes of `parts`; what no part tells is as small as can be."""
    encoder, predictor = parts.get("context_encoder", parts.get("target_encoder")), parts.get("predictor")
    channels, patch, width, depth, hidden, narrow, narrow_hidden = 3, 1, 0, 1, 0, 0, 0
    try:
        tokens = next(iter(parts.values()))["positions"].shape[1]
        if encoder is not None:
            width, channels, patch = encoder["patch_embed.weight"].shape[:3]
            depth, hidden = _depth(encoder), encoder["blocks.0.mlp.fc1.weight"].shape[0]
        if predictor is not None:
            narrow, width = predictor["embed.weight"].shape
            narrow_hidden = predictor["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise UsageError(f"{where} is no ViT of facebookresearch/ijepa: it has no {error.args[0]}") from None
    except (ValueError, IndexError):
        raise UsageError(
            f"{where} is no ViT of facebookresearch/ijepa: a weight is no matrix, or the patch embedding no convolution"
        ) from None
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise UsageError(f"{where}: pos_embed has {tokens} tokens; a square grid was expected")
    chosen = heads or HEADS.get(width)
    if chosen is None:
        raise UsageError(f"{where}: width {width} is no published model's, and heads leave no trace; give heads=")
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    few = predictor_heads or chosen
    narrow = narrow or 4 * few  # no predictor is asked for: any will do
    model = Model(
        width=width, depth=depth, heads=chosen, mlp_ratio=(hidden or width) / width, patch=patch,
        predictor_width=narrow, predictor_depth=_depth(predictor) if predictor else 1, predictor_heads=few,
        predictor_mlp_ratio=(narrow_hidden or narrow) / narrow,
    )  # fmt: skip
    for name, size, count in (("heads", width, chosen), ("predictor_heads", narrow, few)):
        if count < 1 or size % count or size % 4:
            raise UsageError(f"{where}: {count} heads do not divide width {size}; give {name}=")
    data = Data(kind="images", image_size=side * patch, channels=channels, mean=mean, std=std)
    return Config(preset="official", data=data, masks=Masks(mode="reference"), model=model)


def _depth(tensors: dict[str, Tensor]) -> int:
    return 1 + max((int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)


def _fill(module: Encoder | Predictor, tensors: dict[str, Tensor], data: Data, where: str) -> None:
    """Put `tensors` into a module on the meta device. Raises UsageError on a name or a shape too many or too few."""
    buffers = dict(module.named_buffers())
    own = dict(module.named_parameters()) | {"positions": buffers["positions"]}
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        found = f"has no {missing[0]}" if missing else f"has {unknown[0]}, which the model lacks"
        raise UsageError(f"{where} {found}; only plain ViTs of facebookresearch/ijepa are read")
    module.to_empty(device="cpu")
    if isinstance(module, Encoder):
        module.tokenizer = Tokenizer("images", module.tokenizer.size, data.mean, data.std)
    for name, tensor in tensors.items():
        home = module.get_parameter(name) if name != "positions" else module.get_buffer(name)
        value = tensor.flatten(1) if name == "patch_embed.weight" else tensor[0] if name == "positions" else tensor
        if value.shape != home.shape:
            raise UsageError(f"{where}: {name} is {list(tensor.shape)}, expected {list(home.shape)}")
        home.data.copy_(value)
    fixed = sincos_table(module.grid, own["norm.weight"].numel())
    if not torch.allclose(module.get_buffer("positions"), fixed, atol=4e-3):  # bf16 rounds numbers near 1 by 2e-3
        warnings.warn(f"{where}: positions are no fixed sin-cos table; use it at its own image size only", stacklevel=3)


# ---- writing -------------------------------------------------------------------------------------


def _theirs(module: Encoder | Predictor, patch: int) -> dict[str, Tensor]:
    """A module's tensors under the names, in the shapes and with the prefix of ijepa's files."""
    ours = dict(module.named_parameters()) | {"positions": module.positions}
    out = {}
    for name, value in ours.items():
        value = value.detach().float().cpu()
        if name == "positions":
            value = value[None]
        if name == "patch_embed.weight":
            value = value.view(len(value), -1, patch, patch)
        out["module." + _name_there(name, isinstance(module, Predictor))] = value.clone()
    return out


def _name_there(name: str, of_predictor: bool) -> str:
    if of_predictor:
        return {"positions": "predictor_pos_embed", "mask_token": name}.get(name, f"predictor_{name}")
    return "pos_embed" if name == "positions" else name.replace("patch_embed.", "patch_embed.proj.")
