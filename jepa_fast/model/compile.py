"""torch.compile of every transformer block: static shapes, all compiled before the first step, none afterwards.

In: a JEPA, and the ladder that its batches are rounded up with. A block's shapes are then one of a few; the last block
of the predictor alone is compiled for any shape, because it runs on exact totals. Blocks of one kind share code, so a
deep encoder costs no more compilations than a shallow one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn

from jepa_fast.config import Config
from jepa_fast.masks import reference
from jepa_fast.masks.ladder import Ladder, longest
from jepa_fast.masks.packing import MaskPlan, plan
from jepa_fast.masks.reference import BLOCKLESS
from jepa_fast.masks.sample import MaskBatch, sample_masks
from jepa_fast.model.jepa import JEPA

LIMIT = 128  # graphs that one piece of code may have; dynamo's own limit of 8 is for shapes that were not planned


def compiles(config: Config, device: torch.device) -> bool:
    """Whether blocks are to be compiled: as --model.compile says; by itself on CUDA, where a model is not tiny."""
    model = config.model
    return model.compile == "on" or (model.compile == "auto" and device.type == "cuda" and model.width >= 384)


def compile_blocks(jepa: JEPA, cuda_graphs: bool = False, backend: str = "inductor") -> None:
    """Replace every block's call by its compiled form; parameters and their names stay. Before any sharding."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
    options = {"triton.cudagraphs": True} if cuda_graphs else None
    *inner, last = jepa.predictor.blocks
    for block in (*jepa.context_encoder.blocks, *jepa.target_encoder.blocks, *inner):
        block.compile(fullgraph=True, dynamic=False, backend=backend, options=options)
    last.compile(fullgraph=True, dynamic=True, backend=backend)


def warm_up(
    model: nn.Module, config: Config, ladder: Ladder, share: int, device: torch.device,
    precision: Callable[[], AbstractContextManager],
) -> int:  # fmt: skip
    """Forward and backward at every rung, so that all graphs exist; weights and random state stay. Returns the passes.

    model: the JEPA as the loop calls it; share: inputs of one process's batch; precision: the loop's autocast.
    """
    data, passes = config.data, 0
    shape = (data.image_size,) * 2 if data.kind == "images" else (data.series_length,)
    dtype = torch.uint8 if data.kind == "images" else torch.float32
    inputs = torch.zeros(share, data.channels, *shape, dtype=dtype, device=device)
    for each in _plans(config, ladder, share):
        with precision():
            loss = model(inputs, each.to(device)).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        passes += 1
    return passes


def _plans(config: Config, ladder: Ladder, share: int) -> Iterator[MaskPlan]:
    """A usual batch, then one of the shortest sequences under every rung's bucket: the rows behind the tokens fill it."""
    samples = np.arange(max(share, config.train.batch_size))
    masks = sample_masks(config.masks, config.grid, config.train.seed, 0, np.zeros_like(samples), samples, 0, share)
    yield plan(masks, config.num_tokens, ladder)
    shown, hidden = _fewest(config)
    every, blocks = np.ones(share, np.int64), share * masks.num_targets
    short = MaskBatch(
        np.tile(np.arange(shown), share), every * shown, np.tile(np.arange(hidden), blocks), every * hidden, masks.num_targets
    )  # fmt: skip
    few = plan(short, config.num_tokens, ladder)
    for i in range(max(len(ladder.context), len(ladder.predictor))):
        context, predictor = (rungs[min(i, len(rungs) - 1)] for rungs in (ladder.context, ladder.predictor))
        yield dataclasses.replace(few, context_bucket=context, predictor_bucket=predictor)


def _fewest(config: Config) -> tuple[int, int]:
    """Tokens of a context and of a target block that no bucket is too small for. What never varies is as always."""
    if config.masks.mode in BLOCKLESS:
        hidden = longest(config)[1]
        return config.num_tokens - hidden, hidden
    return reference.kept(config.masks, config.grid) or 1, 1


def eager() -> AbstractContextManager:
    """Inside, compiled blocks run as written: for passes of other shapes, such as the probes'."""
    return torch.compiler.set_stance("force_eager")


def num_graphs() -> int:
    """Graphs compiled so far in this process."""
    from torch._dynamo.utils import counters  # takes seconds to import, and who does not compile need not wait

    return int(counters["stats"]["unique_graphs"])
