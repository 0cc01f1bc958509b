"""Sums over the steps since the last record, kept on the device until that record is written."""

import time

import torch
from torch import Tensor

SUMS = ("loss", "highest", "num_finite", "num_bad", "bad_in_a_row")


class Accumulator:
    def __init__(self) -> None:
        self.loss, self.highest, self.num_finite, self.num_bad, self.bad_in_a_row = torch.zeros(5).unbind()
        self._clear_clock()

    def _clear_clock(self) -> None:
        self.began = time.monotonic()
        self.num_steps, self.num_inputs, self.wait, self.examining = 0, 0, 0.0, 0.0

    def add(self, loss: Tensor, num_inputs: int, wait: float) -> None:
        """A step's loss. One that is not finite is left out of the mean."""
        if self.loss.device != loss.device:
            self.load_state_dict({name: value.to(loss.device) for name, value in self.state_dict().items()})
        finite = torch.isfinite(loss)
        self.loss = self.loss + torch.where(finite, loss, 0.0)
        self.highest = torch.maximum(self.highest, torch.where(finite, loss, 0.0))
        self.num_finite = self.num_finite + finite
        self.num_steps, self.num_inputs, self.wait = self.num_steps + 1, self.num_inputs + num_inputs, self.wait + wait

    def judge(self, finite: Tensor) -> None:
        """Whether the step changed the weights: one that did not counts as bad."""
        bad = (~finite).float()
        self.num_bad = self.num_bad + bad
        self.bad_in_a_row = (self.bad_in_a_row + 1) * bad

    def sums(self) -> dict[str, Tensor]:
        sums = {"loss": self.loss / self.num_finite, "highest": self.highest}
        return sums | {"bad": self.num_bad, "bad_in_a_row": self.bad_in_a_row}

    def times(self, world_size: int) -> dict[str, float]:
        """Rates of the interval, the examinations in it left out."""
        seconds = max(1e-9, time.monotonic() - self.began - self.examining)
        steps = max(1, self.num_steps)
        return {
            "time/step": seconds / steps,
            "time/data_wait": self.wait / steps,
            "time/examine": self.examining,
            "images_per_s": self.num_inputs * world_size / seconds,
        }

    def begin(self) -> None:
        """A new interval; only the run of bad steps goes on."""
        self.loss, self.highest, self.num_finite, self.num_bad = torch.zeros(4, device=self.loss.device).unbind()
        self._clear_clock()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in SUMS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in SUMS:
            setattr(self, name, state[name].clone())
