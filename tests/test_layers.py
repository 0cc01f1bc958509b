"""The house keeps its order: a stage never imports a later one, and nobody imports the programs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The path of the data. A module may import those of its own line and of the lines above it.
STAGES = [
    {"errors", "cores", "__version__"},
    {"config"},
    {"presets", "schedules", "log", "checkpoint"},
    {"data"},
    {"model"},
    {"parallel", "optim", "ema", "clock", "perturb", "interop", "flops"},
    {"survive", "profiling"},
    {"monitor"},
    {"rundir"},
    {"cli", "report"},
    {"api"},
    {"run"},
    {"assemble"},
    {"train", "theorem", "probe", "sweep", "shards", "diagnose", "export", "doctor"},
    {"__main__"},
]
VERBS = {"train", "theorem", "probe", "sweep", "shards", "diagnose", "export", "doctor", "__main__"}
LEVEL = {name: level for level, names in enumerate(STAGES) for name in names}


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "jepa_fast":
                yield from (f"jepa_fast.{alias.name}" for alias in node.names)


def stage(name):
    parts = name.split(".")
    return parts[1] if parts[0] == "jepa_fast" and len(parts) > 1 else None


@pytest.mark.parametrize("file", modules("jepa_fast"), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_stage_imports_no_later_stage_and_nobody_a_program(file):
    own = file.relative_to(ROOT / "jepa_fast").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imports(file):
        other = stage(name)
        if other and other != own:
            assert LEVEL[other] <= LEVEL[own], f"{file.name} imports {name}"
            assert other not in VERBS, f"{file.name} imports the program {name}"


@pytest.mark.parametrize("file", modules("kernels"), ids=lambda f: str(f.relative_to(ROOT)))
def test_the_kernel_package_knows_nothing_of_jepa(file):
    assert not any(name.split(".")[0] == "jepa_fast" for name in imports(file))


def test_the_model_knows_nothing_of_processes_or_files():
    for file in modules("jepa_fast/model"):
        assert not any(n.startswith(("torch.distributed", "pathlib", "os")) for n in imports(file)), file


def test_kernels_is_not_a_package():
    """`import kernels` must stay free for the public package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_training_loop_fits_on_a_screen():
    tree = ast.parse((ROOT / "jepa_fast" / "train.py").read_text())
    loop = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert loop.end_lineno - loop.lineno < 80
