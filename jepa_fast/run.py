"""Around the training loop: put a run together, write its records and checkpoints, and close it with a verdict."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from jepa_fast import checkpoint, optim, parallel, report, rundir, schedules
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
from jepa_fast.monitor import FULL_INPUTS, CollapseMonitor, Examination, probes, sentence
from jepa_fast.monitor.views import FixedMasks
from jepa_fast.parallel import World


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
    progress: Progress

    @property
    def log(self) -> RunLog | None:
        """On the main process."""
        return self.monitor.log


def set_up(config: Config, resume: str, world: World) -> Run:
    """Everything that can refuse does so before the run folder is touched. Raises UsageError."""
    for step in (0, 1):  # both ends of a schedule
        check_masks(schedules.masks(config.masks, step, 1), config.grid)
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
    model = parallel.distribute(jepa, world)
    ema, optimizer = TargetEMA(jepa), optim.build(jepa, config.optim)
    progress = Progress(steps, start, quiet=not world.is_main, every=max(config.monitor.every, steps // 40))
    examination = _examination(config, dataset, jepa, world)
    if state is not None:
        _restore(config, folder, dataset, jepa, optimizer, state)
    loader = Loader(config, dataset.train, config.train.seed, world.rank, world.size, start, steps + 1)
    if world.is_main:  # from here on the folder is written to
        rundir.claim(config, folder)
    monitor = CollapseMonitor(
        folder, ema.fused, loss=jepa.loss, target_norm=jepa.target_norm, every=config.log.every,
        spectral_every=config.monitor.spectral_every, examination=examination, start=start, say=progress.say,
    )  # fmt: skip
    if state is not None:
        monitor.load_state_dict(state["monitor"])
    run = Run(
        config, world, folder, steps, warmup, start, dataset, jepa, model, optimizer, ema, monitor, loader, progress
    )
    if world.is_main:
        if start and run.log:
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


def _examination(config: Config, dataset: Dataset, jepa: JEPA, world: World) -> Examination:
    """The fixed inputs live on the main process only."""
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
    return Examination(
        jepa.context_encoder, jepa.target_encoder, inputs, probe_set=probe_set, views=FixedMasks(config),
        config=config.monitor, device=world.device,
    )  # fmt: skip


def _restore(
    config: Config, folder: Path, dataset: Dataset, jepa: JEPA, optimizer: torch.optim.Optimizer, state: dict
) -> None:
    if state["data"] != dataset.fingerprint:
        raise UsageError(
            f"the data changed since {folder} was started (fingerprint {state['data'][:12]} then, {dataset.fingerprint[:12]} now); put the old data back, or start a new --run.dir"
        )
    _load_weights(jepa, state["model"], f"the checkpoint in {folder}")
    optimizer.load_state_dict(state["optimizer"])
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


def show(run: Run, record: dict) -> None:
    """The progress line. Raises UsageError after too many bad steps in a row."""
    names = {"loss": "loss", "discrepancy": "discrepancy/visible", "drift": "drift/total", "probe": "probe/target"}
    shown = {name: record[key] for name, key in names.items() if key in record}
    run.progress.show(record["step"], shown | {"samples/s": record["images_per_s"]})
    if run.monitor.bad_in_a_row >= run.config.train.max_bad_steps:
        good = checkpoint.found(run.folder)
        raise UsageError(
            f"loss or gradients were not finite for {run.monitor.bad_in_a_row} steps up to step {record['step']}; the weights are those from before; "
            f"lower --optim.lr (now {run.config.optim.lr:g}), or look at the data; last checkpoint: "
            + (f"{run.folder / 'checkpoints' / f'step-{good[-1]}'}" if good else "none yet")
        )


def save(run: Run, step: int) -> None:
    """A checkpoint of everything the run needs to go on as if it had not stopped; written by the main process."""
    if run.world.is_main:
        state = {
            "step": step,
            "model": run.jepa.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "monitor": run.monitor.state_dict(),
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
    events = run.monitor.close()
    print()
    print(report.verdict(run.log.records, events, run.dataset.description))
    for event in events:
        print(sentence(event))
    print(f"report: {report.write(run.folder)}", flush=True)
