"""What a run trains on and what probes are fitted on, whatever files they lie in.

In: the `data` section of a configuration. Out: a Dataset of Sources.
"""

import os
from dataclasses import dataclass, field

import numpy as np

from jepa_fast.config import Config, Data
from jepa_fast.data.by_kind import reader_of
from jepa_fast.data.from_shards import open_shards, open_stream
from jepa_fast.data.opened import Opened, digest
from jepa_fast.data.readers import generated, ucr
from jepa_fast.data.sample import TRUSTED, Bad, BadSample, Source
from jepa_fast.data.shards import paths
from jepa_fast.data.sources import Joined, Subset, evaluated
from jepa_fast.errors import UsageError

HELD_OUT = 5000  # at most, of a set without a test split


@dataclass(frozen=True)
class Dataset:
    train: Source
    probe_train: Source | None  # labelled, or None
    probe_test: Source | None
    num_classes: int
    shape: tuple[int, ...]  # of a sample as loaded
    description: str
    contents: dict[str, str]  # what the samples come from -> what is in it
    lost: list[Bad] = field(default_factory=list)  # samples known not to be readable, before any is trained on
    notes: list[str] = field(default_factory=list)  # what else a user should know
    held_out: bool = False  # whether probe_test is there and no part of train

    @property
    def fingerprint(self) -> str:
        """Changes when samples, their order or their labels do."""
        return digest(repr(list(self.contents.items())).encode())


def open_dataset(config: Config, typed: bool = False) -> Dataset:
    """The data that `config` names. Raises UsageError, naming the path and the fix.

    typed: the user gave `data.path` by hand, so `pipe:` in it may run a command; a path from a file may not.
    """
    data = config.data
    if data.path and not typed:
        paths.refuse_commands(data.path)
    if not data.path and not data.embedded:
        raise UsageError(f"preset {config.preset} needs --data.path: {data.hint}")
    path, origin = data.path, f"data of {data.path}"
    if not path:
        path, origin = generated.open_embedded(data.embedded)
    elif ucr.named(path):
        origin = ucr.describe(path)
    return _assemble(_open(path, data, config.train.seed), data, origin)


def _open(path: str, data: Data, seed: int) -> Opened:
    found = paths.entries(path)
    if data.weights and len(data.weights) != len(found):
        raise UsageError(
            f"--data.weights has {len(data.weights)} numbers and --data.path {len(found)} entries; give one for each"
        )
    remote = [entry for entry in found if paths.is_remote(entry)]
    if remote:
        if len(remote) < len(found) or data.weights:
            raise UsageError(f"--data.path {path}: remote shards cannot be mixed with others; copy them here first")
        return open_stream(path, data, seed)
    if len(found) == 1 or (not data.weights and paths.is_shards(path)):
        return _open_one(path, data)
    return _join(found, [_open_one(entry, data) for entry in found], data)


def _open_one(path: str, data: Data) -> Opened:
    if paths.is_shards(path):
        return open_shards(path, data)
    if not ucr.named(path) and not os.path.exists(path):
        raise UsageError(
            f"--data.path {path} does not exist" + (f"; put there {data.hint}" if data.hint else "; check the path")
        )
    return reader_of(data).open_files(path, data)


def _join(found: list[str], opened: list[Opened], data: Data) -> Opened:
    """Several sets as one. The probe looks at the first, as classes of different sets have nothing to do with one another."""
    contents = {
        f"{entry}/{name}": what for entry, one in zip(found, opened, strict=True) for name, what in one.contents.items()
    }
    contents["--data.weights"] = repr(data.weights)
    shapes = {entry: _shape(one.train) for entry, one in zip(found, opened, strict=True)}
    if len(set(shapes.values())) > 1:
        raise UsageError(f"the sets of --data.path hold samples of different shapes, {shapes}; mix those of one shape")
    lost = [(f"{entry}: {where}", why) for entry, one in zip(found, opened, strict=True) for where, why in one.lost]
    notes = [note for one in opened for note in one.notes] + [f"the probe looks at {found[0]} alone"]
    # The probe's samples have the names that they have in training, so that a bad one counts once.
    first, name = opened[0], found[:1]
    probe = Opened(
        Joined([first.train], name), Joined([first.test], name) if first.test is not None else None, contents
    )
    return Opened(Joined([one.train for one in opened], found), None, contents, lost, notes, probe)


