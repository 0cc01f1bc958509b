"""Data loading at ImageNet-1K's scale, without ImageNet: 1.28 million samples in 1,024 shards, with tiny images.

    python -m benchmarks.imagenet_scale FOLDER                          # makes the shards (4.6 GB) if they are not there
    python -m benchmarks.imagenet_scale FOLDER --samples 20480 --shards 16

Measures: opening the set cold (no index kept) and warm, by one process and by eight that start together; memory of a
process (its own, and with its share of what is mapped); bytes of the indexes; files open; the first batch of an epoch and the
turn of an epoch, fully shuffled and in windows; samples read a second in either order. Every measurement is a process of
its own. Rows go to results/data_scale.csv.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from benchmarks.harness import Bench, arguments
from benchmarks.machine import ROOT
from jepa_fast.data.loading.order import Order
from jepa_fast.data.shards.paths import find
from jepa_fast.data.shards.reader import Shards
from jepa_fast.data.shards.writer import write_info

BATCH, WINDOW, READS = 2048, 16384, 4096


# ---- making ---------------------------------------------------------------------------------------


def generate(folder: Path, samples: int, shards: int) -> None:
    """Shards as ImageNet's have it: 00000000.jpg, .cls, .json; sixteen different images of 16 x 16 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pictures = [_jpeg(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(16)]
    cuts = np.linspace(0, samples, shards + 1).astype(int).tolist()
    lengths = {}
    for i, (begin, end) in enumerate(pairwise(cuts)):
        name = f"imagenet1k-train-{i:04}.tar"
        lengths[name] = end - begin
        if not (folder / name).exists():
            partial = folder / f".{name}.partial"
            partial.write_bytes(_tar(range(begin, end), pictures))
            partial.rename(folder / name)
    write_info(folder, {"train": lengths})


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


def _tar(numbers: range, pictures: list[bytes]) -> bytes:
    pieces = []
    for number in numbers:
        label = number * 7919 % 1000
        about = json.dumps({"filename": f"n{label:08}_{number}.JPEG", "label": label}).encode()
        for extension, data in (("cls", b"%d" % label), ("jpg", pictures[number % 16]), ("json", about)):
            pieces += [_header(number, extension, len(data)), data, bytes(-len(data) % 512)]
    return b"".join(pieces) + bytes(1024)


_TEMPLATES: dict[tuple[str, int], tuple[bytes, int]] = {}


def _header(number: int, extension: str, size: int) -> bytes:
    """That of tarfile, whose name and sum are put in by hand: tarfile takes minutes for millions."""
    if (extension, size) not in _TEMPLATES:
        info = tarfile.TarInfo(f"{0:08}.{extension}")
        info.size = size
        made = info.tobuf(tarfile.USTAR_FORMAT)
        _TEMPLATES[extension, size] = (made, int(made[148:154], 8))
    made, total = _TEMPLATES[extension, size]
    digits = b"%08d" % number
    return digits + made[8:148] + b"%06o" % (total + sum(digits) - 8 * 48) + made[154:]


# ---- measuring ------------------------------------------------------------------------------------


def measure(folder: Path, window: int) -> dict[str, float]:
    """What one process sees, in seconds, bytes and counts."""
    files, lengths = find(str(folder))["train"].files, find(str(folder))["train"].lengths
    before, began = _memory(), time.perf_counter()
    held = Shards(files, lengths)
    found = {"open": time.perf_counter() - began}
    began = time.perf_counter()
    assert held.labels is not None and not held.lost
    found["labels"] = time.perf_counter() - began
    batch = min(BATCH, len(held) // 4)
    Order(8, 4, 0).batch(0)  # NumPy imports its random numbers when they are first asked for: no part of a batch
    order = Order(len(held), batch, 0, window)
    began = time.perf_counter()
    order.batch(0)
    found["first_batch"] = time.perf_counter() - began
    steps = len(held) // batch
    found["batch"] = min(_timed(order.batch, step) for step in range(1, min(steps, 20)))
    found["epoch_turn"] = _timed(order.batch, steps)
    numbers = Order(len(held), batch, 0, window).samples(np.arange(min(READS, len(held))))[1]
    held.prepare(numbers[:BATCH])
    began = time.perf_counter()
    total = sum(len(held.read(number)) for number in numbers.tolist())
    found["reads_per_s"] = len(numbers) / (time.perf_counter() - began)
    assert total > 0
    found["open_files"] = float(len(held._open_files))
    after = _memory()
    return found | {f"{name}_bytes": after[name] - before[name] for name in after}


def _timed(call, *args) -> float:
    began = time.perf_counter()
    call(*args)
    return time.perf_counter() - began


def _memory() -> dict[str, float]:
    """Bytes: this process's own, and with its share of the files that it and others map."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    size = {name: 1024.0 * int(text.split()[0]) for name, text in lines.items()}
    return {"private": size["Anonymous"], "proportional": size["Pss"]}


def processes(folder: Path, count: int, window: int = 0) -> list[dict[str, float]]:
    """`measure` in so many processes that start together."""
    command = [sys.executable, "-m", "benchmarks.imagenet_scale", str(folder), "--measure", str(window)]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)},
        )
        for rank in range(count)
    ]  # fmt: skip
    answers = [process.communicate()[0] for process in started]
    return [json.loads(answer) for answer in answers]


UNITS = {"open": "s", "labels": "s", "first_batch": "s", "batch": "s", "epoch_turn": "s", "reads_per_s": "1/s",
         "open_files": "1", "private_bytes": "B", "proportional_bytes": "B"}  # fmt: skip


def run(bench: Bench, folder: Path) -> None:
    shards = sorted(folder.glob("*.tar"))
    shape = f"{sum(find(str(folder))['train'].lengths or []):,} samples in {len(shards)} shards".replace(",", "")
    for count in (1, 8):
        for kept in folder.glob(".*.idx"):
            kept.unlink()
        for provider, window in (("cold", 0), ("warm", 0), ("warm, windows", WINDOW)):
            answers = processes(folder, count, window)
            named = f"{count} processes, {provider}" if count > 1 else provider
            for metric, unit in UNITS.items():
                bench.record(shape, "tiny", named, metric, unit, [answer[metric] for answer in answers])
            worst = {metric: max(answer[metric] for answer in answers) for metric in UNITS}
            print(f"{named:28}" + "  ".join(f"{metric} {value:.4g}" for metric, value in worst.items()), flush=True)
    index_bytes = sum(kept.stat().st_size for kept in folder.glob(".*.idx"))
    bench.record(shape, "tiny", "indexes", "index_bytes", "B", [float(index_bytes)])
    bench.record(shape, "tiny", "shards", "shard_bytes", "B", [float(sum(f.stat().st_size for f in shards))])
    print(f"indexes {index_bytes / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--measure", type=int, metavar="WINDOW", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure is not None:
        print(json.dumps(measure(args.folder, args.measure)))
        return 0
    bench = Bench("data_scale", args)
    began = time.monotonic()
    generate(args.folder, *((2000, 20) if args.tiny else (args.samples, args.shards)))
    print(f"shards ready after {time.monotonic() - began:.0f} s", flush=True)
    run(bench, args.folder)
    return bench.close()


if __name__ == "__main__":
    sys.exit(main())
