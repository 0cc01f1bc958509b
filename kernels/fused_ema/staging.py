"""Weights on their way to an average that is kept in host memory."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Staging:
    """Pinned buffers, allocated once, that device weights are copied into."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def on_device_of(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
        """The sources, where they are or staged in host memory if their targets are kept there.

        Waits for the copies: the CPU kernel reads them next. Other mixtures of devices are left to be refused.
        """
        if not targets or targets[0].device.type != "cpu" or sources[0].device.type != "cuda":
            return list(sources)
        if [(b.shape, b.dtype) for b in self._buffers] != [(s.shape, s.dtype) for s in sources]:
            self._buffers = [torch.empty(s.shape, dtype=s.dtype, device="cpu", pin_memory=True) for s in sources]
        for buffer, source in zip(self._buffers, sources, strict=True):
            buffer.copy_(source, non_blocking=True)
        torch.cuda.current_stream(sources[0].device).synchronize()
        return self._buffers
