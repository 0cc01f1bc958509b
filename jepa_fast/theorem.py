"""The theorem's own setting, trained: `python -m jepa_fast.theorem`. Here the bound is a bound, at every step.

One layer without bias and a 1-Lipschitz activation, f(x) = sigma(x theta'), on token matrices whose hidden rows are
zero, x = (I - M) x_hat (the convention of the appendix); target g(x_hat) = sigma(x_hat theta_bar'), theta_bar the EMA.
Then E ||f(x) - g(x_hat)||_F <= L_f B sqrt(pN) + ||D||_2 E ||x_hat||_F with L_f = ||theta||_2. Every term is exact:
norms by SVD, p from the masks really drawn. Writes a run folder as any run does; `report` shows it.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_ema import FusedEMA
from jepa_fast import rundir
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.sources import fixed_draw
from jepa_fast.errors import Arguments, UsageError, one_line_errors
from jepa_fast.inputs.series import patchify_series
from jepa_fast.monitor import CollapseMonitor
from jepa_fast.presets import preset

# Shape legend: B inputs, N tokens, P numbers in a token, D width.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh}


class OneLayer(nn.Module):
    """f(x) = sigma(x theta'), token by token: [B, N, P] -> [B, N, D]."""

    def __init__(self, tokens: int, width: int, activation: str, std: float = 0.02):
        super().__init__()
        self.theta = nn.Parameter(std * torch.randn(width, tokens))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x @ self.theta.T)


class Predictor(nn.Module):
    """What is visible, pooled, and the position asked for -> features of the hidden token: [B, N, D]."""

    def __init__(self, num_tokens: int, width: int):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, z: Tensor) -> Tensor:
        return self.mlp(z.mean(1, keepdim=True) + self.positions)


class Bracket:
    """beta Delta_t - (1 - beta) sum_{l=1}^{t-1} beta^{t-l} Delta_l of theorem 4.2, literally, in float64.

    The sum needs no history: S_{t+1} = beta (S_t + Delta_t).
    """

    def __init__(self, theta: Tensor, decay: float):
        self.start, self.decay = theta.detach().double().clone(), decay
        self.sum, self.value = torch.zeros_like(self.start), torch.zeros_like(self.start)

    def step(self, theta: Tensor) -> None:
        delta = theta.detach().double() - self.start
        self.value = self.decay * delta - (1 - self.decay) * self.sum
        self.sum = self.decay * (self.sum + delta)


@torch.no_grad()
def gamma(x_hat: Tensor, hidden: Tensor, encoder: OneLayer, target: OneLayer, bracket: Tensor) -> dict[str, float]:
    """The bound, term by term, and what it bounds; x_hat [B, N, P], hidden bool [B, N], bracket [D, P].

    `violations` counts inputs with C > L_f B sqrt(|M|) + ||D|| ||x_hat||: the bound before the mean over masks.
    """
    x = x_hat * ~hidden.unsqueeze(-1)
    measured = (encoder(x) - target(x_hat)).flatten(1).norm(dim=1)  # [B]
    size, num_hidden = x_hat.flatten(1).norm(dim=1), hidden.sum(1)
    lipschitz, drift = (torch.linalg.matrix_norm(w, 2) for w in (encoder.theta, encoder.theta - target.theta))
    token_norm = x_hat.norm(dim=-1).max()
    each = lipschitz * token_norm * num_hidden.sqrt() + drift * size
    mask_term = lipschitz * token_norm * num_hidden.double().mean().sqrt()
    values = {
        "bound/measured": measured.mean(), "bound/lipschitz": lipschitz, "bound/token_norm": token_norm,
        "bound/hidden": num_hidden.float().mean(), "bound/hidden_std": num_hidden.float().std(),
        "bound/input_norm": size.mean(), "bound/mask_term": mask_term, "bound/ema_term": drift * size.mean(),
        "bound/gamma": mask_term + drift * size.mean(), "bound/violations": (measured > each * (1 + 1e-5)).sum(),
        "bound/drift": drift, "bound/bracket": torch.linalg.matrix_norm(bracket, 2),
    }  # fmt: skip
    return {name: float(value) for name, value in values.items()}


