"""Branch a run under several interventions: `python -m jepa_fast.fork RUN --at STEP --set ema.decay=.9999 --dir PATH`.

Every branch starts from the same checkpoint, weights, moments, order of the data and random state, and differs in what its
`--set` says: any field of the configuration, or what is done to the two encoders once. The run that goes on unchanged is the
control. A seed is a whole replicate: the run trained again from its seed on, then branched. Ends in a table of means,
intervals and paired differences (fork.csv) and a comparison page.
"""

import csv
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_fast import checkpoint, cli, cores, log, optim, report, rundir
from jepa_fast.config import Config, flatten, replace, to_json
from jepa_fast.errors import UsageError, one_line_errors, suggest
from jepa_fast.model.jepa import JEPA
from jepa_fast.monitor import phase
from jepa_fast.report import compare
from jepa_fast.report.verdict import values
from jepa_fast.run import tensors
from jepa_fast.sweep import complete

USAGE = """usage: python -m jepa_fast.fork RUN --at STEP|minimum|escape --set WHAT=VALUE [--set ...] --dir PATH [--seeds N]

  --at STEP      branch there; `minimum`: where the smoothed loss of RUN is least; `escape`: where its collapse phase ends
  --set ...      one branch each; fields of the configuration, several with commas: --set ema.decay=.9999,optim.lr=1e-4
                 target=sync    the target encoder becomes the context encoder, once
                 target=freeze  it does not move from here on
                 noise=drift    the target encoder is moved at random, as far as its drift is, tensor by tensor: what
                                `target=sync` does in size, without its direction
  --seeds N      replicates, of seeds from RUN's own on (default: 1); those that RUN is not are trained from the start
  --jobs N       runs at a time (default: 1)

  python -m jepa_fast.fork runs/demo-1 --at minimum --set target=sync --set noise=drift --set ema.decay=.9999 --seeds 8 --dir forks/demo"""

ONCE = {"target": ("sync", "freeze"), "noise": ("drift",)}
CONTROL = "control"


@dataclass(frozen=True)
class Fork:
    run: Path
    config: Config  # of the run
    step: int
    branches: dict[str, dict[str, str]]  # name -> what is set
    seeds: int
    folder: Path
    jobs: int = 1

    def config_of(self, branch: str, seed: int) -> Config:
        """Of a branch's run, without its folder. Raises UsageError on a field that is not, or a value that cannot be."""
        own = {k: v for k, v in self.branches.get(branch, {}).items() if k not in ONCE}
        if self.branches.get(branch, {}).get("target") == "freeze":
            own["teacher.kind"] = "frozen"
        return cli.override(replace(self.config, {"train.seed": self.config.train.seed + seed}), own)

    def place(self, branch: str, seed: int) -> Path:
        return self.folder / f"{branch},seed={self.config.train.seed + seed}"


def parse(argv: list[str]) -> Fork:
    """Raises UsageError; every branch is checked before anything is trained."""
    given: dict[str, list[str]] = {"--at": [], "--set": [], "--seeds": [], "--dir": [], "--jobs": []}
    place, rest = "", list(argv)
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        if not name.startswith("--") and not place:
            place = name + has_value + value
        elif name not in given:
            raise UsageError(f"unknown option {name}{suggest(name, given)}; --help shows all")
        elif not has_value and not rest:
            raise UsageError(f"{name} takes a value")
        else:
            given[name].append(value if has_value else rest.pop(0))
    for name in ("--at", "--dir", "--seeds", "--jobs"):
        if len(given[name]) > 1:
            raise UsageError(f"{name} is given twice")
    if not place or not given["--at"] or not given["--dir"] or not given["--set"]:
        raise UsageError("give a run, --at, at least one --set and --dir; --help shows how")
    run = Path(place)
    config = rundir.saved_config(run) if run.is_dir() else None
    if config is None:
        raise UsageError(f"{place} holds no config.json: give the folder of a run of this trainer")
    fork = Fork(
        run, config, step_of(run, given["--at"][0]), dict(_branch(text) for text in given["--set"]),
        _count("--seeds", given["--seeds"]), Path(given["--dir"][0]), _count("--jobs", given["--jobs"]),
    )  # fmt: skip
    if len(fork.branches) < len(given["--set"]):
        raise UsageError("two --set are the same")
    check(fork)
    return fork


def _count(name: str, said: list[str]) -> int:
    if said and not (said[0].isdigit() and int(said[0])):
        raise UsageError(f"{name} {said[0]}: give a whole number of at least 1")
    return int(said[0]) if said else 1


def _branch(text: str) -> tuple[str, dict[str, str]]:
    parts: dict[str, str] = {}
    for piece in text.split(","):
        name, _, value = piece.partition("=")
        if not name or not value:
            raise UsageError(f"--set {text}: write field=value, several with commas")
        if name in ONCE and value not in ONCE[name]:
            raise UsageError(f"--set {name}={value}: known is {' or '.join(f'{name}={v}' for v in ONCE[name])}")
        parts[name] = value
    return text, parts


