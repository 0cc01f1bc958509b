"""Samples of tar shards by number: bytes, label and key of sample i, read at random.

In: shard files in order. Out: Shards. Every shard is indexed once (index.py); reading takes one `pread` from a file
that stays open (open_files.py).
"""

import hashlib
import os
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from jepa_fast.bounded import shown
from jepa_fast.data.sample import BadSample
from jepa_fast.data.shards import open_files
from jepa_fast.data.shards.index import Index, index
from jepa_fast.data.shards.samples import NO_LABEL, PAYLOADS
from jepa_fast.data.shards.tar import BLOCK
from jepa_fast.data.shards.writer import PLAN
from jepa_fast.errors import UsageError

MOST_BYTES = 2**30  # of one sample
MOST_LOST = 1_000_000  # samples of one damaged shard
SMALLEST = 2 * BLOCK  # bytes of a sample in a tar


class Shards:
    """Random access to the samples of several tar files, in file order."""

    def __init__(self, files: list[Path], lengths: list[int] | None = None, names: list[str] | None = None):
        """`lengths`: samples each shard should have, as `_info.json` tells them; `names`: of the shards, for people.
        Raises UsageError."""
        self.files = files
        self.shard_names = [shown(name) for name in names or short_names(files)]
        self.indexes = _indexes(files)
        self.starts = np.cumsum([0, *map(len, self.indexes)]).tolist()  # of each shard, and the end
        self._bounds = np.array(self.starts)
        self._files = [(str(file), part.stamp) for file, part in zip(files, self.indexes, strict=True)]
        self._open_files = open_files.shared()
        self._changed: dict[int, Index] = {}  # shards that are not what they were when they were opened
        self.told = lengths or [part.expected for part in self.indexes]  # samples each should have; 0: nobody knows
        self.lost = _lost(self.shard_names, self.indexes, self.told)
        if not len(self):
            what = self.indexes[0].damage or f"holds no sample with a payload ({', '.join(PAYLOADS)})"
            where = names[0] if names else files[0]
            raise UsageError(f"shard {where} {what}; copy it again, or take it out")

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def labels(self) -> np.ndarray | None:
        """Class numbers int64 [n], NO_LABEL where a sample has none; None if no sample has one."""
        labels = np.concatenate([part.rows["label"] for part in self.indexes]).astype(np.int64)
        return labels if (labels != NO_LABEL).any() else None

    @property
    def names(self) -> list[str]:
        """The class names (wnids) that occur, in order."""
        return sorted({name for part in self.indexes for name in part.names if name})

    def named(self, names: list[str]) -> np.ndarray:
        """The place of each sample's class name in `names`: int64 [n], -1 if it is not there."""
        place = {name: i for i, name in enumerate(names)}
        return np.concatenate(
            [np.array([place.get(n, -1) for n in part.names], np.int64)[part.rows["name"]] for part in self.indexes]
        )

    @property
    def repeated(self) -> list[str]:
        """Keys that occur more than once in their shard, as <shard>:<key>."""
        return [
            f"{n}:{shown(k)}" for n, part in zip(self.shard_names, self.indexes, strict=True) for k in part.repeated
        ]

    @property
    def unfinished(self) -> list[str]:
        """Folders whose conversion has not ended: there may be further shards to come."""
        folders = dict.fromkeys(file.parent for file in self.files)
        return [str(f) for f in folders if (f / PLAN).exists() and not (f / "_info.json").exists()]

    def place(self, sample: int) -> tuple[int, int]:
        """(shard, row in it)."""
        shard = bisect_right(self.starts, sample) - 1
        return shard, sample - self.starts[shard]

    def key(self, sample: int) -> str:
        """Where the sample lies: <shard>:<key>, of no other sample."""
        shard, row = self.place(sample)
        key = self.indexes[shard].key(row)
        which = f" (sample {row} from 0)" if key in self.indexes[shard].repeated else ""
        return f"{self.shard_names[shard]}:{shown(key)}{which}"

    def payload(self, sample: int) -> str:
        """Extension of the sample's payload."""
        shard, row = self.place(sample)
        return PAYLOADS[self.indexes[shard].rows["payload"][row]]

    def length(self, sample: int) -> int:
        """Bytes of the payload."""
        shard, row = self.place(sample)
        return int(self.indexes[shard].length[row])

    def read(self, sample: int) -> bytes:
        """The payload. Raises BadSample if the file no longer has it."""
        shard, row = self.place(sample)
        part = self.indexes[shard]
        return self._read(shard, row, int(part.offset[row]), int(part.length[row]))

    def read_members(self, sample: int) -> bytes:
        """All members of the sample as they stand in the tar, headers and padding too. Raises BadSample."""
        shard, row = self.place(sample)
        part = self.indexes[shard]
        begin = int(part.rows["begin"][row])
        end = int(part.rows["begin"][row + 1]) if row + 1 < len(part) else part.end
        data = self._read(shard, row, begin, min(end, part.stamp[0]) - begin)
        return data + bytes(-len(data) % BLOCK)  # where the shard is cut in the padding behind a whole payload

    def prepare(self, samples: np.ndarray) -> None:
        """Let the system read ahead what `read` will be asked for."""
        samples = np.sort(samples)
        cuts = np.searchsorted(samples, self._bounds)
        for shard in np.flatnonzero(np.diff(cuts)).tolist():
            part, rows = self.indexes[shard], samples[cuts[shard] : cuts[shard + 1]] - self.starts[shard]
            wanted = zip(part.offset[rows].tolist(), part.length[rows].tolist(), strict=True)
            self._open_files.will_need(self._files[shard], list(wanted))

    def _read(self, shard: int, row: int, offset: int, length: int) -> bytes:
        if not length:
            raise BadSample("is empty (0 bytes)", "empty")
        if length > MOST_BYTES:
            raise BadSample(f"has {length} bytes, more than {MOST_BYTES}", "too_large")
        try:
            data = self._open_files.pread(self._files[shard], length, offset)
            if data is None:
                self._look_again(shard)
                data = self._open_files.pread(self._files[shard], length, offset)
        except FileNotFoundError:
            raise BadSample("the shard is no longer there", "shard_missing") from None
        except OSError as error:
            raise BadSample(f"the shard cannot be read ({error.strerror})", "shard_unreadable") from None
        if data is None or (shard in self._changed and not _same(self.indexes[shard], self._changed[shard], row)):
            raise BadSample("the shard was changed after it was indexed, and no longer holds it there", "shard_changed")
        if len(data) != length:
            raise BadSample(f"the shard ends {length - len(data)} bytes early", "shard_cut")
        return data

    def _look_again(self, shard: int) -> None:
        """Index a shard anew that has another size or time: it may only have been touched, or have lost its end."""
        with suppress(UsageError):  # gone, or no tar: the next read tells
            self._changed[shard] = now = index(self.files[shard])
            self._files[shard] = (str(self.files[shard]), now.stamp)

    def parts(self) -> dict[str, str]:
        """{shard: what is in it}: number of samples and a hash of their keys, sizes and classes; not of the payloads."""
        return {
            n: f"{len(p)} samples {p.digest[:16]}" for n, p in zip(short_names(self.files), self.indexes, strict=True)
        }

    def fingerprint(self) -> str:
        """A hash of `parts`."""
        return hashlib.sha256(repr(sorted(self.parts().items())).encode()).hexdigest()


