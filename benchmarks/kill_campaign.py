"""Kill a training run with signal 9 at random moments, let it go on, and compare it with one that was left in peace.

    python benchmarks/kill_campaign.py --kills 100
    python benchmarks/kill_campaign.py --kills 20 --processes 2 --mode fsdp     # one process is killed, all must end

A moment may fall into set-up, a step, the writing of a checkpoint or its renaming; half of them are counted from a start's
first record on, so that on a slow machine not all fall into set-up. Every record of metrics.jsonl
(without what measures time and memory) and every weight of the last checkpoint must be the same, bit for bit. A line is
appended to benchmarks/results/kill_campaign.jsonl. Exit code 1 if anything differs.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import machine
from jepa_fast import checkpoint, report, train
from jepa_fast.log import read, repeatable

RESULTS = Path(__file__).resolve().parent / "results" / "kill_campaign.jsonl"
GRACE = 30.0  # seconds: what torchrun gives
RUN = ["demo", "--log.every", "5", "--monitor.every", "250", "--monitor.probe_train", "50", "--monitor.probe_test", "50",
       "--checkpoint.every", "10", "--data.workers", "1", "--train.batch_size", "8", "--model.width", "32",
       "--model.predictor_width", "32", "--parallel.threads", "1"]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--longest",
        type=float,
        default=6.0,
        help="seconds from a start, or from its first record, to its kill, at most",
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    found = campaign(args.kills, args.steps, args.longest, args.processes, args.mode, args.seed)
    print(json.dumps(found))
    if not args.no_record:
        with RESULTS.open("a") as file:
            file.write(json.dumps(found | machine.environment(torch.device("cpu"))) + "\n")
    return 0 if found["identical"] else 1


def campaign(kills: int, steps: int, longest: float, processes: int, mode: str, seed: int) -> dict:
    """What happened: kills made and where they fell, starts, whether all is identical in the end."""
    folder = Path(tempfile.mkdtemp())
    options = [*RUN, "--train.steps", str(steps), "--parallel.mode", mode]
    try:
        assert not any(_Job(processes, [*options, "--run.dir", str(folder / "whole")]).join())
        rng, made, starts, torn, helped = random.Random(seed), 0, 0, 0, 0
        killed = [*options, "--run.dir", str(folder / "killed"), "--resume", "auto"]
        while True:
            starts += 1
            job = _Job(processes, killed)
            if made < kills:
                if rng.random() < 0.5:
                    job.first_record(folder / "killed" / "metrics.jsonl")
                time.sleep(rng.uniform(0.05, longest))
                victim = rng.choice(job.processes)
                if victim.is_alive():
                    victim.kill()
                    made += 1
                    torn += bool(list((folder / "killed").glob("checkpoints/.*")))
                    helped += job.end(victim)
            codes = job.join()
            if not any(codes):
                break
        return {
            "kills": made, "starts": starts, "resumed": sum(e["kind"] == "resume" for e in read(folder / "killed" / "events.jsonl")),
            "kills_while_writing_a_checkpoint": torn, "companions_that_did_not_end_by_themselves": helped, "processes": processes, "mode": mode,
            "steps": steps, "seed": seed, "records": len(_records(folder / "whole")), "identical": _same(folder),
        }  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _records(run: Path) -> list[dict]:
    return repeatable(read(run / "metrics.jsonl"))


def _same(folder: Path) -> bool:
    runs = [folder / "whole", folder / "killed"]
    if _records(runs[0]) != _records(runs[1]):
        return False
    a, b = (checkpoint.load(run / "checkpoints" / f"step-{checkpoint.found(run)[-1]}")["model"] for run in runs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class _Job:
    """Processes forked from a server that has imported everything once."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, processes: int, argv: list[str]):
        self.context.set_forkserver_preload(["jepa_fast.train"])
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.processes = [
            self.context.Process(target=_train, args=(r, processes, port, argv)) for r in range(processes)
        ]
        for process in self.processes:
            process.start()

    def first_record(self, file: Path) -> None:
        """Wait until this job has written a record, or is over."""
        records = len(read(file))
        while any(process.is_alive() for process in self.processes):
            now = len(read(file))
            if now > records:
                return
            records = now  # less after a resume, which cuts off what lies behind the checkpoint
            time.sleep(0.2)

    def end(self, victim: multiprocessing.process.BaseProcess) -> int:
        """As a launcher does when a process has died: give the others a while to notice, then kill them. How many it had to."""
        alone = [process for process in self.processes if process is not victim]
        for process in alone:
            process.join(GRACE)
        left = [process for process in alone if process.is_alive()]
        for process in left:
            process.kill()
        return len(left)

    def join(self) -> list[int | None]:
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]


def _train(rank: int, size: int, port: int, argv: list[str]) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    report.write = lambda folder: folder  # figures are not what is tried here
    sys.exit(train.main(argv))


if __name__ == "__main__":
    sys.exit(main())
