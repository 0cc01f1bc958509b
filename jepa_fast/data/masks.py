"""Which tokens each image keeps and which it predicts.

In: the numbers (epoch, sample) of a global batch. Out: a MaskBatch of this rank's rows, ragged token numbers.
Every mask is a pure function of its numbers. What a row draws hangs on (seed, epoch, sample); what a group of rows
shares, the block sizes and in `reference` and `fixed` the cut to the shortest context, on (seed, step, group). Groups
are cut from the global batch, so the result does not depend on how the batch is split among processes.

I-JEPA's sampler (arXiv 2301.08243) as `reference`, and our variants without its quirks: see `Masks.mode`. Unlike the
original it never loops for ever: locations are drawn again a bounded number of times, then the setting is refused.
"""

import importlib
import math
import typing
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, Literal, NoReturn

import numpy as np

from jepa_fast.config import Masks
from jepa_fast.data import masks_reference as reference
from jepa_fast.data.masks_reference import ROWS, SIZES, Drawn, block_sizes, draw_sizes, reach, stream_keys
from jepa_fast.errors import UsageError

EXTENSION_ABI = 1  # of jepa_fast_C; raised together with the C++ side
TRIES = 1000  # draws of one row's locations before the setting is refused
CHECK_TRIES = 50  # a setting that passes with these few will not use up the many
BLOCKLESS = ("random", "bernoulli")
CUT = ("reference", "fixed")  # modes whose contexts are cut to the shortest of the group

Backend = Literal["auto", "cpp", "python"]


@dataclass(frozen=True)
class MaskBatch:
    """Token numbers of B images, int64."""

    context: np.ndarray  # [Tc], image after image, ascending in an image
    context_lengths: np.ndarray  # [B]
    targets: np.ndarray  # [Tt], ordered by (image, target block, token)
    target_lengths: np.ndarray  # [B], tokens of one target block; an image's num_targets blocks have equal size
    num_targets: int


def sample_masks(
    config: Masks, grid: tuple[int, ...], seed: int, step: int, epochs: np.ndarray, samples: np.ndarray,
    start: int = 0, stop: int | None = None, backend: Backend = "auto",
) -> MaskBatch:  # fmt: skip
    """The masks of rows [start, stop) of a global batch.

    epochs, samples: int64 [global batch], the epoch and sample number of each row. Both backends give the same bits.
    Raises UsageError if the setting cannot be met on this grid, ValueError if the rows or the backend do not exist.
    """
    stop = len(samples) if stop is None else stop
    if not 0 <= start < stop <= len(samples) or len(epochs) != len(samples):
        raise ValueError(
            f"rows {start} to {stop} of {len(epochs)} epochs and {len(samples)} samples: give a non-empty part of a batch"
        )
    _check_setting(config, grid)
    first, last = start, stop
    if config.mode in CUT:  # the cut needs every row of a group
        first, last = start // config.group * config.group, min(-(-stop // config.group) * config.group, len(samples))
    keys = stream_keys(seed, ROWS, epochs[first:last], samples[first:last])
    groups = np.arange(first, last) // config.group
    drawn = _draw(config, grid, keys, _group_sizes(config, grid, seed, step, groups), _sampler(backend), TRIES)
    if drawn is None:
        _refuse_context(config)
    context, lengths, targets, target_lengths = drawn
    num_targets = 1 if config.mode in BLOCKLESS else config.num_targets
    if config.mode in CUT:
        context, lengths = _cut(context, lengths, groups)
    mine = slice(start - first, stop - first)
    context = _rows(context, lengths, mine)
    targets = _rows(targets, target_lengths * num_targets, mine)
    return MaskBatch(context, lengths[mine], targets, target_lengths[mine], num_targets)


def _group_sizes(config: Masks, grid: tuple[int, ...], seed: int, step: int, groups: np.ndarray) -> np.ndarray:
    """int64 [R, 4], the block sizes of each row: see `block_sizes`."""
    if config.mode in BLOCKLESS:
        return np.zeros((len(groups), 4), np.int64)
    names = np.arange(groups[0], groups[-1] + 1)
    sizes = [draw_sizes(config, grid, key, TRIES) for key in stream_keys(seed, SIZES, step, names)]
    if None in sizes:
        _refuse(
            "min_keep",
            config.min_keep,
            "no target block has as many tokens; give fewer, or a larger --masks.target_scale",
        )
    return np.array(sizes, np.int64)[groups - groups[0]]


