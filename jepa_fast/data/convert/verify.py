"""Looking at shards: whether every sample can be read, and what they hold."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from jepa_fast import cores
from jepa_fast.data.readers import from_series, images, series
from jepa_fast.data.sample import BadSample
from jepa_fast.data.shards import paths
from jepa_fast.data.shards.reader import Shards
from jepa_fast.data.shards.samples import NO_LABEL
from jepa_fast.errors import UsageError

AT_A_TIME = 64


@dataclass(frozen=True)
class Trouble:
    where: str  # <shard>:<key>
    what: str
    fatal: bool  # whether the sample cannot be used


def open_splits(path: str) -> dict[str, Shards]:
    """The shards of each split that `path` names. Raises UsageError."""
    if any(map(paths.is_remote, paths.entries(path))):
        raise UsageError(f"{path} is not on this machine; copy it first: python -m jepa_fast.shards SOURCE FOLDER")
    found = {name: split for name, split in paths.find(path).items() if split.files}
    if not found:
        raise UsageError(f"{path} holds no shard (.tar); give a folder, pattern or list of them")
    return {name: Shards(split.files, split.lengths) for name, split in found.items()}


def verify(held: Shards, workers: int, progress: Callable[[int, int], None]) -> Iterator[Trouble]:
    """Read and decode every sample; what is wrong, in file order."""
    for folder in held.unfinished:
        yield Trouble(folder, "its conversion has not ended: run it again", True)
    for where, why in held.lost:
        yield Trouble(where, why, True)
    for name, part, told in zip(held.shard_names, held.indexes, held.told, strict=True):
        if part.damage and part.lost and not told:  # else what lies behind the damage is among the lost
            yield Trouble(name, f"{part.damage}; how many samples came after is unknown", False)
        if part.doubt:
            yield Trouble(name, part.doubt, False)
        if part.beside:
            yield Trouble(name, f"{part.beside} payloads are not used: their samples have another before", False)
    for where in held.repeated:
        yield Trouble(where, "the key occurs before in this shard", False)
    labels = held.labels
    shape = from_series.common_shape(held) if held.payload(0) == "npy" else ()
    starts = range(0, len(held), AT_A_TIME)
    with ThreadPoolExecutor(workers or cores.usable()) as pool:
        for start, found in zip(starts, pool.map(lambda s: _verify_some(held, labels, shape, s), starts), strict=True):
            yield from found
            progress(min(start + AT_A_TIME, len(held)), len(held))


def _verify_some(held: Shards, labels: np.ndarray | None, shape: tuple[int, ...], start: int) -> list[Trouble]:
    found = []
    for sample in range(start, min(start + AT_A_TIME, len(held))):
        try:
            data = held.read(sample)
            if held.payload(sample) == "npy":
                if not np.isfinite(series.array(data, shape)).all():
                    raise BadSample("holds a missing or infinite value")
            else:
                images.decode(data, 3)
        except BadSample as error:
            found.append(Trouble(held.key(sample), str(error), True))
        if labels is not None and labels[sample] == NO_LABEL:
            found.append(Trouble(held.key(sample), "has no label, where others have one", False))
    return found


def stats(held: Shards) -> list[str]:
    """Counts, sizes and class balance, a line each."""
    lengths = np.concatenate([part.rows["length"] for part in held.indexes])
    per_shard = [len(part) for part in held.indexes]
    size = sum(part.stamp[0] for part in held.indexes)
    kinds, counts = np.unique([held.payload(i) for i in range(len(held))], return_counts=True)
    said = [
        f"{len(held):,} samples in {len(held.files)} shards of {min(per_shard):,} to {max(per_shard):,}, {size / 1e6:,.1f} MB",
        "payloads: " + ", ".join(f"{count:,} .{kind}" for kind, count in zip(kinds, counts, strict=True)),
        f"bytes of a payload: {lengths.min():,} to {lengths.max():,}, median {int(np.median(lengths)):,}",
    ]
    if held.lost:
        said.append(f"{len(held.lost)} lost: --verify names them")
    labels = held.labels
    if labels is None and not held.names:
        return [*said, "no labels"]
    classes = labels if labels is not None else held.named(held.names)
    present, number = np.unique(classes[classes != NO_LABEL], return_counts=True)
    most, least = present[number.argmax()], present[number.argmin()]
    sizes = f"{number.min():,} (class {least}) to {number.max():,} samples (class {most})"
    if number.min() == number.max():
        sizes = f"{number.max():,} samples of each"
    said.append(
        f"{len(present)} classes: {sizes}, the most common has {number.max() / number.sum():.1%}; {(classes == NO_LABEL).sum()} samples without a label"
    )
    return said
