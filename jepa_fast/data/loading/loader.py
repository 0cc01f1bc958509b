"""Batches ahead of the loop: order -> samples -> masks -> one HostBatch a step, made by background threads.

Sample, augmentation and masks of a row depend on (seed, epoch, sample) alone, so a resumed run, and a run
on another number of processes, sees the same global batches. Threads and no processes: decoding and resizing run
outside Python's lock, and nothing is forked beside OpenMP.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from jepa_fast import schedules
from jepa_fast.config import Config
from jepa_fast.data.loading import resident
from jepa_fast.data.loading.batch import HostBatch
from jepa_fast.data.loading.buffers import PageableBuffers, PinnedBuffers, cuda_mark
from jepa_fast.data.loading.mixture import Mixture
from jepa_fast.data.loading.order import Order
from jepa_fast.data.loading.resident import Resident
from jepa_fast.data.loading.stats import LoaderStats
from jepa_fast.data.random import augmentation
from jepa_fast.data.readers import nvjpeg
from jepa_fast.data.sample import TRUSTED, Bad, BadSample, Encoded, Source
from jepa_fast.data.shards.streams import Arrival, Stream
from jepa_fast.data.sources import Joined
from jepa_fast.errors import UsageError
from jepa_fast.inputs import find
from jepa_fast.masks import packing
from jepa_fast.masks.ladder import Ladder
from jepa_fast.masks.sample import sample_masks

AHEAD = 3  # batches made before they are asked for
IN_WORK = 2  # batches being decoded at a time, so that no thread waits for the slowest of a batch
AT_A_TIME = 8  # samples a thread takes at once


@dataclass
class _Begun:
    """A batch in work."""

    step: int
    everyone: tuple[np.ndarray, np.ndarray]  # epochs and samples of the global batch
    inputs: Tensor
    epochs: np.ndarray
    samples: np.ndarray
    loading: list[Future]
    encoded: dict[int, Encoded] = field(default_factory=dict)  # rows that the device is to decode
    ready: torch.cuda.Event | None = None


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
        self.order = _order(config, source, seed)
        if isinstance(source, Stream):
            source.share(rank, world_size)
        self.stats = LoaderStats(lambda: source.counts)
        self._bad_samples: dict[int, Bad] = {}
        self._decoder = nvjpeg.device_decoder(config.data) if config.data.decoder == "nvjpeg" else None
        self._pin = torch.cuda.is_available()
        on = torch.device("cuda", torch.cuda.current_device()) if self._pin else torch.device("cpu")
        keep, self.where = resident.choose(source, config.data, on)  # `where` in words, or ''
        self._keep = partial(Resident, source, config.data.workers, on) if keep else None
        self._resident: Resident | None = None
        self._device = torch.cuda.current_device() if self._pin else None
        self._buffers: PinnedBuffers | None = None
        self._pageable: PageableBuffers | None = None
        self._shape: tuple[tuple[int, ...], np.dtype] | None = None
        self._ready: queue.Queue[HostBatch | BaseException] = queue.Queue(AHEAD)
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(config.data.workers, thread_name_prefix="decode")
        self._thread: threading.Thread | None = None

    @property
    def bad(self) -> list[Bad]:
        """Samples that could not be read, each once, in the order they were met."""
        return self.stats.bad

    def __iter__(self) -> Iterator[HostBatch]:
        assert self._thread is None, "a loader is iterated once"
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._thread.start()
        for _ in self.steps:
            began = time.monotonic()
            batch = self._ready.get()
            if isinstance(batch, _Closing):
                return
            if isinstance(batch, BaseException):
                raise batch
            batch.wait = time.monotonic() - began
            self.stats.waited += batch.wait
            yield batch
            if self._buffers is not None:
                self._buffers.give_back(batch.inputs)

    def close(self) -> None:
        """Stop the threads; batches made ahead are dropped."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            with suppress(queue.Empty):
                while True:
                    self._ready.get_nowait()
            self._ready.put(_Closing())  # for a caller that still waits
        self._pool.shutdown(cancel_futures=True)
        if isinstance(self.source, Stream):
            self.source.close()

    def _produce(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # of a thread: else pinning makes a context on the first device
            begun: deque[_Begun] = deque()
            for step in self.steps:
                begun.append(self._begin(step))
                if len(begun) == IN_WORK and not self._put(self._finish(begun.popleft())):
                    return
            while begun:
                if not self._put(self._finish(begun.popleft())):
                    return
        except _Closing:
            pass
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

    def _begin(self, step: int) -> _Begun:
        everyone = self.order.batch(step)
        epochs, samples = everyone[0][self.rows], everyone[1][self.rows].copy()
        if self._keep is not None:
            return self._gather(_Begun(step, everyone, torch.empty(0), epochs, samples, []), self._keep)
        self.source.prepare(samples)
        inputs = self._buffer(int(epochs[0]), int(samples[0]))
        batch = _Begun(step, everyone, inputs, epochs, samples, [])
        asked = samples.copy()  # `samples` is changed where one is replaced
        in_file_order = np.argsort(samples, kind="stable")
        for i in range(0, len(samples), AT_A_TIME):
            batch.loading.append(self._pool.submit(self._fill, batch, asked, in_file_order[i : i + AT_A_TIME]))
        return batch

    def _gather(self, batch: _Begun, keep: Callable[[], Resident]) -> _Begun:
        """A batch of samples that are on the device already."""
        if self._resident is None:
            self._resident = keep()
            self._bad_samples.update(self._resident.bad)
        batch.samples = self._resident.stands_for[batch.samples]
        batch.inputs, batch.ready = self._resident.rows(batch.samples)
        return batch

    def _finish(self, batch: _Begun) -> HostBatch:
        config = self.config
        masks = sample_masks(
            schedules.masks(config.masks, batch.step, self.steps.stop - 1),
            config.grid,
            self.seed,
            batch.step,
            *batch.everyone,
            self.rows.start,
            self.rows.stop,
        )
        plans = [
            packing.plan(masks.rows(i, min(i + self.micro, len(masks.context_lengths))), config.num_tokens, self.ladder)
            for i in range(0, len(masks.context_lengths), self.micro)
        ]
        wait(batch.loading)  # woken once: each time costs the thread that decodes a turn at Python's lock
        busy = [each.result() for each in batch.loading]
        inputs, ready = batch.inputs, batch.ready
        if self._decoder is not None:
            inputs, ready = self._decode(batch, self._decoder), self._decoder.mark()
        self.stats.add(len(batch.samples), sum(busy), list(self._bad_samples.values()))
        self._refuse_too_many_bad()
        if self._pin:
            plans = [plan.pin() for plan in plans]
        return HostBatch(batch.step, inputs, plans, batch.epochs, batch.samples, ready=ready)

    def _decode(self, batch: _Begun, decoder: nvjpeg.DeviceDecoder) -> Tensor:
        """The inputs on the device. A row that cannot be decoded is replaced like one that cannot be read."""
        rows: list[Tensor | np.ndarray] = list(batch.inputs)
        while batch.encoded:
            waiting, batch.encoded = batch.encoded, {}
            for row, pixels in zip(waiting, decoder.batch(list(waiting.values())), strict=True):
                if isinstance(pixels, Tensor):
                    rows[row] = pixels
                    continue
                sample = int(batch.samples[row])
                self._bad_samples[sample] = Bad(self.source.key(sample), pixels.kind, str(pixels))
                further, batch.samples[row] = self._load(int(batch.epochs[row]), sample)
                if isinstance(further, Encoded):
                    batch.encoded[row] = further
                else:
                    rows[row] = further
        return decoder.stack(rows)

    def _buffer(self, epoch: int, sample: int) -> Tensor:
        """PageableBuffers for the inputs of one batch."""
        if self._shape is None:
            kind = find(self.config.data.kind)
            shape, dtype = kind.shape(self.config), torch.empty(0, dtype=kind.dtype).numpy().dtype
            if not kind.augmented:  # as the files have it
                first = self._load(epoch, sample)[0]
                assert isinstance(first, np.ndarray)
                shape, dtype = first.shape, first.dtype
            self._shape = ((self.rows.stop - self.rows.start, *shape), dtype)
        if not self._pin or self._decoder is not None:
            self._pageable = self._pageable or PageableBuffers(*self._shape)
            return self._pageable.take()
        if self._buffers is None:
            whole, kept_as = self._shape[0], torch.from_numpy(np.empty(0, self._shape[1])).dtype
            self._buffers = PinnedBuffers(
                AHEAD + IN_WORK + 2, lambda: torch.empty(whole, dtype=kept_as, pin_memory=True), cuda_mark
            )
        while not self._closing.is_set():
            buffer = self._buffers.take(timeout=0.1)
            if buffer is not None:
                return buffer
        raise _Closing

    def _fill(self, batch: _Begun, asked: np.ndarray, rows: np.ndarray) -> float:
        """Load some rows of a batch into its memory; the seconds it took."""
        began = time.perf_counter()
        inputs = batch.inputs.numpy()
        for row in rows.tolist():
            place = inputs[row]
            values, batch.samples[row] = self._load(int(batch.epochs[row]), int(asked[row]), place)
            if isinstance(values, Encoded):
                batch.encoded[row] = values
            elif values is not place:
                place[...] = values
        return time.perf_counter() - began

    def _load(self, epoch: int, sample: int, out: np.ndarray | None = None) -> tuple[np.ndarray | Encoded, int]:
        """The sample, or the next that can be read; and which it was."""
        rng = augmentation(self.seed, epoch, sample)
        for further in range(len(self.source)):
            index = (sample + further) % len(self.source) if further else sample  # a stream has no end
            if index in self._bad_samples:
                continue
            try:
                return self.source.load(index, rng, out), index
            except BadSample as error:
                self._bad_samples[index] = Bad(self.source.key(index), error.kind, str(error))
        first = self._bad_samples[sample]
        raise UsageError(f"not one of the {len(self.source)} samples can be read; {first.key}: {first.reason}")

    def _refuse_too_many_bad(self) -> None:
        bad, limit = self.stats.bad, self.config.data.max_bad_share
        seen = min(self.stats.samples, len(self.source))
        if len(bad) > limit * max(seen, TRUSTED):
            raise UsageError(
                f"{len(bad)} of the first {seen} samples cannot be read, more than --data.max_bad_share {limit:g}; "
                f"the last is {bad[-1].key}: {bad[-1].reason}; fix the data, or allow more"
            )


class _Closing(Exception):
    """The loop is gone; nobody needs another batch."""


def _order(config: Config, source: Source, seed: int) -> Order | Mixture | Arrival:
    batch_size, window = config.train.batch_size, config.data.shuffle_window
    if isinstance(source, Stream):
        return Arrival(batch_size, len(source))
    if isinstance(source, Joined) and config.data.weights:
        return Mixture(source.sizes, config.data.weights, batch_size, seed, window)
    return Order(len(source), batch_size, seed, window)
