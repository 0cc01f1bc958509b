"""The paper's bound gamma (theorem 4.2, proposition 4.4), term by term, beside what it bounds.

gamma = L_f B sqrt(pN) + ||D|| ||x_hat||, x_hat the token embeddings of a whole input, x = (I - M) x_hat what the
mask M leaves, D = theta - theta_bar. Norms of token matrices are Frobenius: the paper's spectral norm does not go
through an entrywise activation. For one layer it is a bound (`jepa_fast.theorem`); for deeper encoders a heuristic.
It cannot show that the discrepancy is small, so nothing is decided by it.
"""

import torch
from torch import Tensor, nn

# Shape legend: B inputs, N tokens of one, T visible tokens of the batch, D width.


def per_input(rows: Tensor, values: Tensor, num_inputs: int, num_tokens: int) -> Tensor:
    """Sum `values` [T] of the tokens `rows` (of [B * N]) by input: [B]."""
    return values.new_zeros(num_inputs).index_add_(0, rows // num_tokens, values)


def terms(embedded: Tensor, rows: Tensor, masked: Tensor, whole: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What needs no weights. embedded [B, N, D]: x_hat; rows [T] the visible tokens; masked, whole, target [T, D]:
    f(x), f(x_hat) and g(x_hat) there.

    `lipschitz` is the largest secant ||f(x) - f(x_hat)|| / ||x - x_hat|| over the inputs: a lower bound of L_f, and the
    smallest value with which the first inequality of equation 5 holds on them.
    """
    b, n, _ = embedded.shape
    sizes = embedded.float().square().sum(-1)  # [B, N]
    visible = per_input(rows, sizes.flatten()[rows], b, n)
    whole_norm = sizes.sum(1).sqrt()
    hidden_norm = (sizes.sum(1) - visible).clamp(min=0).sqrt()  # ||x - x_hat|| = ||M x_hat||
    num_hidden = n - per_input(rows, torch.ones_like(rows, dtype=torch.float32), b, n)
    moved, apart = (
        per_input(rows, (masked.float() - other.float()).square().sum(-1), b, n).sqrt() for other in (whole, target)
    )
    lipschitz = (moved / hidden_norm.clamp(min=1e-12)).max()
    token_norm = sizes.max().sqrt()
    return {
        "bound/lipschitz": lipschitz,
        "bound/token_norm": token_norm,
        "bound/hidden": num_hidden.mean(),
        "bound/hidden_std": num_hidden.std(),
        "bound/input_norm": whole_norm.mean(),
        "bound/mask_norm": hidden_norm.mean(),
        "bound/mask_norm_std": hidden_norm.std(),
        "bound/mask_norm_std_bernoulli": _bernoulli_std(sizes, num_hidden.mean() / n),
        "bound/mask_term": lipschitz * token_norm * num_hidden.mean().sqrt(),
        "bound/measured": apart.mean(),
    }


def complete(record: dict[str, float], drift: float) -> dict[str, float]:
    """gamma from the terms and ||D||; the drift is the Frobenius norm over all weights of the encoder."""
    ema_term = drift * record["bound/input_norm"]
    return {"bound/ema_term": ema_term, "bound/gamma": record["bound/mask_term"] + ema_term}


def _bernoulli_std(sizes: Tensor, p: Tensor) -> Tensor:
    """Standard deviation of ||M x_hat|| over inputs, were each token hidden by itself (remark B.2), on fixed draws."""
    draws = torch.rand(8, *sizes.shape, generator=torch.Generator().manual_seed(0)).to(sizes.device)
    return ((draws < p) * sizes).sum(-1).sqrt().std()


# ---- L_f through the Jacobian ----------------------------------------------------------------------


class Jacobian:
    """Largest singular value of d f(x_hat) / d x_hat at fixed inputs, by power iteration: a local lower bound of L_f.

    Perturbs the output of `embed` (the encoder's patch embedding) with a hook, so it needs nothing of the encoder
    but that module. Central differences one way, a backward pass the other. The vector is kept between calls:
    one iteration a call is enough.
    """

    def __init__(self) -> None:
        self.vector: Tensor | None = None

    def __call__(self, encoder: nn.Module, embed: nn.Module, inputs: Tensor, iterations: int = 1) -> float:
        """The largest of the inputs' values."""
        sigma = torch.zeros(())
        for _ in range(iterations):
            with torch.no_grad():
                if self.vector is None:
                    self.vector = _unit(torch.randn(_shape(encoder, embed, inputs), generator=_seeded()))
                v = self.vector.to(inputs.device)
                h = 1e-2
                u = (_perturbed(encoder, embed, inputs, h * v) - _perturbed(encoder, embed, inputs, -h * v)) / (2 * h)
            with torch.enable_grad():
                push = torch.zeros_like(v, requires_grad=True)
                (w,) = torch.autograd.grad((_perturbed(encoder, embed, inputs, push) * u).sum(), push)
            u_norm, w_norm = (x.flatten(1).norm(dim=1) for x in (u, w))
            sigma = (w_norm / u_norm.clamp(min=1e-12)).max()
            self.vector = _unit(w)
        return float(sigma)


def _perturbed(encoder: nn.Module, embed: nn.Module, inputs: Tensor, push: Tensor) -> Tensor:
    handle = embed.register_forward_hook(lambda _module, _inputs, out: out + push.reshape(out.shape))
    try:
        return encoder(inputs).float()
    finally:
        handle.remove()


def _shape(encoder: nn.Module, embed: nn.Module, inputs: Tensor) -> torch.Size:
    """[B, ...]: the shape of what `embed` gives, an entry an input."""
    seen: list[torch.Size] = []
    handle = embed.register_forward_hook(lambda _module, _inputs, out: seen.append(out.shape))
    try:
        encoder(inputs)
    finally:
        handle.remove()
    (shape,) = seen
    return torch.Size((len(inputs), shape.numel() // len(inputs)))


def _unit(v: Tensor) -> Tensor:
    return v / v.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, *[1] * (v.ndim - 1))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
