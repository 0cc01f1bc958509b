"""The mask sampler in plain Python: the random streams, the block sizes, and what each row draws.

In: one 64-bit stream key per row, block sizes. Out: ragged token numbers (`RaggedMasks`), before any cut to a common length.
csrc/jepa_fast/masks.cpp does the same as `stream_keys` and the three `draw_*` functions, faster, and must give the same
bits. So those take whole numbers only: everything with a fraction (scales, aspects, probabilities) is settled in Python before. What
the sizes rule out is refused here too.
"""

import math
import typing
from functools import lru_cache
from typing import NoReturn

import numpy as np

from jepa_fast.config import Masks
from jepa_fast.errors import UsageError

MODES = typing.get_args(typing.get_type_hints(Masks)["mode"])
BLOCKLESS = ("random", "bernoulli")

RaggedMasks = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""context [Tc], context_lengths [R], targets [Tt], target_lengths [R] of R rows, all int64."""

SIZES, ROWS = 1, 2  # domains: streams of different use never meet
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z):
    """splitmix64's finaliser (Steele, Lea, Flood 2014), of one int or of a uint64 array."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def stream_keys(seed: int, domain: int, first, second) -> np.ndarray:
    """uint64 [R], a stream's key for each pair of numbers: (step, group) of sizes, (epoch, sample) of rows."""
    first, second = (np.atleast_1d(np.asarray(a, np.int64)).astype(np.uint64) for a in (first, second))
    key = np.full(np.broadcast(first, second).shape, seed & _WORD, np.uint64)
    for number in (np.uint64(domain), first, second):
        key = _mix((key + np.uint64(_GOLDEN)) & _WORD) ^ number
    return _mix(key)


class SplitMix64:
    """splitmix64 from a key."""

    def __init__(self, key: int):
        self._state = int(key)

    def next(self) -> int:
        """The next 64 bits."""
        self._state = (self._state + _GOLDEN) & _WORD
        return _mix(self._state)

    def uniform(self) -> float:
        """In [0, 1), a multiple of 2^-53."""
        return (self.next() >> 11) * 2.0**-53

    def below(self, n: int) -> int:
        """In [0, n), by multiply-shift of the upper 32 bits; uneven by at most n / 2^32."""
        return ((self.next() >> 32) * n) >> 32


# ---- sizes: one draw for a group ----------------------------------------------------------------


def reach(mode: str, grid: tuple[int, ...]) -> tuple[int, ...]:
    """The part of the grid blocks are drawn in.

    I-JEPA draws a corner from [0, H-h), so its last row and column are never used (quirk 2): a grid one smaller.
    """
    return tuple(n - 1 for n in grid) if mode == "reference" else grid


def block_sizes(config: Masks, grid: tuple[int, ...], u: float, v: float, w: float) -> tuple[int, int, int, int]:
    """(target height, width, context height, width) from three uniforms: target scale, its aspect, context scale."""
    if config.mode in ("reference", "fixed"):
        v = u  # I-JEPA's one draw for scale and aspect (quirk 1)
    target = _block_size(grid, reach(config.mode, grid), _lerp(config.target_scale, u), _lerp(config.target_aspect, v))
    return target + _block_size(grid, reach(config.mode, grid), _lerp(config.context_scale, w), 1.0)


def draw_sizes(config: Masks, grid: tuple[int, ...], key: int, tries: int) -> tuple[int, int, int, int] | None:
    """Sizes for the stream `key`; drawn again while the target is below min_keep. None after `tries` draws."""
    stream = SplitMix64(key)
    for _ in range(tries):
        sizes = block_sizes(config, grid, stream.uniform(), stream.uniform(), stream.uniform())
        if sizes[0] * sizes[1] >= config.min_keep:
            return sizes
    return None


def target_sizes(config: Masks, grid: tuple[int, ...]) -> list[tuple[int, int]]:
    """(height, width) of the target blocks that the setting can draw: scanned, so the rarest may be left out."""
    scan = np.linspace(0, 1, 65).tolist()
    return sorted({block_sizes(config, grid, u, v, 0)[:2] for u in scan for v in scan})


