"""Which shards a path means.

A path is a folder of .tar, one .tar, a brace pattern, a glob, a text file with one of these a line, or several of them
joined by `::`, as WebDataset writes lists. Splits come from `_info.json` or from the file names.

`pipe:COMMAND` runs a command. It is honoured where the user typed it (the command line, an argument in Python) and refused
wherever a file holds it: a list, a saved configuration, a file name that a pattern found.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path

from jepa_fast.errors import UsageError

MOST_NAMES, MOST_BRACES = 1_000_000, 50  # of one pattern
TEST = ("val", "valid", "validation", "test")


@dataclass
class Split:
    """Shards of one split, and how many samples each should have, where somebody says so."""

    files: list[Path] = field(default_factory=list)
    lengths: list[int] | None = None


def entries(path: str) -> list[str]:
    """The entries of a list: joined by `::`, or the lines of a .txt file (relative to it; # begins a comment)."""
    found = []
    for entry in path.split("::"):
        if not entry.endswith(".txt"):
            found.append(entry)
            continue
        try:
            lines = [line.partition("#")[0].strip() for line in Path(entry).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            said = "is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise UsageError(f"--data.path {entry}: {said}; give a file with one shard or pattern a line") from None
        if _is_table(next(filter(None, lines), "")):  # the UCR archive of 2015 has series in .txt
            found.append(entry)
            continue
        if not any(lines):
            raise UsageError(f"--data.path {entry} is an empty list; give a file with one shard or pattern a line")
        for line in lines:
            if is_command(line):
                raise UsageError(f"{entry} holds {line!r}, which runs a command; lists may not: give it as --data.path")
        beside = Path(entry).parent
        found += [line if is_remote(line) else str(beside / line) for line in lines if line]
    if not all(found):
        raise UsageError(f"--data.path {path!r} has an empty entry; join paths as in A::B")
    return found


def _is_table(line: str) -> bool:
    """Whether a line holds numbers and nothing else, three at least."""
    words = line.replace(",", " ").split()
    try:
        return len([float(word) for word in words]) >= 3
    except ValueError:
        return False


def is_command(path: str) -> bool:
    """Whether an entry is `pipe:COMMAND`, in any spelling."""
    return re.match(r"pipe:", "".join(path.split()), re.IGNORECASE) is not None


def is_remote(path: str) -> bool:
    """Whether shards are streamed and not read from a disk: pipe:, http://, https://, s3://, gs:// and the like."""
    return is_command(path) or ("://" in path and not path.startswith("file://"))


def refuse_commands(path: str) -> None:
    """Raises UsageError if `path` runs a command, as in `pipe:`; for a path that the user did not type."""
    for entry in entries(path):
        if is_command(entry):
            raise UsageError(
                f"--data.path {entry!r} runs a command, and it comes from a file, not from you: "
                "give --data.path yourself if you trust it"
            )


def expand(pattern: str) -> list[str]:
    """The names that a brace pattern stands for; of a path on this machine also a glob, sorted. A URL is no glob."""
    names = _braces(pattern)
    if is_remote(pattern):
        if not is_command(pattern) and any(map(is_command, names)):
            raise UsageError(f"--data.path {pattern} hides a command in its braces; write pipe:COMMAND")
        return names
    return [
        found
        for name in names
        for found in (sorted(glob(name)) if has_magic(name) and not Path(name).exists() else [name])
    ]


def _braces(pattern: str) -> list[str]:
    """The names that {0000..1023} and {a,b} in a pattern stand for, as a shell expands them. Raises UsageError."""
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    if pattern.count("{") > MOST_BRACES:
        raise UsageError(f"--data.path {pattern[:80]}...: more than {MOST_BRACES} braces; give a list, a name a line")
    depth, cuts = 0, [start]
    for end in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[end], 0)
        if depth == 1 and pattern[end] == ",":
            cuts.append(end)
        if depth == 0:
            break
    else:
        raise UsageError(f"--data.path {pattern}: the brace at character {start + 1} is not closed")
    inner, rest = pattern[start + 1 : end], _braces(pattern[end + 1 :])
    numbers = re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})", inner, re.ASCII)
    count = abs(int(numbers[2]) - int(numbers[1])) + 1 if numbers else max(1, len(cuts))
    if count * len(rest) > MOST_NAMES:
        raise UsageError(f"--data.path {pattern[:200]} stands for more than {MOST_NAMES:,} names; give fewer")
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        padded = any(re.match(r"-?0\d", n) for n in numbers.groups())
        width = max(map(len, numbers.groups())) if padded else 0
        middle = [
            f"{n:0{width}}" for n in range(first, last + (1 if last >= first else -1), 1 if last >= first else -1)
        ]
    elif len(cuts) > 1:
        parts = (pattern[a + 1 : b] for a, b in zip(cuts, [*cuts[1:], end], strict=True))
        middle = [name for part in parts for name in _braces(part)]
    else:
        middle = [f"{{{name}}}" for name in _braces(inner)]
    if len(middle) * len(rest) > MOST_NAMES:
        raise UsageError(f"--data.path {pattern[:200]} stands for more than {MOST_NAMES:,} names; give fewer")
    return [pattern[:start] + name + tail for name in middle for tail in rest]


