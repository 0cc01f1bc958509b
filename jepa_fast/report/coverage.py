"""What the masks of a run really cover. In: its configuration. Out: a figure and the numbers of remarks B.1 and B.2."""

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from jepa_fast import schedules
from jepa_fast.config import Config
from jepa_fast.masks import remarks
from jepa_fast.masks.reference import BLOCKLESS
from jepa_fast.masks.sample import sample_masks
from jepa_fast.report.figure import LIGHT, SMALL, bare

INPUTS = 8192  # masks drawn: where a group of 128 is cut to one length, 64 lengths


@dataclass(frozen=True)
class Coverage:
    visible: np.ndarray  # [N], share of inputs in which the context encoder sees the token
    target: np.ndarray  # [N], share in which the loss is taken at it
    hidden: np.ndarray  # [INPUTS], |M|, tokens hidden from the context encoder
    grid: tuple[int, ...]
    blocks: bool  # whether whole blocks are hidden, as remark B.2 has it
    scheduled: bool  # whether later steps have others

    @property
    def p(self) -> float:
        return float(self.hidden.mean()) / len(self.visible)

    @property
    def bernoulli_variance(self) -> float:
        """Remark B.1: N p (1 - p)."""
        return remarks.variance(len(self.visible), self.p)

    def hoeffding(self, delta: float = 0.05) -> tuple[float, float]:
        """(pN + sqrt(N / 2 log(2 / delta)), share of the masks drawn that keep to it): remark B.1 promises 1 - delta."""
        limit = remarks.hoeffding(len(self.visible), self.p, delta)
        return limit, float((self.hidden <= limit).mean())


def coverage(config: Config) -> Coverage:
    """Of the masks at the start of the run, on INPUTS draws."""
    n, numbers = config.num_tokens, np.arange(INPUTS)
    masks = sample_masks(schedules.masks(config.masks, 0, 1), config.grid, 0, 0, np.zeros(INPUTS, np.int64), numbers)
    visible = np.bincount(masks.context, minlength=n) / INPUTS
    owner = np.repeat(numbers, masks.target_lengths * masks.num_targets)
    once = np.unique(owner * n + masks.targets) % n  # target blocks may overlap
    return Coverage(
        visible,
        np.bincount(once, minlength=n) / INPUTS,
        n - masks.context_lengths,
        config.grid,
        config.masks.mode not in BLOCKLESS,
        config.masks.schedule != "constant",
    )


def sentences(found: Coverage) -> list[str]:
    """Remarks B.1 and B.2 beside the masks in use."""
    n, variance = len(found.visible), float(found.hidden.var())
    limit, share = found.hoeffding()
    said = [
        f"{found.p:.1%} of {n} tokens are hidden from the context encoder on average (pN = {found.hidden.mean():.1f}).",
        f"The number hidden has variance {variance:.3g}; independent tokens (remark B.1) would have {found.bernoulli_variance:.3g}.",
    ]
    if found.scheduled:
        said.insert(0, "These are the first step's masks; --masks.schedule changes them over the run.")
    if variance == 0:
        said.append("The count is fixed, so remark B.1, which models it as random, does not describe these masks.")
    elif found.blocks and variance > found.bernoulli_variance:
        said.append("Blocks vary more than independent tokens, as remark B.2 says.")
    elif found.blocks:
        said.append("Remark B.2 says that blocks vary more; cut to a common number of tokens these do not.")
    said.append(f"Hoeffding's limit at 95 % is {limit:.1f} hidden tokens; {share:.1%} of the masks drawn keep to it.")
    return said


def coverage_figure(found: Coverage) -> Figure:
    """How often each token is seen, how often predicted, and how many are hidden."""
    figure = Figure(figsize=(6.4, 2.1), facecolor=LIGHT["paper"], layout="constrained")
    axes = figure.subplots(1, 3)
    shape = found.grid if len(found.grid) == 2 else (1, found.grid[0])
    for ax, values, title in zip(axes, (found.visible, found.target), ("Seen", "Predicted"), strict=False):
        bare(ax)
        low, high = float(values.min()), float(values.max())
        ax.imshow(values.reshape(shape), cmap="cividis", vmin=0, vmax=1, aspect="auto" if shape[0] == 1 else "equal")
        ax.set_title(title, loc="left", fontsize=9, color=LIGHT["ink"])
        ax.set_xlabel(f"of {low:.0%} to {high:.0%} of inputs", **SMALL)
        ax.set_xticks([]), ax.set_yticks([])
    ax = axes[2]
    bare(ax)
    counts = np.bincount(found.hidden, minlength=len(found.visible) + 1)
    used = np.flatnonzero(counts)
    span = range(max(0, used[0] - 2), min(len(counts), used[-1] + 3))
    ax.bar(span, counts[span.start : span.stop] / INPUTS, color=LIGHT["blue"], width=0.9)
    n, p = len(found.visible), found.p
    x = np.arange(n + 1)
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p) for k in x]  # fmt: skip
    ax.plot(x, np.exp(logs), color=LIGHT["orange"], linewidth=1.4)
    wide = 4 * math.sqrt(found.bernoulli_variance)
    ax.set_xlim(max(-0.5, min(span.start, n * p - wide)), min(n + 0.5, max(span.stop, n * p + wide)))
    ax.set_title("Tokens hidden", loc="left", fontsize=9, color=LIGHT["ink"])
    ax.set_yticks([])
    ax.set_xlabel("bars: drawn; line: independent tokens", **SMALL)
    return figure
