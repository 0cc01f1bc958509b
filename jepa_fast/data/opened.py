"""What a reader of files hands on: sources, and what it has to say about them."""

import hashlib
from dataclasses import dataclass, field

from jepa_fast.data.sample import Source


@dataclass(frozen=True)
class Opened:
    """Training samples, held-out ones if there are any, and what they consist of."""

    train: Source
    test: Source | None
    contents: dict[str, str]  # what the samples come from -> what is in it: other samples, other contents
    lost: list[tuple[str, str]] = field(default_factory=list)  # (where, why) of samples that cannot be read at all
    notes: list[str] = field(default_factory=list)  # what else a user should know
    probe: "Opened | None" = None  # what the probe looks at, if not these


def digest(*pieces: bytes) -> str:
    """A short hash of some bytes."""
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(piece)
    return whole.hexdigest()[:16]


def changes(before: dict[str, str], now: dict[str, str]) -> str:
    """What differs between two `contents`, in one sentence, or ''."""
    if list(before.items()) == list(now.items()):
        return ""
    other = [name for name in now if name in before and now[name] != before[name]]
    said = [f"{name} held {before[name]} and holds {now[name]}" for name in other]
    said += [f"{name} is gone" for name in before if name not in now]
    said += [f"{name} is new" for name in now if name not in before]
    if not said:
        return "the same parts come in another order"
    return "; ".join(said[:3]) + (f"; and {len(said) - 3} more differences" if len(said) > 3 else "")
