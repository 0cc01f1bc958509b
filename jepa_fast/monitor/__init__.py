"""The collapse monitor: loss, encodings and weights in, a record of metrics.jsonl out.

Keys are those of docs/metrics.md; every value is a plain number that `phase.detect` can read.
"""

import time
from typing import Any

import torch
from torch import Tensor

from jepa_fast.config import Config
from jepa_fast.data.packing import MaskPlan
from jepa_fast.model.jepa import JEPA, Output
from jepa_fast.monitor import discrepancy, probes, spectrum

FULL_INPUTS = 256  # inputs of the fixed set on which both encoders see everything


class CollapseMonitor:
    """Measures one JEPA: `signals` from what a training step computed, `examine` on the fixed probe set.

    `probe_set` may be None (no labels): then `examine` measures discrepancy and spectrum on `inputs`
    only, and the verdicts say what they cannot say.
    """

    def __init__(self, config: Config, probe_set: probes.ProbeSet | None, inputs: Tensor, device: torch.device):
        self.config, self.probe_set, self.device = config, probe_set, device
        self.inputs = inputs[:FULL_INPUTS]
        self.seconds = 0.0  # that the last examination took
        self.untrained: dict[str, float] = {}  # probe of the encoder as initialised, the baseline of every curve

    def signals(self, jepa: JEPA, output: Output, plan: MaskPlan) -> dict[str, Tensor]:
        """Device scalars of one training step, without a synchronisation."""
        with torch.no_grad():
            target = output.target.float()
            visible = target.flatten(0, 1)[plan.context_rows]
            gap = discrepancy.discrepancy(output.context, visible)
            spread = discrepancy.instance_spread(target)
            regression = jepa.normalise(target)
            skill = discrepancy.predictor_skill(
                output.loss, regression, plan.target_rows, plan.target_weight, jepa.loss
            )
        return {"discrepancy/visible": gap, "discrepancy/relative": gap / spread, "spread": spread, "skill": skill}

    @torch.no_grad()
    def examine(self, jepa: JEPA) -> dict[str, float]:
        """Probes, spectra and the discrepancy on whole inputs; about a second, so on a period of its own."""
        began = time.monotonic()
        context_encoder, target_encoder = jepa.context_encoder, jepa.target_encoder
        inputs = self.inputs.to(self.device)
        record = {"discrepancy/full": float(discrepancy.full_discrepancy(context_encoder, target_encoder, inputs))}
        for name, encoder in (("context", context_encoder), ("target", target_encoder)):
            if self.probe_set is None:
                pooled = encoder(inputs).float().mean(1)
            else:
                monitor = self.config.monitor
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
        self.seconds = time.monotonic() - began
        return record

    def state_dict(self) -> dict[str, Any]:
        return {"untrained": self.untrained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.untrained = dict(state["untrained"])
