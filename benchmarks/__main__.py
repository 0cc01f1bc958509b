"""The CPU set in one command: `python -m benchmarks [NAME ...] [options of the benchmarks]`, as `make bench` does.

Each benchmark is a process of its own with a limit of its own, so that one that fails or hangs does not take the rest
with it; the limits of all together are under ten minutes. Rows already written stay. Then the tables are rendered.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import table
from benchmarks.machine import ROOT

# Seconds, the unit's tests included; in the order of what one wants to know first.
LIMITS = {"ema": 110, "monitor": 140, "step": 140, "attention": 45, "masks": 30, "data": 70, "checkpoint": 45}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(LIMITS)}")
    parser.add_argument("--limit", type=float, help="seconds for each benchmark, instead of its own limit")
    args, options = parser.parse_known_args(argv)
    unknown = [name for name in args.names if name not in LIMITS]
    if unknown:
        print(f"error: there is no benchmark {unknown[0]!r}; choose from {', '.join(LIMITS)}", file=sys.stderr)
        return 2
    outcomes = {}
    for name in args.names or LIMITS:
        print(f"\n== {name}", flush=True)
        began = time.monotonic()
        outcome = run(ROOT / "benchmarks" / f"bench_{name}.py", options, args.limit or LIMITS[name])
        outcomes[name] = f"{outcome} ({time.monotonic() - began:.0f} s)"
    if not any(option.startswith(("--out", "--tiny")) for option in options):
        table.main([])
    print("\n" + "\n".join(f"{name:12} {outcome}" for name, outcome in outcomes.items()))
    return 0 if all(outcome.startswith("done") for outcome in outcomes.values()) else 1


def run(program: Path, options: list[str], limit: float) -> str:
    """How one benchmark ended. It and its children are stopped at the limit; what it wrote is kept."""
    if not program.exists():
        return "missing"
    process = subprocess.Popen([sys.executable, str(program), *options], cwd=ROOT, start_new_session=True)
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
