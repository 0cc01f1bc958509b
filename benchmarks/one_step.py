"""A training step of a preset on random images or series, in the parts that train.py makes it of. For benchmarks and traces.

They are noise: the work does not depend on what they show, and nothing is timed on zeros. One batch is used
again and again; masks are the preset's own, sampled once. The model is built, compiled and sharded as a run's is.
"""

import numpy as np
import torch
from torch import Tensor

from jepa_fast import optim, parallel
from jepa_fast.config import Config, replace
from jepa_fast.ema import TargetEMA
from jepa_fast.inputs import find
from jepa_fast.masks.ladder import ladder
from jepa_fast.masks.packing import plan
from jepa_fast.masks.sample import sample_masks
from jepa_fast.model.compile import compiles
from jepa_fast.model.jepa import Output
from jepa_fast.parallel import World
from jepa_fast.presets import preset


class OneStep:
    """Model, optimizer, EMA and one batch. `parts` are called in the order of train.py's loop."""

    def __init__(
        self, name: str, batch: int, device: torch.device, changes: dict | None = None,
        world: World | None = None,
    ):  # fmt: skip
        """`world`: of several processes, each with `batch` images of its own; the process group is there already."""
        self.config: Config = replace(preset(name), {"train.batch_size": batch} | (changes or {}))
        self.world, self.batch = world or World(0, 1, device), batch
        layout = parallel.choose(self.config, self.world)
        torch.manual_seed(0)
        self.jepa = parallel.build(self.config, self.world, layout)
        self.model = parallel.distribute(self.jepa, self.world, layout)
        self.optimizer = optim.build(self.jepa, self.config.optim)
        self.ema = TargetEMA(self.jepa, self.config)
        self.decay = self.config.ema.decay
        self.inputs = self.images(batch).to(device)
        rows = np.arange(batch)
        masks = sample_masks(self.config.masks, self.config.grid, 0, 0, np.zeros(batch, np.int64), rows)
        rungs = ladder(self.config, batch) if compiles(self.config, device) else None
        self.masks = plan(masks, self.config.num_tokens, rungs).to(device)

    def images(self, count: int, seed: int = 0) -> Tensor:
        return find(self.config.data.kind).example(self.config, count, torch.Generator().manual_seed(seed))

    def forward(self) -> Output:
        with parallel.precision(self.config, self.world):
            return self.model(self.inputs, self.masks)

    def learn(self, output: Output) -> Tensor:
        """Backward and optimizer; whether the step was made, on the device."""
        output.loss.backward()
        return optim.step_if_finite(self.optimizer, output.loss, self.config.optim.clip)

    def __call__(self) -> None:
        """A whole step as between two log steps: nothing is read back."""
        output = self.forward()
        self.ema.update(self.decay, gate=self.learn(output))
