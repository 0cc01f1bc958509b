"""How far the weights of the two encoders are apart: D = theta - theta_bar, by layer.

In: the pairs of weights. Out: plain numbers (one synchronisation a call).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_ema import FusedEMA
from fused_ema.module import block_of

Weights = FusedEMA | tuple[nn.Module, nn.Module] | Mapping[str, tuple[Tensor, Tensor]] | Sequence[tuple[Tensor, Tensor]]
"""A FusedEMA; or (context encoder, target encoder); or pairs (theta, theta_bar), with or without names."""


class Drift:
    """||D|| in total and by layer, absolute and relative to ||theta||. Raises ValueError where weights do not pair up.

    With the FusedEMA that updates the target the distances fall out of its own pass. Otherwise they are measured
    when asked for, in one pass that changes nothing.
    """

    def __init__(self, weights: Weights):
        self.updated_elsewhere = isinstance(weights, FusedEMA)
        self.ema = weights if isinstance(weights, FusedEMA) else _pair_up(weights)

    def by_layer(self) -> dict[str, float]:
        if not self.updated_elsewhere:
            self.ema.stats = self.ema.measure()
        distances, norms = self.ema.distances(group_by="block"), self.ema.norms(group_by="block")
        total, size = (math.sqrt(sum(v * v for v in values.values())) for values in (distances, norms))
        record = {"drift/total": total} | {f"drift/{name}": d for name, d in distances.items()}
        record |= {"drift_relative/total": total / size if size else 0.0}
        return record | {f"drift_relative/{name}": d / norms[name] for name, d in distances.items() if norms[name]}

    def spectral(self) -> dict[str, float]:
        """The paper's norm for matrices: the largest singular value of D, of the matrix of each layer where it is largest.

        By power iteration from the last call's vector: a lower bound that tightens from call to call. `drift_rank` is
        that matrix's stable rank (||D||_F / ||D||_2)^2: over how many directions the drift is spread, at most.
        """
        if not self.updated_elsewhere:
            self.ema.stats = self.ema.measure()
        frobenius = self.ema.distances()
        record: dict[str, float] = {}
        for name, norm in self.ema.spectral_distances().items():
            layer = block_of(name)
            if norm >= record.get(f"drift_spectral/{layer}", 0.0):
                record[f"drift_spectral/{layer}"] = norm
                record[f"drift_rank/{layer}"] = (frobenius[name] / norm) ** 2 if norm else 0.0
        return record

    def state_dict(self) -> dict[str, Tensor]:
        """The power iteration's vectors."""
        return dict(self.ema.spectral.vectors)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        devices = {name: theta.device for name, theta, _ in self.ema.pairs()}
        self.ema.spectral.vectors = {name: vector.to(devices[name]) for name, vector in state.items()}


class _Named(nn.Module):
    """Tensors under their names, as a module."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self._parameters.update({name: nn.Parameter(t.detach(), requires_grad=False) for name, t in tensors.items()})


def _pair_up(weights: tuple[nn.Module, nn.Module] | Mapping | Sequence) -> FusedEMA:
    if isinstance(weights, Mapping):
        theta, theta_bar = ({name: pair[i] for name, pair in weights.items()} for i in (0, 1))
        return FusedEMA(_Named(theta), target=_Named(theta_bar), buffers="ignore")
    pair = tuple(weights)
    if len(pair) == 2 and all(isinstance(part, nn.Module) for part in pair):
        encoder, target = (getattr(part, "module", part) if _is_wrapped(part) else part for part in pair)
        return FusedEMA(encoder, target=target, buffers="ignore")
    if not all(isinstance(p, Sequence) and len(p) == 2 and all(isinstance(t, Tensor) for t in p) for p in pair):
        raise TypeError(
            "weights must be a FusedEMA, (context encoder, target encoder), or pairs of tensors (theta, theta_bar)"
        )
    return _pair_up({f"{number}": p for number, p in enumerate(pair)})


def _is_wrapped(module: nn.Module) -> bool:
    return isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel))


# ---- the identity of theorem 4.2 ------------------------------------------------------------------

SAMPLE = 4096  # leading elements of every tensor: the identity holds element by element
Slices = list[tuple[str, Tensor, Tensor]]


class Identity:
    """D_t = beta (D_{t-1} + theta_t - theta_{t-1}), checked on the weights of a live run.

    It is the recursion behind the bracket of theorem 4.2, D_t = beta Delta_t - (1 - beta) sum_l beta^{t-l} Delta_l, for
    D_0 = 0. What may differ is rounding; the residual is given in units of what rounding can do at most.
    """

    def __init__(self, ema: FusedEMA):
        self.ema = ema
        self.worst: float | None = None  # of the last check, 1 = all that rounding explains
        self.where = ""  # the tensor it was found in
        self._before: Slices = []

    @property
    def remembers(self) -> bool:
        return bool(self._before)

    @torch.no_grad()
    def remember(self) -> None:
        """Keep theta_{t-1} and theta_bar_{t-1}, before the optimizer moves them."""
        self._before = [(name, theta.clone(), average.clone()) for name, theta, average in self._slices()]

    @torch.no_grad()
    def check(self, decay: float | None) -> None:
        """After optimizer and EMA. `decay` None: the step was not made, or the decay is not known; nothing to check."""
        before, self._before = self._before, []
        if decay is None or not before:
            return
        excess = []
        for (_, theta_0, average_0), (_, theta_1, average_1) in zip(before, self._slices(), strict=True):
            eps, size = torch.finfo(average_1.dtype).eps, average_1.double().abs() + average_0.double().abs()
            theta_0, theta_1, average_0, average_1 = (x.double() for x in (theta_0, theta_1, average_0, average_1))
            residual = (theta_1 - average_1) - decay * ((theta_0 - average_0) + (theta_1 - theta_0))
            rounding = eps * size + torch.finfo(torch.float32).eps * theta_1.abs()
            excess.append((residual.abs() / rounding.clamp(min=1e-300)).max())
        worst = torch.stack(excess)
        self.worst, self.where = float(worst.max()), before[int(worst.argmax())][0]

    def _slices(self) -> Slices:
        pairs = ((name, theta, average) for name, theta, average in self.ema.pairs() if theta.numel())
        return [(n, t.flatten()[:SAMPLE], a.flatten()[:SAMPLE].to(t.device)) for n, t, a in pairs]

    def state_dict(self) -> dict[str, Any]:
        return {"worst": self.worst, "where": self.where}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.worst, self.where = state["worst"], state["where"]
