"""Our image encoder <-> the plain ViT that timm and facebookresearch/ijepa name alike.

Names: pos_embed, patch_embed.proj, blocks.i.{norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2}, norm. In: a state dict
under these names. Out: an Encoder, its shape read from the tensors.

Shape legend: N tokens, D width, C channels, p side of a patch.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jepa_fast.config import IMAGENET_MEAN, IMAGENET_STD
from jepa_fast.errors import UsageError
from jepa_fast.model.predictor import Predictor
from jepa_fast.model.tokens import Tokenizer, sincos_table
from jepa_fast.model.vit import Block, Encoder

Weights = dict[str, Tensor]
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}  # by width: no tensor says it
BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Settings:
    """What no tensor says: 0 or empty where the file is silent too."""

    heads: int = 0
    eps: float = 1e-6
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def to_vit(encoder: Encoder) -> Weights:
    """The encoder's weights under timm's names, float32. Raises UsageError if it is no image encoder."""
    if encoder.tokenizer.kind != "images":
        raise UsageError("an encoder of series has no counterpart in timm or transformers: use --format safetensors")
    state = {name: value.detach().float().cpu().clone() for name, value in encoder.state_dict().items()}
    weight, patch = state.pop("patch_embed.weight"), encoder.tokenizer.size
    state["patch_embed.proj.weight"] = weight.view(
        len(weight), -1, patch, patch
    )  # (channel, row, column), as a convolution
    state["patch_embed.proj.bias"] = state.pop("patch_embed.bias")
    return {"pos_embed": encoder.positions.detach().float().cpu()[None].clone()} | state


def from_vit(weights: Weights, settings: Settings, where: str) -> tuple[Encoder, list[str]]:
    """(encoder, what is not as it was in its old home). Raises UsageError naming the tensor that does not fit."""
    weights, said = _plain(dict(weights), where)
    projection = _tensor(weights, "patch_embed.proj.weight", where)
    if projection.dim() != 4 or projection.shape[2] != projection.shape[3]:
        raise UsageError(
            f"{where}: patch_embed.proj.weight is {list(projection.shape)}, not [D, C, p, p]: no image ViT"
        )
    width, channels, patch, _ = projection.shape
    depth = 1 + max((int(m[1]) for name in weights if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    grid = _grid(_tensor(weights, "pos_embed", where), where)
    hidden = len(_tensor(weights, "blocks.0.mlp.fc1.weight", where))
    heads = settings.heads or HEADS.get(width, 0)
    if not heads or width % heads:
        raise UsageError(
            f"{where}: the number of heads of width {width} is not known; give it, as in heads=12 (--heads 12)"
        )
    mean, std = (
        tuple(v[:channels]) if len(v) >= channels else (0.5,) * channels for v in (settings.mean, settings.std)
    )
    encoder = Encoder(
        Tokenizer("images", patch, mean, std), grid, channels * patch * patch,
        width=width, depth=depth, heads=heads, mlp_ratio=hidden / width, eps=settings.eps,
    )  # fmt: skip
    own = _renamed(weights)
    check(encoder, own, where)
    positions = weights["pos_embed"].reshape(-1, width).float()
    if not torch.allclose(positions, sincos_table(grid, width), atol=1e-4):
        said.append(
            "its positions are learned: features use them, training from it starts with the fixed sin-cos table"
        )
    encoder.load_state_dict(own)
    encoder.positions.copy_(positions)
    return encoder.eval().requires_grad_(False), said


def _plain(weights: Weights, where: str) -> tuple[Weights, list[str]]:
    """Prefixes, class and register tokens, and LayerScale away: what remains is the plain ViT."""
    weights = {re.sub(r"^((module|model|backbone|encoder|_orig_mod)\.)+", "", name): v for name, v in weights.items()}
    said = []
    prefix = sum(weights.pop(name).shape[1] for name in ("cls_token", "reg_token") if name in weights)
    if prefix:
        said.append(
            f"its {prefix} class or register token(s) are left out, which changes every feature: a start, not a copy"
        )
        table = _tensor(weights, "pos_embed", where)
        if math.isqrt(table.shape[1]) ** 2 != table.shape[1]:
            weights["pos_embed"] = table[:, -(math.isqrt(table.shape[1]) ** 2) :]
    for name in [name for name in weights if name.startswith(("head.", "head_drop.", "mask_token"))]:
        del weights[name]
    if "fc_norm.weight" in weights:
        raise UsageError(
            f"{where}: fc_norm normalises after pooling; this encoder normalises before it: use a ViT with fc_norm=False"
        )
    for name in [name for name in weights if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]:
        gamma, before = weights.pop(name), "attn.proj" if ".ls1." in name else "mlp.fc2"
        linear = name[: name.index(".ls")] + f".{before}"
        weights[f"{linear}.weight"] = weights[f"{linear}.weight"] * gamma[:, None]  # LayerScale, folded in: exact
        weights[f"{linear}.bias"] = weights[f"{linear}.bias"] * gamma
    for name in [name for name in weights if name.endswith("attn.qkv.weight")]:
        bias = name.replace("weight", "bias")
        weights.setdefault(bias, torch.zeros(len(weights[name])))
    return weights, said


def _tensor(weights: Weights, name: str, where: str) -> Tensor:
    if name not in weights:
        held = ", ".join(sorted(weights)[:4])
        raise UsageError(f"{where} has no {name}, so it is not a ViT this can read; it has {held} ...")
    return weights[name]


def _grid(table: Tensor, where: str) -> tuple[int, int]:
    side = math.isqrt(table.shape[-2])
    if side * side != table.shape[-2]:
        raise UsageError(f"{where}: pos_embed has {table.shape[-2]} positions, which form no square of patches")
    return side, side


def _renamed(weights: Weights) -> Weights:
    """Under our names; what is not the encoder's own keeps its name, for `check` to tell."""
    own = {name: value.float() for name, value in weights.items() if name != "pos_embed"}
    projection = own.pop("patch_embed.proj.weight")
    own["patch_embed.weight"] = projection.reshape(len(projection), -1)
    if "patch_embed.proj.bias" in own:
        own["patch_embed.bias"] = own.pop("patch_embed.proj.bias")
    return own


