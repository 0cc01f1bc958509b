"""For notebooks: frozen features of images or series, and what they are worth. All of it is importable from `jepa_fast`.

import jepa_fast

found = jepa_fast.load_encoder("runs/textures-1")            # or an official, timm or transformers checkpoint
train = jepa_fast.features(found, "photos", split="train")
test = jepa_fast.features(found, "photos", split="test")
jepa_fast.probe_scores(train, test)                          # {'ridge': 0.71, 'majority': 0.25, ...}
jepa_fast.rankme(train.values)
jepa_fast.lidar(jepa_fast.views(found, "photos"))
jepa_fast.predictor_skill("IN1K-vit.h.14-300e.pth.tar", "photos")   # is the predictor better than a trivial one?
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from jepa_fast import config as configuration
from jepa_fast.config import Config, Data, Model, Monitor
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.sample import BadSample, Source
from jepa_fast.data.sources import evaluated
from jepa_fast.errors import UsageError
from jepa_fast.inputs import find
from jepa_fast.interop import Pretrained, load_encoder
from jepa_fast.model.jepa import initialise
from jepa_fast.model.vit import Encoder
from jepa_fast.monitor import probes
from jepa_fast.monitor.measures.spectrum import lidar, rankme
from jepa_fast.trivial import PredictorSkill, predictor_skill

__all__ = [
    "Features",
    "PredictorSkill",
    "Pretrained",
    "features",
    "lidar",
    "load_encoder",
    "predictor_skill",
    "probe_scores",
    "rankme",
    "untrained",
    "views",
]

Split = Literal["all", "train", "test"]

# Shape legend: n samples, N tokens of one, K of them kept, q views, D width.


@dataclass(frozen=True)
class Features:
    """What an encoder makes of a data set, in the set's own order."""

    values: Tensor  # float32 [n, D], average over tokens; or [n, N, D] with pool=False
    labels: Tensor | None  # int64 [n], class numbers from 0; None if the data have none
    keys: list[str]  # where each sample lies
    unreadable: list[str]  # samples left out, each with the reason


