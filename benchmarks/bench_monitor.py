"""What collapse monitoring costs a training step: ours, part by part, and as it is done by hand.

    python benchmarks/bench_monitor.py                              # CPU: the textures preset, and a ViT-S/16
    python benchmarks/bench_monitor.py --shapes vit_b16 vit_h14     # GPU: default ViT-S, B, L, H

Whole steps are timed with the monitoring off, with the EMA only, and with one thing more each time; all of them move
the same weights. `overhead_fraction` is the time over a step with the EMA only, `overhead_fraction_to_no_ema` over one
without an EMA. Rows of whole steps pay on *every* step: `fused+record` writes a record each time. What a run pays is
`trainer`: from the parts, timed alone in the same rounds, as often as the preset's periods make them happen (distances
every step, a record every `log.every`, probes every `monitor.every`). A part alone resolves what the difference of two
long steps does not. `host_syncs` (CUDA) counts what a step reads back from the device.

By hand: `eager+...` are a foreach EMA with the distances from one reused scratch tensor (the best eager way), from
`_foreach_sub` and `_foreach_norm`, from a `.item()` a tensor, and with a second forward of both encoders on whole
images for the discrepancy.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.harness import Bench, Call, Case, arguments, peak_memory
from benchmarks.one_step import OneStep
from jepa_fast.model.jepa import Output
from jepa_fast.monitor import CollapseMonitor
from jepa_fast.monitor.examination import Examination
from jepa_fast.monitor.measures import discrepancy
from jepa_fast.monitor.probes import ProbeSet

SHAPES = {  # name: (preset, images a step on CPU, on CUDA, probe images on CPU (too slow for most), on CUDA)
    "textures": ("textures", 64, 64, (3000, 1500), (3000, 1500)),
    "vit_s16": ("images", 2, 256, (0, 0), (4000, 2000)),
    "vit_b16": ("in1k-vitb16", 2, 128, (0, 0), (1024, 512)),
    "vit_l16": ("in1k-vitl16", 2, 128, (0, 0), (512, 256)),
    "vit_h14": ("in1k-vith14", 2, 128, (0, 0), (256, 128)),
}
EMA_ONLY, OFF = "fused EMA only", "no EMA"


@dataclass
class Subject:
    """A step, the monitor that watches it, and what the ways by hand keep between calls."""

    step: OneStep
    probe_images: tuple[int, int]
    theta: list[Tensor] = field(init=False)
    theta_bar: list[Tensor] = field(init=False)
    scratch: Tensor = field(init=False)

    def __post_init__(self) -> None:
        jepa = self.step.jepa
        self.theta = [p.detach() for p in jepa.context_encoder.parameters()]
        self.theta_bar = list(jepa.target_encoder.parameters())
        self.scratch = torch.empty(max(p.numel() for p in self.theta), device=self.theta[0].device)
        config = self.step.config
        train, test = self.probe_images
        labels = torch.arange(train + test) % 4
        images = self.step.images(train + test, seed=1)
        probes = ProbeSet(images[:train], labels[:train], images[train:], labels[train:], 4)
        self.examination = Examination(
            jepa.context_encoder, jepa.target_encoder, probes.test, probe_set=probes, config=config.monitor
        )
        self.monitor = CollapseMonitor(
            None, self.step.ema.fused, loss=jepa.loss, target_norm=jepa.target_norm, every=1, say=None
        )

    # ---- parts -----------------------------------------------------------------------------------------

    def ema(self, stats: bool, gate: Tensor | None = None) -> Tensor | None:
        measured = self.step.ema.fused.update(self.step.decay, gate=gate, stats=stats)
        return measured.distance_sq if measured else None

    def discrepancy(self, output: Output) -> Tensor:
        """The signals of a record, left on the device."""
        masks = self.step.masks
        signals = self.monitor._signals(
            output.loss.detach(),
            output.context,
            output.target,
            masks.context_rows,
            masks.target_rows,
            masks.target_weight,
            output.statistics,
            None,
        )
        return signals["discrepancy/visible"]

    def record(self, output: Output) -> Tensor:
        """A record as the trainer writes it on a log step, read back to the host."""
        masks = self.step.masks
        record = self.monitor.observe(
            output.loss, output.context, output.target, masks.context_rows, masks.target_rows,
            hidden_weight=masks.target_weight,
        )  # fmt: skip
        assert record is not None
        self.monitor.records.clear()
        return torch.tensor(record["discrepancy/visible"])

    @torch.no_grad()
    def eager_ema(self) -> None:
        torch._foreach_lerp_(self.theta_bar, self.theta, 1 - self.step.decay)

    @torch.no_grad()
    def scratch_distances(self) -> Tensor:
        out = []
        for mean, own in zip(self.theta_bar, self.theta, strict=True):
            gap = self.scratch[: own.numel()].view_as(own)
            out.append(torch.linalg.vector_norm(torch.sub(own, mean, out=gap)))
        return torch.stack(out).square()

    @torch.no_grad()
    def foreach_distances(self) -> Tensor:
        return torch.stack(torch._foreach_norm(torch._foreach_sub(self.theta, self.theta_bar))).square()

    @torch.no_grad()
    def synced_distances(self) -> Tensor:
        pairs = zip(self.theta, self.theta_bar, strict=True)
        return torch.tensor([(own - mean).norm().item() for own, mean in pairs], dtype=torch.float64).square()

    @torch.no_grad()
    def second_forward(self) -> Tensor:
        jepa = self.step.jepa
        with torch.autocast(
            self.scratch.device.type, torch.bfloat16, enabled=self.step.config.train.precision == "bf16"
        ):
            context, target = jepa.context_encoder(self.step.inputs), jepa.target_encoder(self.step.inputs)
        return discrepancy.discrepancy(context.flatten(0, 1), target.flatten(0, 1))


# A way to update and to watch: what it measured, {"distances": squared, by tensor, "discrepancy": ...}.
Way = Callable[[Subject, Output, Tensor], dict[str, Tensor]]


def ways() -> dict[str, Way]:
    def fused(stats: bool, watch: str = "") -> Way:
        def run(s: Subject, output: Output, finite: Tensor) -> dict[str, Tensor]:
            found = {}
            if watch:  # as in train.py, before the weights move
                found["discrepancy"] = s.discrepancy(output) if watch == "signals" else s.record(output)
            distances = s.ema(stats, finite)
            return found | ({"distances": distances} if distances is not None else {})

        return run

    def eager(distances: Callable[[Subject], Tensor], second: bool = False) -> Way:
        def run(s: Subject, output: Output, finite: Tensor) -> dict[str, Tensor]:
            found = {"second": s.second_forward()} if second else {}
            s.eager_ema()
            return found | {"distances": distances(s)}

        return run

    return {
        OFF: lambda s, output, finite: {},
        EMA_ONLY: fused(stats=False),
        "fused+distances": fused(stats=True),
        "fused+distances+discrepancy": fused(stats=True, watch="signals"),
        "fused+record": fused(stats=True, watch="record"),
        "eager+scratch distances": eager(Subject.scratch_distances),
        "eager+foreach distances": eager(Subject.foreach_distances),
        "eager+item a tensor": eager(Subject.synced_distances),
        "eager+separate passes": eager(Subject.foreach_distances, second=True),
    }


def whole_step(subject: Subject, way: Way) -> Callable[[], dict[str, Tensor]]:
    def run() -> dict[str, Tensor]:
        output = subject.step.forward()
        return way(subject, output, subject.step.learn(output))

    return run


# ---- checks ------------------------------------------------------------------------------------------------


def check(subject: Subject, name: str, call: Callable[[], dict[str, Tensor]]) -> None:
    """After one step: the target moved as equation 1 says, and what was measured is what is there, in float64."""
    before = [p.detach().clone() for p in subject.theta_bar]
    found = call()
    weight = 0.0 if name == OFF else 1 - subject.step.decay
    some = range(0, len(before), max(1, len(before) // 16))
    for i in some:
        expected = before[i].double().lerp(subject.theta[i].double(), weight)
        torch.testing.assert_close(subject.theta_bar[i].detach().double(), expected, rtol=1e-5, atol=1e-7)
    if "distances" in found:
        gaps = [(subject.theta[i].double() - subject.theta_bar[i].detach().double()).square().sum() for i in some]
        got = found["distances"].double().to(gaps[0].device)[list(some)]
        torch.testing.assert_close(got, torch.stack(gaps), rtol=1e-2, atol=1e-12)  # eager fp32 norms are that far off
    if "discrepancy" in found:
        assert torch.isfinite(found["discrepancy"]) and found["discrepancy"] > 0, "the discrepancy is not positive"


def check_signals(subject: Subject, output: Output) -> None:
    """The discrepancy is equation 3, token by token in float64."""
    target = output.target.double().flatten(0, 1)[subject.step.masks.context_rows]
    expected = (output.context.double() - target).norm(dim=-1).mean()
    for got in (subject.discrepancy(output), subject.record(output)):
        torch.testing.assert_close(got.double().to(expected.device), expected, rtol=1e-3, atol=1e-6)


def check_probes(subject: Subject) -> None:
    found = subject.examination.look()
    assert 0 <= found["probe/target"] <= 1 and found["discrepancy/full"] >= 0, found


def host_syncs(call: Call) -> int:
    """Synchronisations of one call, as torch warns of them on CUDA."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