def step_of(run: Path, said: str) -> int:
    """The step that `--at` names, from the run's own log. Raises UsageError."""
    if said.isdigit():
        return int(said)
    records = [r for r in log.read(run / "metrics.jsonl") if phase.number(r.get("step")) is not None]
    if said == "minimum":
        loss = compare.smooth(values(records, "loss"))
        if not loss:
            raise UsageError(f"--at minimum: {run} has no record of a loss; give a step")
        return int(min(loss, key=lambda point: point[1])[0])
    if said == "escape":
        ends = [e.get("end") for e in log.read(run / "events.jsonl") if e.get("kind") == phase.PHASE]
        if not any(ends):
            raise UsageError(
                f"--at escape: {run} has no collapse phase that ended (events.jsonl); give a step, or minimum"
            )
        return int([end for end in ends if end][-1])
    raise UsageError(f"--at {said}: give a step, minimum or escape")


def check(fork: Fork) -> None:
    """Raises UsageError where a branch cannot go on from the checkpoint."""
    steps = fork.config.train.steps
    if not steps:
        raise UsageError(f"{fork.run} counts epochs: give runs with --train.steps")
    if not 0 < fork.step < steps:
        raise UsageError(f"--at {fork.step}: {fork.run} has {steps} steps; give one between 0 and {steps}")
    own = _shapes(fork.config)
    for name in fork.branches:
        config = fork.config_of(name, 0)
        changed = [f for f, value in flatten(config).items() if value != flatten(fork.config)[f]]
        if bad := [f for f in changed if f in ("train.seed", "train.steps", "run.dir") or f.startswith("init.")]:
            raise UsageError(f"--set {name}: {bad[0]} is not a branch's to change")
        if _shapes(config) != own:
            raise UsageError(f"--set {name}: it changes the shapes of the model, and the checkpoint has the old ones")


def _shapes(config: Config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in JEPA(config).state_dict().items()}


# ---- the runs -------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """Training processes, at most `jobs` at a time by who calls it."""

    threads: int
    running: set[subprocess.Popen] = field(default_factory=set)

    def train(self, preset: str, folder: Path) -> None:
        """Start or continue the run in `folder`, whose config.json is there. Raises UsageError with its last line."""
        command = [sys.executable, "-m", "jepa_fast.train", preset, "--run.dir", str(folder), "--resume", "auto"]
        command += ["--parallel.threads", str(self.threads)]
        with folder.with_name(folder.name + ".log").open("w", encoding="utf-8") as out:
            environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
            self.running.add(process)
            status = process.wait()
            self.running.discard(process)
        if status:
            said = folder.with_name(folder.name + ".log").read_text(encoding="utf-8").strip().splitlines()
            raise UsageError(f"{folder.name}: {said[-1] if said else f'exit status {status}'}")

    def stop(self) -> None:
        for process in list(self.running):
            process.terminate()


def control(fork: Fork, seed: int, trainer: Trainer) -> Path:
    """The unchanged run of a seed, complete and with the checkpoint: RUN itself, or trained (again) in the fork's folder."""
    if seed == 0 and complete(fork.run) and fork.step in checkpoint.found(fork.run):
        return fork.run
    folder = fork.place(CONTROL, seed)
    if complete(folder) and fork.step in checkpoint.found(folder):
        return folder
    config = replace(fork.config_of(CONTROL, seed), {"checkpoint.every": fork.step, "checkpoint.keep": 0})
    _write_config(config, folder)
    trainer.train(config.preset, folder)
    return folder


