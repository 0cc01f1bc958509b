"""Around the training loop: put a run together, write its records and checkpoints, and close it with a verdict."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from jepa_fast import checkpoint, optim, parallel, report, rundir
from jepa_fast.config import Config, get, replace
from jepa_fast.data.dataset import Dataset, open_dataset
from jepa_fast.data.loader import Loader
from jepa_fast.data.masks import check_masks
from jepa_fast.data.sources import fixed_draw
from jepa_fast.ema import TargetEMA
from jepa_fast.errors import UsageError
from jepa_fast.log import Progress, RunLog
from jepa_fast.model.attention import choose_backend
from jepa_fast.model.jepa import JEPA
from jepa_fast.monitor import FULL_INPUTS, CollapseMonitor, phase, probes
from jepa_fast.parallel import World


class Interval:
    """Sums since the last record, kept on the device until that record is written."""

    def __init__(self, device: torch.device, bad_in_a_row: Tensor | None = None):
        self.began = time.monotonic()
        self.loss, self.num_finite, self.num_bad = torch.zeros(3, device=device).unbind()
        self.bad_in_a_row = torch.zeros((), device=device) if bad_in_a_row is None else bad_in_a_row
        self.num_steps, self.num_inputs, self.wait, self.examining = 0, 0, 0.0, 0.0

    def add(self, loss: Tensor, num_inputs: int, wait: float) -> None:
        finite = torch.isfinite(loss.detach())
        self.loss += torch.where(finite, loss.detach(), 0.0)
        self.num_finite += finite
        self.num_steps, self.num_inputs, self.wait = self.num_steps + 1, self.num_inputs + num_inputs, self.wait + wait

    def judge(self, finite: Tensor) -> None:
        """Count a step that changed nothing."""
        bad = (~finite).float()
        self.num_bad += bad
        self.bad_in_a_row = (self.bad_in_a_row + 1) * bad

    def scalars(self) -> dict[str, Tensor]:
        return {"loss": self.loss / self.num_finite, "bad": self.num_bad, "bad_in_a_row": self.bad_in_a_row}

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "loss": self.loss,
            "num_finite": self.num_finite,
            "num_bad": self.num_bad,
            "bad_in_a_row": self.bad_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)


@dataclass
class Run:
    """The parts of a training run."""

    config: Config
    world: World
    folder: Path
    steps: int  # optimizer steps of the whole run
    warmup: int  # of which with a rising learning rate
    start: int  # steps already made, when resumed
    dataset: Dataset
    jepa: JEPA
    model: nn.Module  # jepa as the loop calls it: wrapped where there are several processes
    optimizer: torch.optim.Optimizer
    ema: TargetEMA
    monitor: CollapseMonitor
    loader: Loader
    interval: Interval
    log: RunLog | None  # on the main process
    progress: Progress

    def examines(self, step: int) -> bool:
        """Whether this process looks at the encoders before step `step`: periodically, and at both ends."""
        return self.world.is_main and (step % self.config.monitor.every == 0 or step == self.steps)


def set_up(config: Config, resume: str, world: World) -> Run:
    """Everything that can refuse does so before the run folder is touched. Raises UsageError."""
    check_masks(config.masks, config.grid)
    dataset = open_dataset(config)
    config = _fitted(config, dataset)
    folder, start, state = _folder(config, resume, world)
    per_epoch = len(dataset.train) / config.train.batch_size
    steps = config.train.steps or math.ceil(config.train.epochs * per_epoch)
    warmup = config.optim.warmup_steps + round(config.optim.warmup_epochs * per_epoch)

    torch.manual_seed(config.train.seed)
    jepa = JEPA(config)
    if config.init.from_ and state is None:
        _load_weights(jepa, checkpoint.weights_at(config.init.from_), f"--init.from {config.init.from_}")
    jepa.to(world.device)
    run = Run(
        config, world, folder, steps, warmup, start, dataset, jepa,
        model=parallel.distribute(jepa, world),
        optimizer=optim.build(jepa, config.optim),
        ema=TargetEMA(jepa),
        monitor=_monitor(config, dataset, world),
        loader=Loader(config, dataset.train, config.train.seed, world.rank, world.size, start, steps + 1),
        interval=Interval(world.device),
        log=None,
        progress=Progress(steps, start, quiet=not world.is_main, every=max(config.monitor.every, steps // 40)),
    )  # fmt: skip
    if state is not None:
        _restore(run, state)
    if world.is_main:  # from here on the folder is written to
        rundir.claim(config, folder)
        run.log = RunLog(folder, start)
        if start:
            run.log.event("resume", start, processes=world.size)
        _introduce(run)
    return run


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


def _folder(config: Config, resume: str, world: World) -> tuple[Path, int, dict | None]:
    """Run folder, first step, checkpoint: decided by the main process, the same on all."""
    folder, step = Path(), 0
    if world.is_main:
        folder = Path(config.run.dir) if config.run.dir else rundir.next_free(config.preset)
        step = rundir.find_start(config, folder, resume)
    folder, step = parallel.same_everywhere((folder, step), world)
    return folder, step, checkpoint.load(folder / "checkpoints" / f"step-{step}") if step else None


def _load_weights(jepa: JEPA, weights: dict[str, Tensor], where: str) -> None:
    own = jepa.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        raise UsageError(
            f"{where} is another architecture: it has {'no ' + missing[0] if missing else unknown[0]}; use the preset it was trained with"
        )
    for name, value in weights.items():
        if own[name].shape != value.shape:
            raise UsageError(
                f"{where} is another architecture: {name} is {list(value.shape)} there and {list(own[name].shape)} here"
            )
    jepa.load_state_dict(weights)


def _monitor(config: Config, dataset: Dataset, world: World) -> CollapseMonitor:
    """The probe set lives on the main process only."""
    probe_set, inputs = None, torch.empty(0)
    if world.is_main:
        if dataset.probe_train is not None and dataset.probe_test is not None:
            m = config.monitor
            probe_set = probes.collect(
                dataset.probe_train, dataset.probe_test, dataset.num_classes, m.probe_train, m.probe_test
            )
            inputs = probe_set.test
        else:
            inputs = torch.from_numpy(fixed_draw(dataset.train, FULL_INPUTS)[0])
    return CollapseMonitor(config, probe_set, inputs, world.device)


def _restore(run: Run, state: dict) -> None:
    if state["data"] != run.dataset.fingerprint:
        raise UsageError(
            f"the data changed since {run.folder} was started (fingerprint {state['data'][:12]} then, {run.dataset.fingerprint[:12]} now); put the old data back, or start a new --run.dir"
        )
    _load_weights(run.jepa, state["model"], f"the checkpoint in {run.folder}")
    run.optimizer.load_state_dict(state["optimizer"])
    run.monitor.load_state_dict(state["monitor"])
    run.interval.load_state_dict(state["interval"])
    torch.set_rng_state(state["rng"])


def _introduce(run: Run) -> None:
    config = run.config
    encoder = sum(p.numel() for p in run.jepa.context_encoder.parameters())
    predictor = sum(p.numel() for p in run.jepa.predictor.parameters())
    backend, reason = choose_backend(run.world.device, config.train.precision == "bf16")
    print(f"{config.preset}: {run.dataset.description}")
    print(
        f"encoder {encoder / 1e6:.2f} M and predictor {predictor / 1e6:.2f} M parameters, {config.num_tokens} tokens, masks {config.masks.mode}"
    )
    print(
        f"{run.world.size} process(es) on {run.world.device.type}, {torch.get_num_threads()} CPU threads each, {config.train.precision}; ragged attention: {backend} ({reason})"
    )
    begun = f"continuing at step {run.start}" if run.start else f"{run.steps} steps of {config.train.batch_size}"
    print(f"run folder {run.folder}: {begun}", flush=True)


def write_record(
    run: Run, step: int, interval: Interval, signals: dict[str, Tensor], examined: dict[str, float]
) -> None:
    """One line of metrics.jsonl, the progress line and new events. Raises UsageError after too many bad steps in a row."""
    values = parallel.average(interval.scalars() | signals, run.world)
    bad, bad_in_a_row = round(values.pop("bad")), round(values.pop("bad_in_a_row"))
    drift = run.ema.drift()
    seconds = max(1e-9, time.monotonic() - interval.began - run.monitor.seconds)
    rate = interval.num_inputs * run.world.size / seconds
    times = {
        "time/step": seconds / interval.num_steps,
        "time/data_wait": interval.wait / interval.num_steps,
        "time/examine": run.monitor.seconds,
    }
    run.monitor.seconds = 0.0
    if run.log:
        run.log.record({"step": step, **values, **drift, **examined, **times, "images_per_s": rate})
        shown = {"loss": values["loss"], "discrepancy": values["discrepancy/visible"], "drift": drift["drift/total"]}
        probe = {"probe": examined["probe/target"]} if "probe/target" in examined else {}
        run.progress.show(step, shown | probe | {"samples/s": rate})
        if bad:
            run.log.event("skipped_step", step, count=bad)
        if examined:
            _announce(run)
    if bad_in_a_row >= run.config.train.max_bad_steps:
        good = checkpoint.found(run.folder)
        raise UsageError(
            f"loss or gradients were not finite for {bad_in_a_row} steps up to step {step}; the weights are those from before; "
            f"lower --optim.lr (now {run.config.optim.lr:g}), or look at the data; last checkpoint: "
            + (f"{run.folder / 'checkpoints' / f'step-{good[-1]}'}" if good else "none yet")
        )


def _announce(run: Run) -> None:
    """Events that the records called by now, each once."""
    assert run.log is not None
    told = {(e["kind"], e.get("called_at")) for e in run.log.events}
    for event in phase.detect(run.log.records):
        if (event.kind, event.called_at) not in told:
            run.log.event(
                event.kind,
                event.step,
                called_at=event.called_at,
                confidence=event.confidence,
                evidence=list(event.evidence),
            )
            run.progress.say(_sentence(run.log.events[-1]))


def _sentence(event: dict) -> str:
    return f"event: {event['kind'].replace('_', ' ')}, step {event['step']:,}: {'; '.join(event['evidence'])}"


def save(run: Run, step: int) -> None:
    """A checkpoint of everything the run needs to go on as if it had not stopped; written by the main process."""
    if run.world.is_main:
        state = {
            "step": step,
            "model": run.jepa.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "monitor": run.monitor.state_dict(),
            "interval": run.interval.state_dict(),
            "data": run.dataset.fingerprint,
            "rng": torch.get_rng_state(),
        }
        checkpoint.save(run.folder, step, state, run.config.checkpoint.keep)
    parallel.barrier(run.world)


def close(run: Run) -> None:
    """Say what happened, in plain words, and where the report is."""
    run.loader.close()
    if run.log is None:
        return
    for key, reason in run.loader.bad:
        run.log.event("bad_sample", run.steps, key=key, reason=reason)
    run.log.close()
    events = [e for e in run.log.events if "evidence" in e]
    print()
    print(report.verdict(run.log.records, events, run.dataset.description))
    for event in events:
        print(_sentence(event))
    print(f"report: {report.write(run.folder)}", flush=True)
