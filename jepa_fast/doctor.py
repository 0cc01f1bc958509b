"""What this machine can do, and which choice follows: `python -m jepa_fast.doctor`. Made to be pasted into an issue.

Ends with a self-test: every kernel that would be used, against its reference, in some seconds. Exit status 1 if one differs.
Names no host, user or path.
"""

import importlib.metadata
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fused_ema import available_backends, ema_update_
from jepa_fast import __version__, cli, cores
from jepa_fast.config import Masks
from jepa_fast.errors import Arguments, one_line_errors
from jepa_fast.extension import extension
from jepa_fast.masks.packing import plan
from jepa_fast.masks.sample import sample_masks
from jepa_fast.model.attention import choose_backend
from jepa_fast.model.jepa import JEPA
from jepa_fast.presets import preset

PACKAGES = (
    "numpy",
    "triton",
    "flash-attn",
    "simplejpeg",
    "pillow",
    "webdataset",
    "safetensors",
    "transformers",
    "timm",
    "tensorboard",
    "wandb",
    "trackio",
)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = Arguments("doctor", __doc__ or "")
    parser.add_argument("--no-test", action="store_true", help="only describe the machine")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    for title, lines in (("machine", machine()), ("choices", choices(device))):
        print(f"{title}\n" + "".join(f"  {name:<18}{value}\n" for name, value in lines), end="", flush=True)
    if options.no_test:
        return 0
    print("self-test")
    failed = 0
    for name, good, said in self_test(device):
        failed += not good
        print(f"  {name:<18}{'ok' if good else 'FAILED'}: {said}", flush=True)
    return 1 if failed else 0


# ---- what there is --------------------------------------------------------------------------------


def machine() -> Iterator[tuple[str, str]]:
    """(what, version or size) of everything a choice hangs on."""
    yield "jepa-fast", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}"
    yield (
        "cpu",
        f"{_cpu()}, {cores.usable()} cores usable, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    yield "memory", _memory()
    if not torch.cuda.is_available():
        yield "gpu", "none"
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield f"gpu {i}", f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 2**30:.1f} GiB"
    yield "collectives", ", ".join(_collectives()) or "none"
    yield (
        "compiler",
        " ".join(filter(None, (shutil.which(c) and c for c in ("c++", "g++", "clang++", "nvcc", "ninja")))) or "none",
    )
    found = {name: _version(name) for name in PACKAGES}
    yield "packages", ", ".join(f"{name} {version}" for name, version in found.items() if version)
    yield "not installed", ", ".join(name for name, version in found.items() if not version) or "nothing"


def choices(device: torch.device) -> Iterator[tuple[str, str]]:
    """(part, what would be used and why)."""
    if (config := _default()) is not None:
        yield "default run", f"{config.preset}, {config.train.precision}, batch {config.train.batch_size}"
    backends = available_backends()
    ema = next(
        (b for b in (("triton", "torch") if device.type == "cuda" else ("cpp", "torch")) if b in backends), "torch"
    )
    why = (
        ""
        if ema != "torch"
        else " (the C++ extension was not built: install a compiler, then install this package again)"
    )
    yield "EMA kernel", f"{ema} of {', '.join(backends)}{why if device.type == 'cpu' else ''}"
    yield "mask sampler", "C++" if extension() else "Python (the C++ extension was not built: slower, same masks)"
    yield "tar headers", "C++" if extension() else "Python (the C++ extension was not built: slower, same index)"
    yield "image resize", "C++" if extension() else "Pillow (the C++ extension was not built: slower, same pixels)"
    backend, reason = choose_backend(device, half=device.type == "cuda")
    yield "ragged attention", f"{backend} ({reason})"
    yield (
        "JPEG decoder",
        f"simplejpeg {_version('simplejpeg')}, Pillow {_version('pillow')} for the rest, on CPU threads",
    )
    yield (
        "precision",
        "bf16 autocast where the preset says so" if _bf16(device) else "fp32; bf16 is slow or missing here",
    )
    count = torch.cuda.device_count()
    yield (
        "processes",
        f"torchrun --nproc_per_node={count} -m jepa_fast.train ..." if count > 1 else "one: python -m jepa_fast.train",
    )


def _default():
    try:
        return cli.default_config()
    except ValueError:
        return None