def _write_config(config: Config, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(to_json(replace(config, {"run.dir": str(folder)})), encoding="utf-8")


def branch(fork: Fork, name: str, seed: int, base: Path, trainer: Trainer) -> Path:
    """One branch from the control's checkpoint to its end."""
    folder = fork.place(name, seed)
    if complete(folder):
        return folder
    if not checkpoint.found(folder):
        shutil.rmtree(folder, ignore_errors=True)  # half prepared
        config = replace(fork.config_of(name, seed), {"checkpoint.every": 0})
        _write_config(config, folder)
        for file, when in (("metrics.jsonl", ("step",)), ("events.jsonl", ("step", "called_at"))):
            entries = [e for e in log.read(base / file) if max(e.get(key) or 0 for key in when) < fork.step]
            (folder / file).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        held = base / "checkpoints" / f"step-{fork.step}"
        once = {k: v for k, v in fork.branches[name].items() if (k, v) in (("target", "sync"), ("noise", "drift"))}
        _rewrite(held, folder, config, once, fork.step)
    trainer.train(fork.config.preset, folder)
    return folder


def _rewrite(held: Path, folder: Path, config: Config, once: dict[str, str], step: int) -> None:
    """The checkpoint as one of the branch's configuration, with its target encoder changed if asked, in `folder`."""
    jepa = JEPA(config)
    state, everything = checkpoint.read_state(held), tensors(jepa, optim.build(jepa, config.optim))
    checkpoint.restore(held, everything, None, str(held))
    if once:
        move_target(jepa, once, config.train.seed)
    state["config"] = to_json(replace(config, {"run.dir": str(folder)}))
    writer = checkpoint.Writer(folder, keep=0)
    writer.save(step, everything, state)
    writer.finish()
    writer.close()


@torch.no_grad()
def move_target(jepa: JEPA, once: dict[str, str], seed: int) -> None:
    """`target=sync`: theta_bar <- theta. `noise=drift`: theta_bar plus noise of norm ||theta - theta_bar||, by tensor."""
    generator = torch.Generator().manual_seed(seed)
    for own, other in zip(jepa.context_encoder.parameters(), jepa.target_encoder.parameters(), strict=True):
        if "noise" in once:
            other.add_(_of_norm(torch.randn(other.shape, generator=generator), (own - other).norm()))
        if once.get("target") == "sync":
            other.copy_(own)


def _of_norm(noise: Tensor, norm: Tensor) -> Tensor:
    return noise * (norm / noise.norm().clamp(min=torch.finfo(noise.dtype).tiny))


def execute(fork: Fork, trainer: Trainer) -> dict[str, list[Path]]:
    """{branch: its runs, a seed each}, the control first. Complete ones are kept."""
    fork.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(fork.jobs) as pool:
        try:
            bases = list(pool.map(lambda seed: control(fork, seed, trainer), range(fork.seeds)))
            found = {CONTROL: bases}
            pairs = [(name, seed) for seed in range(fork.seeds) for name in fork.branches]
            made = list(pool.map(lambda pair: branch(fork, pair[0], pair[1], bases[pair[1]], trainer), pairs))
        except BaseException:
            trainer.stop()
            raise
    for (name, _), folder in zip(pairs, made, strict=True):
        found.setdefault(name, []).append(folder)
    return found


# ---- the table ------------------------------------------------------------------------------------


def outcome(folder: Path, since: int) -> dict[str, float]:
    """What is compared of a run: NaN where it has no such thing."""
    records = [r for r in log.read(folder / "metrics.jsonl") if phase.number(r.get("step")) is not None]
    ends = [e.get("end") for e in phase.latest(log.read(folder / "events.jsonl")) if e.get("kind") == phase.PHASE]
    later = [r for r in records if r["step"] >= since]
    out = {"end of phase": float(next((end for end in reversed(ends) if end), math.nan))}
    for name in ("context", "target"):
        probes = [v for _, v in values(later, f"probe/{name}")] or [math.nan]
        out |= {f"best {name}": max(probes), f"final {name}": probes[-1]}
    losses = [v for _, v in values(later, "loss")] or [math.nan]
    return out | {"final loss": losses[-1]}


def rows(found: dict[str, list[Path]], since: int) -> list[dict[str, Any]]:
    """A row for each branch and outcome: mean, half of its 95 % interval over seeds, and the same of the paired difference."""
    held = {name: [outcome(folder, since) for folder in folders] for name, folders in found.items()}
    table = []
    for name, outcomes in held.items():
        for key in outcomes[0]:
            own, base = [o[key] for o in outcomes], [o[key] for o in held[CONTROL]]
            (mean, half), (by, by_half) = _mean(own), _mean([a - b for a, b in zip(own, base, strict=True)])
            table.append({"branch": name, "outcome": key, "runs": sum(map(math.isfinite, own)), "mean": mean, "+-": half,
                          "less the control": by, "+- of it": by_half})  # fmt: skip
    return table


T_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # by degrees of freedom


def _mean(numbers: list[float]) -> tuple[float, float]:
    """(mean of what is finite, half the 95 % interval by Student's t; NaN of one number)."""
    known = [n for n in numbers if math.isfinite(n)]
    if not known:
        return math.nan, math.nan
    if len(known) < 2:
        return known[0], math.nan
    free = len(known) - 1
    return statistics.mean(known), T_95[min(free, 10)] * statistics.stdev(known) / math.sqrt(len(known))


def as_text(table: list[dict[str, Any]]) -> str:
    widths = max(len(row["branch"]) for row in table)
    lines = [f"{'':{widths}}  {'':14} runs {'mean':>9} {'+-':>8}  less the control"]
    for row in table:
        own, by = (f"{row['mean']:9.4g} {row['+-']:8.2g}", f"{row['less the control']:+9.4g} +- {row['+- of it']:.2g}")
        said = "" if row["branch"] == CONTROL else by
        lines.append(f"{row['branch']:{widths}}  {row['outcome']:14} {row['runs']:4} {own}  {said}".rstrip())
    return "\n".join(lines)


def conclude(fork: Fork, found: dict[str, list[Path]]) -> str:
    """Write fork.csv and the comparison page of the first seed's runs; the table as text."""
    table = rows(found, fork.step)
    with (fork.folder / "fork.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    page = report.write_comparison([folders[0] for folders in found.values()], fork.folder)
    return f"{as_text(table)}\n\n+- is half a 95 % interval over seeds; page: {page}, table: {fork.folder / 'fork.csv'}"


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0 if argv else 2
    fork = parse(argv)
    trainer = Trainer(max(1, cores.usable() // fork.jobs))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print(
        f"{fork.run} branched at step {fork.step}: {len(fork.branches)} branches and the control, {fork.seeds} seed(s)",
        flush=True,
    )
    print(conclude(fork, execute(fork, trainer)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