def run(
    x_hat: Tensor, folder: Path | None, *, decay: float = 0.996, ratio: float = 0.7, steps: int = 600, lr: float = 1e-3,
    width: int = 64, activation: str = "relu", batch_size: int = 64, seed: int = 0, every: int = 5,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train on the token matrices x_hat [n, N, P] (equation 2, Bernoulli masks, AdamW, EMA). Returns the records."""
    torch.manual_seed(seed)
    num_tokens, tokens = x_hat.shape[1:]
    encoder, target = (OneLayer(tokens, width, activation) for _ in range(2))
    target.requires_grad_(False)
    target.load_state_dict(encoder.state_dict())
    predictor = Predictor(num_tokens, width)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], lr=lr)
    ema, bracket = FusedEMA(encoder, decay, target=target), Bracket(encoder.theta, decay)
    with CollapseMonitor(folder, ema, loss="l2", every=every, say=None) as monitor:
        for step in range(steps + 1):
            x = x_hat[torch.randint(len(x_hat), (batch_size,))]
            hidden = torch.rand(batch_size, num_tokens) < ratio
            hidden[:, 0] |= ~hidden.any(1)  # equation 2 divides by |M|
            z, h = encoder(x * ~hidden.unsqueeze(-1)), target(x)
            error = (predictor(z) - h).square().sum(-1)  # [B, N], squared l2
            loss = ((error * hidden).sum(1) / hidden.sum(1)).mean()
            terms = partial(gamma, x, hidden, encoder, target, bracket.value.float())
            monitor.observe(loss / width, z, h, last=step == steps, more=terms)
            if step == steps:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update()
            bracket.step(encoder.theta)
            monitor.updated(decay)
        return monitor.records


def tokens(count: int = 2048) -> Tensor:
    """Token matrices of the generated sensor series: float32 [count, 10, 50]."""
    inputs, _ = fixed_draw(open_dataset(preset("demo")).train, count)
    return patchify_series(torch.from_numpy(inputs), 10)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = Arguments("theorem", __doc__.split("\n")[0])
    parser.add_argument("--decay", type=float, default=0.996, help="beta of equation 1")
    parser.add_argument("--ratio", type=float, default=0.7, help="share of hidden tokens, p")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=64, help="features of a token, D")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--activation", choices=sorted(ACTIVATIONS), default="relu")
    parser.add_argument("--run.dir", dest="folder", default="", help="default: runs/theorem-<n>")
    args = parser.parse_args(argv)
    if not 0 <= args.decay <= 1 or not 0 < args.ratio < 1 or min(args.steps, args.width) < 1 or not args.lr > 0:
        raise UsageError("--decay must lie in [0, 1], --ratio between 0 and 1, --steps, --width and --lr above 0")
    folder = Path(args.folder) if args.folder else rundir.next_free("theorem")
    if (folder / "metrics.jsonl").exists():
        raise UsageError(f"{folder} already holds a run: give another --run.dir")
    records = run(tokens(), folder, decay=args.decay, ratio=args.ratio, steps=args.steps, lr=args.lr, seed=args.seed,
                  width=args.width, activation=args.activation)  # fmt: skip
    ratios = [r["bound/gamma"] / r["bound/measured"] for r in records]
    violations = sum(int(r["bound/violations"]) for r in records)
    print(f"one layer, decay {args.decay:g}, ratio {args.ratio:g}: the bound held on every input" if not violations else
          f"the bound was violated {violations} times")  # fmt: skip
    print(f"gamma / C from {min(ratios):.2f} to {max(ratios):.2f} over {len(records)} records; run folder {folder}")
    return int(violations > 0)


if __name__ == "__main__":
    sys.exit(main())
