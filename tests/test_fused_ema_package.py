"""The package as its users meet it: copied alone, its README, its examples."""

import copy
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_ema


@pytest.mark.parametrize("module", ["None", "types.SimpleNamespace(ABI=-1)"], ids=["missing", "stale"])
def test_a_copied_folder_without_its_extension_tells_once_and_torch_serves(module, tmp_path):
    folder = shutil.copytree(Path(fused_ema.__file__).parent, tmp_path / "fused_ema")
    code = f"""
import sys, types, warnings, torch
sys.modules["fused_ema_C"], sys.modules["triton"] = {module}, None
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import fused_ema
    for _ in range(2):
        fused_ema.ema_update_([torch.zeros(3)], [torch.ones(3)], 0.5)
told = [w for w in told if "fused_ema" in str(w.message)]
assert len(told) == 1, told
assert fused_ema.available_backends() == ("torch",)
assert fused_ema.__file__.startswith({str(folder)!r})
"""
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, check=True
    )


def blocks_of_the_readme():
    text = (Path(fused_ema.__file__).parent / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_what_the_readme_shows_runs(tmp_path):
    network = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    loss = network(torch.ones(4)).square().mean()
    names = dict.fromkeys(("model", "online", "student", "network", "sharded_model"), network)
    names |= dict.fromkeys(("target", "teacher", "sharded_target"), copy.deepcopy(network))
    names |= {"optimizer": optimizer, "loss": loss, "step": 3, "num_steps": 10, "noise": torch.ones(4)}
    names |= {"path": tmp_path / "ema.pt", "torch": torch, "math": math, "warmup": fused_ema.warmup}
    blocks = blocks_of_the_readme()
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize("example, last", [("plain_loop", "averaged weights:"), ("averaged_model", "model 1.99")])
def test_the_examples_run(example, last, capsys):
    runpy.run_path(str(Path(fused_ema.__file__).parent / "examples" / f"{example}.py"), run_name="__main__")
    assert last in capsys.readouterr().out.splitlines()[-1]
