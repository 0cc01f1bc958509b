"""What the loop gets: one process's share of a global batch, and its micro batches on the device."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from jepa_fast.masks.packing import MaskPlan


@dataclass
class HostBatch:
    """One process's share of a global batch, in host memory.

    Where there is CUDA the inputs are pinned, and belong to the loader again as soon as the next batch is asked for.
    """

    step: int
    inputs: Tensor  # uint8 [b, C, H, W] or float32 [b, C, L]
    plans: list[MaskPlan]  # of its micro batches, in order
    epochs: np.ndarray  # int64 [b]
    samples: np.ndarray  # int64 [b], after bad ones were replaced
    wait: float = field(default=0.0)  # seconds the loop waited for it
    ready: torch.cuda.Event | None = None  # of inputs that the device makes itself

    def parts(self, device: torch.device) -> Iterator[tuple[Tensor, MaskPlan, float]]:
        """(inputs, masks, share of this batch) of each micro batch, on `device`."""
        done = 0
        if self.ready is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self.ready)
            self.inputs.record_stream(stream)
        for plan in self.plans:
            count = plan.context_cu.numel() - 1
            inputs = self.inputs[done : done + count].to(device, non_blocking=True)
            yield inputs, plan.to(device), count / len(self.inputs)
            done += count
