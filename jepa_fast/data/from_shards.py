"""Shards, on this machine or remote, as sources: payloads, class numbers, and the classes one wants to keep."""

from pathlib import Path

import numpy as np

from jepa_fast.config import Data
from jepa_fast.data.by_kind import reader_of
from jepa_fast.data.opened import Opened, digest
from jepa_fast.data.sample import TRUSTED, Source
from jepa_fast.data.shards import paths
from jepa_fast.data.shards.index import Index
from jepa_fast.data.shards.reader import Shards, short_names
from jepa_fast.data.shards.samples import NO_LABEL
from jepa_fast.data.shards.streams import PROMISE, Stream, bring
from jepa_fast.data.sources import Joined, Lost, Subset
from jepa_fast.errors import UsageError


def open_shards(path: str, data: Data) -> Opened:
    """The shards that `path` means. Raises UsageError."""
    found = paths.find(path)
    splits = [split for split in (found["train"], found["test"]) if split.files]
    names = iter(short_names([file for split in splits for file in split.files]))
    held = [Shards(s.files, s.lengths, [next(names) for _ in s.files]) for s in splits]
    reader = reader_of(data)
    for part in held:
        reader.refuse_other_payload(part, path)
    _refuse_too_many_damaged(held, data.max_bad_share)
    labels = _labels(held)
    source = reader.of_shards(held[0], data)
    sources = [source(part, classes) for part, classes in zip(held, labels, strict=True)]
    contents = {
        f"{split}/{name}": what
        for split, part in zip(("train", "test"), held, strict=False)
        for name, what in part.parts().items()
    }
    if data.label_filter:
        sources = _filtered(sources, held, data.label_filter)
        contents[f"--data.label_filter {Path(data.label_filter).name}"] = digest(Path(data.label_filter).read_bytes())
    lost = [entry for part in held for entry in part.lost]
    return Opened(sources[0], sources[1] if len(sources) > 1 else None, contents, lost, _notes(held, labels))


def open_stream(path: str, data: Data, seed: int) -> Opened:
    """The remote shards that `path` means, all of them for training. Raises UsageError."""
    reader = reader_of(data)
    reader.refuse_stream(data)
    if data.label_filter:
        raise UsageError(
            "--data.label_filter needs shards on this machine; copy them first: python -m jepa_fast.shards"
        )
    urls = [url for entry in paths.entries(path) for url in paths.expand(entry)]
    first = Shards([bring(urls[0])], names=urls[:1])
    reader.refuse_other_payload(first, path)
    known = _labels([first])[0]
    source = reader.of_shards(first, data)

    def opened(held: Shards) -> Source:
        whole = source(held, None)
        return Joined([whole, Lost(held.lost)], ["", ""]) if held.lost else whole

    stream = Stream(
        urls, opened, source(first, known),
        data.num_samples or len(first) * len(urls), seed,
    )  # fmt: skip
    about = "" if data.num_samples else f"; --data.num_samples is not given, {len(stream)} taken from the first shard"
    return Opened(stream, None, dict.fromkeys(urls, "remote"), [], [PROMISE + about])


def _refuse_too_many_damaged(held: list[Shards], share: float) -> None:
    """What nobody can count in samples is counted in shards."""
    unknown = [
        f"{name} {index.damage}"
        for part in held
        for name, index, told in zip(part.shard_names, part.indexes, part.told, strict=True)
        if index.damage and not told
    ]
    total = sum(len(part.files) for part in held)
    if len(unknown) > share * max(total, TRUSTED):
        raise UsageError(
            f"{len(unknown)} of {total} shards are damaged, more than --data.max_bad_share {share:g}; the first: "
            f"{unknown[0]}; copy them again, or allow more"
        )


def _labels(held: list[Shards]) -> list[np.ndarray | None]:
    """Class numbers of each part: those of .cls, else class names numbered over all parts; NO_LABEL for a sample of none."""
    numbers = [part.labels for part in held]
    if all(labels is not None for labels in numbers):
        return list(numbers)
    if not all(part.names for part in held):
        return [None] * len(held)
    known = sorted({name for part in held for name in part.names})
    return [part.named(known) for part in held]


def _notes(held: list[Shards], labels: list[np.ndarray | None]) -> list[str]:
    notes = [
        f"shard {name} {index.damage}; {_behind(index, told)}: copy it again"
        for part in held
        for name, index, told in zip(part.shard_names, part.indexes, part.told, strict=True)
        if index.damage
    ]
    doubtful: dict[str, list[str]] = {}
    for part in held:
        for name, index, told in zip(part.shard_names, part.indexes, part.told, strict=True):
            if index.doubt and told != len(index):
                doubtful.setdefault(index.doubt, []).append(name)
    notes += [f"{_few(shards)}: the shard {why}" for why, shards in doubtful.items()]
    notes += [f"the conversion of {folder} has not ended: run it again" for folder in held[0].unfinished]
    for part, classes in zip(held, labels, strict=True):
        bare = [] if classes is None else np.flatnonzero(classes == NO_LABEL).tolist()
        if bare:
            notes.append(
                f"{len(bare)} samples without a label take no part in the probe: {_few([part.key(i) for i in bare[:4]])}"
            )
        if part.repeated:
            notes.append(
                f"{len(part.repeated)} samples have a key that came before in their shard; all are used: {_few(part.repeated)}"
            )
        beside = sum(index.beside for index in part.indexes)
        if beside:
            notes.append(
                f"{beside} payloads are not used, as another of the same sample stands before them (a key ends at the first dot)"
            )
    return notes


def _behind(index: Index, told: int) -> str:
    if not told:
        return "how many samples came after is unknown, as neither _info.json nor an earlier index counts them"
    return f"{max(0, told - len(index))} of its {told} samples are lost"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _filtered(sources: list[Source], held: list[Shards], label_filter: str) -> list[Source]:
    """The samples whose class number or name is listed in the file `label_filter`, classes renumbered from 0."""
    kept: list[Subset] = []
    for source, part in zip(sources, held, strict=True):
        kept.append(Subset(source, wanted(part, label_filter)))
        if not len(kept[-1]):
            raise UsageError(
                f"no sample of {part.files[0].name} ... is of a class listed in --data.label_filter {label_filter}; list class numbers as in .cls, or wnids"
            )
    numbers = [k.labels for k in kept if k.labels is not None]
    if len(numbers) == len(kept):
        present = np.unique(np.concatenate(numbers))
        for subset in kept:
            assert subset.labels is not None
            subset.labels = np.searchsorted(present, subset.labels)
    return list(kept)


def wanted(part: Shards, label_filter: str) -> np.ndarray:
    """Numbers of the samples whose class is listed, a number or a wnid a word, in the file. Raises UsageError."""
    try:
        listed = Path(label_filter).read_text(encoding="utf-8").split()
    except OSError as error:
        raise UsageError(
            f"--data.label_filter {label_filter}: {error.strerror}; give a file with one class a line"
        ) from None
    if all(word.isdecimal() for word in listed):
        labels = part.labels
        return (
            np.flatnonzero(np.isin(labels, [int(w) for w in listed])) if labels is not None else np.array([], np.int64)
        )
    return np.flatnonzero(part.named(sorted(set(listed))) >= 0)
