"""EMA of ViT weights, with and without per-layer distances: ours against the usual and the best eager ways.

    python benchmarks/bench_ema.py                          # CPU or GPU, whichever is there
    python benchmarks/bench_ema.py --shapes vit_b16 --compile

Bandwidth is counted as what one pass must move: 12 bytes a parameter in float32, 10 with a bfloat16 theta. It is set
against an axpy (the access pattern of an EMA) and against a copy, which on a CPU also reads what it overwrites.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402

from benchmarks.harness import Bench, arguments, axpy_bandwidth, copy_bandwidth  # noqa: E402
from fused_ema import available_backends, ema_update_, ema_update_reference  # noqa: E402

WIDTHS = {  # name: (width, depth, patch, MLP width)
    "vit_ti16": (192, 12, 16, 768),
    "vit_b16": (768, 12, 16, 3072),
    "vit_l16": (1024, 24, 16, 4096),
    "vit_h14": (1280, 32, 14, 5120),
    "vit_g16": (1408, 40, 16, 6144),
    "tiny": (32, 2, 16, 128),  # for trying the script out
}
DECAY = 0.996
Tensors = list[Tensor]
Update = Callable[[], Tensor | None]  # returns ||theta - theta_bar||^2 of each tensor, or nothing


def vit_shapes(name: str) -> list[tuple[int, ...]]:
    """Parameter shapes of an I-JEPA encoder: no class token, final LayerNorm."""
    width, depth, patch, mlp = WIDTHS[name]
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    feedforward = [(mlp, width), (mlp,), (width, mlp), (width,)]
    block = [*norm, *attention, *norm, *feedforward]
    return [(1, (224 // patch) ** 2, width), (width, 3, patch, patch), (width,), *block * depth, *norm]


# ---- the update alone --------------------------------------------------------------------------------


def ijepa_loop(average: Tensors, theta: Tensors) -> None:
    for a, t in zip(average, theta, strict=True):
        a.mul_(DECAY).add_((1.0 - DECAY) * t)


def foreach_mul_add(average: Tensors, theta: Tensors) -> None:
    torch._foreach_mul_(average, DECAY)
    torch._foreach_add_(average, theta, alpha=1.0 - DECAY)


def foreach_lerp(average: Tensors, theta: Tensors) -> None:
    torch._foreach_lerp_(average, theta, 1.0 - DECAY)


def lerp_loop(average: Tensors, theta: Tensors) -> None:
    for a, t in zip(average, theta, strict=True):
        a.lerp_(t, 1.0 - DECAY)


def fused_update_only(average: Tensors, theta: Tensors) -> None:
    ema_update_(average, theta, DECAY, stats=False)


def as_module(tensors: Tensors) -> nn.Module:
    """A module of these very tensors."""
    return nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors)


def timm_style(average: Tensors, theta: Tensors) -> Update:
    """As timm's ModelEmaV3: both state dicts are walked at every update, floating entries then move in one lerp."""
    averaged, model = as_module(average), as_module(theta)

    def update() -> None:
        moved: tuple[Tensors, Tensors] = ([], [])
        for a, t in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
            if a.is_floating_point():
                moved[0].append(a)
                moved[1].append(t)
            else:
                a.copy_(t)
        torch._foreach_lerp_(*moved, weight=1.0 - DECAY)

    return update


def averaged_model(average: Tensors, theta: Tensors) -> Update:
    model = as_module(theta)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for parameter, tensor in zip(averaged.module.parameters(), average, strict=True):
        parameter.data = tensor
    averaged.n_averaged.add_(1)  # else the first update copies
    return lambda: averaged.update_parameters(model)


def apex_adam_swa(average: Tensors, theta: Tensors) -> Update:
    """apex's Adam and EMA in one kernel. At a learning rate of 0 theta stays, so that the average can be checked."""
    from apex.contrib.openfold_triton.fused_adam_swa import FusedAdamSWA

    parameters = with_gradients(theta)
    averaged = [nn.Parameter(a, requires_grad=False) for a in average]
    optimizer = FusedAdamSWA(parameters, parameters, averaged, swa_decay_rate=DECAY, lr=0.0)
    optimizer.swa_param_groups[0]["n_averaged"] = 1  # else the first update copies
    return optimizer.step