def _assemble(opened: Opened, data: Data, origin: str) -> Dataset:
    lost = [Bad(where, "lost", why) for where, why in opened.lost]
    total = len(opened.train) + len(lost)
    if len(lost) > data.max_bad_share * max(total, TRUSTED):
        raise UsageError(
            f"{len(lost)} of {total} samples are lost, more than --data.max_bad_share {data.max_bad_share:g}; "
            f"the first is {lost[0].key}: {lost[0].reason}; fix the data, or allow more"
        )
    train, held_in, held_out, said = _probe(opened)
    num_classes, counted = 0, f"{len(train)} samples, {said}"
    if held_in is not None and held_out is not None:
        num_classes, held_in, held_out = _numbered(held_in, held_out)
        if num_classes < 2:
            held_in, held_out, num_classes = None, None, 0
            counted = f"{len(train)} samples, all of one class, so no probes"
    if held_in is not None and held_out is not None:
        counted = f"{len(train)} training and {len(held_out)} test samples, {num_classes} classes{said}"
    notes = [*opened.notes, *_doubt(num_classes, held_in, held_out)]
    description = f"{origin}: {counted}" + (f"; {len(lost)} lost" if lost else "")
    # Without a test part the probe's samples are taken out of training, but not out of a stream or of one of several sets.
    apart = (opened.probe or opened).test is not None or (opened.probe is None and not hasattr(opened.train, "fixed"))
    return Dataset(
        train, held_in, held_out, num_classes, _shape(train), description, opened.contents, lost, notes,
        held_out=held_out is not None and apart,
    )  # fmt: skip


def _doubt(num_classes: int, held_in: Source | None, held_out: Source | None) -> list[str]:
    """A note where the labels look like something else, as numbers of samples do."""
    count = len(held_in or ()) + len(held_out or ())
    if num_classes <= 2 or 2 * num_classes < count:
        return []
    return [
        f"{num_classes} classes of {count} labelled samples: these labels look like no classes, and the probe will say little"
    ]


def _probe(opened: Opened) -> tuple[Source, Source | None, Source | None, str]:
    """(what is trained on, what the probe is fitted on, what it is scored on, what to say of that)."""
    train, test, base = opened.train, opened.test, opened.train
    if opened.probe is not None:
        base, test = opened.probe.train, opened.probe.test
    fixed = getattr(base, "fixed", base)  # of a stream: its first shard
    if fixed.labels is None or (test is not None and test.labels is None):
        return train, None, None, "no labels, so no probes"
    known = np.flatnonzero(fixed.labels >= 0)
    if test is not None and len(known):
        assert test.labels is not None
        scored = np.flatnonzero(test.labels >= 0)
        if not len(scored):
            return train, None, None, "no test labels, so no probes"
        return train, _only(fixed, known), _only(test, scored), ""
    if len(known) < 10:
        return train, None, None, "too few labelled samples for a probe"
    order = known[np.random.default_rng(0).permutation(len(known))]
    held = min(HELD_OUT, max(1, len(known) // 5))
    said = f", {held} of the labelled samples held out for the probe"
    if fixed is not train:
        return train, Subset(fixed, np.sort(order[held:])), Subset(fixed, order[:held]), f"{said}, not from training"
    kept = np.ones(len(fixed), bool)
    kept[order[:held]] = False
    return Subset(fixed, np.flatnonzero(kept)), Subset(fixed, np.sort(order[held:])), Subset(fixed, order[:held]), said


def _numbered(held_in: Source, held_out: Source) -> tuple[int, Source, Source]:
    """(number of classes, both sources with labels from 0): a class is what occurs, whatever the highest number."""
    assert held_in.labels is not None and held_out.labels is not None
    classes = np.unique(np.concatenate([held_in.labels, held_out.labels]))
    if classes[-1] < len(classes):
        return len(classes), held_in, held_out
    numbered = [Subset(source, np.arange(len(source))) for source in (held_in, held_out)]
    for subset in numbered:
        assert subset.labels is not None
        subset.labels = np.searchsorted(classes, subset.labels)
    return len(classes), numbered[0], numbered[1]


def _only(source: Source, samples: np.ndarray) -> Source:
    return source if len(samples) == len(source) else Subset(source, samples)


def _shape(source: Source) -> tuple[int, ...]:
    """The shape of the first sample that can be read."""
    source = getattr(source, "fixed", source)
    trouble = BadSample("there are no samples")
    for index in range(min(100, len(source))):
        try:
            return evaluated(source, index).shape
        except BadSample as error:
            trouble = error
    raise UsageError(f"none of the first samples can be read; {source.key(0)}: {trouble}")
