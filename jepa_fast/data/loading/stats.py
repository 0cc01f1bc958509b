"""How the loader is doing: what it could not read, and how fast it reads what it can."""

import time
from collections import Counter
from collections.abc import Callable

from jepa_fast.data.sample import Bad, Counts


class LoaderStats:
    """Filled by the loader's thread, read by the loop."""

    def __init__(self, counts: Callable[[], Counts]):
        self.samples = 0  # loaded so far
        self.waited = 0.0  # seconds that the loop waited for a batch so far
        self.bad: list[Bad] = []
        self._counts, self._busy = counts, 0.0
        self._keys: set[str] = set()
        self._before = self._now()

    def add(self, samples: int, busy: float, bad: list[Bad]) -> None:
        """A batch: its samples, the seconds threads spent on it, and all bad ones met so far."""
        self.samples += samples
        self._busy += busy
        for one in bad[len(self.bad) :]:
            if one.key not in self._keys:
                self._keys.add(one.key)
                self.bad.append(one)

    def kinds(self) -> dict[str, int]:
        """Bad samples by reason."""
        return dict(Counter(one.kind for one in self.bad))

    def record(self) -> dict[str, float]:
        """What metrics.jsonl says of the time since the last call."""
        now = self._now()
        took, waited, samples, busy, num_bytes, decoded, by_pillow = (
            b - a for a, b in zip(self._before, now, strict=True)
        )
        self._before = now
        return {
            "data/wait_share": min(1.0, waited / max(took, 1e-9)),
            "data/per_worker_s": samples / busy if busy else 0.0,
            "data/bytes_per_s": num_bytes / max(took, 1e-9),
            "data/pillow_share": by_pillow / decoded if decoded else 0.0,
            "data/bad": float(len(self.bad)),
        }

    def _now(self) -> tuple[float, float, int, float, int, int, int]:
        counts = self._counts()
        return time.monotonic(), self.waited, self.samples, self._busy, counts.bytes, counts.decoded, counts.by_pillow
