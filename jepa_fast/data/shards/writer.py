"""Writing tar shards, as WebDataset does: same samples, same bytes; all of a set or nothing."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import webdataset

PLAN = ".plan.json"  # what a conversion is going to write; without _info.json beside it, it has not ended


def write_shards(folder: Path, splits: Mapping[str, Iterable[dict]], name: str, samples_per_shard: int = 1000) -> Path:
    """Write {split: samples} as `folder`/<name>-<split>-0000.tar ... with `_info.json`; all of it or nothing.

    A sample is WebDataset's dict: `__key__` and payloads by extension ('png', 'npy', 'cls', ...; bytes, arrays and
    numbers). Same samples, same bytes. If `folder` appears meanwhile (another process), that one is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        lengths = {
            split: _write_split(partial, f"{name}-{split}", samples, samples_per_shard)
            for split, samples in splits.items()
        }
        write_info(partial, lengths)
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_split(folder: Path, stem: str, samples: Iterable[dict], per_shard: int) -> dict[str, int]:
    rest = iter(samples)
    lengths: dict[str, int] = {}
    while chunk := list(islice(rest, per_shard)):
        filename = f"{stem}-{len(lengths):04}.tar"
        write_tar(folder / filename, chunk)
        lengths[filename] = len(chunk)
    return lengths


def write_tar(file: Path, samples: Iterable[dict]) -> None:
    with file.open("wb") as stream, webdataset.TarWriter(stream, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)


def write_info(folder: Path, lengths: Mapping[str, Mapping[str, int]], **more: object) -> None:
    """`_info.json` as the ImageNet shards have it: {split: {shard: number of samples}}."""
    splits = {
        split: {
            "name": split,
            "filenames": list(shards),
            "shard_lengths": list(shards.values()),
            "num_samples": sum(shards.values()),
        }
        for split, shards in lengths.items()
    }
    partial = folder / "._info.json.partial"
    partial.write_text(json.dumps({"splits": splits, **more}, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder / "_info.json")
