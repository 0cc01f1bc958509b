"""The documentation builds without a warning, and what it generates follows the code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import figures  # noqa: E402

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
    """A dip and its end, of series and of images; the loss without a dip; a falling loss and a target like an untrained one."""
    ends = {name: figures.curves(name) for name in figures.RUNS}
    last = {name: [r for r in rows if "probe/target" in r][-1] for name, rows in ends.items()}
    lowest = {name: min(rows, key=lambda r: r["loss"])["step"] for name, rows in ends.items()}
    for name in ("recovery", "textures"):
        probes = [r for r in ends[name] if "probe/target" in r]
        assert min(r["probe/target"] - r["probe/untrained"] for r in probes) < -0.026
    for name in ("recovery", "textures", "no-dip"):
        assert last[name]["probe/target"] > last[name]["probe/untrained"] + 0.1
        assert lowest[name] < last[name]["step"] / 2 and last[name]["loss"] > 3 * min(r["loss"] for r in ends[name])
    assert min(r["probe/target"] - r["probe/untrained"] for r in ends["no-dip"] if "probe/target" in r) > -0.026
    assert (
        lowest["slow-target"] > 700
        and last["slow-target"]["probe/target"] < last["slow-target"]["probe/untrained"] + 0.01
    )


def test_figures_are_drawn_from_the_committed_curves():
    assert figures.draw("recovery").count("<path") > 20
    assert all((ROOT / "docs" / "runs" / f"{name}.svg").exists() for name in figures.RUNS)
