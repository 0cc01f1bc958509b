"""Checkpoints of a run of any trainer -> how far the target encoder lags behind, and whether the predictor predicts.

In: files that hold both encoders. Out: records with `drift/<layer>` and `drift/total`, the keys of metrics.jsonl; with data
also discrepancy, spectrum, probes and, where the file holds the predictor, its skill.
Files are opened with torch's weights_only reader: code in them is not executed.
"""

import glob
import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from jepa_fast import api, checkpoint
from jepa_fast.errors import UsageError, reading
from jepa_fast.interop import files
from jepa_fast.interop.official import PARTS
from jepa_fast.monitor.measures import spectrum

Record = dict[str, float]
NUM_TRAIN, NUM_TEST, NUM_FULL = 2000, 2000, 256  # samples of the probe, and of the discrepancy
PROTOCOLS = {
    "ridge": "",
    "balanced": "/balanced",
    "raw": "/raw",
    "knn": "/knn",
}  # probe_scores' names -> suffixes of our keys
# (context encoder, target encoder) as trainers call them
PAIRS = (("encoder", "target_encoder"), ("context_encoder", "target_encoder"), ("student", "teacher"),
         ("online_encoder", "target_encoder"), ("model", "ema"))  # fmt: skip


def measure(
    pattern: str, data: str, steps_per_epoch: int, heads: int = 0, predictor_heads: int = 0
) -> tuple[list[Record], list[str]]:
    """One record a checkpoint, by rising step: drift of every layer, and with `data` what the encoders make of them.

    And with `data` a sentence on the predictor of each. heads, predictor_heads: of the attention, which leaves no trace in
    weights; 0: as usual for the encoder's width.

    The step is the optimizer's own count where the file holds one, else epoch x steps_per_epoch.
    Raises UsageError naming the file that cannot be used.
    """
    matched = sorted(Path(file) for file in glob.glob(pattern, recursive=True))
    if not matched:
        raise UsageError(f"--checkpoints {pattern} matches no file; quote it, as in --checkpoints 'run/*.pth.tar'")
    found: dict[int, Record] = {}
    said: dict[int, str] = {}
    for file in matched:
        with reading(file, "a checkpoint"):
            state = checkpoint.load(file) if file.is_dir() else files.load(file)
            step = _step(state, steps_per_epoch)
            if step is None:
                raise UsageError(f"{file} says neither its step nor its epoch; diagnose the log without --checkpoints")
            found[step] = {"step": step} | drift(*encoders(state, file), str(file))
        if data:
            found[step] |= examine(file, data, heads)
            said[step] = f"step {step:,} ({file.name}): the file holds no predictor, so nothing is said of its skill"
            if _has_predictor(state):
                judged = api.predictor_skill(file, data, heads=heads, predictor_heads=predictor_heads)
                found[step] |= judged.record()
                said[step] = f"step {step:,} ({file.name}): {judged}"
    return [found[step] for step in sorted(found)], [said[step] for step in sorted(said)]


def _has_predictor(state: dict[str, Any]) -> bool:
    """Whether it is a file of facebookresearch/ijepa or one of ours, with all three parts."""
    model = state["model"] if isinstance(state.get("model"), dict) else {}
    official = all(isinstance(state.get(name), dict) and state[name] for name in PARTS.values())
    return official or any(str(name).startswith("predictor.") for name in model)


def examine(file: Path, data: str, heads: int = 0) -> Record:
    """Discrepancy on whole inputs, spectrum and probes of both encoders of one checkpoint, under the keys of metrics.jsonl."""
    record: Record = {}
    pair = {which: api.load_encoder(file, which, heads=heads) for which in ("context", "target")}
    split: api.Split = "train"
    for which, found in (*pair.items(), ("untrained", api.untrained(pair["target"]))):
        train = api.features(found, data, split, limit=NUM_TRAIN)
        if which != "untrained":
            suffix = "" if which == "target" else "/context"
            record[f"rankme{suffix}"] = spectrum.rankme(train.values)
            record[f"participation{suffix}"] = spectrum.participation_ratio(train.values)
        if train.labels is not None:
            scores = api.probe_scores(train, api.features(found, data, "test", limit=NUM_TEST))
            record |= {f"probe/{which}{PROTOCOLS[name]}": v for name, v in scores.items() if name in PROTOCOLS}
            record["probe/majority"] = scores["majority"]
    tokens = [api.features(found, data, split, pool=False, limit=NUM_FULL).values for found in pair.values()]
    record["discrepancy/full"] = float((tokens[0] - tokens[1]).norm(dim=-1).mean())
    return record


def encoders(state: dict[str, Any], file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(context, target) state dicts under one naming. Raises UsageError if the file does not hold both."""
    state = state["model"] if isinstance(state.get("model"), dict) else state
    for names in PAIRS:
        pair = [_under(state, name) for name in names]
        if all(pair):
            return pair[0], pair[1]
    held = ", ".join(sorted({str(key).split(".")[0] for key in state})[:8])
    raise UsageError(
        f"{file} does not hold two encoders (it has {held}); their distance needs both, as in encoder and target_encoder"
    )


def _under(state: dict[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors of one module: a dict of its own, or keys that begin with its name."""
    held = state.get(name)
    if not isinstance(held, dict):
        held = {key.removeprefix(f"{name}."): value for key, value in state.items() if str(key).startswith(f"{name}.")}
    plain = {re.sub(r"^((module|backbone|_orig_mod)\.)+", "", key): value for key, value in held.items()}
    return {key: value for key, value in plain.items() if isinstance(value, Tensor) and value.is_floating_point()}


def drift(context: dict[str, Tensor], target: dict[str, Tensor], where: str) -> dict[str, float]:
    """{'drift/total', 'drift/<layer>'}: Frobenius norms of theta - theta_bar, fixed position tables left out."""
    if context.keys() != target.keys():
        only = sorted(context.keys() ^ target.keys())[0]
        raise UsageError(f"{where}: the two encoders differ in their parameters ({only}); they are no EMA pair")
    squares: dict[str, float] = {}
    for key, theta in context.items():
        if "pos_embed" in key:
            continue
        if theta.shape != target[key].shape:
            raise UsageError(
                f"{where}: {key} is {list(theta.shape)} in one encoder, {list(target[key].shape)} in the other"
            )
        square = float((theta.double() - target[key].double()).square().sum())
        if not math.isfinite(square):
            raise UsageError(f"{where}: {key} holds NaN or infinite weights; take an earlier checkpoint")
        layer = f"drift/{_layer(key)}"
        squares[layer] = squares.get(layer, 0.0) + square
    if not squares:
        raise UsageError(f"{where}: the encoders hold no weights")
    return {"drift/total": math.sqrt(sum(squares.values()))} | {k: math.sqrt(v) for k, v in squares.items()}


def _layer(key: str) -> str:
    block = re.search(r"\b(blocks|layers|layer)\.(\d+)\b", key)
    return f"blocks.{block[2]}" if block else key.split(".")[0]


def _step(state: dict[str, Any], per_epoch: int) -> int | None:
    if isinstance(state.get("step"), int):
        return state["step"]
    for name in ("opt", "optimizer"):
        held = state.get(name)
        moments = held.get("state") if isinstance(held, dict) else None
        counts = [s["step"] for s in moments.values() if isinstance(s, dict) and "step" in s] if moments else []
        if counts:
            return int(max(float(count) for count in counts))
    epoch = state.get("epoch")
    return epoch * (per_epoch or 1) if isinstance(epoch, int) else None
