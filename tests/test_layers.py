"""The house keeps its order: a stage never imports a later one, and nobody imports the programs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The path of the data. A module may import those of its own line and of the lines above it. The longest name counts:
# `data.shards` is a line of its own, `data` stands for what lies in the folder itself.
STAGES = [
    {"errors", "bounded", "pickles", "cores", "extension", "__version__"},
    {"inputs"},
    {"config"},
    {"presets", "schedules", "log", "sinks", "checkpoint"},
    {"masks"},
    {"data.sample", "data.cache", "data.random"},
    {"data.sources", "data.opened", "data.shards"},
    {"data.readers"},
    {"data.by_kind"},
    {"data.from_shards"},
    {"data.loading", "data.convert", "data.dataset"},
    {"masks.report"},
    {"data.masks", "masks.__main__"},
    {"model"},
    {"parallel", "optim", "ema", "clock", "perturb", "interop", "flops"},
    {"preemption", "profiling"},
    {"monitor"},
    {"rundir"},
    {"cli", "report"},
    {"api", "trivial"},
    {"run"},
    {"assemble"},
    {"train", "theorem", "probe", "sweep", "shards", "diagnose", "export", "doctor", "fork"},
    {"__main__"},
]
VERBS = {"train", "theorem", "probe", "sweep", "shards", "diagnose", "export", "doctor", "__main__"}
LEVEL = {name: level for level, names in enumerate(STAGES) for name in names}


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def _for_annotations(block):
    return isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"


def imports(file):
    """Dotted names of what is imported, but for what is needed for annotations alone."""
    tree = ast.parse(file.read_text())
    annotations = {n for block in tree.body if _for_annotations(block) for n in ast.walk(block)}
    for node in set(ast.walk(tree)) - annotations:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def stage(name):
    """The longest entry of STAGES that a dotted name lies in; None outside the package."""
    parts = name.split(".")
    if parts[0] != "jepa_fast" or len(parts) == 1:
        return None
    return next((part for n in range(len(parts), 1, -1) if (part := ".".join(parts[1:n])) in LEVEL), None)


@pytest.mark.parametrize("file", modules("jepa_fast"), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_stage_imports_no_later_stage_and_nobody_a_program(file):
    dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    if dotted in ("jepa_fast.__init__", "jepa_fast.data.__init__"):
        return
    own = stage(dotted)
    assert own, f"{dotted} is in no line of STAGES"
    for name in imports(file):
        other = stage(name)
        if (own, other) == ("fork", "sweep"):  # a fork trains its branches as a sweep does its runs
            continue
        if other and other != own:
            assert LEVEL[other] <= LEVEL[own], f"{file.name} imports {name}"
            assert other not in VERBS, f"{file.name} imports the program {name}"


def test_no_module_imports_itself_by_a_detour():
    files = {
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in modules("jepa_fast")
    }
    ahead = {
        name: {n for n in imports(file) if n in files and not f"{name}.".startswith(f"{n}.")}  # a folder's own __init__
        for name, file in files.items()
    }
    ahead["jepa_fast"] = set()  # the public names, imported on first use
    while leaves := {name for name, needed in ahead.items() if not needed}:
        ahead = {name: needed - leaves for name, needed in ahead.items() if name not in leaves}
    assert not ahead, f"import circle among {sorted(ahead)}"


@pytest.mark.parametrize(
    "folder", sorted({f.parent for f in modules("jepa_fast")} - {ROOT / "jepa_fast"}), ids=lambda f: f.name
)
def test_a_folder_can_be_taken_in_at_a_glance(folder):
    assert len([f for f in folder.glob("*.py") if not f.name.startswith("__")]) <= 12


@pytest.mark.parametrize("file", modules("kernels"), ids=lambda f: str(f.relative_to(ROOT)))
def test_the_kernel_package_knows_nothing_of_jepa(file):
    assert not any(name.split(".")[0] == "jepa_fast" for name in imports(file))


def test_the_model_knows_nothing_of_processes_or_files():
    """But for the statistics of targets and regularisers, which are sums over processes."""
    for file in modules("jepa_fast/model"):
        if file.name in ("targets.py", "regularizers.py"):
            continue
        assert not any(n.startswith(("torch.distributed", "pathlib", "os")) for n in imports(file)), file


def test_kernels_is_not_a_package():
    """`import kernels` must stay free for the public package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_training_loop_fits_on_a_screen():
    tree = ast.parse((ROOT / "jepa_fast" / "train.py").read_text())
    loop = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert loop.end_lineno - loop.lineno < 80
