"""Folders of the transformers library's IJepaModel: names on disk <-> the plain ViT's, and the two JSON files beside.

Written under the names that `save_pretrained` writes (its modules are called otherwise). Nothing here imports transformers.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from jepa_fast.bounded import read_text
from jepa_fast.errors import UsageError
from jepa_fast.interop.vit import Settings, Weights, first_block
from jepa_fast.model.vit import Encoder

OUTSIDE = {"pos_embed": "embeddings.position_embeddings", "patch_embed.proj": "embeddings.patch_embeddings.projection",
           "norm": "layernorm"}  # fmt: skip
INSIDE = {"norm1": "layernorm_before", "attn.proj": "attention.output.dense", "norm2": "layernorm_after",
          "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}  # fmt: skip
QKV = ("query", "key", "value")


def to_hf(weights: Weights) -> Weights:
    """A plain ViT's weights under the names of model.safetensors; qkv cut into its thirds."""
    out: Weights = {}
    for name, value in weights.items():
        if m := re.match(r"blocks\.(\d+)\.(.+)\.(weight|bias)$", name):
            layer = f"encoder.layer.{m[1]}"
            if m[2] == "attn.qkv":
                for part, third in zip(QKV, value.chunk(3), strict=True):
                    out[f"{layer}.attention.attention.{part}.{m[3]}"] = third.contiguous()
            else:
                out[f"{layer}.{INSIDE[m[2]]}.{m[3]}"] = value
        else:
            stem = next(stem for stem in OUTSIDE if name == stem or name.startswith(f"{stem}."))
            out[OUTSIDE[stem] + name.removeprefix(stem)] = value
    return out


def from_hf(weights: Weights, where: str) -> Weights:
    """The other way. Raises UsageError if a name is not an IJepaModel's."""
    inside = {theirs: ours for ours, theirs in INSIDE.items()}
    outside = {theirs: ours for ours, theirs in OUTSIDE.items()}
    out: Weights = {}
    thirds: dict[str, dict[str, torch.Tensor]] = {}
    for whole, value in weights.items():
        name = whole.removeprefix("ijepa.")
        if name.startswith(("classifier.", "pooler.", "embeddings.mask_token")):
            continue
        m = re.match(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)$", name)
        if m and m[2].startswith("attention.attention."):
            thirds.setdefault(f"blocks.{m[1]}.attn.qkv.{m[3]}", {})[m[2].rsplit(".", 1)[1]] = value
        elif m and m[2] in inside:
            out[f"blocks.{m[1]}.{inside[m[2]]}.{m[3]}"] = value
        elif stem := next((stem for stem in outside if name == stem or name.startswith(f"{stem}.")), None):
            out[outside[stem] + name.removeprefix(stem)] = value
        else:
            raise UsageError(f"{where} has {whole}, which is no part of an IJepaModel; give a folder of one")
    for name, parts in thirds.items():
        if set(parts) != set(QKV):
            raise UsageError(f"{where} has {', '.join(sorted(parts))} of {name}, and needs {', '.join(QKV)}")
        out[name] = torch.cat([parts[part] for part in QKV])
    return out


def model_config(encoder: Encoder) -> dict[str, Any]:
    """config.json of an IJepaModel."""
    weight = encoder.patch_embed.weight
    patch, block = encoder.tokenizer.size, first_block(encoder)
    side = round(len(encoder.positions) ** 0.5)
    return {
        "architectures": ["IJepaModel"], "model_type": "ijepa", "hidden_size": encoder.width,
        "num_hidden_layers": len(encoder.blocks), "num_attention_heads": block.attn.heads,
        "intermediate_size": block.mlp.fc1.out_features, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02, "layer_norm_eps": encoder.norm.eps,
        "image_size": side * patch, "patch_size": patch, "num_channels": weight.shape[1] // patch**2,
        "qkv_bias": True, "add_pooling_layer": False, "dtype": "float32",
    }  # fmt: skip


def preprocessor_config(encoder: Encoder, crop: bool) -> dict[str, Any]:
    """preprocessor_config.json, our evaluation in transformers' words: resize (and crop the middle), / 255, normalise."""
    side = round(len(encoder.positions) ** 0.5) * encoder.tokenizer.size
    mean, std = (value.flatten().tolist() for value in (encoder.tokenizer.mean, encoder.tokenizer.std))
    square = {"height": side, "width": side}
    sized: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": square}
    if crop:
        sized = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": round(side * 256 / 224)},
                 "do_center_crop": True, "crop_size": square, "do_convert_rgb": len(mean) == 3}  # fmt: skip
    return sized | {
        "do_resize": True, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [round(v, 6) for v in mean], "image_std": [round(v, 6) for v in std],
    }  # fmt: skip


def settings(folder: Path) -> Settings:
    """Heads, eps and normalisation that the folder's JSON files say. Raises UsageError if it is no IJepaModel."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != "ijepa":
        raise UsageError(f"{folder / 'config.json'} is of model_type {config.get('model_type')!r}, not 'ijepa'")
    default = Settings()
    file = folder / "preprocessor_config.json"
    processor = read_json(file) if file.is_file() else {}
    return Settings(
        heads=int(config.get("num_attention_heads", 12)),
        eps=float(config.get("layer_norm_eps", 1e-12)),  # IJepaConfig's own default
        mean=tuple(processor.get("image_mean", default.mean)),
        std=tuple(processor.get("image_std", default.std)),
    )


def read_json(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{file} cannot be read ({str(error).splitlines()[0]}); give the folder that the library wrote"
        ) from None
    if not isinstance(held, dict):
        raise UsageError(f"{file} holds no JSON object; give the folder that the library wrote")
    return held