def check(module: nn.Module, own: Weights, where: str) -> None:
    """Raises UsageError unless `own` has the module's names and shapes, and finite values."""
    wanted = module.state_dict()
    missing, unknown = sorted(wanted.keys() - own.keys()), sorted(own.keys() - wanted.keys())
    if missing or unknown:
        raise UsageError(f"{where} is another architecture: it has {'no ' + missing[0] if missing else unknown[0]}")
    for name, value in own.items():
        if value.shape != wanted[name].shape:
            raise UsageError(f"{where}: {name} is {list(value.shape)}, and should be {list(wanted[name].shape)}")
        if not torch.isfinite(value).all():
            raise UsageError(f"{where}: {name} holds NaN or infinite weights; take another checkpoint")


def timm_arguments(encoder: Encoder) -> dict[str, Any]:
    """Keyword arguments that make any of timm's ViTs this encoder."""
    block, patch = first_block(encoder), encoder.tokenizer.size
    return {
        "img_size": math.isqrt(len(encoder.positions)) * patch, "patch_size": patch, "embed_dim": encoder.width,
        "in_chans": encoder.patch_embed.in_features // patch**2, "depth": len(encoder.blocks), "num_heads": block.attn.heads,
        "mlp_ratio": block.mlp.fc1.out_features / encoder.width, "class_token": False, "global_pool": "avg",
        "fc_norm": False, "num_classes": 0,
    }  # fmt: skip


def first_block(module: Encoder | Predictor) -> Block:
    """All blocks of a module are shaped alike; this one says how."""
    block = module.blocks[0]
    assert isinstance(block, Block)
    return block
