"""Write an encoder for other libraries: `python -m jepa_fast.export RUN --format timm|hf|official|safetensors`.

In: a run folder or one of its checkpoints. Out: a folder with the weights, the preprocessing and a model card (README.md)
that says which encoder it holds, what it was trained on, and what its probes say.
"""

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from jepa_fast import interop
from jepa_fast.errors import Arguments, UsageError, one_line_errors
from jepa_fast.export.card import card
from jepa_fast.interop import hf, vit
from jepa_fast.interop.pretrained import header

__all__ = ["export", "main"]

FORMATS = ("timm", "hf", "official", "safetensors")
EXAMPLES = """Writes model weights, preprocessing and a model card into a new folder.

  hf           transformers.IJepaModel.from_pretrained(FOLDER)
  timm         timm.create_model("local-dir:FOLDER", pretrained=True), or load_state_dict into a ViT
  official     a .pth.tar of facebookresearch/ijepa: both encoders and the predictor
  safetensors  one encoder under our own names; jepa_fast.load_encoder reads it (the one format for series)

  python -m jepa_fast.export runs/textures-1 --format hf
  python -m jepa_fast.export runs/textures-1 --format timm --which context --step 1000 --out exported"""


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = Arguments("export", EXAMPLES)
    parser.add_argument("run", type=Path, help="run folder, or one of its checkpoints/step-N")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--which", choices=("target", "context"), default="target",
                        help="encoder to export (default: target, the one papers evaluate)")  # fmt: skip
    parser.add_argument("--step", type=int, help="checkpoint to take (default: the newest)")
    parser.add_argument("--out", type=Path, help="folder to write (default: exports/<run>-<which>-<format>)")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    folder = export(options.run, options.format, options.which, options.step, options.out)
    held = "both encoders and the predictor" if options.format == "official" else f"the {options.which} encoder"
    print(f"{folder}: {held}, {options.format} format; README.md says how to load it")
    return 0


def export(
    run: Path, format: str, which: interop.Which = "target", step: int | None = None, out: Path | None = None
) -> Path:
    """Write one encoder of a run for another library; the folder. Raises UsageError, before anything is written."""
    if not (run / "checkpoints").is_dir() and not (run / "meta.json").is_file():
        raise UsageError(
            f"{run} is no run folder and no checkpoint of one: give runs/<name>, or its checkpoints/step-N"
        )
    found = interop.load_encoder(run, which, step)
    run_folder = run if (run / "checkpoints").is_dir() else run.parent.parent
    folder = (
        out or Path("exports") / f"{run_folder.resolve().name}-{'jepa' if format == 'official' else which}-{format}"
    )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty; nothing was written over: give another --out")
    write = {"timm": _write_timm, "hf": _write_hf, "safetensors": _write_own}
    contents = write[format](found) if format in write else _write_official(run, step)
    beside = folder.with_name(f".{folder.name}.partial")
    try:
        beside.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            if callable(content):
                content(beside / name)
            else:
                (beside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (beside / "README.md").write_text(card(found, run_folder, format), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except OSError as error:
        raise UsageError(f"cannot write {folder} ({error.strerror}); choose another --out") from None
    return folder


def _write_hf(found: interop.Pretrained) -> dict[str, Any]:
    assert found.config is not None
    encoder = found.encoder
    weights = hf.to_hf(vit.to_vit(encoder))
    return {
        "model.safetensors": lambda file: save_file(weights, file, {"format": "pt"}),
        "config.json": hf.model_config(encoder) | {"jepa_fast": _origin(found)},
        "preprocessor_config.json": hf.preprocessor_config(encoder, found.config.data.random_crop),
    }


def _write_timm(found: interop.Pretrained) -> dict[str, Any]:
    weights = vit.to_vit(found.encoder)
    arguments = vit.timm_arguments(found.encoder)
    mean, std = (value.flatten().tolist() for value in (found.encoder.tokenizer.mean, found.encoder.tokenizer.std))
    channels, side = arguments["in_chans"], arguments["img_size"]
    assert found.config is not None
    crop = found.config.data.random_crop
    config = {
        "architecture": "vit_base_patch16_224", "num_classes": 0, "num_features": found.encoder.width,
        "global_pool": "avg", "model_args": arguments, "jepa_fast": _origin(found),
        "pretrained_cfg": {
            "tag": "jepa_fast", "num_classes": 0, "input_size": [channels, side, side], "pool_size": None,
            "interpolation": "bilinear", "crop_pct": 0.875 if crop else 1.0, "crop_mode": "center" if crop else "squash",
            "fixed_input_size": True,
            "mean": [round(v, 6) for v in mean], "std": [round(v, 6) for v in std],
            "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip
    return {"model.safetensors": lambda file: save_file(weights, file, {"format": "pt"}), "config.json": config}


def _write_own(found: interop.Pretrained) -> dict[str, Any]:
    assert found.config is not None
    weights = {name: value.contiguous() for name, value in found.encoder.state_dict().items()}
    about = header(found.config, found.which, found.step)
    return {"model.safetensors": lambda file: save_file(weights, file, about)}


def _write_official(run: Path, step: int | None) -> dict[str, Any]:
    jepa, config, _ = interop.load_jepa(run, step)
    if config.data.kind != "images":
        raise UsageError("an encoder of series has no counterpart in facebookresearch/ijepa: use --format safetensors")
    return {"jepa.pth.tar": lambda file: interop.save_official(jepa, file)}


def _origin(found: interop.Pretrained) -> dict[str, Any]:
    """What the format's own fields cannot say."""
    return {"encoder": found.which, "step": found.step, "preset": found.config.preset if found.config else ""}
