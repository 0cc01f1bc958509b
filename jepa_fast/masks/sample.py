"""Which tokens each image keeps and which it predicts.

In: the numbers (epoch, sample) of a global batch. Out: a MaskBatch of this rank's rows, ragged token numbers.
Every mask is a pure function of its numbers. What a row draws hangs on (seed, epoch, sample); what a group of rows
shares, the block sizes and in `reference` and `fixed` the cut to the shortest context, on (seed, step, group). Groups
are cut from the global batch, so the result does not depend on how the batch is split among processes.

`reference` draws as I-JEPA's published sampler does (arXiv 2301.08243), with three quirks that the other modes fix
one by one: see `block_sizes`, `reach`, `_cut`. Two things differ on purpose. It never loops for ever: an image with too
few context tokens has all its locations drawn again, a bounded number of times, then the setting is refused. And
min_keep is the fewest tokens that will do, where I-JEPA asks for one more.
"""

import math
import typing
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, NoReturn

import numpy as np

from jepa_fast.config import Masks
from jepa_fast.extension import extension
from jepa_fast.masks import reference
from jepa_fast.masks.reference import BLOCKLESS, ROWS, SIZES, RaggedMasks, check_setting, refuse

TRIES = 1000  # draws of one row's locations before the setting is refused
CHECK_TRIES = 50  # a setting that passes with these few will not use up the many
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

    def rows(self, start: int, stop: int) -> "MaskBatch":
        """The masks of images [start, stop)."""
        mine = slice(start, stop)
        context = _rows(self.context, self.context_lengths, mine)
        targets = _rows(self.targets, self.target_lengths * self.num_targets, mine)
        return MaskBatch(context, self.context_lengths[mine], targets, self.target_lengths[mine], self.num_targets)


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
        raise ValueError(f"rows [{start}, {stop}) of {len(epochs)} epochs, {len(samples)} samples: not part of a batch")
    check_setting(config, grid)
    first, last = start, stop
    if config.mode in CUT:  # the cut needs every row of a group
        first, last = start // config.group * config.group, min(-(-stop // config.group) * config.group, len(samples))
    sampler = _sampler(backend)
    keys = sampler.stream_keys(seed, ROWS, epochs[first:last], samples[first:last])
    groups = np.arange(first, last) // config.group
    drawn = _draw(config, grid, keys, _group_sizes(config, grid, seed, step, groups, sampler), sampler, TRIES)
    if drawn is None:
        _refuse_context(config)
    context, lengths, targets, target_lengths = drawn
    num_targets = 1 if config.mode in BLOCKLESS else config.num_targets
    if config.mode in CUT:
        context, lengths = _cut(context, lengths, groups)
    return MaskBatch(context, lengths, targets, target_lengths, num_targets).rows(start - first, stop - first)


def _group_sizes(
    config: Masks, grid: tuple[int, ...], seed: int, step: int, groups: np.ndarray, sampler: ModuleType
) -> np.ndarray:
    """int64 [R, 4], the block sizes of each row: see `block_sizes`."""
    if config.mode in BLOCKLESS:
        return np.zeros((len(groups), 4), np.int64)
    names = np.arange(groups[0], groups[-1] + 1)
    sizes = [reference.draw_sizes(config, grid, key, TRIES) for key in sampler.stream_keys(seed, SIZES, step, names)]
    if None in sizes:
        refuse(config, "min_keep", "no target block has as many tokens; give fewer")
    return np.array(sizes, np.int64)[groups - groups[0]]


def _draw(
    config: Masks, grid: tuple[int, ...], keys: np.ndarray, sizes: np.ndarray,
    sampler: ModuleType, tries: int, cut: bool = True,
) -> RaggedMasks | None:  # fmt: skip
    """The rows before a group's cut (and whole, without `cut`, in `subsampled`); None if one found no locations."""
    num_tokens = math.prod(grid)
    if config.mode == "random":
        return sampler.draw_exact(keys, num_tokens, int(config.ratio * num_tokens))
    if config.mode == "bernoulli":
        return sampler.draw_bernoulli(keys, num_tokens, int(config.ratio * 2**53), config.min_keep, tries)
    keep, within = reference.kept(config, grid), reference.reach(config.mode, grid)
    need = max(config.min_keep, keep)
    return sampler.draw_blocks(keys, sizes, grid, within, config.num_targets, need, keep if cut else 0, tries)


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
    """The module whose stream_keys and draw_* serve `backend`. Raises ValueError if it is not there."""
    if backend not in typing.get_args(Backend):
        raise ValueError(f"backend {backend!r} is none of {', '.join(typing.get_args(Backend))}")
    if backend == "python":
        return reference
    module = extension()
    if module is None and backend == "cpp":
        raise ValueError("backend 'cpp' is not installed; reinstall (pip install .), or use 'python'")
    return module or reference


# ---- checks -------------------------------------------------------------------------------------


def check_masks(config: Masks, grid: tuple[int, ...]) -> None:
    """Raises UsageError, one line naming the field and the fix, for what cannot work on `grid`.

    What is possible but too rare to be found is refused too: every size of target block that the setting can draw
    is tried beside the smallest context block.
    """
    check_setting(config, grid)
    sizes = [[0] * 4]
    if config.mode not in BLOCKLESS:
        sizes = [
            [*target, *reference.smallest_context(config, grid)] for target in reference.target_sizes(config, grid)
        ]
    sampler = _sampler("auto")
    keys = sampler.stream_keys(0, ROWS, 0, np.arange(8 * len(sizes)))
    if _draw(config, grid, keys, np.repeat(np.array(sizes), 8, axis=0), sampler, CHECK_TRIES) is None:
        _refuse_context(config)


def _refuse_context(config: Masks) -> NoReturn:
    if config.mode == "bernoulli":
        refuse(config, "min_keep", f"--masks.ratio {config.ratio} hardly ever leaves and hides so many; give fewer")
    name = "context_tokens" if config.mode == "subsampled" else "min_keep"
    refuse(config, name, "targets hardly ever leave so many; give fewer, or a smaller --masks.target_scale")


def visible_before_cut(config: Masks, grid: tuple[int, ...], seed: int, step: int, batch: int) -> int:
    """Context tokens of the whole batch before any cut or subsample."""
    sampler = _sampler("auto")
    keys = sampler.stream_keys(seed, ROWS, 0, np.arange(step * batch, (step + 1) * batch))
    sizes = _group_sizes(config, grid, seed, step, np.arange(batch) // config.group, sampler)
    drawn = _draw(config, grid, keys, sizes, sampler, TRIES, cut=False)
    return len(drawn[0]) if drawn else 0
