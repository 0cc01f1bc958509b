"""An encoder from wherever it lies: our run or checkpoint, an official file, a timm or a transformers folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from jepa_fast import checkpoint
from jepa_fast.config import Config, check, from_json, replace, to_json
from jepa_fast.errors import UsageError, reading
from jepa_fast.interop import files, hf, official, vit
from jepa_fast.model.jepa import JEPA
from jepa_fast.model.vit import Encoder

Which = Literal["target", "context"]
OFFICIAL = {"context": "encoder", "target": "target_encoder"}  # entries of a facebookresearch/ijepa checkpoint


@dataclass(frozen=True)
class Pretrained:
    """A frozen encoder and what is known of it."""

    encoder: Encoder
    which: str  # 'target', 'context', or 'unknown' where the file does not say
    origin: str  # format and place, for people
    step: int | None = None  # optimizer steps behind it
    config: Config | None = None  # of our own runs
    notes: list[str] = field(default_factory=list)  # what is not as it was in its old home


def load_encoder(path: str | Path, which: Which = "target", step: int | None = None, heads: int = 0) -> Pretrained:
    """The encoder at `path`, frozen, in eval mode, on the CPU.

    path: a run folder (its newest checkpoint, or that of `step`), one of its checkpoints/step-N, a facebookresearch/ijepa
    .pth.tar, a transformers IJepaModel folder, a timm ViT (folder, .safetensors, .bin, .pth) or our own export.
    which: the target encoder (which papers evaluate) or the context encoder, where both are there.
    heads: attention heads, where neither the file nor the width says it.
    Raises UsageError: unknown format, missing tensors, another architecture, NaN weights, code in a pickle.
    """
    path = Path(path)
    if which not in OFFICIAL:
        raise UsageError(f"which is {which!r}; give 'target' or 'context'")
    with reading(path, "an encoder"):
        if not path.exists():
            raise UsageError(f"{path} does not exist; give a run folder or a checkpoint")
        if (path / "checkpoints").is_dir() or (path / "meta.json").is_file():
            return _from_run(path, which, step)
        if path.is_dir():
            return _from_folder(path, which, heads)
        return _from_file(path, which, heads)


def load_jepa(path: str | Path, step: int | None = None) -> tuple[JEPA, Config, int]:
    """(both encoders and predictor, configuration, optimizer steps) of one of our runs, or of its checkpoint. Raises UsageError."""
    config, state, _ = open_run(Path(path), step)
    jepa = build(config, state["model"], str(path))
    jepa.load_state_dict(state["model"])
    return jepa.eval().requires_grad_(False), config, state["step"]


def _from_run(path: Path, which: str, step: int | None) -> Pretrained:
    config, state, held = open_run(path, step)
    encoder = encoder_of(config, state["model"], which, str(path))
    return Pretrained(encoder, which, f"run {held.parent.parent}", state.get("step"), config)


def open_run(path: Path, step: int | None) -> tuple[Config, dict[str, Any], Path]:
    """(configuration, state, folder of the checkpoint) of a run or of one of its checkpoints. Raises UsageError.

    step: which checkpoint of a run; None: the newest.
    """
    held = path
    if not (path / "meta.json").is_file():
        found = checkpoint.found(path)
        if step is None and not found:
            raise UsageError(
                f"{path} has no checkpoint: give the folder of a run of this trainer, or one of its checkpoints, or let the "
                "run write one (--checkpoint.every N)"
            )
        if step is not None and step not in found:
            raise UsageError(f"{path} has no checkpoint of step {step}; it has {', '.join(map(str, found)) or 'none'}")
        held = path / "checkpoints" / f"step-{found[-1] if step is None else step}"
    state = checkpoint.load(held)
    return configuration(state.get("config"), f"the configuration in {path}"), state, held


def configuration(text: Any, where: str) -> Config:
    """A configuration out of a checkpoint, its values checked. Raises UsageError that names `where`."""
    try:
        return check(from_json(text, where))
    except UsageError as error:
        raise UsageError(str(error) if where in str(error) else f"{where}: {error}") from None


def build(config: Config, weights: dict[str, Any], where: str) -> JEPA:
    """A JEPA of `config`, which must fit `weights`: checked before any memory is taken. Raises UsageError."""
    with torch.device("meta"):
        vit.check(JEPA(config), weights, where)
    return JEPA(config)


def encoder_of(config: Config, weights: dict[str, Any], which: str, where: str) -> Encoder:
    """One encoder of a JEPA's state dict."""
    prefix = f"{which}_encoder."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    few = 4 * (config.model.predictor_heads or config.model.heads)  # the predictor is not wanted: a small one
    config = replace(config, {"model.predictor_depth": 1, "model.predictor_width": few})
    with torch.device("meta"):  # no memory is taken before it is known that the weights are there
        vit.check(getattr(JEPA(config), prefix[:-1]), own, where)
    encoder: Encoder = getattr(JEPA(config), prefix[:-1])
    encoder.load_state_dict(own)
    return encoder.eval().requires_grad_(False)


