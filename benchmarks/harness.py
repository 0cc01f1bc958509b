"""How everything here is measured. A benchmark reads like this:

    args = arguments(__doc__, rounds=15).parse_args(argv)
    bench = Bench("ema", args, tests=["tests/test_fused_ema.py"])    # refuses to go on if these are not green
    case = bench.case("vit_b16", "float32")
    case.add("fused_ema", update, check=agrees_with_reference)        # refused, not timed, if the check raises
    case.ceiling("copy", *copy_bandwidth(numel, bench.device))        # what the machine can do, in the same rounds
    if case.run():
        case.rate("bytes_per_s", "GB/s", 12e-9 * numel)
        case.fraction("fraction_of_copy_bandwidth", 12 * numel, of=["copy"])
        case.speedup("ratio_to_loop", over="loop")
    sys.exit(bench.close())

Providers take turns, in a new random order each round, so that a machine that slows down slows all of them; what
compares two of them (ratios, overheads, fractions) is computed within each round. The first round warms up and is
thrown away. A sample is one call, or as many as make it long enough to time (on CUDA, for the host to run ahead of
the device). `run(cold=True)` empties the caches before each call; its metrics end in `_cold`. On CUDA, device events
are read. Clock, power and load are written down beside the times, and never changed. A case ends after --seconds, or
when BENCH_DEADLINE (Unix time, from whoever bounds the whole program) is near, with the rounds it has.
"""

import argparse
import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine, rows

SHORTEST = {"cpu": 2e-4, "cuda": 5e-3}  # seconds of a sample; shorter calls are repeated inside one
COLD_BYTES = 256 << 20  # written to empty the caches: several times a GPU's L2 or most CPUs' last level
Call = Callable[[], object]


