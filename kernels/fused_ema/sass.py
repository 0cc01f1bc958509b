"""What the GPU kernel compiles to, seen without a GPU: `python -m fused_ema.sass --arch 90` prints JSON lines.

In: dtypes and options. Out: counts of wide loads and stores, spills, registers of the machine code. Needs Triton,
which brings the compiler and the disassembler; must not run under TRITON_INTERPRET.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_ema import triton_kernel as kernel

VARIANTS: dict[str, tuple[Any, ...]] = {  # name: (theta, theta_bar, bf16 copy, gate, distances)
    "fp32": (torch.float32, torch.float32, False, False),
    "fp32-update-only": (torch.float32, torch.float32, False, False, False),
    "fp32+gate": (torch.float32, torch.float32, False, True),
    "fp32+gate+copy": (torch.float32, torch.float32, True, True),
    "bf16": (torch.bfloat16, torch.float32, False, True),
    "bf16+gate+copy": (torch.bfloat16, torch.float32, True, True),
    "fp16": (torch.float16, torch.float32, False, True),
    "bf16-average": (torch.bfloat16, torch.bfloat16, False, True),
}


def compile_update(
    arch: int, source: torch.dtype, target: torch.dtype, copied: bool, gated: bool, measure: bool = True,
    aligned: bool = True,
):  # fmt: skip
    """The main kernel as compiled for sm_<arch>; `.asm` holds ptx and cubin."""
    constants = {
        "SOURCE": kernel.DTYPES[source],
        "TARGET": kernel.DTYPES[target],
        "COPY": tl.bfloat16 if copied else kernel.DTYPES[target],
        "HAS_COPY": copied,
        "HAS_GATE": gated,
        "MEASURE": measure,
        "ALIGNED": aligned,
        "CHUNK": kernel.CHUNK,
        "BLOCK": kernel.block_size(source, copied),
    }
    gate = "*i1" if gated else "*fp64"
    arguments = {"table": "*i64", "partials": "*fp32", "weight_ptr": "*fp64", "gate_ptr": gate}
    numbers = dict.fromkeys(("first", "num_chunks", "total"), "i32")
    signature = arguments | numbers | dict.fromkeys(constants, "constexpr")
    aligned_arguments = {(i,): [["tt.divisibility", 16]] for i in range(len(arguments))}
    source_code = ASTSource(fn=kernel.update_kernel, signature=signature, constexprs=constants, attrs=aligned_arguments)
    return triton.compile(source_code, target=GPUTarget("cuda", arch, 32), options=kernel.OPTIONS)


def describe(compiled) -> dict[str, int | bool]:
    """Instruction counts of the machine code (static: a loop counts once); loads are those of the main path."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        code, usage = _tool("nvdisasm", "-c", cubin.name), _tool("cuobjdump", "--dump-resource-usage", cubin.name)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    def used(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", usage)
        assert found is not None
        return int(found[1])

    return {
        # EF, evict first, is asked for in the main path alone: neither tails nor tables are among these
        "load_128": count(r"\bLDG\.E\.EF\.128"),
        "load_64": count(r"\bLDG\.E\.EF\.64"),
        "load_narrow": count(r"\bLDG\.E\.EF(?!\.128|\.64)"),
        "store_128": count(r"\bSTG\.E\S*\.128"),
        "store_64": count(r"\bSTG\.E\S*\.64"),
        "fused_multiply_adds": count(r"\bFFMA"),
        "atomics": count(r"\b(?:ATOMG?|RED)\."),
        "spills": count(r"\b(?:LDL|STL)\b"),
        "registers": used("REG"),
        "stack": used("STACK"),
        "rounds_bf16_to_nearest": "cvt.rn.bf16" in compiled.asm["ptx"],
    }


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    for arch in parser.parse_args().arch:
        for name, variant in VARIANTS.items():
            report = describe(compile_update(arch, *variant))
            print(json.dumps({"arch": arch, "variant": name, "triton": triton.__version__} | report), flush=True)


if __name__ == "__main__":
    main()