def _cpu() -> str:
    try:
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> str:
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        total, free = (int(fields[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return "not known on this system"
    return f"{total:.1f} GiB, {free:.1f} GiB free"


def _collectives() -> Iterator[str]:
    if dist.is_available():
        if dist.is_nccl_available():
            version = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "(no GPU)"
            yield f"NCCL {version}"
        if dist.is_gloo_available():
            yield "gloo"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


# ---- self-test ------------------------------------------------------------------------------------


def self_test(device: torch.device) -> Iterator[tuple[str, bool, str]]:
    """(kernel, whether it agrees with its reference, how far). A crash is a failure, told in its own words."""
    tests: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        (f"EMA {backend}", lambda backend=backend: _test_ema(backend, device))  # type: ignore[misc]
        for backend in available_backends()
        if backend != "torch" and (backend == "triton") == (device.type == "cuda")
    ]
    tests += [
        ("masks", _test_masks),
        ("packed attention", lambda: _test_attention(device)),
        ("training step", lambda: _test_step(device)),
    ]
    for name, test in tests:
        began = time.monotonic()
        try:
            good, said = test()
        except Exception as error:
            good, said = False, f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        yield name, good, f"{said} ({time.monotonic() - began:.1f} s)"


def _test_ema(backend: str, device: torch.device) -> tuple[bool, str]:
    """Odd sizes and a million elements, float32: stored values within one rounding, distances to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1,), (7,), (129, 33), (1000, 1003))
    sources = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    ours = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    theirs = [value.clone() for value in ours]
    got = ema_update_(ours, sources, 0.996, backend=backend)
    want = ema_update_(theirs, sources, 0.996, backend="torch")
    far = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    off = float((got.distance_sq / want.distance_sq - 1).abs().max())
    return far <= 5e-7 and off <= 1e-6, f"weights differ by {far:.1e} at most, distances by {off:.1e}"


def _test_masks() -> tuple[bool, str]:
    """The C++ sampler draws what the Python one draws, bit for bit, in every mode for images."""
    if extension() is None:
        return True, "Python sampler only: nothing to compare"
    numbers = np.arange(64)
    for mode in ("reference", "fixed", "subsampled", "packed"):
        drawn = [
            sample_masks(Masks(mode=mode, group=32), (14, 14), 0, 3, np.zeros_like(numbers), numbers, backend=backend)
            for backend in ("cpp", "python")
        ]
        if not (
            np.array_equal(drawn[0].context, drawn[1].context) and np.array_equal(drawn[0].targets, drawn[1].targets)
        ):
            return False, f"mode {mode}: the two samplers draw different masks"
    return True, "C++ and Python draw the same, four modes"


def _test_attention(device: torch.device) -> tuple[bool, str]:
    """Packed images of unequal length give what each gives alone, float32."""
    torch.manual_seed(0)
    encoder = JEPA(preset("textures")).context_encoder.to(device)
    images = torch.rand(3, 1, 48, 48, device=device)
    kept = [torch.arange(length, device=device) * 2 % 35 for length in (5, 17, 9)]
    lengths = torch.tensor([0] + [len(k) for k in kept])
    with torch.no_grad():
        patches = encoder.tokenizer(images)
        packed = encoder.packed(
            torch.cat([p[k] for p, k in zip(patches, kept, strict=True)]), torch.cat(kept),
            lengths.cumsum(0).int().to(device), int(lengths.max()),
        )  # fmt: skip
        alone = torch.cat([encoder(images[i : i + 1], k[None])[0] for i, k in enumerate(kept)])
    far = float((packed - alone).abs().max())
    return far < 1e-4, f"packed and alone differ by {far:.1e}"


def _test_step(device: torch.device) -> tuple[bool, str]:
    """Forward and backward of a small JEPA: a finite loss, and a gradient for every weight that is trained."""
    torch.manual_seed(0)
    config = preset("textures")
    jepa, numbers = JEPA(config).to(device), np.arange(8)
    drawn = sample_masks(config.masks, config.grid, 0, 0, np.zeros_like(numbers), numbers)
    loss = jepa(torch.rand(8, 1, 48, 48, device=device), plan(drawn, config.num_tokens).to(device)).loss
    loss.backward()
    bad = [
        name
        for name, p in jepa.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    if bad or not loss.isfinite():
        return False, f"no usable gradient for {bad[0]}" if bad else "the loss is not finite"
    return True, f"loss {float(loss.detach()):.3f}, every gradient finite"


if __name__ == "__main__":
    sys.exit(main())