def smallest_context(config: Masks, grid: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of the context block at the smallest scale."""
    return block_sizes(config, grid, 0, 0, 0)[2:]


def longest(config: Masks, grid: tuple[int, ...]) -> tuple[int, int]:
    """Bounds on the tokens of one context and of one target block; reached in `random`, not passed in any mode."""
    num_tokens = math.prod(grid)
    if config.mode == "random":
        hidden = int(config.ratio * num_tokens)
        return num_tokens - hidden, hidden
    if config.mode == "bernoulli":
        return num_tokens - config.min_keep, num_tokens - config.min_keep
    context = math.prod(block_sizes(config, grid, 0, 0, 1)[2:])
    area = int(num_tokens * config.target_scale[1])
    aspect = max(config.target_aspect[1], 1 / config.target_aspect[0])
    target = area + math.sqrt(area) * (math.sqrt(aspect) + 1 / math.sqrt(aspect)) / 2 + 0.25  # both sides rounded up
    return kept(config, grid) or context - 1, min(num_tokens, math.floor(target))


def _lerp(bounds: tuple[float, float], t: float) -> float:
    return bounds[0] + t * (bounds[1] - bounds[0])


def _block_size(grid: tuple[int, ...], most: tuple[int, ...], scale: float, aspect: float) -> tuple[int, int]:
    area = int(math.prod(grid) * scale)
    return min(round(math.sqrt(area * aspect)), most[0]), min(round(math.sqrt(area / aspect)), most[1])


def kept(config: Masks, grid: tuple[int, ...]) -> int:
    """Tokens `subsampled` keeps of each image; 0 in other modes."""
    return (config.context_tokens or math.prod(grid) // 4) if config.mode == "subsampled" else 0


# ---- settings that cannot work ------------------------------------------------------------------


@lru_cache
def check_setting(config: Masks, grid: tuple[int, ...]) -> None:
    """Raises UsageError for what the numbers alone rule out. Once for each setting: it scans sizes."""
    if config.mode not in MODES:
        refuse(config, "mode", f"give one of {', '.join(MODES)}")
    if config.mode in BLOCKLESS:
        _check_tokens(config, math.prod(grid))
    elif len(grid) != 2:
        refuse(config, "mode", f"blocks need rows and columns, this grid is {grid}; give random or bernoulli")
    else:
        _check_blocks(config, (grid[0], grid[1]))


def _check_tokens(config: Masks, num_tokens: int) -> None:
    if config.num_targets != 1:
        refuse(config, "num_targets", f"{config.mode} hides one set of tokens; give 1")
    if config.mode == "random":
        hidden = int(config.ratio * num_tokens)
        most = min(hidden, num_tokens - hidden)
        if most < 1:
            refuse(
                config, "ratio", f"hides {hidden} of {num_tokens} tokens; give a share that hides some and leaves some"
            )
    else:
        most = num_tokens // 2
    if config.min_keep > most:
        refuse(config, "min_keep", f"so many of {num_tokens} tokens cannot be hidden and visible; give at most {most}")


def _check_blocks(config: Masks, grid: tuple[int, int]) -> None:
    sizes, where = target_sizes(config, grid), f"the {grid[0]}x{grid[1]} grid"
    smallest = min(height * width for height, width in sizes)
    if smallest < 1:
        refuse(config, "target_scale", f"targets can be empty on {where}; give more, or an aspect nearer 1")
    if smallest < config.min_keep:
        refuse(config, "min_keep", f"targets can have {smallest} tokens on {where}; give at most {smallest}")
    # At best all targets lie on one another, as far outside the smallest context block as the grid allows.
    context, room = smallest_context(config, grid), reach(config.mode, grid)
    most = math.prod(context) - max(
        math.prod(max(t + c - r, 0) for t, c, r in zip(size, context, room, strict=True)) for size in sizes
    )
    if most < config.min_keep:
        refuse(config, "min_keep", f"targets can leave {most} context tokens on {where}; give fewer or smaller targets")
    keep = kept(config, grid)
    if keep and not config.min_keep <= keep <= most:
        bounds = f"from --masks.min_keep ({config.min_keep}) to the {most} that targets can leave on {where}"
        refuse(config, "context_tokens", f"{keep} tokens are not {bounds}; give a number between")


def refuse(config: Masks, name: str, fix: str) -> NoReturn:
    raise UsageError(f"--masks.{name} is {getattr(config, name)!r}: {fix}")


# ---- rows: locations and tokens, one image after the other --------------------------------------


def draw_blocks(
    keys: np.ndarray, sizes: np.ndarray, grid: tuple[int, int], within: tuple[int, int],
    num_targets: int, need: int, keep: int, tries: int,
) -> RaggedMasks | None:  # fmt: skip
    """Target blocks, and what they leave of a context block.

    keys: uint64 [R]; sizes: int64 [R, 4]; within: see `reach`. Locations are drawn again until `need` context
    tokens are left; `keep` of them, uniformly chosen, are taken (0: all). None if a row used up its `tries`.
    """
    tokens = np.arange(grid[0] * grid[1]).reshape(grid)
    contexts, targets = [], []
    for key, (height, width, *context_size) in zip(keys.tolist(), sizes.tolist(), strict=True):
        stream = SplitMix64(key)
        for _ in range(tries):
            corners = [_corner(stream, within, (height, width)) for _ in range(num_targets)]
            visible = np.zeros(grid, bool)
            top, left = _corner(stream, within, context_size)
            visible[top : top + context_size[0], left : left + context_size[1]] = True
            for top, left in corners:
                visible[top : top + height, left : left + width] = False
            context = np.flatnonzero(visible)
            if len(context) >= need:
                break
        else:
            return None
        contexts.append(context[_choose(stream, len(context), keep)] if keep else context)
        targets += [tokens[top : top + height, left : left + width].ravel() for top, left in corners]
    return *_ragged(contexts), np.concatenate(targets), sizes[:, 0] * sizes[:, 1]


def draw_exact(keys: np.ndarray, num_tokens: int, hidden: int) -> RaggedMasks:
    """Exactly `hidden` tokens of each row are the target, the others its context."""
    masks = [_choose(SplitMix64(key), num_tokens, hidden) for key in keys.tolist()]
    return _split(masks)


def draw_bernoulli(keys: np.ndarray, num_tokens: int, threshold: int, need: int, tries: int) -> RaggedMasks | None:
    """Each token is hidden with probability threshold / 2^53, given `need` hidden and `need` visible ones."""
    masks = []
    for key in keys.tolist():
        stream = SplitMix64(key)
        for _ in range(tries):
            mask = np.array([stream.next() >> 11 < threshold for _ in range(num_tokens)])
            if need <= mask.sum() <= num_tokens - need:
                break
        else:
            return None
        masks.append(mask)
    return _split(masks)


def _corner(stream: SplitMix64, within: tuple[int, int], size) -> tuple[int, int]:
    return stream.below(within[0] - size[0] + 1), stream.below(within[1] - size[1] + 1)


def _choose(stream: SplitMix64, n: int, k: int) -> np.ndarray:
    """bool [n], a uniformly random k of them True: selection sampling (Knuth 3.4.2 S), in order and without a sort."""
    chosen, left = np.zeros(n, bool), k
    for i in range(n):
        if stream.below(n - i) < left:
            chosen[i] = True
            left -= 1
    return chosen


def _split(hidden: list[np.ndarray]) -> RaggedMasks:
    return *_ragged([np.flatnonzero(~h) for h in hidden]), *_ragged([np.flatnonzero(h) for h in hidden])


def _ragged(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(rows).astype(np.int64), np.array([len(r) for r in rows], np.int64)
