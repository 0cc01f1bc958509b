"""What each mask mode really draws: `python -m jepa_fast.masks --report`.

Lengths, where on the grid tokens are shown and predicted, what the sampler costs, and the paper's Remarks B.1 and B.2:
how much the number of hidden tokens |M| and the hidden part of an input vary, beside independent (Bernoulli) masks
that hide as much on average.
"""

import math
import statistics
import time
from typing import NamedTuple

import numpy as np

from jepa_fast.config import Masks
from jepa_fast.data.readers.generated import texture
from jepa_fast.errors import Arguments, UsageError, one_line_errors
from jepa_fast.extension import extension
from jepa_fast.masks import remarks
from jepa_fast.masks.reference import BLOCKLESS, MODES
from jepa_fast.masks.sample import Backend, MaskBatch, check_masks, sample_masks, visible_before_cut

# Shape legend: R masks drawn, N tokens of the grid.

DELTA = 0.05  # of Remark B.1: its bound on |M| may fail with this probability
TIMED = 10  # batches that the slower sampler draws, where another draws them all
PATCH = 8  # pixels of the generated textures that stand for inputs in Remark B.2

_LEGEND = """
context: tokens an image shows the context encoder, after any cut.   target: tokens of one block.
hidden: share of the grid outside the context.   covered: share of it inside a target.
top: share of the context in the upper half of the grid.   thrown: visible tokens that a cut or subsample drops.
even: exp(entropy) of the positions used, over tokens of the grid; 1 where all are used alike.
us: microseconds an image, median over batches, of the Python and the C++ sampler.
"""

_REMARKS = """
Remarks B.1 and B.2: M are the hidden tokens (outside the context), p their mean share, N the tokens of the grid.
var |M|: simulated; Bernoulli: N p (1 - p), exact.   over: share of masks past the bound of Remark B.1, which holds for
independent masks with probability {delta:.0%} of failing: |M| <= pN + sqrt(N / 2 log(2 / {delta})).
var ||Mx||^2: of the hidden part of an input, from the covariance of the masks and the patches of 16 generated
textures, over that of a Bernoulli mask, p (1 - p) sum of ||x_i||^4; for patches of equal norm it is the ratio of
var |M| again.   corr: mean correlation of neighbouring tokens' being hidden; 0 for independent masks.

mode              p    mean |M|    var |M|   Bernoulli    ratio    bound     over   var ||Mx||^2 ratio     corr"""


