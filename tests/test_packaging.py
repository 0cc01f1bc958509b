"""What an installation promises: complete packages, pinned tools, and extensions that may be missing but never stale."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(requirements):
    return {re.match(r"[\w-]+", r).group().lower().replace("_", "-") for r in requirements}


def test_every_package_is_installed():
    found = {str(f.parent.relative_to(ROOT)).replace("/", ".") for f in (ROOT / "jepa_fast").rglob("__init__.py")}
    assert found | {"fused_ema"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_everything_the_project_installs_is_pinned():
    pinned = names(line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = names(PROJECT["project"]["dependencies"]) | set().union(
        *(names(extras[e]) for e in ("test", "dev", "docs", "interop"))
    )
    assert wanted - {"jepa-fast"} <= pinned


def test_the_build_does_not_ask_for_torch_and_the_base_not_for_cuda():
    assert "torch" not in names(PROJECT["build-system"]["requires"])
    assert not names(PROJECT["project"]["dependencies"]) & {"torchvision", "flash-attn", "triton"}


@pytest.mark.parametrize("verb", [[], ["--help"], ["train", "--list"], ["report", "--help"], ["shards", "--help"]])
def test_the_console_script_has_the_verbs(verb, capsys):
    from jepa_fast.__main__ import main

    assert main(verb) == 0
    assert capsys.readouterr().out


def test_an_unknown_verb_is_one_line(capsys):
    from jepa_fast.__main__ import main

    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


WITHOUT = """
import sys, warnings
for name in ("fused_ema_C", "jepa_fast_C"):
    sys.modules[name] = None
warnings.simplefilter("always")
import numpy as np, torch
from fused_ema import FusedEMA, available_backends
from jepa_fast.masks.sample import sample_masks
from jepa_fast.presets import preset
config = preset("textures")
for _ in range(3):
    sample_masks(config.masks, config.grid, 0, 0, np.zeros(4, np.int64), np.arange(4))
    FusedEMA(torch.nn.Linear(2, 2), decay=0.9).update()
print(available_backends())
"""


def test_without_the_extensions_everything_works_and_each_is_missed_once():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cpp" not in done.stdout
    for name in ("fused_ema_C", "jepa_fast_C"):
        assert done.stderr.count(f"import of {name} halted") == 1, done.stderr
