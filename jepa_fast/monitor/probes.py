"""Probes: what a linear or nearest-neighbour readout gets from frozen features. Deterministic, closed-form.

In: a fixed labelled set and an encoder. Out: accuracies as fractions, by protocol: ridge on
standardised features (the headline), ridge on raw features, kNN; the protocol can change the verdict.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_fast.config import Monitor
from jepa_fast.data.sample import Bad, Source
from jepa_fast.data.sources import fixed_draw

# Shape legend: n training and m test samples of the probe, D width, c classes.


@dataclass(frozen=True)
class ProbeSet:
    """The same inputs at every measurement, of every run on these data, whatever its seed."""

    train: Tensor  # uint8 [n, C, H, W] or float32 [n, C, L]
    train_labels: Tensor  # int64 [n]
    test: Tensor
    test_labels: Tensor
    num_classes: int

    @property
    def majority(self) -> float:
        """Accuracy on the test samples of always naming the most common training class."""
        return accuracy(majority(self.train_labels, self.test_labels, self.num_classes), self.test_labels)


def collect(
    train: Source, test: Source, num_classes: int, num_train: int, num_test: int, left_out: list[Bad] | None = None
) -> ProbeSet:
    """Draw the probe set: a fixed random subset of each source, without augmentation; what cannot be read goes to
    `left_out`."""
    train_x, train_y = _subset(train, num_train, left_out)
    test_x, test_y = _subset(test, num_test, left_out)
    return ProbeSet(train_x, train_y, test_x, test_y, num_classes)


def _subset(source: Source, count: int, left_out: list[Bad] | None) -> tuple[Tensor, Tensor]:
    assert source.labels is not None
    inputs, chosen = fixed_draw(source, count, left_out)
    return torch.from_numpy(inputs), torch.from_numpy(np.asarray(source.labels)[chosen].astype(np.int64))


@torch.no_grad()
def features(encoder: nn.Module, inputs: Tensor, device: torch.device, batch_size: int = 256) -> Tensor:
    """Average-pooled features of all tokens, float32 [n, D] on `device`."""
    return torch.cat([encoder(x.to(device)).float().mean(1) for x in inputs.split(batch_size)])


def score(x: Tensor, y: Tensor, test: Tensor, truth: Tensor, num_classes: int, config: Monitor) -> dict[str, float]:
    """Accuracies of features x [n, D] with labels y int64 [n], on test [m, D] with labels truth int64 [m].

    'ridge' on standardised features, 'ridge/balanced' its mean recall over classes, 'ridge/raw' on features as they are,
    'knn'. NaN all, if a feature is not finite: such features have no accuracy, not a low one.
    """
    if not (x.isfinite().all() and test.isfinite().all()):
        return dict.fromkeys(("ridge", "ridge/balanced", "ridge/raw", "knn"), math.nan)
    a, b = standardise(x, test)
    standardised = ridge_predict(a, y, b, num_classes, config.ridge)
    raw = ridge_predict(x, y, test, num_classes, config.ridge)
    near = knn_predict(x, y, test, num_classes, config.knn, config.knn_temperature)
    return {
        "ridge": accuracy(standardised, truth),
        "ridge/balanced": balanced_accuracy(standardised, truth),
        "ridge/raw": accuracy(raw, truth),
        "knn": accuracy(near, truth),
    }


def standardise(x: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both by mean and standard deviation of the training features x [n, D]."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-8)
    return (x - mean) / std, (test - mean) / std


def majority(y: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """The most common training class as the prediction of every test sample, int64 [m]."""
    return torch.full_like(truth, int(y.bincount(minlength=num_classes).argmax()))


def ridge_predict(x: Tensor, y: Tensor, test: Tensor, num_classes: int, ridge: float) -> Tensor:
    """Classes int64 [m] by least squares on one-hot labels with penalty ridge * n, in float64, intercept unpenalised."""
    x, test = x.double(), test.double()
    onehot = F.one_hot(y, num_classes).double()
    mean, base = x.mean(0), onehot.mean(0)
    centred = x - mean
    gram = centred.T @ centred
    gram.diagonal().add_(ridge * len(x))
    weight = torch.linalg.solve(gram, centred.T @ (onehot - base))
    return ((test - mean) @ weight + base).argmax(1)


RATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # learning rates that the linear head is tried with


def sgd_predict(
    x: Tensor, y: Tensor, test: Tensor, num_classes: int, epochs: int = 100, batch_size: int = 256, seed: int = 0
) -> tuple[Tensor, float]:
    """(classes int64 [m], learning rate) of a linear head by SGD on cross-entropy: momentum .9, cosine to 0.

    The rate is the one that is best on a tenth of the training samples, held out; the head is then fitted on all.
    All rates are trained at once, as one batched product. Deterministic.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held, kept = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
    tried = _heads(x[kept], y[kept], num_classes, RATES, epochs, batch_size, seed)
    hits = ((torch.einsum("nd,rdc->rnc", x[held], tried[0]) + tried[1]).argmax(-1) == y[held]).sum(1)
    rate = RATES[int(hits.argmax())]
    weight, bias = _heads(x, y, num_classes, (rate,), epochs, batch_size, seed)
    return (test @ weight[0] + bias[0]).argmax(1), rate


def _heads(
    x: Tensor, y: Tensor, num_classes: int, rates: tuple[float, ...], epochs: int, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """A linear head for each rate: weights [r, D, c], biases [r, 1, c]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(len(rates), x.shape[1], num_classes, device=x.device, requires_grad=True)
    bias = torch.zeros(len(rates), 1, num_classes, device=x.device, requires_grad=True)
    moments = [torch.zeros_like(p) for p in (weight, bias)]
    rate = torch.tensor(rates, device=x.device).view(-1, 1, 1)
    steps, step = epochs * -(-len(x) // batch_size), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
            logits = torch.einsum("nd,rdc->rnc", x[rows], weight) + bias
            labels = y[rows].expand(len(rates), -1).flatten()
            loss = F.cross_entropy(logits.flatten(0, 1), labels) * len(rates)  # each head's own mean
            gradients = torch.autograd.grad(loss, (weight, bias))
            scale = 0.5 * (1 + np.cos(np.pi * step / steps))
            with torch.no_grad():
                for p, moment, gradient in zip((weight, bias), moments, gradients, strict=True):
                    moment.mul_(0.9).add_(gradient)
                    p.sub_(scale * rate * moment)
            step += 1
    return weight.detach(), bias.detach()


def knn_predict(x: Tensor, y: Tensor, test: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Classes int64 [m] by the k nearest in cosine, weighted exp(similarity / temperature) (DINO's protocol)."""
    similarity, index = (F.normalize(test, dim=1) @ F.normalize(x, dim=1).T).topk(min(k, len(x)), dim=1)
    votes = torch.zeros(len(test), num_classes, dtype=torch.float64, device=x.device)
    votes.scatter_add_(1, y[index], (similarity.double() / temperature).exp())
    return votes.argmax(1)


def accuracy(predicted: Tensor, truth: Tensor) -> float:
    return float((predicted == truth).double().mean())


def balanced_accuracy(predicted: Tensor, truth: Tensor) -> float:
    """Mean recall over the classes present."""
    return float(np.mean([float((predicted[truth == c] == c).double().mean()) for c in truth.unique()]))