class MaskStats(NamedTuple):
    """What a number of batches of one mode came to."""

    lengths: np.ndarray  # [R], context tokens
    sizes: np.ndarray  # [R], tokens of a target block
    shown: np.ndarray  # bool [R, N], in the context
    predicted: np.ndarray  # bool [R, N], in a target
    tokens: np.ndarray  # target token numbers, block after block, repeats and all
    thrown: float  # share of visible tokens that are not used
    micros: dict[str, str]  # by sampler


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Print what each mode really draws, and how fast."""
    parser = Arguments("masks", main.__doc__ or "")
    parser.add_argument("--report", action="store_true", required=True)
    parser.add_argument("--mode", choices=MODES, help="only this one")
    parser.add_argument("--grid", type=int, nargs="+", default=[14, 14], help="rows and columns, or patches")
    parser.add_argument("--masks.group", dest="group", type=int, default=Masks.group)
    parser.add_argument("--masks.min_keep", dest="min_keep", type=int, help="default 10, without blocks 1")
    # So many, because a group shares its block sizes: it is groups that the variances are estimated from.
    for name, value in (("batch", 128), ("batches", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(argv)
    if min(args.batch, args.batches, args.group, *args.grid) < 1:
        raise UsageError("--batch, --batches, --masks.group and --grid must be at least 1")
    if len(args.grid) > 2:
        raise UsageError(f"--grid {' '.join(map(str, args.grid))}: give rows and columns, or a number of patches")
    print(report(args.mode, tuple(args.grid), args.group, args.min_keep, args.batch, args.batches, args.seed))


def report(
    only: str | None, grid: tuple[int, ...], group: int, min_keep: int | None, batch: int, batches: int, seed: int
) -> str:
    """The page: three tables and a map of each mode. Raises UsageError for a setting that cannot be met."""
    drawn: dict[str, MaskStats] = {}
    for mode in [only] if only else [m for m in MODES if len(grid) == 2 or m in BLOCKLESS]:
        num_targets, least = (1, 1) if mode in BLOCKLESS else (Masks.num_targets, Masks.min_keep)
        config = Masks(mode, num_targets, group=group, min_keep=min_keep or least)  # type: ignore[arg-type]
        check_masks(config, grid)
        drawn[mode] = draw(config, grid, seed, batch, batches)
    first = "mode         context  min  max  target  hidden  covered   top  thrown  even:context  even:target  us:python  us:cpp"
    lines = [
        f"grid {'x'.join(map(str, grid))}, {batches} batches of {batch}, groups of {group}, seed {seed}",
        _LEGEND,
        first,
    ]
    lines += [_lengths(mode, each) for mode, each in drawn.items()]
    energies = _energies(grid, seed)
    lines += [_REMARKS.format(delta=DELTA), *(_variance(mode, each, grid, energies) for mode, each in drawn.items())]
    lines += [
        "",
        "Coverage: how often a token is shown to the context encoder (left) and predicted (right), in tenths.",
    ]
    for mode, each in drawn.items():
        lines += ["", mode, *_map(each, grid)]
    return "\n".join(lines)


def draw(config: Masks, grid: tuple[int, ...], seed: int, batch: int, batches: int) -> MaskStats:
    """`batches` batches of masks, as a run draws them, with every sampler there is."""
    num_tokens, visible = math.prod(grid), 0
    micros: dict[str, str] = {}
    backends: list[tuple[Backend, int]] = [("python", batches)]
    if extension():
        backends = [("python", min(batches, TIMED)), ("cpp", batches)]
    for backend, count in backends:  # the same masks from both: the last has drawn them all
        found: list[MaskBatch] = []
        times = []
        for step in range(count):
            began = time.perf_counter()
            rows = np.arange(step * batch, (step + 1) * batch)
            found.append(sample_masks(config, grid, seed, step, np.zeros_like(rows), rows, backend=backend))
            times.append((time.perf_counter() - began) / batch * 1e6)
        micros[backend] = f"{statistics.median(times):.2f}"
    for step in range(batches):
        visible += visible_before_cut(config, grid, seed, step, batch)
    lengths = np.concatenate([m.context_lengths for m in found])
    sizes = np.concatenate([m.target_lengths for m in found])
    context, targets = (np.concatenate([getattr(m, k) for m in found]) for k in ("context", "targets"))
    return MaskStats(
        lengths, sizes,
        shown=_grid(context, lengths, num_tokens),
        predicted=_grid(targets, sizes * found[0].num_targets, num_tokens),
        tokens=targets,
        thrown=1 - len(context) / visible,
        micros=micros,
    )  # fmt: skip


def _grid(tokens: np.ndarray, lengths: np.ndarray, num_tokens: int) -> np.ndarray:
    """Ragged token numbers -> bool [R, N]."""
    out = np.zeros((len(lengths), num_tokens), bool)
    out[np.repeat(np.arange(len(lengths)), lengths), tokens] = True
    return out


def _lengths(mode: str, drawn: MaskStats) -> str:
    num_tokens = drawn.shown.shape[1]
    even = [_evenness(c) for c in (drawn.shown.sum(0), np.bincount(drawn.tokens, minlength=num_tokens))]
    top = drawn.shown[:, : num_tokens // 2].sum() / drawn.shown.sum()
    return (
        f"{mode:<11} {drawn.lengths.mean():8.1f} {drawn.lengths.min():4d} {drawn.lengths.max():4d} {drawn.sizes.mean():7.1f} "
        f"{1 - drawn.shown.mean():7.3f} {drawn.predicted.mean():8.3f} {top:5.3f} {drawn.thrown:7.3f} "
        f"{even[0]:13.3f} {even[1]:12.3f} {drawn.micros['python']:>10} {drawn.micros.get('cpp', '-'):>7}"
    )


def _evenness(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum())) / len(counts)


def _energies(grid: tuple[int, ...], seed: int) -> np.ndarray:
    """[16, N], squared norms of the patches of generated textures; of patches of random walks where the grid is a line."""
    rng = np.random.default_rng(seed)
    if len(grid) == 1:
        walks = rng.normal(size=(16, grid[0] * PATCH)).cumsum(1)
        return (walks.reshape(16, grid[0], PATCH) ** 2).sum(2)
    side = max(grid) * PATCH
    images = np.stack([texture(i % 4, side, rng) for i in range(16)])[:, : grid[0] * PATCH, : grid[1] * PATCH]
    patches = images.reshape(16, grid[0], PATCH, grid[1], PATCH)
    return (patches**2).sum((2, 4)).reshape(16, -1)


def _variance(mode: str, drawn: MaskStats, grid: tuple[int, ...], energies: np.ndarray) -> str:
    hidden = ~drawn.shown
    num_tokens, count, p = hidden.shape[1], hidden.sum(1), hidden.mean()
    independent = remarks.variance(num_tokens, p)
    bound = remarks.hoeffding(num_tokens, p, DELTA)
    # Var(sum m_i a_i) = a' Cov(m) a: computed as the variance of the hidden energy over the masks, for each input.
    energy = (
        (hidden @ energies.T).var(0, ddof=1) / (p * (1 - p) * (energies**2).sum(1)) if len(hidden) > 1 else np.zeros(1)
    )
    variance = float(count.var(ddof=1)) if len(count) > 1 else 0.0
    return (
        f"{mode:<11} {p:7.3f} {count.mean():11.1f} {variance:10.1f} {independent:11.1f} {variance / independent:8.2f} "
        f"{bound:8.1f} {(count > bound).mean():8.3f} {energy.mean():20.2f} {_correlation(hidden, grid):8.2f}"
    )


def _correlation(hidden: np.ndarray, grid: tuple[int, ...]) -> float:
    """Mean correlation between tokens next to one another along the last axis; those that never vary are left out."""
    x = hidden.astype(float).reshape(len(hidden), -1, grid[-1])
    x = x - x.mean(0)
    a, b = x[:, :, :-1], x[:, :, 1:]
    spread = np.sqrt((a**2).mean(0) * (b**2).mean(0))
    return float(((a * b).mean(0)[spread > 0] / spread[spread > 0]).mean()) if (spread > 0).any() else 0.0


def _map(drawn: MaskStats, grid: tuple[int, ...]) -> list[str]:
    maps = [(seen.mean(0).reshape(-1, grid[-1]) * 10).round().astype(int) for seen in (drawn.shown, drawn.predicted)]
    return ["  " + "    ".join(" ".join(_tenth(v) for v in row) for row in pair) for pair in zip(*maps, strict=True)]


def _tenth(value: int) -> str:
    return "." if value == 0 else "X" if value == 10 else str(value)