def _draw(
    config: Masks, grid: tuple[int, ...], keys: np.ndarray, sizes: np.ndarray, sampler: ModuleType, tries: int
) -> Drawn | None:
    """The rows before the cut; None if one of them found no locations."""
    num_tokens = math.prod(grid)
    if config.mode == "random":
        return sampler.draw_exact(keys, num_tokens, int(config.ratio * num_tokens))
    if config.mode == "bernoulli":
        return sampler.draw_bernoulli(keys, num_tokens, int(config.ratio * 2**53), config.min_keep, tries)
    keep = _kept(config, grid)
    need = max(config.min_keep, keep)
    return sampler.draw_blocks(keys, sizes, grid, reach(config.mode, grid), config.num_targets, need, keep, tries)


def _kept(config: Masks, grid: tuple[int, ...]) -> int:
    """Tokens `subsampled` keeps of each image; 0 in other modes."""
    return (config.context_tokens or math.prod(grid) // 4) if config.mode == "subsampled" else 0


def _cut(context: np.ndarray, lengths: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each context's first tokens, in raster order, as many as the shortest of its group has (I-JEPA's quirk 3)."""
    begins = np.flatnonzero(np.diff(groups, prepend=-1))
    shortest = np.minimum.reduceat(lengths, begins)[groups - groups[0]]
    place = np.arange(len(context)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return context[place < np.repeat(shortest, lengths)], shortest


def _rows(values: np.ndarray, lengths: np.ndarray, rows: slice) -> np.ndarray:
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return values[ends[rows.start] : ends[rows.stop]]


# ---- backends -----------------------------------------------------------------------------------


def _sampler(backend: Backend) -> ModuleType:
    """The module whose draw_* functions serve `backend`. Raises ValueError if it is not there."""
    if backend not in typing.get_args(Backend):
        raise ValueError(f"backend {backend!r} is none of {', '.join(typing.get_args(Backend))}")
    if backend == "python":
        return reference
    module = extension()
    if module is None and backend == "cpp":
        raise ValueError("backend 'cpp' is not installed; reinstall (pip install .), or use 'python'")
    return module or reference


@cache
def extension() -> ModuleType | None:
    """jepa_fast_C, or None after one warning that says what to do."""
    try:
        module = importlib.import_module("jepa_fast_C")
    except ImportError as error:
        _warn(f"the C++ mask sampler cannot be used ({error}); the Python one serves, slower")
        return None
    if getattr(module, "ABI", None) != EXTENSION_ABI:
        version = getattr(module, "ABI", None)
        _warn(
            f"jepa_fast_C is version {version} and this package needs {EXTENSION_ABI}; reinstall (pip install .); the Python sampler serves meanwhile, slower"
        )
        return None
    return module


def _warn(message: str) -> None:
    warnings.warn(f"jepa_fast: {message}", RuntimeWarning, stacklevel=5)


# ---- checks -------------------------------------------------------------------------------------


def check_masks(config: Masks, grid: tuple[int, ...]) -> None:
    """Raises UsageError, one line naming the field and the mend, for what cannot work on `grid`.

    What is possible but too rare to be found is refused too: every size of target block that the setting can draw
    is tried beside the smallest context block.
    """
    _check_setting(config, grid)
    sizes = np.array([(*target, *_smallest_context(config, grid)) for target in _target_sizes(config, grid)])
    sizes = np.zeros((1, 4), np.int64) if config.mode in BLOCKLESS else sizes
    sizes = np.repeat(sizes, 8, axis=0)
    keys = stream_keys(0, ROWS, 0, np.arange(len(sizes)))
    if _draw(config, grid, keys, sizes, _sampler("auto"), CHECK_TRIES) is None:
        _refuse_context(config)


@lru_cache
def _check_setting(config: Masks, grid: tuple[int, ...]) -> None:
    """What follows from the numbers alone; cheap, once for each setting."""
    modes = typing.get_args(typing.get_type_hints(Masks)["mode"])
    if config.mode not in modes:
        _refuse("mode", config.mode, f"give one of {', '.join(modes)}")
    num_tokens = math.prod(grid)
    if config.mode in BLOCKLESS:
        _check_tokens(config, num_tokens)
    elif len(grid) != 2:
        _refuse(
            "mode",
            config.mode,
            f"blocks need rows and columns, and this grid is {grid}; a series takes random or bernoulli",
        )
    else:
        _check_blocks(config, grid)


def _check_tokens(config: Masks, num_tokens: int) -> None:
    if config.num_targets != 1:
        _refuse("num_targets", config.num_targets, f"{config.mode} hides one set of tokens; give 1")
    if config.mode == "random":
        hidden = int(config.ratio * num_tokens)
        if not 0 < hidden < num_tokens:
            _refuse(
                "ratio", config.ratio, f"hides {hidden} of {num_tokens} tokens; some must be hidden and some visible"
            )
        if min(hidden, num_tokens - hidden) < config.min_keep:
            _refuse(
                "min_keep",
                config.min_keep,
                f"{hidden} of {num_tokens} tokens are hidden; give at most {min(hidden, num_tokens - hidden)}",
            )
    elif 2 * config.min_keep > num_tokens:
        _refuse(
            "min_keep",
            config.min_keep,
            f"as many must be hidden and visible of {num_tokens} tokens; give at most {num_tokens // 2}",
        )


def _check_blocks(config: Masks, grid: tuple[int, ...]) -> None:
    smallest = min(h * w for h, w in _target_sizes(config, grid))
    if smallest < 1:
        _refuse(
            "target_scale",
            config.target_scale,
            f"a target block of the {grid[0]}x{grid[1]} grid can be empty; give a larger scale or an aspect nearer 1",
        )
    if smallest < config.min_keep:
        _refuse(
            "min_keep",
            config.min_keep,
            f"a target block of the {grid[0]}x{grid[1]} grid can have {smallest} tokens; give at most {smallest}, or a larger --masks.target_scale",
        )
    most = min(_most_visible(config, grid, target) for target in _target_sizes(config, grid))
    if most < config.min_keep:
        _refuse(
            "min_keep",
            config.min_keep,
            f"targets can leave {most} context tokens at most; give fewer, a smaller --masks.target_scale or a larger --masks.context_scale",
        )
    if config.mode == "subsampled":
        keep = _kept(config, grid)
        if keep < config.min_keep:
            _refuse(
                "context_tokens",
                config.context_tokens,
                f"keeps {keep} tokens, fewer than --masks.min_keep {config.min_keep}; give at least as many",
            )
        if keep > most:
            _refuse(
                "context_tokens",
                config.context_tokens,
                f"keeps {keep} tokens and targets can leave {most} at most; give fewer",
            )


def _target_sizes(config: Masks, grid: tuple[int, ...]) -> list[tuple[int, int]]:
    """Sizes of target blocks that the setting can draw (scanned: all but the rarest)."""
    if config.mode in BLOCKLESS:
        return []
    scan = np.linspace(0, 1, 65).tolist()
    return sorted({block_sizes(config, grid, u, v, 0)[:2] for u in scan for v in scan})


def _smallest_context(config: Masks, grid: tuple[int, ...]) -> tuple[int, int]:
    return block_sizes(config, grid, 0, 0, 0)[2:]


def _most_visible(config: Masks, grid: tuple[int, ...], target: tuple[int, int]) -> int:
    """Context tokens left when all targets lie on one another, as far outside the smallest context block as can be."""
    context, room = _smallest_context(config, grid), reach(config.mode, grid)
    overlap = [max(t + c - r, 0) for t, c, r in zip(target, context, room, strict=True)]
    return math.prod(context) - math.prod(overlap)


def _refuse(name: str, value: Any, mend: str) -> NoReturn:
    raise UsageError(f"--masks.{name} is {value!r}: {mend}")


def _refuse_context(config: Masks) -> NoReturn:
    if config.mode == "bernoulli":
        _refuse(
            "min_keep",
            config.min_keep,
            f"hardly any draw at --masks.ratio {config.ratio} has as many hidden and visible tokens; give fewer",
        )
    name = "context_tokens" if config.mode == "subsampled" else "min_keep"
    _refuse(
        name,
        getattr(config, name),
        "the targets hardly ever leave as many context tokens; give fewer, or fewer or smaller targets (--masks.num_targets, --masks.target_scale)",
    )
