"""A training run: its parts, its records and checkpoints, and its close, with a verdict. `assemble` puts one together."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from jepa_fast import checkpoint, optim, parallel, preemption, report, schedules
from jepa_fast.clock import Clock
from jepa_fast.config import Config, to_json
from jepa_fast.data.dataset import Dataset
from jepa_fast.data.loading.loader import Loader
from jepa_fast.data.sample import Bad
from jepa_fast.ema import TargetEMA
from jepa_fast.errors import UsageError
from jepa_fast.log import Progress, RunLog
from jepa_fast.masks.packing import MaskPlan
from jepa_fast.masks.reference import BLOCKLESS
from jepa_fast.model.jepa import JEPA, Output
from jepa_fast.monitor import CollapseMonitor, sentence
from jepa_fast.monitor.best import Best
from jepa_fast.parallel import Layout, World


@dataclass
class Run:
    """The parts of a training run."""

    config: Config
    world: World
    layout: Layout
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
    stop: preemption.Preemption
    writer: checkpoint.Writer
    best: Best  # look so far
    progress: Progress
    log: RunLog | None  # on the main process
    lock: IO[str] | None  # of the folder, on the main process

    def records(self, step: int) -> bool:
        """Whether a line of metrics.jsonl is written before step `step`."""
        examination = self.monitor.examination
        seldom = examination is not None and examination.due(step)
        return step % self.config.log.every == 0 or seldom or step == self.steps

    def measurements(self) -> dict[str, float]:
        """What a record says of the machine and the data since the last, and of the update to come. All call it."""
        step = self.monitor.step
        levers = {
            "schedule/lr": schedules.learning_rate(self.config.optim, step, self.steps, self.warmup),
            "schedule/weight_decay": schedules.weight_decay(self.config.optim, step, self.steps),
            "schedule/ema_decay": self.ema.decay(step, self.steps),
        }
        masks = self.config.masks
        if masks.schedule != "constant":
            now = schedules.masks(masks, step, self.steps)
            if masks.mode in BLOCKLESS:
                levers["schedule/ratio"] = now.ratio
            else:
                levers["schedule/target_scale"] = sum(now.target_scale) / 2
        return self.clock.report() | self.loader.stats.record() | levers

    def looks(self, step: int) -> bool:
        """Whether both encoders are examined at `step` with everything that says what they are worth."""
        return step % self.config.monitor.every == 0 or step == self.steps

    def more(self, output: Output) -> dict[str, float]:
        """What else a record holds. All processes call it."""
        if "regularizer" not in output.terms:
            return self.measurements()
        term = output.terms["regularizer"].item()
        weighted = self.jepa.regularizer.weight * term
        return self.measurements() | {"loss/regularizer": term, "loss/regularizer_weighted": weighted}

    def saves(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return (every > 0 and step % every == 0) or step == self.steps


def tensors(jepa: JEPA, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that is trained or remembered, by the names it has in a checkpoint; the tensors themselves."""
    parallel.settle(jepa)
    weights = {f"model.{name}": value for name, value in jepa.state_dict().items()}
    return weights | {f"optimizer.{name}": value for name, value in optim.moments(optimizer, jepa).items()}


def show(run: Run, record: dict) -> None:
    """The progress line. Raises UsageError after too many bad steps in a row."""
    shown = {"phase": record["phase/state"]} if "phase/state" in record else {}
    useful, probes = ([v for name in ("context", "target") if (v := record.get(f"{kind}/{name}")) is not None]
                      for kind in ("phase/useful", "probe"))  # fmt: skip
    shown |= {"p(useful)": max(useful)} if useful else {}
    shown |= {name: record[key] for name, key in {"loss": "loss", "skill": "skill/smooth"}.items() if key in record}
    shown |= {"probe": max(probes)} if probes else {}
    run.progress.show(record["step"], shown | {"samples/s": record["images_per_s"]})
    tell_of_data(run, record["step"], run.loader.bad)
    if run.monitor.bad_in_a_row >= run.config.train.max_bad_steps:
        run.writer.finish()
        good = checkpoint.found(run.folder)
        raise parallel.refusal(
            f"loss or gradients were not finite for {run.monitor.bad_in_a_row} steps up to step {record['step']}; the weights are those from before; "
            f"lower --optim.lr (now {run.config.optim.lr:g}), or look at the data; last checkpoint: "
            + (f"{run.folder / 'checkpoints' / f'step-{good[-1]}'}" if good else "none yet"),
            run.world,
        )


def release(run: Run, record: dict) -> None:
    """Let a teacher that waits for it (`--ema.schedule escape`) move from here on, if this record says so."""
    if run.ema.look(record, run.world) and run.log is not None:
        skill, error = record["skill/smooth"], record["skill/error"]
        run.log.event("teacher_released", record["step"], skill=skill, error=error)
        run.progress.say(f"event: teacher released, step {record['step']:,}: skill {skill:.2f} +- {2 * error:.2f}")


