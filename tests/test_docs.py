"""The documentation builds without a warning, and what it generates follows the code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import figures  # noqa: E402

from jepa_fast.monitor import phase  # noqa: E402
from jepa_fast.presets import PRESETS  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="the docs extra is not installed")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0 and not built.stderr.strip(), built.stderr
    return out


@pytest.mark.slow  # `make docs` in .ci/run builds them too
def test_there_is_a_page_for_every_preset_with_its_docstring_and_its_numbers(site):
    for name, make in PRESETS.items():
        page = (site / "recipes" / name / "index.html").read_text()
        assert make.__doc__.splitlines()[0].split("(")[0].split("/")[0][:30] in page
        assert f"<td>{make().train.batch_size}</td>" in page


@pytest.mark.slow  # `make docs` in .ci/run builds them too
def test_the_loss_curve_page_shows_what_the_detector_says_of_our_own_runs(site):
    page = (site / "reading-a-loss-curve" / "index.html").read_text()
    assert "<!-- run" not in page and page.count("The command:") == len(figures.RUNS)
    assert "loss minimum" in page and "ijepa/issues/41" in page
    assert "load_encoder" in (site / "api" / "index.html").read_text()


def test_the_committed_curves_show_what_the_page_says_of_them():
    """The phase and its end on FordA and, later, on FordB; a frozen target; no false minimum under batch targets."""
    rows = {name: figures.curves(name) for name in figures.RUNS}
    phases = {
        name: next(e for e in phase.detect(r) if e.kind == "collapse_phase")
        for name, r in rows.items()
        if name != "batch"
    }
    assert phases["forda"].end is not None and phases["fordb"].end is not None
    assert phases["fordb"].end > 1.5 * phases["forda"].end and phases["forda"].loss_factor > 10
    lowest = min(rows["forda"], key=lambda r: r["loss"])
    assert rows["forda"][-1]["loss"] > 2 * lowest["loss"]
    frozen = [r for r in rows["frozen"] if "probe/target" in r]
    assert (
        len({r["probe/target"] for r in frozen}) == 1
        and frozen[-1]["probe/context"] > frozen[-1]["probe/untrained"] + 0.1
    )
    assert not any(e.kind == "loss_minimum" for e in phase.detect(rows["batch"]))


def test_figures_are_drawn_from_the_committed_curves():
    assert figures.draw("forda").count("<path") > 20
    assert all((ROOT / "docs" / "runs" / f"{name}.svg").exists() for name in figures.RUNS)
