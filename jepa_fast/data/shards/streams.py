"""Remote shards: brought here one after the other by the webdataset library, and kept in a cache.

In: URLs (`pipe:`, http, https, s3, gs, ...). Out: a Source whose samples come in the order in which the shards arrive.
Shards, and the samples in each, are shuffled from the seed. Shards are shared out over the processes; with fewer shards
than processes every process reads all of them and keeps its part of the samples. The stream never ends, so no process
runs out before another; what it cannot do is begin in the middle: a resumed run begins a pass of its own.
"""

import hashlib
import itertools
import os
import re
import shlex
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from webdataset.cache import FileCache

from jepa_fast.data.cache import cache_folder
from jepa_fast.data.random import shuffled
from jepa_fast.data.sample import Counts, Encoded, Source
from jepa_fast.data.shards.index import index
from jepa_fast.data.shards.reader import Shards
from jepa_fast.errors import UsageError

PROMISE = (
    "remote shards come in order of arrival: a resumed run is not exact to the sample, and an epoch is only about one; "
    "for both, copy them first: python -m jepa_fast.shards SOURCE FOLDER"
)
TRIES = (0.0, 1.0, 4.0)  # seconds before each attempt to bring a shard here
_BROUGHT: set[str] = set()  # URLs that this process has a copy of
ABANDONED = 3600.0  # seconds without a byte
IN_WORK = 8  # batches whose samples are kept; the loader has two in work
KNOWN = "https, s3, gs, hf, sftp, scp, ftps, ais, htgs"
SCHEMES = re.compile(rf"({KNOWN.replace(', ', '|')})://")  # exactly: the library would also take "PIPE:" for a command
PART = 2**34  # of the streams of random words: the order of the shards


class Arrival:
    """The order of a stream: sample i is what stands at place i."""

    def __init__(self, batch_size: int, per_pass: int):
        self.batch_size, self.per_pass = batch_size, per_pass

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(passes, places) of the global batch `step`."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        return places // self.per_pass, places


class Stream:
    """A Source over URLs: samples by place in the stream, which are at hand once `prepare` was told of them.

    `open_shards` makes a Source of shards on this machine, `fixed` is such a one, from which probes and measurements are
    drawn; `per_pass` is how many samples a pass is said to have.
    """

    labels = None

    def __init__(
        self, urls: list[str], open_shards: Callable[[Shards], Source], fixed: Source, per_pass: int, seed: int
    ):
        self.urls, self.fixed, self.per_pass, self.seed = urls, fixed, per_pass, seed
        self._open, self._rank, self._size = open_shards, 0, 1
        self._arriving: Generator[tuple[Source, int], None, None] | None = None
        self._at: dict[int, tuple[Source, int]] = {}  # sample of a place
        self._batches: deque[list[int]] = deque()
        self._retired = Counts()
        self._opened: Source | None = None

    def share(self, rank: int, size: int) -> None:
        """Which part of the stream is this process's; before the first `prepare`."""
        self._rank, self._size = rank, size

    @property
    def counts(self) -> Counts:
        """Of the whole stream so far."""
        now, total = (self._opened.counts if self._opened else Counts()), Counts()
        total.bytes, total.decoded = self._retired.bytes + now.bytes, self._retired.decoded + now.decoded
        total.by_pillow = self._retired.by_pillow + now.by_pillow
        return total

    def __len__(self) -> int:
        return self.per_pass

    def prepare(self, places: np.ndarray) -> None:
        """Take in what stands at these places of this process; calls come in the order of the stream."""
        if self._arriving is None:
            self._arriving = self._arrivals()
        batch = places.tolist()
        for place in batch:
            self._at[place] = next(self._arriving)
        self._batches.append(batch)
        if len(self._batches) > IN_WORK:
            for place in self._batches.popleft():
                del self._at[place]

    def close(self) -> None:
        """Wait for the shard that is on its way, and fetch no further one."""
        if self._arriving is not None:
            self._arriving.close()

    def load(self, place: int, rng: np.random.Generator | None, out: np.ndarray | None = None) -> np.ndarray | Encoded:
        source, sample = self._sample(place)
        return source.load(sample, rng, out)

    def key(self, place: int) -> str:
        source, sample = self._sample(place)
        return source.key(sample)

    def _sample(self, place: int) -> tuple[Source, int]:
        """That of the place; behind the end of what has arrived, another of the last batch (in place of a bad one)."""
        if place in self._at:
            return self._at[place]
        batch = self._batches[-1]
        return self._at[batch[place % len(batch)]]

    def _arrivals(self) -> Generator[tuple[Source, int], None, None]:
        """(shard, sample in it) of this process, pass after pass; while one shard is read the next is on its way."""
        with ThreadPoolExecutor(1, thread_name_prefix="shards") as pool:
            turns = self._turns()
            coming = pool.submit(self._bring, next(turns))
            for count, url in enumerate(turns):
                source, coming = coming.result(), pool.submit(self._bring, url)
                if self._opened is not None:
                    self._retired = self.counts
                self._opened = source
                order = shuffled(len(source), self.seed, count, PART + 1).tolist()
                for sample in order if self._by_shard else order[self._rank :: self._size]:
                    yield source, sample

    @property
    def _by_shard(self) -> bool:
        return len(self.urls) >= self._size

    def _turns(self) -> Iterator[str]:
        for turn in itertools.count():
            order = [self.urls[i] for i in shuffled(len(self.urls), self.seed, turn, PART)]
            yield from order[self._rank :: self._size] if self._by_shard else order

    def _bring(self, url: str) -> Source:
        return self._open(Shards([bring(url)], names=[url]))


