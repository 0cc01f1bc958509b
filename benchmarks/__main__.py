"""The CPU set in one command: `python -m benchmarks [NAME ...] [options of the benchmarks]`, as `make bench` does.

Each benchmark is a process of its own with a limit of its own, so that one that fails or hangs does not take the rest
with it; the limits of all together are under ten minutes. Rows already written stay. Then the tables are rendered.
Exit code 1 if one of them failed, was stopped, or refused to time something.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks import table
from benchmarks.machine import ROOT


@dataclass(frozen=True)
class Bench:
    limit: float  # seconds, the unit's tests included
    options: tuple[str, ...] = ()


# In the order of what one wants to know first. Two quiet cores take about four fifths of the limits.
CPU_SET = {
    "ema": Bench(67),
    "monitor": Bench(108, ("--rounds", "5", "--seconds", "25")),
    "step": Bench(60, ("--batch", "8", "--rounds", "7", "--seconds", "60")),
    "data": Bench(66),
    "attention": Bench(36),
    "checkpoint": Bench(130, ("--rounds", "3", "--seconds", "30")),
    "masks": Bench(22),
    "parallel": Bench(110, ("--rounds", "3", "--seconds", "20")),
}
RESERVE = 12  # seconds before its limit at which a benchmark begins no further round


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(CPU_SET)}")
    parser.add_argument("--limit", type=float, help="seconds for each benchmark, instead of its own limit")
    args, options = parser.parse_known_args(argv)
    unknown = [name for name in args.names if name not in CPU_SET]
    if unknown:
        print(f"error: there is no benchmark {unknown[0]!r}; choose from {', '.join(CPU_SET)}", file=sys.stderr)
        return 2
    outcomes = {}
    for name in args.names or CPU_SET:
        print(f"\n== {name}", flush=True)
        began = time.monotonic()
        bench = CPU_SET[name]
        outcome = run(name, [*bench.options, *options], args.limit or bench.limit)
        outcomes[name] = f"{outcome} ({time.monotonic() - began:.0f} s)"
    if not any(option.startswith(("--out", "--tiny")) for option in options):
        table.main([])
    print("\n" + "\n".join(f"{name:12} {outcome}" for name, outcome in outcomes.items()))
    return 0 if all(outcome.startswith("done") for outcome in outcomes.values()) else 1


def run(name: str, options: list[str], limit: float) -> str:
    """How one benchmark ended. It and its children are stopped at the limit; what it wrote is kept."""
    if not (ROOT / "benchmarks" / f"bench_{name}.py").exists():
        return "missing"
    environment = os.environ | {"BENCH_DEADLINE": str(time.time() + limit - RESERVE)}
    command = [sys.executable, "-m", f"benchmarks.bench_{name}", *options]
    return bounded(command, limit, environment)


def bounded(command: list[str], limit: float, environment: Mapping[str, str]) -> str:
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=environment)
    try:
        code = process.wait(limit)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(reason, KeyboardInterrupt):
            raise
        return f"stopped at its limit of {limit:.0f} s"
    return "done" if code == 0 else f"failed with exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