def arguments(doc: str | None, rounds: int = 15, seconds: float = 30.0) -> argparse.ArgumentParser:
    """The options all benchmarks share."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=rounds, help="measured rounds of each case (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="a case begins no further round after this (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    parser.add_argument("--out", type=Path, help="folder of the CSV files (benchmarks/results; with --tiny: none)")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, two rounds: does the program run?")
    parser.add_argument("--ungated", action="store_true", help="do not run the unit's tests first")
    return parser


class Bench:
    """One benchmark's run: where it runs, and the rows it leaves."""

    def __init__(self, name: str, args: argparse.Namespace, tests: Sequence[str] = ()):
        self.name, self.tiny = name, args.tiny
        self.rounds, self.seconds = (2, 5.0) if args.tiny else (args.rounds, args.seconds)
        self.device = torch.device(args.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit(f"error: --device {args.device}: torch sees no CUDA device here; use --device cpu")
        if args.threads:
            torch.set_num_threads(args.threads)
        folder = args.out or (None if args.tiny else rows.RESULTS)
        self.path = folder / f"{name}.csv" if folder else None
        self.rows: list[rows.Row] = []
        self.refused: list[str] = []
        torch.manual_seed(0)
        self.environment = machine.environment(self.device)
        print(f"{name}: {self.environment['device']}, torch {torch.__version__}, commit {self.environment['commit']}")
        if tests and not (args.ungated or args.tiny):
            gate(tests, self.device)

    def case(self, shape: str, dtype: str = "float32") -> "Case":
        return Case(self, shape, dtype)

    def record(self, shape: str, dtype: str, provider: str, metric: str, unit: str, values: Sequence[float]) -> None:
        """A row that did not come out of a case's rounds (a count, a peak of memory). Written at once."""
        row = rows.make(self.name, provider, shape, dtype, metric, unit, values) | self.environment
        if self.path:
            rows.append([row], self.path)
        self.rows.append(row)

    def close(self) -> int:
        """Print what was refused and where the rows are; the exit code."""
        for line in self.refused:
            print(f"refused: {line}", file=sys.stderr)
        if self.path and self.rows:
            print(f"{len(self.rows)} rows in {self.path}")
        return 1 if self.refused else 0


class Case:
    """Providers of the same work on the same shape, timed against each other."""

    def __init__(self, bench: Bench, shape: str, dtype: str):
        self.bench, self.shape, self.dtype = bench, shape, dtype
        self.calls: dict[str, Call] = {}
        self.before: dict[str, Call] = {}
        self.times: dict[str, list[float]] = {}  # seconds of a call, by round
        self.ceilings: dict[str, tuple[Call, float, str]] = {}
        self.suffix = ""  # of the metrics' names

    def add(self, provider: str, call: Call, *, check: Call, before: Call | None = None) -> bool:
        """Enter a provider if `check` (compare it with the reference; raise if it differs) passes; `before` is not timed."""
        if provider in self.calls:
            raise ValueError(f"{provider} is there already; every provider of a case has a name of its own")
        try:
            if before:
                before()
            check()
            synchronize(self.bench.device)
        except Exception as error:
            self._refuse(provider, error)
            return False
        self.calls[provider] = call
        if before:
            self.before[provider] = before
        return True

    def ceiling(self, name: str, call: Call, amount: float, unit: str) -> None:
        """Enter what the machine can do at best: a call, and the `unit` (B, FLOP) it is credited with."""
        self.ceilings[name] = (call, amount, unit)

    def run(self, cold: bool = False) -> bool:
        """Time everything entered; False if no provider is left. What raises while it is timed is refused."""
        device = self.bench.device
        flush = torch.empty(COLD_BYTES // 4, device=device) if cold else None
        timed = self.calls | {f"ceiling {name}": call for name, (call, _, _) in self.ceilings.items()}
        repeats = dict.fromkeys(timed, 1)
        self.times = {name: [] for name in timed}
        watched, began = [machine.state(device)], time.monotonic()
        for turn in range(self.bench.rounds + 1):
            late = time.time() > float(os.environ.get("BENCH_DEADLINE", "inf"))
            if (turn > 2 and time.monotonic() - began > self.bench.seconds) or (turn > 1 and late):
                break
            order = list(timed)
            random.Random(turn).shuffle(order)
            gc.collect(1)  # between the samples, so that it does not fall into one
            for name in order:
                try:
                    if name in self.before:
                        self.before[name]()
                    elapsed = sample(timed[name], device, repeats[name], flush)
                    if turn == 0 and flush is None and name not in self.before:
                        if elapsed < 1:  # a second time: in the first, something may have been set up
                            elapsed = sample(timed[name], device)
                        repeats[name] = max(1, min(1000, round(SHORTEST[device.type] / max(elapsed, 1e-7))))
                except Exception as error:
                    if name not in self.calls:
                        raise
                    del timed[name], self.calls[name], self.times[name]
                    self._refuse(name, error)
                    continue
                if turn:
                    self.times[name].append(elapsed)
        watched.append(machine.state(device))

        self.suffix = "_cold" if cold else ""
        self.derive("ms", "ms", lambda own, _: 1e3 * own)
        for name, (_, amount, unit) in self.ceilings.items():
            reached = [amount / own for own in self.times[f"ceiling {name}"]]
            self._row(name, "ceiling", f"{unit}/s", reached)
        for metric, (unit, _) in watched[-1].items():
            self._row("machine", metric, unit, [state[metric][1] for state in watched if metric in state])
        return bool(self.calls)

    # ---- metrics, from the times of the same rounds ------------------------------------------------

    def rate(self, metric: str, unit: str, amount: float) -> None:
        """`amount` a call (already in units of `unit` times a second) over the time of a call."""
        self.derive(metric, unit, lambda own, _: amount / own)

    def fraction(self, metric: str, amount: float, of: Sequence[str]) -> None:
        """Rate of `amount` over the best of the named ceilings in the same round."""
        best = [max(self._reached(name, turn) for name in of) for turn in range(self._turns())]
        self.derive(metric, "1", lambda own, turn: amount / own / best[turn])

    def speedup(self, metric: str, over: str) -> None:
        """How many times as fast as the provider `over`: its time over one's own."""
        self.compare(metric, over, lambda own, other: other / own)

    def overhead(self, metric: str, over: str) -> None:
        """How much more time than the provider `over`, as a fraction of its time."""
        self.compare(metric, over, lambda own, other: own / other - 1)

    def compare(self, metric: str, other: str, function: Callable[[float, float], float]) -> None:
        """`function(own time, the other's time)` of each round. No rows if the other was refused."""
        if other in self.calls:
            self.derive(metric, "1", lambda own, turn: function(own, self.times[other][turn]))

    def derive(self, metric: str, unit: str, function: Callable[[float, int], float]) -> None:
        """A row for each provider: `function(time, round)` over the rounds."""
        for provider in self.calls:
            self._row(provider, metric, unit, [function(t, turn) for turn, t in enumerate(self.times[provider])])

    def table(self) -> str:
        """The medians of this case: a line a provider, a column a metric."""
        mine = [r for r in self.bench.rows if r["shape"] == self.shape and r["dtype"] == self.dtype]
        return render(mine, f"{self.shape} {self.dtype}", skip=("machine", *self.ceilings))

    def _turns(self) -> int:
        return min(len(times) for times in self.times.values())

    def _reached(self, name: str, turn: int) -> float:
        return self.ceilings[name][1] / self.times[f"ceiling {name}"][turn]

    def _row(self, provider: str, metric: str, unit: str, values: Sequence[float]) -> None:
        self.bench.record(self.shape, self.dtype, provider, metric + self.suffix, unit, values)

    def _refuse(self, provider: str, error: Exception) -> None:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        self.bench.refused.append(f"{self.shape} {provider}: {reason}")


def render(found: Sequence[rows.Row], title: str, skip: Sequence[str] = ()) -> str:
    """Rows as a plain table of medians: a line a provider, a column a metric."""
    found = [r for r in found if r["provider"] not in skip]
    metrics = list(dict.fromkeys(r["metric"] for r in found))
    value = {(r["provider"], r["metric"]): r["p50"] for r in found}
    providers = list(dict.fromkeys(r["provider"] for r in found))
    first = max([len(title), *map(len, providers)])
    lines = [f"{title:{first}}" + "".join(f"  {metric:>8}" for metric in metrics)]
    for provider in providers:
        cells = (f"  {value.get((provider, metric), ''):>{max(8, len(metric))}}" for metric in metrics)
        lines.append(f"{provider:{first}}" + "".join(cells))
    return "\n".join(lines)


# ---- gate --------------------------------------------------------------------------------------------


def gate(tests: Sequence[str], device: torch.device) -> None:
    """Run a unit's tests, on CUDA those marked `gpu`; SystemExit if one fails. Fast code that is wrong is not timed."""
    chosen = ["-m", "gpu"] if device.type == "cuda" else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen, *tests]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
    if done.returncode == 5:  # pytest: nothing was selected
        print(f"gate: no test for {device.type} in {', '.join(tests)}; only each provider's own check stands")
    elif done.returncode:
        print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(f"refused: {' '.join(tests)} is not green, so nothing is timed")


# ---- timing ------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(call: Call, device: torch.device, repeat: int = 1, flush: Tensor | None = None) -> float:
    """Seconds of one call, the mean of `repeat` in a row. With `flush`, that tensor is overwritten first."""
    synchronize(device)
    if flush is not None:
        flush.fill_(1.0)
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeat):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeat
    began = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - began) / repeat


# ---- ceilings: (call, amount, unit), for Case.ceiling -------------------------------------------------


def copy_bandwidth(numel: int, device: torch.device) -> tuple[Call, float, str]:
    """A float32 copy of `numel` elements: bytes read and written."""
    source, target = torch.randn(numel, device=device), torch.empty(numel, device=device)
    return lambda: target.copy_(source), 8.0 * numel, "B"


def axpy_bandwidth(numel: int, device: torch.device) -> tuple[Call, float, str]:
    """target += a * source in float32, the access pattern of an EMA: 12 bytes an element."""
    source, target = torch.randn(numel, device=device), torch.randn(numel, device=device)
    return lambda: target.add_(source, alpha=1e-3), 12.0 * numel, "B"


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 0) -> tuple[Call, float, str]:
    """A square matrix product on random data (zeros run faster): 2 * size^3 operations."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    return lambda: torch.mm(a, b, out=out), 2.0 * size**3, "FLOP"


# ---- other things worth counting -----------------------------------------------------------------------


def peak_memory(call: Call, device: torch.device) -> float | None:
    """Bytes of CUDA memory that one call takes at its peak, above what is allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - before)