def is_shards(path: str) -> bool:
    """Whether `path` names tar shards: a .tar, a pattern or list of them, or a folder that holds some."""
    return all(
        entry.endswith(".tar") or _holds_tar(entry) or _holds_tar(os.path.join(entry, "train"))
        for entry in entries(path)
    )


def _holds_tar(folder: str) -> bool:
    return os.path.isdir(folder) and any(f.endswith(".tar") for f in os.listdir(folder))


def find(path: str) -> dict[str, Split]:
    """{'train': shards, 'test': shards, possibly none}. Raises UsageError naming what is missing.

    A pattern over training shards also finds the validation shards beside them.
    """
    found = {"train": Split(), "test": Split()}
    for entry in entries(path):
        for name, split in _find_one(entry).items():
            if name == "test" and split.files and set(split.files) <= set(found["test"].files):
                continue  # what lies beside several patterns
            found[name] = _both(found[name], split)
    for split in found.values():
        twice = [f for f, times in Counter(split.files).items() if times > 1]
        if twice:
            raise UsageError(f"--data.path {path} names {twice[0]} twice; name every shard once")
    return found if found["train"].files else {"train": found["test"], "test": Split()}


def _both(a: Split, b: Split) -> Split:
    """Their shards; how many samples each has is known if it is of both."""
    known = (a.lengths is not None or not a.files) and (b.lengths is not None or not b.files)
    return Split(a.files + b.files, (a.lengths or []) + (b.lengths or []) if known else None)


def _find_one(entry: str) -> dict[str, Split]:
    if os.path.isdir(entry):
        named = _of_info(Path(entry))
        if named:
            return named
        files = sorted(Path(entry).glob("*.tar"))
        if not files:  # a folder for each split
            held_out = next((name for name in TEST if _holds_tar(os.path.join(entry, name))), None)
            return {
                "train": _counted(sorted(Path(entry, "train").glob("*.tar"))),
                "test": _counted(sorted(Path(entry, held_out).glob("*.tar")) if held_out else []),
            }
    else:
        files = [Path(name.removeprefix("file://")) for name in expand(entry)]
        if not files:
            raise UsageError(f"--data.path {entry} matches no file; give the right pattern")
    missing = [f for f in files if not f.is_file()]
    if missing:
        raise UsageError(
            f"shard {missing[0]} does not exist ({len(missing)} of {len(files)} of --data.path {entry} are missing); give the right range or put the file there"
        )
    test = [f for f in files if _is_test(f)]
    train = [f for f in files if not _is_test(f)]
    if not test and not os.path.isdir(entry):
        test = sorted(f for f in files[0].parent.glob("*.tar") if _is_test(f))
    return {"train": _counted(train), "test": _counted(test)}


def _counted(files: list[Path]) -> Split:
    """A split, with the numbers that `_info.json` beside it gives, if it gives one for every shard."""
    known = _lengths_beside(files[0].parent) if files else {}
    return Split(files, [known[f.name] for f in files] if files and all(f.name in known for f in files) else None)


def _is_test(file: Path) -> bool:
    return re.search(rf"(^|[^a-z])({'|'.join(TEST)})([^a-z]|$)", file.name.lower()) is not None


def _of_info(folder: Path) -> dict[str, Split] | None:
    splits = _info(folder)
    for name, split in splits.items():
        missing = [f for f in split.files if not f.is_file()]
        if missing:
            raise UsageError(
                f"shard {missing[0]} does not exist, and {folder / '_info.json'} names it; put it back, or delete _info.json to use what is there"
            )
        if split.lengths is not None and len(split.lengths) != len(split.files):
            raise UsageError(
                f"{folder / '_info.json'} has {len(split.files)} filenames but {len(split.lengths)} shard_lengths for {name}; fix it, or delete it"
            )
    if "train" not in splits:
        return None
    held = next((splits[name] for name in TEST if name in splits), Split())
    return {"train": splits["train"], "test": held}


def _lengths_beside(folder: Path) -> dict[str, int]:
    return {
        file.name: length
        for split in _info(folder).values()
        for file, length in zip(split.files, split.lengths or [], strict=False)
    }


def _info(folder: Path) -> dict[str, Split]:
    """What `_info.json` says, if it is there. Raises UsageError if it cannot be read."""
    file = folder / "_info.json"
    if not file.is_file():
        return {}
    try:
        return {
            name: Split(
                [folder / f for f in split["filenames"]],
                [int(n) for n in split["shard_lengths"]] if "shard_lengths" in split else None,
            )
            for name, split in json.loads(file.read_text(encoding="utf-8"))
            .get("splits", {})
            .items()  # without: another program's
        }
    except (ValueError, KeyError, TypeError, AttributeError, OSError, OverflowError, RecursionError) as error:
        raise UsageError(
            f"{file} cannot be read ({error!r}); fix it, or delete it and the splits are taken from the file names"
        ) from None