def _from_folder(folder: Path, which: str, heads: int) -> Pretrained:
    config = hf.read_json(folder / "config.json")
    ours = config.get("jepa_fast", {})  # what our own export adds
    said = str(ours.get("encoder", "unknown"))
    if config.get("model_type"):
        settings, names = hf.settings(folder), hf.from_hf
        origin = f"transformers folder {folder}"
    elif "architecture" in config:
        pixels, arguments = config.get("pretrained_cfg", {}), config.get("model_args", {})
        settings = vit.Settings(
            heads=int(arguments.get("num_heads", 0)),
            mean=tuple(pixels.get("mean", vit.Settings.mean)),
            std=tuple(pixels.get("std", vit.Settings.std)),
        )
        names, origin = (lambda weights, where: weights), f"timm folder {folder}"
    else:
        raise UsageError(
            f"{folder / 'config.json'} is neither transformers' nor timm's; give a folder that one of them wrote"
        )
    if heads:
        settings = vit.Settings(heads, settings.eps, settings.mean, settings.std)
    weights = names(files.load_folder(folder), str(folder))
    encoder, notes = vit.from_vit(weights, settings, str(folder))
    return Pretrained(encoder, _agreeing(said, which, folder), origin, ours.get("step"), notes=notes)


def _agreeing(said: str, which: str, path: Path) -> str:
    if said != "unknown" and said != which:
        raise UsageError(f"{path} holds the {said} encoder, not the {which} encoder: ask for {said!r}")
    return said


def _from_file(file: Path, which: str, heads: int) -> Pretrained:
    state, header = files.load(file), files.metadata(file)
    if "jepa_fast" in header:
        try:
            held = json.loads(header["jepa_fast"])
            text, said, step = json.dumps(held["config"]), str(held["encoder"]), held["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(f"{file}: what its header says of the encoder cannot be read; export it again") from None
        config = configuration(text, f"the configuration in {file}")
        if said not in OFFICIAL:
            raise UsageError(f"{file} says that it holds the encoder {said[:80]!r}; known are {', '.join(OFFICIAL)}")
        said = _agreeing(said, which, file)
        encoder = encoder_of(config, {f"{said}_encoder.{k}": v for k, v in state.items()}, said, str(file))
        return Pretrained(encoder, said, f"export {file}", step if type(step) is int else None, config)
    if isinstance(state.get(OFFICIAL[which]), dict):
        encoder, notes = vit.from_vit(state[OFFICIAL[which]], vit.Settings(heads), f"{file} ({OFFICIAL[which]})")
        return Pretrained(encoder, which, f"official checkpoint {file}", _step(state), notes=notes)
    weights = files.tensors(state)
    if any(name.removeprefix("ijepa.").startswith("encoder.layer.") for name in weights):
        weights = hf.from_hf(weights, str(file))
    encoder, notes = vit.from_vit(weights, vit.Settings(heads), str(file))
    return Pretrained(encoder, "unknown", f"ViT {file}", notes=notes)


def _step(state: dict[str, Any]) -> int | None:
    """Optimizer steps, as AdamW counts them in an official checkpoint."""
    optimizer = state.get("opt")
    moments = optimizer.get("state", {}) if isinstance(optimizer, dict) else {}
    counts = [int(s["step"]) for s in moments.values() if isinstance(s, dict) and "step" in s]
    return max(counts, default=None)


def header(config: Config, which: str, step: int | None) -> dict[str, str]:
    """What our own .safetensors says of itself."""
    return {
        "jepa_fast": json.dumps({"encoder": which, "step": step, "config": json.loads(to_json(config))}),
        "format": "pt",
    }


def _is_official(state: dict[str, Any]) -> bool:
    return all(isinstance(state.get(name), dict) for name in official.PARTS.values())


def initial_weights(path: str, config: Config) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(state dict of a JEPA of `config`, what to tell) of whatever `--init.from` names.

    Our checkpoints and official ones bring all three parts. From an encoder alone both encoders start alike, and the
    predictor as the run would have initialised it. Whether names and shapes fit is for the caller to check.
    """
    place = Path(path)
    if (place / "checkpoints").is_dir() or (place / "meta.json").is_file() or not place.exists():
        return checkpoint.weights_at(path), []
    if place.is_file() and _is_official(files.load(place)):
        heads, few = config.model.heads, config.model.predictor_heads or config.model.heads
        whole = official.load_official(place, heads=heads, predictor_heads=few)
        return whole.state_dict(), [f"both encoders and the predictor start from the official checkpoint {place}"]
    found = load_encoder(place, heads=config.model.heads)
    with torch.random.fork_rng(devices=[]):
        own = {name: value for name, value in JEPA(config).state_dict().items() if name.startswith("predictor.")}
    for part in ("context_encoder", "target_encoder"):
        own |= {f"{part}.{name}": value.clone() for name, value in found.encoder.state_dict().items()}
    said = [f"both encoders start from the encoder of {found.origin}, the predictor from nothing", *found.notes]
    theirs = tuple(round(v, 4) for v in found.encoder.tokenizer.mean.flatten().tolist())
    if theirs != tuple(round(v, 4) for v in config.data.mean):
        said.append(f"it was trained on pixels of mean {theirs}, this run has --data.mean {config.data.mean}")
    return own, said
