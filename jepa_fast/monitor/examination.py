"""A look at both encoders on a fixed set, on periods of its own: probes, spectra, what equation 4 is made of.

In: the encoders as they are. Out: plain numbers, keys of docs/metrics.md. Deterministic, and no part of training.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jepa_fast.config import Monitor
from jepa_fast.monitor import discrepancy, probes, spectrum

FULL_INPUTS = 256  # inputs of the fixed set on which both encoders see everything

# (encoder, inputs, number of the mask) -> features [T, D] of the tokens it leaves visible, their rows in [B * N]
Masked = Callable[[nn.Module, Tensor, int], tuple[Tensor, Tensor]]


class Examination:
    """Encoders are called as `encoder(inputs)` and give features [B, N, D] of every token.

    inputs: a fixed batch, as the encoders take it; the first 256 are used. probe_set: labelled inputs; None: no probes.
    masked: how an encoder sees inputs through the run's masks; None: the terms of equation 4 stay unmeasured.
    config: periods and settings. everywhere: all processes take part, as sharded encoders need; else the first alone.
    """

    def __init__(
        self,
        context_encoder: nn.Module,
        target_encoder: nn.Module,
        inputs: Tensor,
        *,
        probe_set: probes.ProbeSet | None = None,
        masked: Masked | None = None,
        config: Monitor | None = None,
        device: torch.device | None = None,
        everywhere: bool = False,
    ):
        self.encoders = {"context": context_encoder, "target": target_encoder}
        self.probe_set, self.masked, self.config = probe_set, masked, config or Monitor()
        self.device = device or next(context_encoder.parameters()).device
        self.inputs, self.everywhere = inputs[:FULL_INPUTS], everywhere
        self.untrained: dict[str, float] = {}  # probe of the encoder as initialised, the baseline of every curve

    def due(self, step: int) -> bool:
        return step % self.config.every == 0

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Everything, now. The encoders are put into evaluation mode for it, and back."""
        modes = {encoder: encoder.training for encoder in self.encoders.values()}
        try:
            for encoder in modes:
                encoder.eval()
            return self._discrepancies() | self._features()
        finally:
            for encoder, mode in modes.items():
                encoder.train(mode)

    def _discrepancies(self) -> dict[str, float]:
        inputs = self.inputs.to(self.device)
        whole, target = (self.encoders[name](inputs).flatten(0, 1) for name in ("context", "target"))  # [B * N, D]
        record = {"discrepancy/full": float(discrepancy.discrepancy(whole, target))}
        if self.masked is not None:
            masked, rows = self.masked(self.encoders["context"], inputs, 0)
            terms, excess = discrepancy.mismatches(masked, whole[rows], target[rows])
            record |= {name: float(value) for name, value in terms.items()} | {"mismatch/excess": float(excess)}
        return record

    def _features(self) -> dict[str, float]:
        record: dict[str, float] = {}
        for name, encoder in self.encoders.items():
            if self.probe_set is None:
                pooled = probes.features(encoder, self.inputs, self.device)
            else:
                monitor = self.config
                scores, pooled = probes.score(
                    encoder, self.probe_set, self.device, monitor.ridge, monitor.knn, monitor.knn_temperature
                )
                record |= {f"probe/{name}{protocol}": value for protocol, value in scores.items()}
                if not self.untrained:
                    self.untrained = {f"probe/untrained{protocol}": value for protocol, value in scores.items()}
            suffix = "" if name == "target" else "/context"
            record[f"rankme{suffix}"] = spectrum.rankme(pooled)
            record[f"participation{suffix}"] = spectrum.participation_ratio(pooled)
        if self.probe_set is not None:
            record |= self.untrained
            record["probe/majority"] = self.probe_set.majority
        return record

    def state_dict(self) -> dict[str, Any]:
        return {"untrained": self.untrained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.untrained = dict(state["untrained"])


def timed(look: Callable[[], dict[str, float]]) -> tuple[dict[str, float], float]:
    """(record, seconds it took)."""
    began = time.monotonic()
    return look(), time.monotonic() - began
