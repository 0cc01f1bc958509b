"""Buckets for the token totals of a batch, so that a compiled model meets few shapes."""

import math
from dataclasses import dataclass

import numpy as np

from jepa_fast import schedules
from jepa_fast.config import Config
from jepa_fast.extension import extension
from jepa_fast.masks import reference
from jepa_fast.masks.sample import sample_masks

PADDING = 0.02  # mean share of rows behind the tokens, on the batches the ladder was learnt from
SIMULATED = {True: 100_000, False: 2_000}  # images drawn to learn the usual totals, with the C++ sampler and without


@dataclass(frozen=True)
class Ladder:
    """Bucket lengths for the packed totals of one process's batch, rising, and bounds on the lengths of one sequence."""

    context: tuple[int, ...]
    predictor: tuple[int, ...]
    context_max: int
    predictor_max: int
    target_max: int

    @staticmethod
    def rung(rungs: tuple[int, ...], total: int, longest: int) -> tuple[int, int]:
        """(bucket, spare): the smallest rung that holds `total` tokens, and how many sequences the rows behind them form.

        Their number is a rung's own, and none is empty or longer than `longest`: a kernel sees the same shapes whatever
        the batch, and cuDNN before 9.25 is wrong about empty sequences. Beyond the last rung, its next multiple.
        """
        if rungs == (total,):
            return total, 0
        for rung, spare in zip(rungs, spares(rungs, longest), strict=True):
            if total + spare <= rung:
                return rung, max(spare, -(-(rung - total) // longest))
        beyond = (total // rungs[-1] + 1) * rungs[-1]
        return beyond, -(-(beyond - total) // longest)


def spares(rungs: tuple[int, ...], longest: int) -> list[int]:
    """Sequences behind the tokens at every rung: enough for the fewest tokens that are rounded up to it.

    Those of the first rung fill half of it: less than that is so seldom that it may cost a compilation.
    """
    counts, fewest = list[int](), rungs[0] // 2
    for rung in rungs:
        counts.append(-(-(rung - fewest) // longest))
        fewest = rung - counts[-1] + 1
    return counts


def ladder(config: Config, share: int) -> Ladder:
    """Buckets for `share` inputs of a global batch: where totals usually fall, closely; one more that holds any.

    Learnt by drawing masks as the run will, so that every process builds the same. One rung where totals cannot vary.
    """
    batch = max(share, config.train.batch_size)
    context, predictor, targets = [], [], set[int]()
    draws = max(8, min(800, SIMULATED[extension() is not None] // max(share, config.masks.group)))
    for step in range(draws):
        samples = np.arange(step * batch, (step + 1) * batch)
        masks = schedules.masks(config.masks, step, draws - 1)
        drawn = sample_masks(masks, config.grid, config.train.seed, step, np.zeros_like(samples), samples, 0, share)
        context.append(len(drawn.context))
        predictor.append(drawn.num_targets * len(drawn.context) + len(drawn.targets))
        targets |= set(drawn.target_lengths.tolist())
    longest_context, longest_target = longest(config)
    together = min(longest_context + longest_target, config.num_tokens)  # they do not overlap
    most_context, most_predictor = share * longest_context, share * drawn.num_targets * together
    # Where lengths vary, a bound that none reaches: a batch of longest ones only would be a dense one, and need another graph.
    context_max = longest_context + (min(context) < most_context)
    predictor_max = together + (min(predictor) < most_predictor)
    return Ladder(
        _rungs(context, most_context, context_max),
        _rungs(predictor, most_predictor, predictor_max),
        context_max,
        predictor_max,
        longest_target + (targets != {longest_target}),
    )


def longest(config: Config) -> tuple[int, int]:
    """Bounds on the tokens of one context and of one target block over the whole run."""
    ends = [schedules.masks(config.masks, end, 1) for end in (0, 1)]
    context, target = zip(*(reference.longest(end, config.grid) for end in ends), strict=True)
    return max(context), max(target)


def _rungs(totals: list[int], most: int, longest: int) -> tuple[int, ...]:
    """The fewest rungs that pad the totals seen by PADDING on average, one further, then the most there can be."""
    if min(totals) == most:
        return (most,)
    seen = np.quantile(totals, np.linspace(0, 1, 129), method="higher")  # 128 equally likely totals, rising
    best, held = np.cumsum(seen[-1] - seen)[-1], [int(seen[-1])]
    while best > PADDING * seen.sum():
        best, held = _cheapest(seen, len(held) + 1)
    step = 64 if seen[0] >= 16384 else 8 if seen[0] >= 2048 else 1
    rungs, below = list[int](), held[0] // 2
    for total in sorted({min(n, most) for n in (*held, math.ceil(seen[-1] * (1 + 2 * PADDING)), most)}):
        spare = -(-(total - below + step) // max(longest - 1, 1))  # at least what `spares` will count
        rungs.append(max(-(-(total + spare) // step) * step, rungs[-1] + step if rungs else 0))
        below = total
    return tuple(rungs)


def _cheapest(totals: np.ndarray, count: int) -> tuple[float, list[int]]:
    """(padding, rungs): the `count` rungs, each one of the rising totals, that pad them least. Dynamic programming."""
    below, n = np.concatenate([[0], np.cumsum(totals)]), len(totals)
    i, j = np.arange(n + 1)[:, None], np.arange(1, n + 1)
    cost = np.where(i < j, (j - i) * totals - (below[j] - below[i]), np.inf)  # totals [i, j) padded to totals[j - 1]
    padding, came = np.where(np.arange(n + 1) == 0, 0.0, np.inf), []
    for _ in range(count):
        through = padding[:, None] + cost  # [n + 1, n]
        came.append(np.concatenate([[0], through.argmin(0)]))
        padding = np.concatenate([[np.inf], through.min(0)])
    rungs, end = [], n
    for start in reversed(came):
        rungs.append(int(totals[end - 1]))
        end = int(start[end])
    return float(padding[n]), rungs