@torch.no_grad()
def features(
    found: Pretrained,
    data: str | Path | Tensor | np.ndarray | None = None,
    split: Split = "all",
    *,
    pool: bool = True,
    limit: int = 0,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> Features:
    """Features of whole inputs, preprocessed as in evaluation (no augmentation), by a frozen encoder.

    data: a folder of images (with or without class folders, train/ and val/), shards, CIFAR batches, a file of series;
    or an array uint8 [n, C, H, W], float [n, C, H, W] (normalised already) or float [n, C, L];
    None: the data that the run was trained on.
    split: a set without a test part has a fifth of its labelled samples held out as `test`.
    limit: a fixed random draw of so many samples of each part (0: all). pool: average over tokens.
    Raises UsageError: unreadable data, images or series of another size than the encoder's.
    """
    encoder = found.encoder.to(device)
    values: list[Tensor] = []
    if isinstance(data, (Tensor, np.ndarray)):
        array = torch.as_tensor(data)[: limit or None]
        _check_shape(encoder, tuple(array.shape[1:]))
        values = [_encode(encoder, x, pool, device) for x in array.split(batch_size)]
        return Features(torch.cat(values), None, [str(i) for i in range(len(array))], [])
    labels: list[int] = []
    keys: list[str] = []
    bad: list[str] = []
    for inputs, its_labels, its_keys in _batches(_sources(found, data, split), limit, batch_size, bad):
        _check_shape(encoder, tuple(inputs.shape[1:]))
        values.append(_encode(encoder, inputs, pool, device))
        labels += its_labels
        keys += its_keys
    if not values:
        raise UsageError(f"{data or 'the data of the run'}: not one sample of split {split!r} can be read")
    labelled = len(labels) == len(keys)
    return Features(torch.cat(values), torch.tensor(labels) if labelled else None, keys, bad)


@torch.no_grad()
def views(
    found: Pretrained,
    data: str | Path | Tensor | np.ndarray | None = None,
    *,
    num_views: int = 8,
    keep: float = 0.25,
    limit: int = 1000,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Embeddings E [n, q, D] for `lidar`: each of n inputs seen through q random masks, `keep` of its tokens visible.

    A view is the average of the visible tokens' features: the views of a JEPA are masks, not augmentations.
    """
    encoder = found.encoder.to(device)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(data, (Tensor, np.ndarray)):
        batches: Iterator[Tensor] = iter(torch.as_tensor(data)[: limit or None].split(64))
    else:
        batches = (inputs for inputs, *_ in _batches(_sources(found, data, "all"), limit, 64, []))
    out = []
    for inputs in batches:
        _check_shape(encoder, tuple(inputs.shape[1:]))
        num_tokens = len(encoder.positions)
        kept = max(1, round(keep * num_tokens))
        each = []
        for _ in range(num_views):
            order = torch.rand(len(inputs), num_tokens, generator=generator).argsort(1)
            each.append(encoder(inputs.to(device), order[:, :kept].sort(1).values.to(device)).float().mean(1).cpu())
        out.append(torch.stack(each, dim=1))  # [b, q, D]
    if not out:
        raise UsageError(f"{data or 'the data of the run'}: not one sample can be read")
    return torch.cat(out)


def probe_scores(
    train: Features, test: Features, ridge: float = 1e-2, knn: int = 20, temperature: float = 0.07
) -> dict[str, float]:
    """What frozen features [n, D] let one read off, as fractions: closed form, no randomness.

    'ridge' (a linear probe on standardised features, the headline), 'balanced' (its mean recall over classes), 'raw'
    (features not standardised), 'knn', and 'majority', the accuracy of always naming the most common class. Read the
    same scores of `untrained(found)` beside them.
    Raises UsageError if there are no labels, or only one class.
    """
    if train.labels is None or test.labels is None:
        raise UsageError("a probe needs labels: class folders, .cls files, or labels in the file of series")
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    if len(train.labels.unique()) < 2:
        raise UsageError(f"the {len(train.labels)} training samples are all of one class: a probe needs two")
    labels = train.labels, test.labels
    config = Monitor(ridge=ridge, knn=knn, knn_temperature=temperature)
    scores = probes.score(train.values, labels[0], test.values, labels[1], num_classes, config)
    return {
        "ridge": scores["ridge"],
        "balanced": scores["ridge/balanced"],
        "raw": scores["ridge/raw"],
        "knn": scores["knn"],
        "majority": probes.accuracy(probes.majority(*labels, num_classes), test.labels),
    }


def untrained(found: Pretrained, seed: int = 0) -> Pretrained:
    """The same encoder with fresh weights: the baseline of every probe."""
    encoder = copy.deepcopy(found.encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initialise(encoder, found.config.model if found.config else Model())
    return replace(found, encoder=encoder, origin=f"untrained, shaped as {found.origin}", step=0)


# ---- data -----------------------------------------------------------------------------------------


def _sources(found: Pretrained, data: str | Path | None, split: str) -> list[Source]:
    if split not in ("all", "train", "test"):
        raise UsageError(f"split is {split!r}; give 'all', 'train' or 'test'")
    if data is None and found.config is None:
        raise UsageError(f"{found.origin} does not say what it was trained on: give the data")
    dataset = open_dataset(_config(found, data), typed=data is not None)
    train, test = dataset.probe_train or dataset.train, dataset.probe_test
    if split == "test" and test is None:
        raise UsageError(f"{dataset.description}: there is no test part; use split='all'")
    return [
        source for source in ((train, test) if split == "all" else (test,) if split == "test" else (train,)) if source
    ]


def _config(found: Pretrained, data: str | Path | None) -> Config:
    """How to read `data` for this encoder: as its run did, else by the encoder's own shape."""
    if found.config is not None:
        changed = {} if data is None else {"data.path": str(data), "data.embedded": "", "data.label_filter": ""}
        return configuration.replace(found.config, changed)
    encoder = found.encoder
    patch = encoder.tokenizer.size
    mean, std = (tuple(value.flatten().tolist()) for value in (encoder.tokenizer.mean, encoder.tokenizer.std))
    return Config(
        data=Data(
            kind="images", path=str(data), image_size=math.isqrt(len(encoder.positions)) * patch,
            channels=encoder.patch_embed.in_features // patch**2, mean=mean, std=std,
        )
    )  # fmt: skip


def _batches(
    sources: list[Source], limit: int, batch_size: int, bad: list[str]
) -> Iterator[tuple[Tensor, list[int], list[str]]]:
    """(inputs, labels or [], keys) in order; unreadable samples go to `bad`."""
    inputs: list[np.ndarray] = []
    labels: list[int] = []
    keys: list[str] = []
    for source in sources:
        drawn = np.random.default_rng(0).permutation(len(source))[:limit] if limit else np.arange(len(source))
        for index in np.sort(drawn).tolist():
            try:
                inputs.append(evaluated(source, index))
            except BadSample as error:
                bad.append(f"{source.key(index)}: {error}")
                continue
            keys.append(source.key(index))
            if source.labels is not None:
                labels.append(int(source.labels[index]))
            if len(inputs) == batch_size:
                yield torch.from_numpy(np.stack(inputs)), labels, keys
                inputs, labels, keys = [], [], []
    if inputs:
        yield torch.from_numpy(np.stack(inputs)), labels, keys


def _check_shape(encoder: Encoder, shape: tuple[int, ...]) -> None:
    kind = find(encoder.tokenizer.kind)
    wanted = kind.misfit(shape, encoder.tokenizer.size, encoder.patch_embed.in_features, len(encoder.positions))
    if wanted:
        raise UsageError(f"samples of shape {list(shape)} do not fit this encoder: it takes {wanted}")


def _encode(encoder: Encoder, inputs: Tensor, pool: bool, device: str | torch.device) -> Tensor:
    out = encoder(inputs.to(device)).float()
    return (out.mean(1) if pool else out).cpu()