def adam_then_fused_ema(average: Tensors, theta: Tensors) -> Update:
    """The same work as apex's, in two kernels, and the distances."""
    optimizer = torch.optim.Adam(with_gradients(theta), lr=0.0, fused=True)
    return then(optimizer.step, lambda: ema_update_(average, theta, DECAY).distance_sq)


def with_gradients(theta: Tensors) -> list[nn.Parameter]:
    parameters = [nn.Parameter(t) for t in theta]
    for p in parameters:
        p.grad = 1e-3 * torch.randn_like(p)
    return parameters


# ---- the distances after it --------------------------------------------------------------------------


def foreach_distances(average: Tensors, theta: Tensors) -> Tensor:
    return torch.stack(torch._foreach_norm(torch._foreach_sub(theta, average))).square()


def scratch_distances(scratch: Tensor, average: Tensors, theta: Tensors) -> Tensor:
    """The best eager way: one scratch tensor, reused, that stays in cache where it fits."""
    norms = []
    for a, t in zip(average, theta, strict=True):
        gap = scratch[: a.numel()].view_as(a)
        norms.append(torch.linalg.vector_norm(torch.sub(t, a, out=gap)))
    return torch.stack(norms).square()


def compiled(average: Tensors, theta: Tensors) -> Update:
    @torch.compile
    def step(average: Tensors, theta: Tensors) -> Tensor:
        gaps = []
        for a, t in zip(average, theta, strict=True):
            a.add_((1.0 - DECAY) * (t - a))
            gaps.append((t - a).square().sum())
        return torch.stack(gaps)

    return lambda: step(average, theta)


def captured(update: Update) -> Update:
    """The same in a CUDA graph: no launches from the host, and small tensors stay in L2 between its kernels."""
    for _ in range(3):
        update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = update()

    def replay() -> Tensor | None:
        graph.replay()
        return result

    return replay


def then(update: Update, distances: Callable[[], Tensor]) -> Update:
    def run() -> Tensor:
        update()
        return distances()

    return run


def providers(average: Tensors, theta: Tensors, with_compile: bool) -> dict[str, Callable[[], Update]]:
    """{name: what makes the call}: made one at a time, so that one that cannot be made is refused alone."""
    device = average[0].device
    mixed = theta[0].dtype != torch.float32  # lerp takes one dtype only
    scratch = torch.empty(max(a.numel() for a in average), device=device)
    gate = torch.ones((), dtype=torch.bool, device=device)
    in_place = [ijepa_loop, foreach_mul_add] + ([] if mixed else [foreach_lerp, lerp_loop])
    alone: dict[str, Callable[[], Update]] = {
        f.__name__: lambda f=f: lambda: f(average, theta)  # type: ignore[misc]
        for f in in_place
    }
    if not mixed:
        alone |= {f.__name__: lambda f=f: f(average, theta) for f in (timm_style, averaged_model)}  # type: ignore[misc]
    best = "foreach_mul_add" if mixed else "foreach_lerp"
    usual, reused = lambda: foreach_distances(average, theta), lambda: scratch_distances(scratch, average, theta)
    made = dict(alone)
    made |= {f"{name}+distances": lambda make=make: then(make(), usual) for name, make in alone.items()}  # type: ignore[misc]
    made[f"{best}+scratch_distances"] = lambda: then(alone[best](), reused)
    if with_compile:
        made["compile+distances"] = lambda: compiled(average, theta)
    made["fused_ema"] = lambda: lambda: ema_update_(average, theta, DECAY).distance_sq
    made["fused_ema_update_only"] = lambda: lambda: fused_update_only(average, theta)
    made["fused_ema+gate"] = lambda: lambda: ema_update_(average, theta, DECAY, gate=gate).distance_sq
    if device.type == "cuda" and not mixed and importlib.util.find_spec("apex"):
        made["adam+fused_ema"] = lambda: adam_then_fused_ema(average, theta)
        made["apex_adam_swa"] = lambda: apex_adam_swa(average, theta)
    if device.type == "cuda":
        for name in (best, f"{best}+scratch_distances", "fused_ema", "fused_ema_update_only"):
            made[f"{name}+graph"] = lambda make=made[name]: captured(make())  # type: ignore[misc]
    return made


