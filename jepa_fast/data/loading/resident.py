"""Series that fit are read once and kept on the device; a batch is then a gather there, and nothing is copied.

In: a source of series. Out: their rows by number, the same as the source gives them one by one.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from jepa_fast.config import Data
from jepa_fast.data.sample import Bad, BadSample, Source
from jepa_fast.data.shards.streams import Stream
from jepa_fast.data.sources import evaluated
from jepa_fast.errors import UsageError
from jepa_fast.inputs import find

SHARE = 0.1  # of the device's free memory that `auto` takes for data


class Resident:
    """All samples of `source` in one tensor; `bad` are those that cannot be read, and the next that can stands for each."""

    def __init__(self, source: Source, workers: int, device: torch.device):
        def read(index: int) -> np.ndarray | Bad:
            try:
                return evaluated(source, index)
            except BadSample as error:
                return Bad(source.key(index), error.kind, str(error))

        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(read, range(len(source))))
        self.bad = {i: one for i, one in enumerate(found) if isinstance(one, Bad)}
        good = [i for i in range(len(found)) if i not in self.bad]
        if not good:
            raise UsageError(f"not one of the {len(found)} samples can be read; {found[0].key}: {found[0].reason}")  # type: ignore[union-attr]
        self.stands_for = np.array([good[k % len(good)] for k in np.searchsorted(good, np.arange(len(found)))])
        example = found[good[0]]
        assert isinstance(example, np.ndarray)
        self._rows = torch.from_numpy(
            np.stack([np.zeros_like(example) if isinstance(one, Bad) else one for one in found])
        ).to(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def rows(self, samples: np.ndarray) -> tuple[Tensor, torch.cuda.Event | None]:
        """(the samples on the device, what passes when they are there)."""
        with torch.cuda.stream(self._stream):
            rows = self._rows[torch.from_numpy(samples).to(self._rows.device)]
        return rows, None if self._stream is None else self._stream.record_event()


def choose(source: Source, data: Data, device: torch.device) -> tuple[bool, str]:
    """(whether the samples are to be kept on `device`, a line that says so and why). Raises UsageError if they cannot be."""
    if find(data.kind).augmented or isinstance(source, Stream) or data.keep_on == "host":
        return False, ""
    if data.keep_on == "auto" and device.type != "cuda":
        return False, ""
    size, free = len(source) * _bytes_of_one(source), _free(device)
    about = f"{data.kind}: {size / 1e6:,.0f} MB, {free / 1e9:,.1f} GB free on {device}"
    if data.keep_on == "device":
        if size > 0.9 * free:
            raise UsageError(f"--data.keep_on device: {about}, which is too little; use host")
        return True, f"{about}: read once and kept there (--data.keep_on device)"
    if size > SHARE * free:
        return (
            False,
            f"{about}: more than {SHARE:.0%} of it, so read for every batch (--data.keep_on device to keep them)",
        )
    return True, f"{about}: read once and kept there (--data.keep_on host to read them for every batch)"


def _bytes_of_one(source: Source) -> int:
    for index in range(len(source)):
        try:
            return evaluated(source, index).nbytes
        except BadSample:
            continue
    return 0


def _free(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
