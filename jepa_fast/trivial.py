"""Is a checkpoint's predictor better than a trivial one? Its loss beside those of three predictors without weights.

In: a checkpoint that holds both encoders and the predictor (facebookresearch/ijepa's, or one of our runs) and data. Out:
a PredictorSkill. Inputs and masks are fixed, so that the checkpoints of one run can be compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from jepa_fast.config import Config, Data, Masks, replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.sources import fixed_draw
from jepa_fast.errors import UsageError
from jepa_fast.inputs import find
from jepa_fast.interop import load_jepa, load_official
from jepa_fast.model.jepa import JEPA
from jepa_fast.monitor.fixed_masks import FixedMasks
from jepa_fast.monitor.heldout import objective
from jepa_fast.monitor.measures import skill

NAMES = {
    "constant": "the constant of each position",
    "copy": "a copy of the nearest visible token",
    "context_mean": "the mean of the visible tokens",
}
FEWEST_BATCHES = 4  # if there are enough inputs: a standard error of less says little


@dataclass(frozen=True)
class PredictorSkill:
    """What `predictor_skill` measured. A skill is 1 - loss / loss of a trivial predictor: 0 is no better, 1 is perfect."""

    loss: float  # the predictor's, of the objective it was trained with
    skill: float  # the least of the next three
    error: float  # standard error of `skill` over batches of inputs and masks; NaN with one batch
    constant: float  # beside the best constant of each position
    copy: float  # beside the context feature of the nearest visible token
    context_mean: float  # beside the mean context feature of the visible tokens
    position_share: float  # share of the targets' variance between positions, 0 to 1
    num_inputs: int
    num_batches: int

    @property
    def best(self) -> str:
        """The best trivial predictor, in words."""
        skills = {name: getattr(self, name) for name in NAMES}
        return NAMES[min((name for name in NAMES if not math.isnan(skills[name])), key=skills.__getitem__)]

    @property
    def better(self) -> bool | None:
        """Whether the predictor is better than the best trivial one; None if `skill` is within two standard errors of 0."""
        return None if not abs(self.skill) > 2 * self.error else self.skill > 0

    def __str__(self) -> str:
        numbers = f"skill {self.skill:.3f}, standard error {self.error:.3f}, loss {self.loss:.4g}"
        if math.isnan(self.error):
            return f"too few inputs to say whether the predictor is better than the best trivial one, {self.best} ({numbers})"
        if self.better is None:
            return f"the predictor is as good as the best trivial one, {self.best}, within the noise ({numbers})"
        said = "better" if self.better else "worse"
        return f"the predictor is {said} than the best trivial one, {self.best} ({numbers})"

    def record(self) -> dict[str, float]:
        """The same under the keys of metrics.jsonl."""
        skills = {f"skill/{name}": getattr(self, name) for name in NAMES}
        return {"loss/heldout": self.loss, "skill": self.skill, "skill/error": self.error, **skills,
                "position_share": self.position_share}  # fmt: skip


def predictor_skill(
    path: str | Path,
    data: str | Path | None = None,
    *,
    step: int | None = None,
    num_inputs: int = 256,
    batch_size: int = 32,
    heads: int = 0,
    predictor_heads: int = 0,
    device: str | torch.device = "cpu",
) -> PredictorSkill:
    """Whether the predictor of a checkpoint is better than a trivial one, on fixed inputs and fixed masks.

    path: a facebookresearch/ijepa .pth.tar, one of our run folders (its newest checkpoint, or that of `step`) or one of
    its checkpoints/step-N. data: as `features` takes it, as a path; None: what the run was trained on. The test part is
    used where there is one.
    The objective is the checkpoint's own: of our runs as configured (masks as at the first step), of an ijepa file
    smooth-L1 on layer-normed targets with its multi-block masks. Inputs are preprocessed as in evaluation.
    num_inputs: a fixed draw of so many. batch_size: inputs that the constant is fitted on, and that one term of the
    standard error is of. heads, predictor_heads: where the file's width does not tell them.
    Raises UsageError: no predictor in it, unreadable data, inputs of another shape.
    """
    jepa, config = _load(Path(path), step, heads, predictor_heads)
    if data is None and not config.data.path and not config.data.embedded:
        raise UsageError(f"{path} does not say what it was trained on: give the data")
    if data is not None:
        config = replace(config, {"data.path": str(data), "data.embedded": "", "data.label_filter": ""})
    dataset = open_dataset(config, typed=data is not None)
    inputs = fixed_draw(dataset.probe_test or dataset.train, num_inputs)[0]
    shape = find(config.data.kind).shape(config)
    if inputs.shape[1:] != shape:
        raise UsageError(
            f"{data or 'the data'}: samples of shape {list(inputs.shape[1:])}, but {path} takes {list(shape)}: "
            f"give data of that shape"
        )
    return measure(jepa, config, inputs, batch_size, torch.device(device))


@torch.no_grad()
def measure(jepa: JEPA, config: Config, inputs: np.ndarray, batch_size: int, device: torch.device) -> PredictorSkill:
    """The same of a JEPA on the CPU or `device` and inputs [n, ...]; batch k is seen through mask number k of each input."""
    size = max(1, min(batch_size, max(2, len(inputs) // FEWEST_BATCHES), len(inputs)))
    masks, jepa = FixedMasks(config), jepa.to(device).eval()
    own: list[float] = []
    others: list[dict[str, float]] = []
    shares: list[float] = []
    for view in range(len(inputs) // size):
        plan = masks.plan(size, view).to(device)
        seen = objective(jepa, torch.from_numpy(inputs[view * size : (view + 1) * size]).to(device), plan)
        losses = skill.trivial_losses(
            seen.targets, seen.context, plan.context_rows, plan.target_rows, plan.target_weight, jepa.loss, config.grid,
            centred=seen.centred,
        )  # fmt: skip
        own.append(float(seen.loss))
        others.append({name: float(value) for name, value in losses.items()})
        shares.append(float(skill.position_share(seen.targets)))
    skills = {name: _skill(own, [losses[name] for losses in others]) for name in NAMES}
    least, error = min((pair for pair in skills.values() if not math.isnan(pair[0])), default=(math.nan, math.nan))
    return PredictorSkill(
        float(np.mean(own)), least, error, **{name: value for name, (value, _) in skills.items()},
        position_share=float(np.mean(shares)), num_inputs=len(own) * size, num_batches=len(own),
    )  # fmt: skip


def _skill(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """(1 - sum(own) / sum(other), its standard error by the jackknife over batches)."""
    a, b, k = np.array(own), np.array(other), len(own)
    if k < 2:
        return float(1 - a.sum() / b.sum()), math.nan
    without = (a.sum() - a) / (b.sum() - b)
    return float(1 - a.sum() / b.sum()), float(np.sqrt((k - 1) * without.var()))


def _load(path: Path, step: int | None, heads: int, predictor_heads: int) -> tuple[JEPA, Config]:
    if path.is_dir():
        jepa, config, _ = load_jepa(path, step)
        return jepa, config
    whole = load_official(path, heads=heads or None, predictor_heads=predictor_heads or None)
    assert isinstance(whole, JEPA)
    encoder = whole.context_encoder
    tokens, patch = len(encoder.positions), encoder.tokenizer.size
    mean, std = (tuple(value.flatten().tolist()) for value in (encoder.tokenizer.mean, encoder.tokenizer.std))
    data = Data(
        kind="images", image_size=math.isqrt(tokens) * patch, channels=encoder.patch_embed.in_features // patch**2,
        mean=mean, std=std,
    )  # fmt: skip
    # I-JEPA asks for 10 tokens of its 14 x 14 or more; small grids cannot give as many.
    masks = Masks(mode="reference", min_keep=10 if tokens >= 144 else 4 if tokens >= 36 else 1)
    config = Config(preset="official", data=data, masks=masks)
    return whole, replace(config, {"model.patch": patch})