# ---- measuring ---------------------------------------------------------------------------------------


def measure(bench: Bench, shape: str, dtype: torch.dtype, with_compile: bool) -> None:
    theta = [torch.randn(s).mul_(0.02).to(bench.device, dtype) for s in vit_shapes(shape)]
    average = [t.float() + 1e-3 * torch.randn_like(t, dtype=torch.float32) for t in theta]
    probed = range(0, len(theta), max(1, len(theta) // 16))
    start = [average[i].clone() for i in probed]
    want = [s.clone() for s in start]
    weight = torch.tensor(1 - DECAY, dtype=torch.float64, device=bench.device)
    expected = ema_update_reference(want, [theta[i] for i in probed], weight, range(len(want)), len(want))[0]

    def check(update: Update) -> None:
        for i, s in zip(probed, start, strict=True):
            average[i].copy_(s)
        distances = update()
        torch.testing.assert_close([average[i] for i in probed], want, rtol=1e-5, atol=1e-6)
        if distances is not None:  # 1e-2: a float32 norm of millions of elements is no better
            torch.testing.assert_close(distances[list(probed)].double(), expected, rtol=1e-2, atol=1e-9)

    case = bench.case(shape, str(dtype).removeprefix("torch."))
    for name, make in providers(average, theta, with_compile).items():
        try:
            call = make()
        except Exception as error:
            bench.refused.append(f"{shape} {name}: {error}")
            continue
        case.add(name, call, check=lambda call=call: check(call))  # type: ignore[misc]
    numel = sum(t.numel() for t in theta)
    moved = (8 + dtype.itemsize) * numel
    case.ceiling("axpy", *axpy_bandwidth(numel, bench.device))
    case.ceiling("copy", *copy_bandwidth(numel, bench.device))
    if case.run():
        case.rate("bytes_per_s", "GB/s", 1e-9 * moved)
        case.fraction("fraction_of_axpy_bandwidth", moved, of=["axpy"])
        case.fraction("fraction_of_copy_bandwidth", moved, of=["copy"])
        case.compare("time_ratio_to_fused_ema", "fused_ema", lambda own, ours: own / ours)
        case.compare("time_ratio_to_update_only", "fused_ema_update_only", lambda own, ours: own / ours)
        print(case.table(), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, rounds=25, seconds=35)
    parser.add_argument("--shapes", nargs="+", choices=list(WIDTHS), help="default: CPU vit_ti16 vit_b16, CUDA all")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], help="of theta; default: CPU float32")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile of the expression too: compiles for minutes"
    )
    args = parser.parse_args(argv)
    cuda = torch.device(args.device).type == "cuda"
    bench = Bench("ema", args, tests=["tests/test_fused_ema_triton.py" if cuda else "tests/test_fused_ema.py"])
    if ("triton" if cuda else "cpp") not in available_backends():
        print("the kernel for this device is not available: fused_ema below is plain torch", file=sys.stderr)
    default = [s for s in WIDTHS if s != "tiny"] if cuda else ["vit_ti16", "vit_b16"]
    for shape in ["tiny"] if args.tiny else args.shapes or default:
        for dtype in args.dtypes or (["float32", "bfloat16"] if cuda or args.tiny else ["float32"]):
            with torch.no_grad():
                measure(bench, shape, getattr(torch, dtype), args.compile)
            if cuda:
                torch.cuda.empty_cache()
    return bench.close()


if __name__ == "__main__":
    sys.exit(main())
