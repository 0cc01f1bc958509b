"""Batches ahead of the loop: order -> samples -> masks -> one HostBatch a step, made by background threads.

Sample, augmentation and masks of a row depend on (seed, epoch, sample) alone, so a resumed run, and a run
on another number of processes, sees the same global batches.
"""

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from jepa_fast import schedules
from jepa_fast.config import Config
from jepa_fast.data import packing
from jepa_fast.data.masks import sample_masks
from jepa_fast.data.order import Order, philox
from jepa_fast.data.packing import Ladder, MaskPlan
from jepa_fast.data.shards import BadSample
from jepa_fast.data.sources import Source
from jepa_fast.errors import UsageError

AHEAD = 3  # batches made before they are asked for
TRUSTED = 200  # samples after which a share of bad ones means something


@dataclass
class HostBatch:
    """One process's share of a global batch, in host memory (pinned where there is CUDA)."""

    step: int
    inputs: Tensor  # uint8 [b, C, H, W] or float32 [b, C, L]
    plans: list[MaskPlan]  # of its micro batches, in order
    epochs: np.ndarray  # int64 [b]
    samples: np.ndarray  # int64 [b], after bad ones were replaced
    wait: float = field(default=0.0)  # seconds the loop waited for it

    def parts(self, device: torch.device) -> Iterator[tuple[Tensor, MaskPlan, float]]:
        """(inputs, masks, share of this batch) of each micro batch, on `device`."""
        done = 0
        for plan in self.plans:
            count = plan.context_cu.numel() - 1
            inputs = self.inputs[done : done + count].to(device, non_blocking=True)
            yield inputs, plan.to(device), count / len(self.inputs)
            done += count


class Loader:
    """Iterates over the HostBatches of steps `start` to `stop` - 1 of process `rank` of `world_size`.

    A sample that cannot be read is replaced by the next that can, and noted in `bad`. Raises UsageError, from
    the iteration, when more than data.max_bad_share of the samples are bad.
    """

    def __init__(self, config: Config, source: Source, seed: int, rank: int, world_size: int, start: int, stop: int,
                 ladder: Ladder | None = None):  # fmt: skip
        self.config, self.source, self.seed = config, source, seed
        share = config.train.batch_size // world_size
        self.ladder = ladder  # buckets for a compiled model
        self.rows = slice(rank * share, (rank + 1) * share)
        self.micro = config.parallel.micro_batch or share
        self.steps = range(start, stop)
        self.order = Order(len(source), config.train.batch_size, seed)
        self.bad: list[tuple[str, str]] = []  # (where, why), each sample once
        self._bad_samples: dict[int, str] = {}
        self._num_loaded = 0
        self._pin = torch.cuda.is_available()
        self._ready: queue.Queue[HostBatch | BaseException] = queue.Queue(AHEAD)
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(config.data.workers, thread_name_prefix="decode")
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[HostBatch]:
        assert self._thread is None, "a loader is iterated once"
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._thread.start()
        for _ in self.steps:
            began = time.monotonic()
            batch = self._ready.get()
            if isinstance(batch, BaseException):
                raise batch
            batch.wait = time.monotonic() - began
            yield batch

    def close(self) -> None:
        """Stop the threads; batches made ahead are dropped."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def _produce(self) -> None:
        try:
            for step in self.steps:
                if not self._put(self._batch(step)):
                    return
        except BaseException as error:  # whatever it is, the loop must hear of it
            self._put(error)

    def _put(self, item: HostBatch | BaseException) -> bool:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _batch(self, step: int) -> HostBatch:
        config = self.config
        epochs, samples = self.order.batch(step)
        masks = sample_masks(
            schedules.masks(config.masks, step, self.steps.stop - 1),
            config.grid,
            self.seed,
            step,
            epochs,
            samples,
            self.rows.start,
            self.rows.stop,
        )
        plans = [
            packing.plan(masks.rows(i, min(i + self.micro, len(masks.context_lengths))), config.num_tokens, self.ladder)
            for i in range(0, len(masks.context_lengths), self.micro)
        ]
        epochs, samples = epochs[self.rows], samples[self.rows]
        shares = np.array_split(np.arange(len(samples)), config.data.workers)
        loaded = [
            row
            for rows in self._pool.map(lambda s: [self._load(int(epochs[i]), int(samples[i])) for i in s], shares)
            for row in rows
        ]
        self._num_loaded += len(loaded)
        self._count_bad()
        inputs = torch.from_numpy(np.stack([values for values, _ in loaded]))
        if self._pin:
            inputs, plans = inputs.pin_memory(), [plan.pin() for plan in plans]
        return HostBatch(step, inputs, plans, epochs, np.array([index for _, index in loaded]))

    def _load(self, epoch: int, sample: int) -> tuple[np.ndarray, int]:
        """The sample, or the next that can be read; and which it was."""
        rng = np.random.Generator(philox(self.seed, epoch, sample))
        for further in range(len(self.source)):
            index = (sample + further) % len(self.source)
            if index in self._bad_samples:
                continue
            try:
                return self.source.load(index, rng), index
            except BadSample as error:
                self._bad_samples[index] = str(error)
        raise UsageError(
            f"not one of the {len(self.source)} samples can be read; {self.source.key(sample)}: {self._bad_samples[sample]}"
        )

    def _count_bad(self) -> None:
        for index, reason in list(self._bad_samples.items())[len(self.bad) :]:
            self.bad.append((self.source.key(index), reason))
        seen, limit = min(self._num_loaded, len(self.source)), self.config.data.max_bad_share
        if len(self.bad) > limit * max(seen, TRUSTED):
            key, reason = self.bad[-1]
            raise UsageError(
                f"{len(self.bad)} of the first {seen} samples cannot be read, more than --data.max_bad_share {limit:g}; "
                f"the last is {key}: {reason}; mend the data, or allow more"
            )
