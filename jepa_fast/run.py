"""Around the training loop: put a run together, write its records and checkpoints, and close it with a verdict."""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from jepa_fast import checkpoint, log, optim, parallel, report, rundir, schedules, survive
from jepa_fast.clock import Clock
from jepa_fast.config import Config, get, replace, to_json
from jepa_fast.data import packing
from jepa_fast.data.dataset import Dataset, open_dataset
from jepa_fast.data.health import Bad
from jepa_fast.data.loader import Loader
from jepa_fast.data.masks import check_masks
from jepa_fast.data.packing import MaskPlan
from jepa_fast.data.parts import changes
from jepa_fast.data.sources import fixed_draw
from jepa_fast.ema import TargetEMA
from jepa_fast.errors import UsageError
from jepa_fast.interop import initial_weights
from jepa_fast.log import Progress, RunLog
from jepa_fast.model.attention import choose_backend
from jepa_fast.model.compile import compiles, num_graphs, warm_up
from jepa_fast.model.jepa import JEPA, Output
from jepa_fast.monitor import FULL_INPUTS, CollapseMonitor, Examination, probes, sentence
from jepa_fast.monitor.views import FixedMasks
from jepa_fast.parallel import Choice, World


@dataclass
class Run:
    """The parts of a training run."""

    config: Config
    world: World
    choice: Choice
    folder: Path
    steps: int  # optimizer steps of the whole run
    warmup: int  # of which with a rising learning rate
    start: int  # steps already made, when resumed
    dataset: Dataset
    jepa: JEPA
    model: nn.Module  # jepa as the loop calls it: wrapped where DDP averages gradients
    optimizer: torch.optim.Optimizer
    ema: TargetEMA
    monitor: CollapseMonitor
    loader: Loader
    clock: Clock
    stop: survive.Preemption
    writer: checkpoint.Writer
    progress: Progress
    lock: IO[str] | None  # of the folder, on the main process

    @property
    def log(self) -> RunLog | None:
        """On the main process."""
        return self.monitor.log

    def records(self, step: int) -> bool:
        """Whether a line of metrics.jsonl is written before step `step`."""
        examination = self.monitor.examination
        seldom = examination is not None and examination.due(step)
        return step % self.config.log.every == 0 or seldom or step == self.steps

    def health(self) -> dict[str, float]:
        """What a record says of the machine and the data since the last. All processes call it."""
        return self.clock.report() | self.loader.health.record()

    def saves(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return (every > 0 and step % every == 0) or step == self.steps


def set_up(config: Config, resume: str, world: World, stop: survive.Preemption) -> Run:
    """Everything that can refuse does so before the run folder is touched. Raises UsageError."""
    with parallel.lead(world):
        for step in (0, 1):  # both ends of a schedule
            check_masks(schedules.masks(config.masks, step, 1), config.grid)
        dataset = open_dataset(config)
        config = _fitted(config, dataset)
        if config.log.tensorboard:
            log.need_tensorboard()
    folder, start = _folder(config, resume, world)
    held = folder / "checkpoints" / f"step-{start}"
    state = checkpoint.read_state(held) if start else None
    per_epoch = len(dataset.train) / config.train.batch_size
    steps = config.train.steps or math.ceil(config.train.epochs * per_epoch)
    warmup = config.optim.warmup_steps + round(config.optim.warmup_epochs * per_epoch)

    choice = parallel.choose(config, world)
    choose_backend(world.device, config.train.precision == "bf16")
    torch.manual_seed(config.train.seed)
    jepa = parallel.build(config, world, choice, _initial_weights(config, world, choice, start))
    model = parallel.distribute(jepa, world, choice)
    ema, optimizer = TargetEMA(jepa), optim.build(jepa, config.optim)
    if state is not None:
        with parallel.lead(world):
            _refuse_other_data(state, dataset, folder)
        checkpoint.restore(held, _tensors(jepa, optimizer), world.host, f"the checkpoint in {folder}")
    progress = Progress(steps, start, quiet=not world.is_main, every=max(config.monitor.every, steps // 40))
    examination = _examination(config, dataset, jepa, world, choice)
    clock = Clock(world, half=config.train.precision == "bf16")
    jepa.target_encoder.encode = clock.timed("target", jepa.target_encoder.encode)  # type: ignore[method-assign]
    buckets = None
    if compiles(config, world.device):
        buckets = packing.ladder(config, _forwarded(config, world))
        if world.is_main:
            counts = f"{len(buckets.context)} context and {len(buckets.predictor)} predictor"
            print(
                f"compiling blocks for {counts} buckets of token totals: minutes the first time, then cached",
                flush=True,
            )
        warm_up(
            model, config, buckets, _forwarded(config, world), world.device, partial(parallel.precision, config, world)
        )
    loader = Loader(config, dataset.train, config.train.seed, world.rank, world.size, start, steps + 1, buckets)
    lock = None
    with parallel.lead(world):
        if world.is_main:  # from here on the folder is written to
            lock = rundir.claim(config, folder, new=not config.run.dir and not start)
    monitor = CollapseMonitor(
        folder, ema.fused, loss=jepa.loss, target_norm=jepa.target_norm, every=config.log.every,
        spectral_every=config.monitor.spectral_every, examination=examination, start=start, say=progress.say,
    )  # fmt: skip
    if state is not None:
        _restore_share(state, monitor, world)
    run = Run(
        config, world, choice, folder, steps, warmup, start, dataset, jepa, model, optimizer, ema, monitor, loader,
        clock, stop, checkpoint.Writer(folder, config.checkpoint.keep, world.files), progress, lock,
    )  # fmt: skip
    if run.log:
        if config.log.tensorboard:
            run.log.mirror_to_tensorboard(folder / "tensorboard", start)
        if start:
            run.log.event("resume", start, processes=world.size)
        _tell_of_data(run, start, dataset.lost)
        _introduce(run)
    return run


def _forwarded(config: Config, world: World) -> int:
    """Inputs of one forward in one process: where blocks are compiled, always as many."""
    share = config.train.batch_size // world.size
    micro = min(config.parallel.micro_batch or share, share)
    if share % micro:
        raise UsageError(
            f"--parallel.micro_batch {micro} does not divide the {share} inputs of each process, as compiled blocks need; "
            "give a divisor, or --model.compile off"
        )
    return micro


def _fitted(config: Config, dataset: Dataset) -> Config:
    """The configuration with length and channels of a series taken from the data, where it leaves them open."""
    if config.data.kind != "series":
        return config
    for name, held in (("data.channels", dataset.shape[0]), ("data.series_length", dataset.shape[1])):
        asked = get(config, name)
        if asked not in (0, held):
            raise UsageError(
                f"--{name} is {asked}, but {dataset.description.split(':')[0]} have {held}: give --{name} {held}"
            )
        config = replace(config, {name: held})
    return config.check()


def _folder(config: Config, resume: str, world: World) -> tuple[Path, int]:
    """Run folder and first step: decided by the main process, the same on all."""
    found = Path(), 0
    with parallel.lead(world):
        if world.is_main:
            folder = Path(config.run.dir) if config.run.dir else rundir.next_free(config.preset)
            found = folder, rundir.find_start(config, folder, resume)
    return parallel.same_everywhere(found, world)


def _initial_weights(config: Config, world: World, choice: Choice, start: int) -> dict[str, Tensor] | None:
    """What --init.from names, if the run begins; read by every process that will build a whole model."""
    weights = None
    with parallel.lead(world):
        if config.init.from_ and not start and (world.is_main or not choice.sharded):
            where, (weights, told) = f"--init.from {config.init.from_}", initial_weights(config.init.from_, config)
            if world.is_main:
                print("".join(f"--init.from: {line}\n" for line in told), end="")
            with torch.device("meta"):
                own = JEPA(config).state_dict()
            checkpoint.check_fit(_shapes(weights), _shapes(own), where)
    return weights


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _examination(config: Config, dataset: Dataset, jepa: JEPA, world: World, choice: Choice) -> Examination:
    """The fixed inputs live on the main process, or on all where only all together can run an encoder."""
    probe_set, inputs = None, torch.empty(0)
    if world.is_main or choice.sharded:
        if dataset.probe_train is not None and dataset.probe_test is not None:
            m = config.monitor
            probe_set = probes.collect(
                dataset.probe_train, dataset.probe_test, dataset.num_classes, m.probe_train, m.probe_test
            )
            inputs = probe_set.test
        else:
            inputs = torch.from_numpy(fixed_draw(dataset.train, FULL_INPUTS)[0])
    return Examination(
        jepa.context_encoder, jepa.target_encoder, inputs, probe_set=probe_set, views=FixedMasks(config),
        config=config.monitor, device=world.device, everywhere=choice.sharded,
        around=partial(parallel.gathered, jepa, config),
    )  # fmt: skip


def _refuse_other_data(state: dict[str, Any], dataset: Dataset, folder: Path) -> None:
    changed = changes(state["data"], dataset.contents)
    if changed:
        raise UsageError(
            f"the data changed since {folder} was started: {changed}; put the old data back, or start a new --run.dir"
        )


def _restore_share(state: dict[str, Any], monitor: CollapseMonitor, world: World) -> None:
    """What this process kept; on another number of processes the mean of all sums, so that means over processes hold."""
    shares = state["processes"]
    own = shares[world.rank % len(shares)]
    if len(shares) != world.size:
        sums = [share["monitor"]["interval"] for share in shares]
        mean = {name: torch.stack([s[name] for s in sums]).mean(0) for name in sums[0]}
        own = own | {"monitor": own["monitor"] | {"interval": mean}}
    monitor.load_state_dict(own["monitor"])
    torch.set_rng_state(own["rng"])
    if "rng/cuda" in own and world.device.type == "cuda":
        torch.cuda.set_rng_state(own["rng/cuda"])


def _tensors(jepa: JEPA, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that is trained or remembered, by the names it has in a checkpoint; the tensors themselves."""
    parallel.settle(jepa)
    weights = {f"model.{name}": value for name, value in jepa.state_dict().items()}
    return weights | {f"optimizer.{name}": value for name, value in optim.moments(optimizer, jepa).items()}


def _introduce(run: Run) -> None:
    config = run.config
    encoder = sum(p.numel() for p in run.jepa.context_encoder.parameters())
    predictor = sum(p.numel() for p in run.jepa.predictor.parameters())
    backend, reason = choose_backend(run.world.device, config.train.precision == "bf16")
    print(f"{config.preset}: {run.dataset.description}")
    for note in run.dataset.notes:
        print(f"data: {note}")
    print(
        f"encoder {encoder / 1e6:.2f} M and predictor {predictor / 1e6:.2f} M parameters, {config.num_tokens} tokens, masks {config.masks.mode}"
    )
    print(
        f"{run.world.size} process(es) on {run.world.device.type}, {torch.get_num_threads()} CPU threads each, {config.train.precision}; ragged attention: {backend} ({reason})"
    )
    print(f"parallel: {run.choice.mode} ({run.choice.reason})")
    if config.train.deterministic and run.world.device.type == "cuda":
        print(
            "deterministic: torch warns of operations that have no such variant; NCCL's sums repeat for equal topology"
        )
    if compiles(config, run.world.device):
        print(f"blocks compiled: {num_graphs()} graphs; none will be added")
    begun = f"continuing at step {run.start}" if run.start else f"{run.steps} steps of {config.train.batch_size}"
    print(f"run folder {run.folder}: {begun}", flush=True)


def show(run: Run, record: dict) -> None:
    """The progress line. Raises UsageError after too many bad steps in a row."""
    names = {"loss": "loss", "discrepancy": "discrepancy/visible", "drift": "drift/total", "probe": "probe/target"}
    shown = {name: record[key] for name, key in names.items() if key in record}
    run.progress.show(record["step"], shown | {"samples/s": record["images_per_s"]})
    _tell_of_data(run, record["step"], run.loader.bad)
    if run.monitor.bad_in_a_row >= run.config.train.max_bad_steps:
        good = checkpoint.found(run.folder)
        raise UsageError(
            f"loss or gradients were not finite for {run.monitor.bad_in_a_row} steps up to step {record['step']}; the weights are those from before; "
            f"lower --optim.lr (now {run.config.optim.lr:g}), or look at the data; last checkpoint: "
            + (f"{run.folder / 'checkpoints' / f'step-{good[-1]}'}" if good else "none yet")
        )


def _tell_of_data(run: Run, step: int, bad: list[Bad]) -> None:
    """An event for each sample that was left out, once in a run however often it is resumed."""
    if bad and run.log is not None:
        told = {e["key"] for e in run.log.events if e["kind"] == "bad_sample"}
        for one in bad:
            if one.key not in told:
                run.log.event("bad_sample", step, key=one.key, reason=one.reason, why=one.kind)


Part = tuple[Output, MaskPlan, float]
"""Outputs and masks of a micro batch, and its share of the process's batch."""


def joined(parts: list[Part]) -> tuple[Output, MaskPlan]:
    """The outputs of micro batches as of one batch, for the monitor: of the plan, rows and weights are of all."""
    if len(parts) == 1:
        return parts[0][0], parts[0][1]
    outputs, plans, shares = zip(*parts, strict=True)
    begins = [0]
    for output in outputs:
        begins.append(begins[-1] + output.target.shape[0] * output.target.shape[1])  # rows of [B * N]
    plan = dataclasses.replace(
        plans[0],
        context_rows=torch.cat([p.context_rows + b for p, b in zip(plans, begins, strict=False)]),
        target_rows=torch.cat([p.target_rows + b for p, b in zip(plans, begins, strict=False)]),
        target_weight=torch.cat([p.target_weight * share for p, share in zip(plans, shares, strict=True)]),
    )
    loss = torch.stack([o.loss.detach() * share for o, share in zip(outputs, shares, strict=True)]).sum()
    return Output(loss, torch.cat([o.context for o in outputs]), torch.cat([o.target for o in outputs])), plan


def save(run: Run, step: int) -> None:
    """Begin a checkpoint of everything the run needs to go on as if it had not stopped. All processes call it."""
    own = {"monitor": run.monitor.state_dict(), "rng": torch.get_rng_state()}
    if run.world.device.type == "cuda":
        own["rng/cuda"] = torch.cuda.get_rng_state()
    state = {
        "step": step,
        "data": run.dataset.contents,
        "config": to_json(run.config),
        "processes": parallel.gather(own, run.world),
    }
    run.writer.save(step, _tensors(run.jepa, run.optimizer), state)
    if not run.config.checkpoint.background:
        run.writer.finish()


def stop_here(run: Run, number: int, step: int) -> None:
    """The checkpoint of `step` written out. Raises Preempted."""
    run.writer.finish()
    if run.log:
        run.log.event("preempted", step, signal=number)
    parallel.barrier(run.world)
    raise survive.farewell(number, step, run.folder)


@contextmanager
def watched(run: Run) -> Iterator[None]:
    """Around the loop: a watchdog; threads and files closed however it ends; errors noted, each process its own."""
    dog = survive.Watchdog(run.world, run.clock, 0.8 * run.config.parallel.timeout)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not isinstance(error, (UsageError, survive.Preempted)):
            survive.note_error(run.folder, run.world, run.clock, error)
        line = survive.lost_contact(error, run.world, run.clock)
        if line is None:
            raise
        print(f"error: {line}", flush=True)
        os._exit(1)  # threads that wait for the lost process would hold up a normal exit
    finally:
        dog.close()
        run.loader.close()
        run.writer.close()


def close(run: Run) -> None:
    """Say what happened, in plain words, and where the report is."""
    for bad in parallel.gather(run.loader.bad, run.world):
        _tell_of_data(run, run.steps, bad)
    if run.log is None:
        return
    skipped = Counter(e["why"] for e in run.log.events if e["kind"] == "bad_sample")
    events = run.monitor.close()
    print()
    print(report.verdict(run.log.records, events, run.dataset.description))
    for event in events:
        print(sentence(event))
    if skipped:
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(skipped.items()))
        print(f"samples left out: {sum(skipped.values())} ({reasons}); events.jsonl names them")
    print(f"report: {report.write(run.folder)}", flush=True)
    if run.lock:
        run.lock.close()
