"""The examples run, with the real libraries, and leave a run folder that the report reads."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import real_libraries

from jepa_fast import report
from jepa_fast.log import read

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {"plain_loop": (), "lightning_callback": ("lightning",), "lightly_ijepa": ("torchvision", "lightly")}
SMALL = {"lightly_ijepa": ("--size", "128", "--patch", "16", "--depth", "1", "--batch-size", "4")}


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_leaves_a_run_folder(name, tmp_path, monkeypatch, capsys):
    for library in NEEDS[name]:
        real_libraries.require(library)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--steps", "11", "--out", "out", *SMALL.get(name, ())])

    records = read(tmp_path / "out" / "metrics.jsonl")
    assert [r["step"] for r in records] == [0, 10]
    for key in ("loss", "discrepancy/visible", "discrepancy/relative", "spread", "skill", "drift/total"):
        assert all(math.isfinite(r[key]) for r in records), key
    assert records[-1]["drift/total"] > 0 and records[-1]["discrepancy/visible"] > 0
    assert (tmp_path / "out" / "events.jsonl").exists()
    assert report.write(tmp_path / "out").exists()
    sys.modules.pop("plain_loop", None)


def test_the_readme_names_every_example():
    said = (EXAMPLES / "README.md").read_text()
    assert all(f"({file.name})" in said for file in EXAMPLES.glob("*.py"))
