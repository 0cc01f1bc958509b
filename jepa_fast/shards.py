"""Make shards, look at them, verify them: `python -m jepa_fast.shards`."""

import argparse
import signal
import sys
import time
from pathlib import Path

from jepa_fast.data.convert import verify
from jepa_fast.data.convert.inputs import SeriesOptions, open_inputs
from jepa_fast.data.convert.to_shards import Options, convert
from jepa_fast.errors import Arguments, UsageError, one_line_errors

USAGE = """usage: python -m jepa_fast.shards SOURCE FOLDER [options]     make shards
       python -m jepa_fast.shards --verify SHARDS [--workers N]   read every sample, name what is bad; 1 if anything is
       python -m jepa_fast.shards --stats SHARDS                  counts, sizes, class balance

SOURCE  an image folder (train/ and val/ of class folders, class folders, or just images), CIFAR-10/100 batches (pickled
        or binary), a file of series (.tsv .ts .pt .npy .csv .txt), a folder of them or ucr:NAME, or shards: a folder, pattern, list or URL
SHARDS  a folder of .tar, a brace pattern, a glob, or a list joined by ::

  --name NAME             NAME-train-0000.tar ...; default: the folder's name
  --samples-per-shard N   default 1000
  --seed N                of the order of the samples, default 0      --keep-order   as they come
  --label-filter FILE     keep the classes listed (numbers or wnids), renumbered from 0; for shards
  --label COLUMN          of a table of series: first, last, a name, a number from 0 on, none; default: auto
  --gaps refuse|interpolate|zero    --lengths refuse|pad|cut      of series with missing values or of unequal length
  --workers N             threads; default: one a core

Called again after an interruption it goes on. Same source and options, same bytes."""


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Arguments("shards", USAGE)
    parser.add_argument("source", nargs="?")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--verify", metavar="SHARDS")
    parser.add_argument("--stats", metavar="SHARDS")
    parser.add_argument("--name", default="")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-order", action="store_true")
    parser.add_argument("--label-filter", default="")
    parser.add_argument("--label", "--data.label", dest="label", default="auto")
    parser.add_argument(
        "--gaps", "--data.gaps", dest="gaps", choices=("refuse", "interpolate", "zero"), default="refuse"
    )
    parser.add_argument(
        "--lengths", "--data.lengths", dest="lengths", choices=("refuse", "pad", "cut"), default="refuse"
    )
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args(argv)
    for name, least in (("samples_per_shard", 1), ("seed", 0), ("workers", 0)):
        if getattr(args, name) < least:
            raise UsageError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}: give a whole number of at least {least}"
            )
    if "/" in args.name:
        raise UsageError(f"--name is {args.name!r}: a name holds no /")
    looks = [x for x in (args.verify, args.stats) if x]
    if len(looks) > 1 or (looks and args.source) or not (looks or (args.source and args.folder)):
        raise UsageError("give SOURCE and FOLDER, or --verify SHARDS, or --stats SHARDS; --help shows how")
    return args


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    args = _parse(argv)
    if args.stats:
        for split, held in verify.open_splits(args.stats).items():
            print(f"{split}: " + f"\n{split}: ".join(verify.stats(held)))
        return 0
    return _verify(args) if args.verify else _make(args)


def _make(args: argparse.Namespace) -> int:
    began = time.monotonic()
    held = open_inputs(args.source, args.label_filter, SeriesOptions(args.label, args.gaps, args.lengths))
    print(
        f"{args.source}: {held.kind}, " + ", ".join(f"{count:,} {split}" for split, count in held.splits.items()),
        flush=True,
    )
    for note in held.notes:
        print(f"data: {note}")
    seed = None if args.keep_order else args.seed
    options = Options(args.name, args.samples_per_shard, seed, args.workers)

    def progress(done: int, shards: int, written: int) -> None:
        rate = written / 1e6 / max(1e-9, time.monotonic() - began)
        _show(f"{done}/{shards} shards, {rate:.1f} MB/s", done == shards)

    try:
        result = convert(held, Path(args.folder), options, progress)
    except KeyboardInterrupt:
        print("\ninterrupted: what is done stays, and the same command goes on from it", file=sys.stderr)
        return 128 + signal.SIGINT
    total = sum(sum(lengths.values()) for lengths in result.shards.values())
    shards = sum(map(len, result.shards.values()))
    already = f", {shards - result.made} of them from before" if result.made < shards else ""
    print(f"{args.folder}: {total:,} samples in {shards} shards{already}")
    for line in result.left_out:
        print(f"left out: {line}")
    return 1 if result.left_out else 0


def _verify(args: argparse.Namespace) -> int:
    bad = 0
    for split, held in verify.open_splits(args.verify).items():
        fatal = others = 0
        for trouble in verify.verify(held, args.workers, lambda done, of: _show(f"{done}/{of} samples", done == of)):
            print(f"{'bad' if trouble.fatal else 'note'}: {trouble.where}: {trouble.what}")
            fatal, others = fatal + trouble.fatal, others + (not trouble.fatal)
        print(f"{split}: {len(held):,} samples in {len(held.files)} shards read; {fatal} bad, {others} notes")
        bad += fatal
    return 1 if bad else 0


def _show(line: str, last: bool) -> None:
    """A live line on a terminal, the last one elsewhere."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="\n" if last else "", flush=True)
    elif last:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