# ---- measuring ---------------------------------------------------------------------------------------------


def measure(bench: Bench, shape: str) -> None:
    name, on_cpu, on_cuda, probes_cpu, probes_cuda = SHAPES[shape]
    cuda = bench.device.type == "cuda"
    batch, probe_images = (on_cuda, probes_cuda) if cuda else (on_cpu, probes_cpu)
    if bench.tiny:
        batch, probe_images = 4, (16, 8)
    precision = {} if cuda else {"train.precision": "fp32"}  # few CPUs multiply bf16
    subject = Subject(OneStep(name, batch, bench.device, precision), probe_images)
    config = subject.step.config
    case = bench.case(f"{shape} batch {batch}", "bfloat16" if config.train.precision == "bf16" else "float32")
    calls = {way_name: whole_step(subject, way) for way_name, way in ways().items()}
    for way_name, call in calls.items():
        case.add(way_name, call, check=lambda n=way_name, c=call: check(subject, n, c))
    output = subject.step.forward()
    output = output._replace(loss=output.loss.detach())
    parts: dict[str, Call] = {
        "part: EMA only": lambda: subject.ema(stats=False),
        "part: EMA and distances": lambda: subject.ema(stats=True),
        "part: signals": lambda: subject.discrepancy(output),
        "part: record": lambda: subject.record(output),
    }
    for part, call in parts.items():
        case.add(part, call, check=lambda: check_signals(subject, output))
    if sum(probe_images):
        case.add("part: probes", subject.examination.look, check=lambda: check_probes(subject))
    if not case.run():
        return
    steps = [way_name for way_name in calls if way_name in case.calls]
    rows = {way_name: case.times[way_name] for way_name in steps}
    for metric, base in (("overhead_fraction", EMA_ONLY), ("overhead_fraction_to_no_ema", OFF)):
        if base in rows:
            for way_name, times in rows.items():
                values = [own / other - 1 for own, other in zip(times, rows[base], strict=True)]
                bench.record(case.shape, case.dtype, way_name, metric, "1", values)
    trainer(bench, case, config.log.every, config.monitor.every)
    for way_name in steps if cuda else ():
        bench.record(case.shape, case.dtype, way_name, "host_syncs", "1", [host_syncs(calls[way_name])])
        peak = peak_memory(calls[way_name], bench.device)
        if peak is not None:
            bench.record(case.shape, case.dtype, way_name, "peak_memory", "GB", [peak / 1e9])
    print(case.table(), flush=True)


def trainer(bench: Bench, case: Case, log_every: int, monitor_every: int) -> None:
    """What a run pays a step, from the parts: distances always, a record and probes at the preset's periods.

    And what it would pay for distances and the discrepancy of the visible tokens on every step.
    """
    needed = [OFF, EMA_ONLY, "part: EMA only", "part: EMA and distances", "part: signals", "part: record"]
    if any(part not in case.times for part in needed):
        return
    off, base, ema, distances, signals, record = (case.times[part] for part in needed)
    extra = [d - e + r / log_every for d, e, r in zip(distances, ema, record, strict=True)]
    every_step = [d - e + s for d, e, s in zip(distances, ema, signals, strict=True)]
    paid = {"trainer without probes": extra, "drift and discrepancy every step": every_step}
    if "part: probes" in case.times:
        paid["trainer"] = [x + p / monitor_every for x, p in zip(extra, case.times["part: probes"], strict=True)]
    for what, seconds in paid.items():
        fractions = [x / b for x, b in zip(seconds, base, strict=True)]
        bench.record(case.shape, case.dtype, what, "overhead_fraction", "1", fractions)
        total = [(x + e) / o for x, e, o in zip(seconds, ema, off, strict=True)]
        bench.record(case.shape, case.dtype, what, "overhead_fraction_to_no_ema", "1", total)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=15, seconds=40)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: CPU textures vit_s16, CUDA vit_*")
    args = parser.parse_args(argv)
    bench = Bench("monitor", args, tests=["tests/test_collapse.py", "tests/test_fused_ema_module.py"])
    default = [s for s in SHAPES if s.startswith("vit")] if bench.device.type == "cuda" else ["textures", "vit_s16"]
    for shape in ["textures"] if args.tiny else args.shapes or default:
        measure(bench, shape)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return bench.close()


if __name__ == "__main__":
    sys.exit(main())
