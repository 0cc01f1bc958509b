"""torch.compile of every transformer block: static shapes, all compiled before the first step, none afterwards.

In: a JEPA, and the ladder that its batches are rounded up with. A block's shapes are then one of a few; the last block
of the predictor alone is compiled for any shape, because it runs on exact totals. Blocks of one kind share code, so a
deep encoder costs no more compilations than a shallow one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from jepa_fast.config import Config
from jepa_fast.inputs import find
from jepa_fast.masks.ladder import Ladder, longest, spares
from jepa_fast.masks.packing import MaskPlan, plan
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
    # A block's gradients leave it together anyway: under DDP no graph is to be split again where buckets end.
    torch._dynamo.config.optimize_ddp = False
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

    model: the JEPA as the loop calls it; share: inputs of one process's batch; precision: the loop's autocast. Every
    rung is met by one block of each kind, as all blocks of a kind share their code, and the whole model meets a usual
    batch only. So the largest rung, which hardly any batch needs, does not set how much memory a run takes.
    """
    jepa, passes = cast(JEPA, getattr(model, "module", model)), 0

    def learn(call: Callable[[], Tensor]) -> None:
        nonlocal passes
        if jepa.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with precision():
            loss = call()
        loss.backward()
        model.zero_grad(set_to_none=True)
        passes += 1

    usual = _usual(config, ladder, share)
    with _one_block_of_each_kind(jepa):
        for each in _contexts(config, ladder, share, usual.num_targets):
            learn(partial(_encode, jepa, each.to(device)))
        for each in _predictors(config, ladder, share, usual.num_targets):
            learn(partial(_predict, jepa, each.to(device)))
    inputs = find(config.data.kind).example(config, share).to(device)
    masks = plan(usual, config.num_tokens, ladder).to(device)
    learn(lambda: model(inputs, masks).loss)
    return passes


def _encode(jepa: JEPA, masks: MaskPlan) -> Tensor:
    encoder = jepa.context_encoder
    patches = torch.zeros(len(masks.context_index), encoder.patch_embed.in_features, device=masks.context_index.device)
    out = encoder.encode_packed(
        patches, masks.context_index, masks.context_cu, masks.context_max, masks.context_bucket, masks.context_spare
    )
    return out.sum()


def _predict(jepa: JEPA, masks: MaskPlan) -> Tensor:
    device = masks.context_index.device
    return jepa.predictor.packed(
        torch.zeros(len(masks.context_index), jepa.context_encoder.width, device=device), masks
    ).sum()


@contextmanager
def _one_block_of_each_kind(jepa: JEPA) -> Iterator[None]:
    """Inside, the context encoder has its first block alone, and the predictor its first and last."""
    encoder, predictor = jepa.context_encoder, jepa.predictor
    held = encoder.blocks, predictor.blocks
    encoder.blocks = nn.ModuleList([*held[0]][:1])
    predictor.blocks = nn.ModuleList([*[*held[1]][:-1][:1], held[1][-1]])
    try:
        yield
    finally:
        encoder.blocks, predictor.blocks = held


def _usual(config: Config, ladder: Ladder, share: int) -> MaskBatch:
    samples = np.arange(max(share, config.train.batch_size))
    return sample_masks(config.masks, config.grid, config.train.seed, 0, np.zeros_like(samples), samples, 0, share)


def _contexts(config: Config, ladder: Ladder, share: int, num_targets: int) -> Iterator[MaskPlan]:
    """A batch that fills each context rung, where there are several; its targets are not used."""
    if len(ladder.context) > 1:
        most = share * longest(config)[0]
        for rung, spare in zip(ladder.context, spares(ladder.context, ladder.context_max), strict=True):
            context = _even(min(rung - spare, most), share)
            yield plan(_masks(context, np.ones_like(context), num_targets), config.num_tokens, ladder)


def _predictors(config: Config, ladder: Ladder, share: int, num_targets: int) -> Iterator[MaskPlan]:
    """A batch that fills each predictor rung, where there are several. Target blocks are as long as always, if they are."""
    if len(ladder.predictor) > 1:
        hidden = longest(config)[1]
        most = share * num_targets * (ladder.predictor_max - 1)
        for rung, spare in zip(ladder.predictor, spares(ladder.predictor, ladder.predictor_max), strict=True):
            lengths = _even(min(rung - spare, most) // num_targets, share)
            targets = np.full(share, hidden) if ladder.target_max == hidden else np.minimum(hidden, lengths // 2)
            targets = np.minimum(targets, lengths - 1)
            yield plan(_masks(lengths - targets, targets, num_targets), config.num_tokens, ladder)


def _even(total: int, share: int) -> np.ndarray:
    """`share` lengths that add up to the total and differ by one at most."""
    return np.diff(np.arange(share + 1) * total // share)


def _masks(context: np.ndarray, targets: np.ndarray, num_targets: int) -> MaskBatch:
    """So many tokens an input and a block, the first ones of each."""
    blocks = np.repeat(targets, num_targets)
    visible, hidden = (np.concatenate([np.arange(n) for n in lengths]) for lengths in (context, blocks))
    return MaskBatch(visible, context, hidden, targets, num_targets)


def eager() -> AbstractContextManager:
    """Inside, compiled blocks run as written: for passes of other shapes, such as the probes'."""
    return torch.compiler.set_stance("force_eager")


def num_graphs() -> int:
    """Graphs compiled so far in this process."""
    from torch._dynamo.utils import counters  # takes seconds to import, and who does not compile need not wait

    return int(counters["stats"]["unique_graphs"])