def tell_of_data(run: Run, step: int, bad: list[Bad]) -> None:
    """An event for each sample that was left out, once in a run however often it is resumed."""
    if bad and run.log is not None:
        known = {e["key"] for e in run.log.events if e["kind"] == "bad_sample"}
        for one in bad:
            if one.key not in known:
                run.log.event("bad_sample", step, key=one.key, reason=one.reason, why=one.kind)


MicroBatch = tuple[Output, MaskPlan, float]
"""Outputs and masks of a micro batch, and its share of the process's batch."""


def joined(micro_batches: list[MicroBatch]) -> tuple[Output, MaskPlan]:
    """The outputs of micro batches as of one batch, for the monitor: of the plan, rows and weights are of all."""
    if len(micro_batches) == 1:
        return micro_batches[0][0], micro_batches[0][1]
    outputs, plans, shares = zip(*micro_batches, strict=True)
    begins = [0]
    for output in outputs:
        begins.append(begins[-1] + output.target.shape[0] * output.target.shape[1])  # rows of [B * N]
    plan = dataclasses.replace(
        plans[0],
        context_rows=torch.cat([p.context_rows + b for p, b in zip(plans, begins, strict=False)]),
        target_rows=torch.cat([p.target_rows + b for p, b in zip(plans, begins, strict=False)]),
        target_weight=torch.cat([p.target_weight * share for p, share in zip(plans, shares, strict=True)]),
    )

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack([value.detach() * share for value, share in zip(values, shares, strict=True)]).sum()

    return Output(
        loss=mean([o.loss for o in outputs]),
        context=torch.cat([o.context for o in outputs]),
        target=torch.cat([o.target for o in outputs]),
        terms={name: mean([o.terms[name] for o in outputs]) for name in outputs[0].terms},
        statistics=outputs[0].statistics,  # the same for all
        wanted=torch.cat([o.wanted for o in outputs]),
    ), plan


def save(run: Run, step: int) -> None:
    """Begin a checkpoint of everything the run needs to go on as if it had not stopped. All processes call it."""
    own = {"monitor": run.monitor.state_dict(), "rng": torch.get_rng_state()}
    if run.world.device.type == "cuda":
        own["rng/cuda"] = torch.cuda.get_rng_state()
    state = {
        "step": step,
        "data": run.dataset.contents,
        "config": to_json(run.config),
        "released": run.ema.released,
        "processes": parallel.gather(own, run.world),
    }
    run.writer.save(step, tensors(run.jepa, run.optimizer), state)
    if not run.config.checkpoint.background:
        run.writer.finish()


def keep_best(run: Run, record: dict) -> None:
    """After a look: keep the weights if none before were as good (`checkpoint.keep_best`). All processes call it."""
    step = record["step"]
    if not (run.config.checkpoint.keep_best and run.looks(step)):
        return
    known = run.best.state() if run.log and run.best.add(record) else None  # the main process has the record's probes
    known = parallel.same_everywhere(known, run.world)
    if known is None:
        return
    state = {"step": step, "data": run.dataset.contents, "config": to_json(run.config), "best": known}
    weights = {name: value for name, value in tensors(run.jepa, run.optimizer).items() if name.startswith("model.")}
    run.writer.save(step, weights, state, best=True)
    if not run.config.checkpoint.background:
        run.writer.finish()


def stop_here(run: Run, number: int, step: int) -> None:
    """The checkpoint of `step` written out. Raises Preempted."""
    run.writer.finish()
    if run.log:
        run.log.event("preempted", step, signal=number)
    parallel.barrier(run.world)
    raise preemption.farewell(number, step, run.folder)


@contextmanager
def watched(run: Run) -> Iterator[None]:
    """Around the loop: a watchdog; threads and files closed however it ends; errors noted, each process its own."""
    dog = preemption.Watchdog(run.world, run.clock, 0.8 * run.config.parallel.timeout)
    try:
        yield
        run.writer.finish()
    except (Exception, KeyboardInterrupt) as error:
        with suppress(UsageError):  # what ended the run may be among them
            tell_of_data(run, run.clock.step, run.loader.bad)
        if not isinstance(error, UsageError):
            preemption.note_error(run.folder, run.world, run.clock, error)
        preemption.end_if_alone(error, run.world, f"{run.clock.phase_now} of step {run.clock.step}")
        raise
    finally:
        dog.close()
        run.loader.close()
        run.writer.close()


def close(run: Run) -> None:
    """Say what happened, in plain words, and where the report is."""
    for bad in parallel.gather(run.loader.bad, run.world):
        tell_of_data(run, run.steps, bad)
    if run.log is None:
        return
    events = run.monitor.close()
    run.log.close()
    print()
    print(report.verdict(run.log.records, events, run.dataset.description))
    for event in events:
        print(sentence(event))
    if skipped := report.left_out(run.log.events):
        print(skipped)
    again = f"python -m jepa_fast.report {run.folder} writes it"
    try:
        print(f"report: {report.write(run.folder) if run.config.log.report else again}", flush=True)
    except OSError as error:
        raise UsageError(f"the run is complete, its report is not written: {error.strerror}; {again}") from None
    if run.lock:
        run.lock.close()
