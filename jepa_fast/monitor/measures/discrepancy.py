"""What the two encoders make of the same tokens: the paper's discrepancy, and what to read it against.

In: features that the training step computed anyway. Out: scalars on the device; nothing here
synchronises.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape legend: B images, N tokens of one, T tokens of the batch that both encoders saw, D width.


def discrepancy(context: Tensor, target: Tensor) -> Tensor:
    """C of equation 3: mean over tokens of ||f(x)_i - g(x_hat)_i||, features [T, D] of the same tokens."""
    return (context.float() - target.float()).norm(dim=-1).mean()


def instance_spread(target: Tensor) -> Tensor:
    """Mean over images and positions of ||g(x)_i - mean_x g(x)_i||, features [B, N, D], B > 1.

    Near 0 the encoder says the same of every image. Corrected for the mean being the batch's own.
    """
    target = target.float()
    b = target.shape[0]
    deviation = (target - target.mean(0, keepdim=True)).norm(dim=-1).mean()
    return deviation * (b / max(1, b - 1)) ** 0.5


def readings(context: Tensor, visible: Tensor, spread: Tensor) -> dict[str, Tensor]:
    """C of features [T, D], absolute, relative and centred, raw and layer-normed. `visible` is g of the same tokens.

    `relative` is to the instance spread, `to_norm` to the mean norm of g. `centred` takes each encoder's mean over the
    batch's tokens away first: what is left differs between tokens, where a common offset of one encoder counts not.
    """
    context, visible = context.float(), visible.float()
    norm = visible.norm(dim=-1).mean()
    raw = discrepancy(context, visible)
    normed = [F.layer_norm(x, x.shape[-1:]) for x in (context, visible)]
    return {
        "discrepancy/visible": raw,
        "discrepancy/relative": raw / spread,
        "discrepancy/to_norm": raw / norm,
        "discrepancy/centred": _centred(context, visible),
        "discrepancy/normed": discrepancy(*normed),
        "discrepancy/normed_centred": _centred(*normed),
        "norm/context": context.norm(dim=-1).mean(),
        "norm/target": norm,
    }


def _centred(context: Tensor, visible: Tensor) -> Tensor:
    return discrepancy(context - context.mean(0), visible - visible.mean(0))


# ---- equation 4, on whole and masked views of the same inputs -----------------------------------------


def mismatches(masked: Tensor, whole: Tensor, target: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of equation 4 over the visible tokens, and by how much it is violated.

    f(x), f(x_hat) and g(x_hat), features [T, D] of the same tokens. The second result is the largest excess of
    ||f(x) - g(x_hat)|| over the sum of the other two, as a share of the features' norm: rounding, or a fault.
    NaN where features are not finite.
    """
    masked, whole, target = masked.float(), whole.float(), target.float()
    both, by_input, by_ema = ((a - b).norm(dim=-1) for a, b in ((masked, target), (masked, whole), (whole, target)))
    size = masked.norm(dim=-1) + whole.norm(dim=-1) + target.norm(dim=-1)
    excess = ((both - by_input - by_ema) / size.clamp(min=torch.finfo(torch.float32).tiny)).max()
    terms = {"mismatch/both": both.mean(), "mismatch/input": by_input.mean(), "mismatch/ema": by_ema.mean()}
    return terms, excess.clamp(min=0)
