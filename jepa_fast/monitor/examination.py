"""A look at both encoders on a fixed set, on periods of its own: probes, spectra, equation 4, the bound.

In: the encoders as they are. Out: plain numbers, keys of docs/metrics.md. Deterministic, and no part of training.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jepa_fast.config import Monitor
from jepa_fast.monitor import probes
from jepa_fast.monitor.measures import bound, discrepancy, spectrum
from jepa_fast.monitor.measures.readout import pseudo_classes, readout

FULL_INPUTS = 256  # inputs of the fixed set on which both encoders see everything
READOUT_INPUTS = 1000  # of the probe's training inputs, and of its test inputs
# Metric keys of the probe's protocols: ridge is the headline and has none of its own.
PROBES = {"ridge": "", "ridge/balanced": "/balanced", "ridge/raw": "/raw", "knn": "/knn"}
LIDAR_INPUTS, JACOBIAN_INPUTS, LAYER_INPUTS = 128, 16, 16


class Views(Protocol):
    """How an encoder sees the fixed inputs through masks. `jepa_fast.monitor.fixed_masks.FixedMasks` is ours."""

    def __call__(self, encoder: nn.Module, inputs: Tensor, view: int) -> tuple[Tensor, Tensor]:
        """(features [T, D] of the tokens that mask number `view` leaves visible, their rows in [B * N])."""
        ...

    def embed(self, encoder: nn.Module, inputs: Tensor) -> Tensor:
        """x_hat: the tokens [B, N, D] as they enter the first block."""
        ...


class Examination:
    """Encoders are called as `encoder(inputs)` and give features [B, N, D] of every token.

    inputs: a fixed batch, as the encoders take it; the first 256 are compared under both encoders. probe_set: labelled
    inputs; None: no probes, and spectra and readout are of all `inputs`.
    views: how an encoder sees inputs through the run's masks; None: equation 4, the bound and LiDAR stay unmeasured.
    objective: the training loss of inputs [n, ...], for `loss/heldout` on the probe's test inputs; None: not measured.
    config: periods and settings. everywhere: all processes take part, as sharded encoders need; else the first alone.
    """

    def __init__(
        self,
        context_encoder: nn.Module,
        target_encoder: nn.Module,
        inputs: Tensor,
        *,
        probe_set: probes.ProbeSet | None = None,
        views: Views | None = None,
        objective: Callable[[Tensor], float] | None = None,
        config: Monitor | None = None,
        device: torch.device | None = None,
        everywhere: bool = False,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.encoders = {"context": context_encoder, "target": target_encoder}
        self.probe_set, self.views, self.config = probe_set, views, config or Monitor()
        self.objective = objective
        self.device = device or next(context_encoder.parameters()).device
        self.inputs, self.everywhere, self.around = inputs[:FULL_INPUTS], everywhere, around
        self.sample = inputs if probe_set is None else probe_set.train  # that spectra are taken over
        self.untrained: dict[str, float] = {}  # probe and readout of the encoder as initialised, every curve's baseline
        self._classes: Tensor | None = None
        self._jacobian = bound.Jacobian()
        self._pooled: dict[str, Tensor] = {}  # of this look, as the next
        self._seen: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def due(self, step: int) -> bool:
        return any(step % period == 0 for period in self._periods().values())

    def _periods(self) -> dict[str, int]:
        c = self.config
        return {
            "discrepancy": c.every,
            "probe": c.every,
            "heldout": c.every,
            "spectrum": c.spectrum_every or c.every,
            "readout": c.spectrum_every or c.every,
            "lidar": c.lidar_every or c.every,
            "bound": c.bound_every or c.every,
        }

    def look(self, step: int = 0, everything: bool = True) -> dict[str, float]:
        """What is due at `step`, or everything. The encoders are put into evaluation mode for it, and back."""
        with torch.no_grad(), self.around():
            return self._look(step, everything)

    def _look(self, step: int, everything: bool) -> dict[str, float]:
        measures = {"discrepancy": self._discrepancies, "probe": self._probes, "heldout": self._held_out,
                    "spectrum": self._spectra, "readout": self._readouts, "lidar": self._lidar, "bound": self._bound}  # fmt: skip
        modes = {encoder: encoder.training for encoder in self.encoders.values()}
        record: dict[str, float] = {}
        try:
            for encoder in modes:
                encoder.eval()
            for name, period in self._periods().items():
                if everything or step % period == 0:
                    began = time.monotonic()
                    measured = measures[name]()
                    record |= measured
                    if measured:
                        record[f"time/{name}"] = time.monotonic() - began
        finally:
            self._pooled, self._seen = {}, None
            for encoder, mode in modes.items():
                encoder.train(mode)
        if not self.untrained:
            held = {k: v for k, v in record.items() if k.startswith(("probe/context", "readout/context"))}
            self.untrained = {key.replace("context", "untrained", 1): value for key, value in held.items()}
        return record | {k: v for k, v in self.untrained.items() if k.replace("untrained", "context", 1) in record}

    # ---- the two encoders against each other --------------------------------------------------------

    def _whole(self, name: str) -> Tensor:
        """Features of the fixed inputs as one encoder gives them, [B, N, D]."""
        return self.encoders[name](self.inputs.to(self.device))

    def _visible(self, context: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """f(x), f(x_hat), g(x_hat) of the visible tokens [T, D], and their rows, from features [B, N, D]."""
        assert self.views is not None
        masked, rows = self.views(self.encoders["context"], self.inputs.to(self.device), 0)
        return masked, context.flatten(0, 1)[rows], target.flatten(0, 1)[rows], rows

    def _discrepancies(self) -> dict[str, float]:
        context, target = self._whole("context"), self._whole("target")
        spread = discrepancy.instance_spread(target)
        values = discrepancy.readings(context.flatten(0, 1), target.flatten(0, 1), spread)
        full = {
            key.removeprefix("discrepancy"): value for key, value in values.items() if key.startswith("discrepancy/")
        }
        values = {f"discrepancy/full{key}": value for key, value in full.items()}
        values["discrepancy/full"] = values.pop("discrepancy/full/visible")
        values |= {"spread/full": spread, "spread/full/context": discrepancy.instance_spread(context)}
        if self.views is not None:
            self._seen = self._visible(context, target)
            terms, values["mismatch/excess"] = discrepancy.mismatches(*self._seen[:3])
            values |= terms
        values |= self._by_layer()
        return {key: float(value) for key, value in values.items()}

    def _by_layer(self) -> dict[str, Tensor]:
        """||f_l - g_l|| after each block, relative to the spread of g there; few inputs, as every block's are held."""
        inputs = self.inputs[:LAYER_INPUTS].to(self.device)
        context, target = (_after_blocks(encoder, inputs) for encoder in self.encoders.values())
        return {
            f"layer_discrepancy/{name}": discrepancy.discrepancy(f, target[name])
            / discrepancy.instance_spread(target[name].view(len(inputs), -1, f.shape[-1])).clamp(min=1e-12)
            for name, f in context.items()
        }

    def _bound(self) -> dict[str, float]:
        """Terms of gamma that need no weights; the monitor adds the drift's."""
        if self.views is None:
            return {}
        inputs, encoder = self.inputs.to(self.device), self.encoders["context"]
        masked, whole, target, rows = self._seen or self._visible(self._whole("context"), self._whole("target"))
        values = bound.terms(self.views.embed(encoder, inputs), rows, masked, whole, target)
        record = {name: float(value) for name, value in values.items()}
        embed = getattr(encoder, "patch_embed", None)
        if self.config.jacobian and isinstance(embed, nn.Module):
            record["bound/jacobian"] = self._jacobian(encoder, embed, inputs[:JACOBIAN_INPUTS], self.config.jacobian)
        return record

    # ---- what the features are worth, and how many directions they use --------------------------------

    def _features(self, name: str, test: bool = False) -> Tensor:
        """Pooled features of the probe's training or test inputs, or of those given: [n, D]."""
        key = f"{name}/test" if test else name
        if key not in self._pooled:
            inputs = self.probe_set.test if test and self.probe_set is not None else self.sample
            self._pooled[key] = probes.features(self.encoders[name], inputs, self.device)
        return self._pooled[key]

    def _all_features(self, name: str) -> Tensor:
        """Of what the readout looks at."""
        if self.probe_set is None:
            return self._features(name)
        return torch.cat([self._features(name, test)[:READOUT_INPUTS] for test in (False, True)])

    def _probes(self) -> dict[str, float]:
        if self.probe_set is None:
            return {}
        record: dict[str, float] = {}
        y, truth = (labels.to(self.device) for labels in (self.probe_set.train_labels, self.probe_set.test_labels))
        for name in self.encoders:
            x, test = self._features(name), self._features(name, test=True)
            scores = probes.score(x, y, test, truth, self.probe_set.num_classes, self.config)
            record |= {f"probe/{name}{suffix}": scores[protocol] for protocol, suffix in PROBES.items()}
        return record | {"probe/majority": self.probe_set.majority, "probe/num_test": len(self.probe_set.test)}

    def _held_out(self) -> dict[str, float]:
        """The training objective on the first of the probe's test inputs."""
        if self.objective is None or self.probe_set is None:
            return {}
        return {"loss/heldout": self.objective(self.probe_set.test[:FULL_INPUTS].to(self.device))}

    def _spectra(self) -> dict[str, float]:
        record: dict[str, float] = {}
        for name, suffix in (("target", ""), ("context", "/context")):
            z = self._features(name)
            record[f"rankme{suffix}"] = spectrum.rankme(z)
            record[f"participation{suffix}"] = spectrum.participation_ratio(z)
            record[f"feature_std{suffix}"] = spectrum.feature_std(z)
            record[f"alpha_req{suffix}"] = spectrum.alpha_req(z)
        return record

    def _readouts(self) -> dict[str, float]:
        """The probe without labels, of both encoders."""
        inputs = (
            [self.sample]
            if self.probe_set is None
            else [self.sample[:READOUT_INPUTS], self.probe_set.test[:READOUT_INPUTS]]
        )
        if self._classes is None:
            self._classes = pseudo_classes(torch.cat(inputs))
        if self._classes is None:
            return {}
        names = {"readout": "target", "readout/context": "context"}
        return {key: readout(self._all_features(name), self._classes) for key, name in names.items()}

    def _lidar(self) -> dict[str, float]:
        """Views are masks of the same input, pooled over the visible tokens."""
        if self.views is None or self.config.lidar_views < 2 or len(self.inputs) < 2:
            return {}
        inputs, record = self.inputs[:LIDAR_INPUTS].to(self.device), {}
        for name, suffix in (("target", ""), ("context", "/context")):
            pooled = [self._pooled_view(self.encoders[name], inputs, view) for view in range(self.config.lidar_views)]
            record[f"lidar{suffix}"] = spectrum.lidar(torch.stack(pooled, dim=1))
        return record

    def _pooled_view(self, encoder: nn.Module, inputs: Tensor, view: int) -> Tensor:
        assert self.views is not None
        features, rows = self.views(encoder, inputs, view)
        num_tokens = self.views.embed(encoder, inputs[:1]).shape[1]
        owner = rows // num_tokens
        sums = features.new_zeros(len(inputs), features.shape[1]).index_add_(0, owner, features)
        return sums / owner.bincount(minlength=len(inputs)).unsqueeze(1)

    def state_dict(self) -> dict[str, Any]:
        return {"untrained": self.untrained, "jacobian": self._jacobian.vector}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.untrained, self._jacobian.vector = dict(state["untrained"]), state["jacobian"]


def _after_blocks(encoder: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """{'blocks.<i>': its output, tokens flattened [B * N, D]}, of an encoder with a list `blocks`; else {}."""
    seen: dict[str, Tensor] = {}
    blocks = getattr(encoder, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or len(inputs) < 2:
        return seen

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, out: Tensor) -> None:
            seen[name] = out.detach().float().flatten(0, -2)

        return hook

    handles = [block.register_forward_hook(keep(f"blocks.{i}")) for i, block in enumerate(blocks)]
    try:
        encoder(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen
