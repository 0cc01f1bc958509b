"""EMA of ViT weights, with and without per-layer distances: ours against the usual and the best eager ways.

    python benchmarks/bench_ema.py                          # CPU or GPU, whichever is there
    python benchmarks/bench_ema.py --shapes vit_b16 --threads 2

A provider is timed only if its values and distances agree with the reference. Providers are interleaved, in a new
random order each round; rows of p20, p50, p80 are appended to results/ema.csv, a table is printed. Bandwidth is
counted as 12 bytes a parameter in float32 (what one pass must move) against a copy or axpy measured in the same
rounds, whichever is faster.
"""

import argparse
import csv
import datetime
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from fused_ema import available_backends, ema_update_, ema_update_reference  # noqa: E402

COLUMNS = [
    "bench",
    "provider",
    "shape",
    "dtype",
    "metric",
    "unit",
    "p20",
    "p50",
    "p80",
    "n",
    "device",
    "driver",
    "torch",
    "triton",
    "commit",
    "date",
]
WIDTHS = {  # name: (width, depth, patch, MLP width)
    "vit_ti16": (192, 12, 16, 768),
    "vit_b16": (768, 12, 16, 3072),
    "vit_l16": (1024, 24, 16, 4096),
    "vit_h14": (1280, 32, 14, 5120),
    "vit_g16": (1408, 40, 16, 6144),
    "tiny": (32, 2, 16, 128),  # for trying the script out
}
DECAY = 0.996
Update = Callable[[], Tensor | None]


def vit_shapes(name: str) -> list[tuple[int, ...]]:
    """Parameter shapes of an I-JEPA encoder: no class token, final LayerNorm."""
    width, depth, patch, mlp = WIDTHS[name]
    norm = [(width,), (width,)]
    block = [
        *norm,
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        *norm,
        (mlp, width),
        (mlp,),
        (width, mlp),
        (width,),
    ]
    return [(1, (224 // patch) ** 2, width), (width, 3, patch, patch), (width,), *block * depth, *norm]


# ---- providers: each returns ||theta - theta_bar||^2 per tensor, or None ---------------------------


def ijepa_loop(average: list[Tensor], theta: list[Tensor]) -> None:
    for a, t in zip(average, theta, strict=True):
        a.mul_(DECAY).add_((1.0 - DECAY) * t)


def foreach_mul_add(average: list[Tensor], theta: list[Tensor]) -> None:
    torch._foreach_mul_(average, DECAY)
    torch._foreach_add_(average, theta, alpha=1.0 - DECAY)


def foreach_lerp(average: list[Tensor], theta: list[Tensor]) -> None:
    torch._foreach_lerp_(average, theta, 1.0 - DECAY)


def lerp_loop(average: list[Tensor], theta: list[Tensor]) -> None:
    for a, t in zip(average, theta, strict=True):
        a.lerp_(t, 1.0 - DECAY)


def foreach_norms(average: list[Tensor], theta: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(torch._foreach_sub(theta, average))).square()


def scratch_norms(scratch: Tensor, average: list[Tensor], theta: list[Tensor]) -> Tensor:
    """The best eager way: one scratch tensor, reused, that stays in cache."""
    out = []
    for a, t in zip(average, theta, strict=True):
        gap = scratch[: a.numel()].view_as(a)
        out.append(torch.linalg.vector_norm(torch.sub(t, a, out=gap)))
    return torch.stack(out).square()


def providers(average: list[Tensor], theta: list[Tensor], compiled: bool) -> dict[str, Update]:
    device = average[0].device
    scratch = torch.empty(max(a.numel() for a in average), device=device)
    gate = torch.ones((), dtype=torch.bool, device=device)
    out: dict[str, Update] = {}
    for name, update in (
        ("ijepa_loop", ijepa_loop),
        ("foreach_mul_add", foreach_mul_add),
        ("foreach_lerp", foreach_lerp),
        ("lerp_loop", lerp_loop),
    ):
        out[name] = lambda u=update: u(average, theta)  # type: ignore[misc]

    def lerp_then(norms: Callable[[], Tensor]) -> Update:
        def run() -> Tensor:
            foreach_lerp(average, theta)
            return norms()

        return run

    def loop_then_norms() -> Tensor:
        ijepa_loop(average, theta)
        return foreach_norms(average, theta)

    out["ijepa_loop+distances"] = loop_then_norms
    out["foreach_lerp+foreach_norm"] = lerp_then(lambda: foreach_norms(average, theta))
    out["foreach_lerp+scratch_norm"] = lerp_then(lambda: scratch_norms(scratch, average, theta))
    out["fused_ema"] = lambda: ema_update_(average, theta, DECAY).distance_sq
    out["fused_ema+gate"] = lambda: ema_update_(average, theta, DECAY, gate=gate).distance_sq
    if compiled:
        out["compile+distances"] = _compiled(average, theta)
    if device.type == "cuda":
        out["foreach_lerp+scratch_norm+graph"] = _captured(out["foreach_lerp+scratch_norm"])
        out["fused_ema+graph"] = _captured(out["fused_ema"])
    return out


def _compiled(average: list[Tensor], theta: list[Tensor]) -> Update:
    @torch.compile
    def step(average, theta):
        gaps = []
        for a, t in zip(average, theta, strict=True):
            a.lerp_(t, 1.0 - DECAY)
            gaps.append((t - a).square().sum())
        return torch.stack(gaps)

    return lambda: step(average, theta)


def _captured(update: Update) -> Update:
    for _ in range(3):
        update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = update()

    def replay() -> Tensor | None:
        graph.replay()
        return result

    return replay


# ---- measuring -------------------------------------------------------------------------------------


def check(name: str, update: Update, average: list[Tensor], theta: list[Tensor], start: list[Tensor]) -> None:
    """Refuse to time what is wrong."""
    for a, s in zip(average, start, strict=True):
        a.copy_(s)
    got = update()
    want = [s.clone() for s in start[:16]]
    weight = torch.tensor(1 - DECAY, dtype=torch.float64, device=start[0].device)
    stats = ema_update_reference(want, theta[:16], weight, range(16), 16)
    torch.testing.assert_close(average[:16], want, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")
    if got is not None:
        torch.testing.assert_close(got[:16].double(), stats[0], rtol=1e-2, atol=1e-9, msg=lambda m: f"{name}: {m}")


def seconds(update: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        update()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin_s = time.perf_counter()
    update()
    return time.perf_counter() - begin_s


def bandwidth_probes(average: list[Tensor]) -> dict[str, tuple[Callable[[], object], int]]:
    """{name: (call, bytes moved)} on buffers of the model's size."""
    n = sum(a.numel() for a in average)
    a, b = torch.zeros(n, device=average[0].device), torch.ones(n, device=average[0].device)
    return {"copy": (lambda: a.copy_(b), 8 * n), "axpy": (lambda: a.add_(b, alpha=0.5), 12 * n)}


def measure(shape: str, device: torch.device, rounds: int, compiled: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    theta = [torch.randn(s, generator=generator).mul_(0.02).to(device) for s in vit_shapes(shape)]
    average = [t + 1e-3 for t in theta]
    start = [a.clone() for a in average[:16]] + average[16:]
    calls = providers(average, theta, compiled)
    for name, call in calls.items():
        check(name, call, average, theta, start)
    probes = bandwidth_probes(average)
    timed: dict[str, Callable[[], object]] = calls | {f"probe {k}": call for k, (call, _) in probes.items()}
    times: dict[str, list[float]] = {name: [] for name in timed}
    order = list(timed)
    for r in range(rounds + 1):
        random.Random(r).shuffle(order)
        for name in order:
            elapsed = seconds(timed[name], device)
            if r:  # the first round warms up
                times[name].append(elapsed)
    size = sum(t.numel() for t in theta)
    best = [max(moved / times[f"probe {k}"][r] for k, (_, moved) in probes.items()) for r in range(rounds)]
    rows = []
    for name in calls:
        rows.append(_row(name, shape, "ms", "ms", [1e3 * t for t in times[name]]))
        rows.append(_row(name, shape, "bytes_per_s", "GB/s", [12e-9 * size / t for t in times[name]]))
        fractions = [12 * size / t / b for t, b in zip(times[name], best, strict=True)]
        rows.append(_row(name, shape, "fraction_of_copy_bandwidth", "1", fractions))
        ratios = [t / ours for t, ours in zip(times[name], times["fused_ema"], strict=True)]
        rows.append(_row(name, shape, "time_ratio_to_fused_ema", "1", ratios))
    for k, (_, moved) in probes.items():
        rows.append(_row(k, shape, "bytes_per_s", "GB/s", [1e-9 * moved / t for t in times[f"probe {k}"]]))
    return rows


def _row(provider: str, shape: str, metric: str, unit: str, values: list[float]) -> dict:
    p20, p50, p80 = (statistics.quantiles(values, n=10)[i] for i in (1, 4, 7)) if len(values) > 1 else values * 3
    numbers = {"p20": f"{p20:.5g}", "p50": f"{p50:.5g}", "p80": f"{p80:.5g}", "n": len(values)}
    return {
        "bench": "ema",
        "provider": provider,
        "shape": shape,
        "dtype": "float32",
        "metric": metric,
        "unit": unit,
    } | numbers


def environment(device: torch.device) -> dict[str, str]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = _output(query).splitlines()[0] if _output(query) else ""
    else:
        name, driver = f"{_cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores", ""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    return {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit,
        "date": date,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def append(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(r["provider"] for r in rows if r["metric"] == "ms"))
    value = {(r["provider"], r["metric"]): r["p50"] for r in rows}
    lines = [f"{rows[0]['shape']:34} {'ms':>9} {'GB/s':>8} {'fraction':>9} {'x ours':>7}"]
    for name in names:
        cells = [value[name, m] for m in ("ms", "bytes_per_s", "fraction_of_copy_bandwidth", "time_ratio_to_fused_ema")]
        lines.append(f"{name:34} {cells[0]:>9} {cells[1]:>8} {cells[2]:>9} {cells[3]:>7}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(WIDTHS), help="default: CPU vit_ti16 vit_b16, GPU all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile of the expression (compiles for minutes)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ema.csv")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    shapes = args.shapes or (["vit_ti16", "vit_b16"] if device.type == "cpu" else [s for s in WIDTHS if s != "tiny"])
    wanted = "triton" if device.type == "cuda" else "cpp"
    if wanted not in available_backends():
        print(f"the {wanted} kernel is not available: fused_ema below is plain torch", file=sys.stderr)
    where = environment(device)
    print(where["device"])
    for shape in shapes:
        with torch.no_grad():
            rows = measure(shape, device, args.rounds, args.compile)
        append([row | where for row in rows], args.out)
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
