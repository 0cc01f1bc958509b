"""Put a run together: data, model, optimizer, EMA, monitor, loader, checkpoint; on one process or many.

In: a configuration. Out: a Run. Everything that can refuse does so before the run folder is touched.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_fast import checkpoint, inputs, optim, parallel, preemption, rundir, schedules, sinks
from jepa_fast.clock import Clock
from jepa_fast.config import Config, check, get, replace
from jepa_fast.data.dataset import Dataset, open_dataset
from jepa_fast.data.loading.loader import Loader
from jepa_fast.data.opened import changes
from jepa_fast.data.readers import ucr
from jepa_fast.data.sources import fixed_draw
from jepa_fast.ema import TargetEMA
from jepa_fast.errors import UsageError
from jepa_fast.interop import initial_weights, load_encoder
from jepa_fast.log import Progress, RunLog
from jepa_fast.masks.ladder import ladder
from jepa_fast.masks.sample import check_masks
from jepa_fast.model.attention import choose_backend
from jepa_fast.model.compile import compiles, num_graphs, warm_up
from jepa_fast.model.jepa import JEPA
from jepa_fast.monitor import FULL_INPUTS, CollapseMonitor, Examination, probes
from jepa_fast.monitor.best import Best
from jepa_fast.monitor.fixed_masks import FixedMasks
from jepa_fast.monitor.heldout import HeldOut
from jepa_fast.parallel import Layout, World
from jepa_fast.run import Run, tell_of_data, tensors


def set_up(config: Config, resume: str, world: World, stop: preemption.Preemption, typed: bool = False) -> Run:
    """Everything that can refuse does so before the run folder is touched. `typed`: see open_dataset. Raises UsageError."""
    with parallel.lead(world):
        for step in (0, 1):  # both ends of a schedule
            check_masks(schedules.masks(config.masks, step, 1), config.grid)
        dataset = open_dataset(config, typed)
        config = _fitted(config, dataset)
        sinks.check(config)
    folder, start = _folder(config, resume, world)
    held = folder / "checkpoints" / f"step-{start}"
    state = checkpoint.read_state(held) if start else None
    per_epoch = len(dataset.train) / config.train.batch_size
    steps = config.train.steps or math.ceil(config.train.epochs * per_epoch)
    with parallel.lead(world):
        if steps < start:
            raise UsageError(
                f"{folder} has made {start} steps, and --train.steps asks for {steps}: give more, or another --run.dir"
            )
    warmup = config.optim.warmup_steps + round(config.optim.warmup_epochs * per_epoch)

    layout = parallel.choose(config, world)
    choose_backend(world.device, config.train.precision == "bf16")
    torch.manual_seed(config.train.seed)
    jepa = parallel.build(config, world, layout, _initial_weights(config, world, layout, start))
    model = parallel.distribute(jepa, world, layout)
    ema, optimizer = TargetEMA(jepa, config), optim.build(jepa, config.optim)
    if state is not None:
        with parallel.lead(world):
            _refuse_other_data(state, dataset, folder)
        checkpoint.restore(held, tensors(jepa, optimizer), world.host, f"the checkpoint in {folder}")
    progress = Progress(steps, start, quiet=not world.is_main, every=max(config.monitor.every, steps // 40))
    examination = _examination(config, dataset, jepa, world, layout)
    clock = Clock(world, half=config.train.precision == "bf16")
    jepa.phase = clock.phase_of_forward
    buckets = None
    if compiles(config, world.device):
        buckets = ladder(config, _forwarded(config, world))
        if world.is_main:
            counts = f"{len(buckets.context)} context and {len(buckets.predictor)} predictor"
            print(
                f"compiling blocks for {counts} buckets of token totals: minutes the first time, then cached",
                flush=True,
            )
        warm_up(
            model, config, buckets, _forwarded(config, world), world.device, partial(parallel.precision, config, world)
        )
        jepa.targets.forget()  # what it has seen was no data
    loader = Loader(config, dataset.train, config.train.seed, world.rank, world.size, start, steps + 1, buckets)
    lock, log = None, None
    with parallel.lead(world):
        if world.is_main:  # from here on the folder is written to
            lock = rundir.claim(config, folder, new=not config.run.dir and not start)
            log = RunLog(folder, start, sinks.opened(config, folder, start))
    stop.folder = folder
    monitor = CollapseMonitor(
        log, ema.fused, loss=jepa.loss, target_norm=jepa.target_norm, grid=config.grid, every=config.log.every,
        spectral_every=config.monitor.spectral_every, examination=examination, start=start, say=progress.say,
    )  # fmt: skip
    if state is not None:
        _restore_share(state, monitor, world)
        ema.released = state.get("released")
    run = Run(
        config, world, layout, folder, steps, warmup, start, dataset, jepa, model, optimizer, ema, monitor, loader,
        clock, stop, checkpoint.Writer(folder, config.checkpoint.keep, world.files),
        Best(checkpoint.kept(folder)), progress, log, lock,
    )  # fmt: skip
    if run.log:
        if start:
            run.log.event("resume", start, processes=world.size)
        tell_of_data(run, start, dataset.lost)
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
    """The configuration with what the data decide, such as the length of a series: where it leaves that open, or names a set."""
    for name, held in inputs.find(config.data.kind).from_data(config, dataset.shape).items():
        asked = get(config, name)
        if asked not in (0, held) and not ucr.named(config.data.path):
            raise UsageError(
                f"--{name} is {asked}, but {dataset.description.split(':')[0]} have {held}: give --{name} {held}"
            )
        config = replace(config, {name: held})
    return check(config)


def _folder(config: Config, resume: str, world: World) -> tuple[Path, int]:
    """Run folder and first step: decided by the main process, the same on all."""
    found = Path(), 0
    with parallel.lead(world):
        if world.is_main:
            folder = Path(config.run.dir) if config.run.dir else rundir.next_free(config.preset)
            found = folder, rundir.find_start(config, folder, resume)
    return parallel.same_everywhere(found, world)


def _initial_weights(config: Config, world: World, layout: Layout, start: int) -> dict[str, Tensor] | None:
    """What --init.from names, if the run begins; read by every process that will build a whole model."""
    weights = None
    with parallel.lead(world):
        if config.init.from_ and not start and (world.is_main or not layout.sharded):
            where, (weights, told) = f"--init.from {config.init.from_}", initial_weights(config.init.from_, config)
            with torch.device("meta"):
                own = _weights_alone(JEPA(config).state_dict())
            weights = _weights_alone(weights)
            checkpoint.check_fit(_shapes(weights), _shapes(own), where)
            if lost := [name for name, value in weights.items() if not value.isfinite().all()]:
                raise UsageError(f"{where}: {lost[0]} holds NaN or infinite weights; take another checkpoint")
            if world.is_main:
                print("".join(f"--init.from: {line}\n" for line in told), end="")
        if config.teacher.from_ and not start and (world.is_main or not layout.sharded):
            weights = (weights or {}) | _teacher_weights(config)
    return weights


def _teacher_weights(config: Config) -> dict[str, Tensor]:
    """The target encoder that --teacher.from names, under its names in a JEPA. Raises UsageError if it is of another shape."""
    where, found = (
        f"--teacher.from {config.teacher.from_}",
        load_encoder(config.teacher.from_, heads=config.model.heads),
    )
    held = found.encoder
    with torch.device("meta"):
        own = JEPA(config).target_encoder
    for what, theirs, ours in (
        ("tokens", held.grid, own.grid), ("width", held.width, own.width), ("depth", len(held.blocks), len(own.blocks)),
        ("heads", held.width // held.head_width, config.model.heads),
    ):  # fmt: skip
        if theirs != ours:
            raise UsageError(f"{where} has {what} {theirs}, this run {ours}: give a teacher of the run's own shape")
    checkpoint.check_fit(_shapes(held.state_dict()), _shapes(own.state_dict()), where)
    return {f"target_encoder.{name}": value.clone() for name, value in held.state_dict().items()}


def _weights_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A JEPA's state without the statistics of its targets: these are of the encoder that trained, and begin anew."""
    return {name: value for name, value in state.items() if not name.startswith("targets.")}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _examination(config: Config, dataset: Dataset, jepa: JEPA, world: World, layout: Layout) -> Examination:
    """The fixed inputs live on the main process, or on all where only all together can run an encoder.

    Those that cannot be read are added to what the dataset has lost."""
    probe_set, inputs = None, torch.empty(0)
    if world.is_main or layout.sharded:
        if dataset.probe_train is not None and dataset.probe_test is not None:
            m = config.monitor
            probe_set = probes.collect(
                dataset.probe_train, dataset.probe_test, dataset.num_classes, m.probe_train, m.probe_test, dataset.lost
            )
            inputs = probe_set.test
        else:
            count = max(FULL_INPUTS, config.monitor.probe_train)
            inputs = torch.from_numpy(fixed_draw(dataset.train, count, dataset.lost)[0])
    return Examination(
        jepa.context_encoder, jepa.target_encoder, inputs, probe_set=probe_set, views=FixedMasks(config),
        objective=HeldOut(jepa, config) if dataset.held_out else None,
        config=config.monitor, device=world.device, everywhere=layout.sharded,
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


def _introduce(run: Run) -> None:
    config = run.config
    encoder = sum(p.numel() for p in run.jepa.context_encoder.parameters())
    predictor = sum(p.numel() for p in run.jepa.predictor.parameters())
    backend, reason = choose_backend(run.world.device, config.train.precision == "bf16")
    print(f"{config.preset}: {run.dataset.description}")
    for note in [*run.dataset.notes, *filter(None, [run.loader.where])]:
        print(f"data: {note}")
    if config.train.batch_size > len(run.dataset.train):
        print(
            f"data: --train.batch_size is {config.train.batch_size}, but there are {len(run.dataset.train)} training samples: "
            "every batch holds samples more than once"
        )
    print(
        f"encoder {encoder / 1e6:.2f} M and predictor {predictor / 1e6:.2f} M parameters, {config.num_tokens} tokens, masks {config.masks.mode}"
    )
    print(
        f"{run.world.size} process(es) on {run.world.device.type}, {torch.get_num_threads()} CPU threads each, {config.train.precision}; ragged attention: {backend} ({reason})"
    )
    print(f"parallel: {run.layout.mode} ({run.layout.reason})")
    if config.train.deterministic and run.world.device.type == "cuda":
        print(
            "deterministic: torch warns of operations that have no such variant; NCCL's sums repeat for equal topology"
        )
    if compiles(config, run.world.device):
        print(f"blocks compiled: {num_graphs()} graphs; none will be added")
    begun = f"continuing at step {run.start}" if run.start else f"{run.steps} steps of {config.train.batch_size}"
    print(f"run folder {run.folder}: {begun}", flush=True)