def sweep(folder: Path) -> None:
    """Take away what killed processes left half fetched: parts that nobody has written to for an hour."""
    for part in folder.glob("*.tar.temp*"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


def bring(url: str) -> Path:
    """A copy of a shard in the cache, made now if there is none. Raises UsageError after some attempts.

    A copy that an earlier run left damaged is made anew, once a process: its transport may have been cut, or the shard mended.
    It is replaced and never taken away, as others may be reading it.
    """
    name = _name(_transport(url))
    kept = cache_folder() / "shards" / name
    if not _BROUGHT:
        sweep(kept.parent)
    if url not in _BROUGHT and _damaged(kept):
        os.replace(_fetched(url, f"again{os.getpid()}-{name}"), kept)
    _BROUGHT.add(url)
    return _fetched(url, name)


def _fetched(url: str, name: str) -> Path:
    """The file of that name in the cache, fetched now if it is not there."""
    folder = cache_folder() / "shards"
    # By name alone (the library's way) the shards of two hosts would be taken for one another.
    cache = FileCache(str(folder), url_to_name=lambda _: name)
    for seconds in TRIES:
        time.sleep(seconds)
        try:
            return Path(cache.get_file(_transport(url)))
        except Exception as error:  # whatever a transport raises
            trouble = error
            for partial in folder.glob(f"{name}.temp{os.getpid()}"):
                partial.unlink(missing_ok=True)
    said = (str(trouble).splitlines() or [type(trouble).__name__])[0]
    code = re.search(r"exit (\d+) \(read\)", said)  # the library's words for a command that failed
    said = f"the command ended with {code[1]}" if code else said
    raise UsageError(f"cannot fetch shard {url} ({said}); check the URL, and the room in {folder}") from None


def _damaged(shard: Path) -> bool:
    try:
        return shard.exists() and bool(index(shard).damage)
    except UsageError:  # another process has taken it away
        return False


def _name(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:32] + ".tar"


def _transport(url: str) -> str:
    """s3 by Amazon's own program; the library knows the other schemes. Raises UsageError for what is none of them."""
    if url.startswith("s3://"):
        return f"pipe:aws s3 cp {shlex.quote(url)} -"
    if url.startswith(("http://", "https://")):  # curl would read brackets as patterns
        return re.sub(r"[][{}]", lambda found: f"%{ord(found[0]):02X}", url)
    if url.startswith("pipe:") or SCHEMES.match(url):
        return url
    raise UsageError(f"cannot fetch shard {url}: no program is known for its scheme; give {KNOWN} or pipe:COMMAND")