def short_names(files: list[Path]) -> list[str]:
    """Names that tell the files apart: without folders if that will do, else from the folder they share."""
    names = [f.name for f in files]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath([f.parent.absolute() for f in files])
    return [os.path.relpath(f.absolute(), shared) for f in files]


def _same(before: Index, now: Index, row: int) -> bool:
    """Whether a sample lies where it lay."""
    columns = ("offset", "length", "label")
    return (
        row < len(now)
        and all(before.rows[c][row] == now.rows[c][row] for c in columns)
        and before.key(row) == now.key(row)
    )


def _indexes(files: list[Path]) -> list[Index]:
    """All indexes. Processes of one machine begin at different shards, so that each makes its share and finds the rest."""
    rank, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    first = len(files) * rank // max(1, size)
    turned = files[first:] + files[:first]
    with ThreadPoolExecutor(8) as pool:  # for disks that answer slowly
        made = list(pool.map(index, turned))
    return made[len(files) - first :] + made[: len(files) - first]


def _lost(names: list[str], indexes: list[Index], told: list[int]) -> list[tuple[str, str]]:
    """(where, why) of every sample that should be in the shards and cannot be read from them.

    How many lie behind a damage is known where `_info.json` or an index made before the damage counts them; else they
    are one, "the rest".
    """
    lost = []
    for name, part, expected in zip(names, indexes, told, strict=True):
        lost += [(f"{name}:{shown(key)}", why) for key, why in part.lost]
        behind = len(part) + len(part.lost)
        most = max(behind, MOST_LOST if part.damage else part.stamp[0] // SMALLEST)
        if expected > most:
            raise UsageError(
                f"shard {name} should have {expected:,} samples, by _info.json or its index, and {part.stamp[0]:,} bytes "
                f"hold {most:,} at most; delete what says so"
            )
        if expected:
            why = f"the shard {part.damage}" if part.damage else "_info.json counts it, but the shard lacks it"
            lost += [(f"{name}:sample {number}", why) for number in range(behind, expected)]
        elif part.damage and not part.lost:
            lost.append((f"{name}:the rest", f"the shard {part.damage}; how many samples came after is unknown"))
    return lost
