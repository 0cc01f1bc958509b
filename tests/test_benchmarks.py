"""A benchmark's numbers can be trusted: what is wrong is not timed, rows say where they come from and are never lost."""

import csv
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as everything
from benchmarks import harness, machine, rows, table
from benchmarks.harness import Bench, arguments

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def start(tmp_path, *options, tests=()):
    args = arguments("Toy.\n", rounds=5).parse_args(["--device", "cpu", "--out", str(tmp_path), *options])
    return Bench("toy", args, tests)


def passes():
    assert torch.ones(2).sum() == 2


def wrong():
    torch.testing.assert_close(torch.ones(2), torch.zeros(2))


@pytest.fixture
def vectors():
    return torch.randn(1000), torch.randn(1000)


def written(tmp_path):
    with (tmp_path / "toy.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- rows ----------------------------------------------------------------------------------------------


def test_rows_have_the_columns_that_readers_rely_on(tmp_path, vectors):
    a, b = vectors
    bench = start(tmp_path)
    case = bench.case("n1000", "float32")
    case.add("add", lambda: a + b, check=passes)
    assert case.run() and bench.close() == 0
    header = (tmp_path / "toy.csv").read_text().splitlines()[0]
    assert header == ("bench,provider,shape,dtype,metric,unit,p20,p50,p80,n,device,driver,torch,triton,commit,date")
    row = next(r for r in written(tmp_path) if r["metric"] == "ms")
    assert (row["bench"], row["provider"], row["shape"], row["dtype"], row["unit"]) == (
        "toy",
        "add",
        "n1000",
        "float32",
        "ms",
    )
    assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) and row["n"] == "5"
    assert row["device"] and row["torch"] == torch.__version__ and row["commit"] and row["date"][:2] == "20"


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 3.0, 0.0], [7.0] * 9])
def test_quantiles_are_those_of_the_values(values):
    expected = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    assert rows.quantiles(values) == pytest.approx(expected.tolist())


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        rows.quantiles([])


def test_rows_are_only_ever_appended(tmp_path, vectors):
    for _ in range(2):
        case = start(tmp_path).case("n1000")
        case.add("add", lambda: vectors[0] + 1, check=passes)
        before = (tmp_path / "toy.csv").read_text() if (tmp_path / "toy.csv").exists() else ""
        case.run()
        assert (tmp_path / "toy.csv").read_text().startswith(before)
    assert (tmp_path / "toy.csv").read_text().count("bench,provider") == 1
    assert len(written(tmp_path)) == len(rows.read(tmp_path)) > 0


def test_a_file_with_other_columns_is_left_as_it_is(tmp_path):
    path = tmp_path / "toy.csv"
    path.write_text("a,b\n1,2\n")
    complete = rows.make("toy", "p", "s", "float32", "ms", "ms", [1.0]) | machine.environment(CPU)
    with pytest.raises(ValueError, match="has the columns a, b"):
        rows.append([complete], path)
    assert path.read_text() == "a,b\n1,2\n" and rows.read(tmp_path) == []


def test_a_row_without_its_machine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="driver"):
        rows.append([rows.make("toy", "p", "s", "float32", "ms", "ms", [1.0])], tmp_path / "toy.csv")
    assert not (tmp_path / "toy.csv").exists()


# ---- what is wrong is not timed --------------------------------------------------------------------------


def test_a_provider_that_fails_its_check_is_refused_and_the_rest_is_timed(tmp_path, capsys):
    called = []
    bench = start(tmp_path)
    case = bench.case("s")
    assert not case.add("wrong", lambda: called.append(1), check=wrong)
    assert case.add("right", lambda: None, check=passes)
    assert case.run()
    case.speedup("ratio_to_wrong", over="wrong")
    assert bench.close() == 1 and not called
    assert {r["provider"] for r in written(tmp_path)} == {"right", "machine"}
    assert "refused: s wrong: Tensor-likes are not" in capsys.readouterr().err
    assert not any(r["metric"] == "ratio_to_wrong" for r in written(tmp_path))


def test_a_provider_that_breaks_while_it_is_timed_leaves_no_row(tmp_path):
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of memory")

    bench = start(tmp_path)
    case = bench.case("s")
    case.add("breaks", breaks, check=passes)
    case.add("right", lambda: None, check=passes)
    assert case.run()
    assert bench.close() == 1 and "breaks" not in {r["provider"] for r in written(tmp_path)}


def test_nothing_is_timed_while_a_test_of_the_unit_is_red(tmp_path):
    red = tmp_path / "test_red.py"
    red.write_text("def test_red():\n    assert 1 == 2\n")
    with pytest.raises(SystemExit, match="not green"):
        start(tmp_path, tests=[str(red)])
    assert not (tmp_path / "toy.csv").exists()


def test_a_name_is_given_once(tmp_path):
    case = start(tmp_path).case("s")
    case.add("p", lambda: None, check=passes)
    with pytest.raises(ValueError, match="there already"):
        case.add("p", lambda: None, check=passes)


# ---- measuring ---------------------------------------------------------------------------------------------


def test_providers_take_turns_in_changing_order(tmp_path):
    turns = []
    case = start(tmp_path, "--rounds", "8").case("s")
    for name in "abc":  # `before` allows one call a round
        case.add(name, lambda n=name: turns.append(n), check=passes, before=lambda: None)
    case.run()
    rounds = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == 9 and all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 2


def test_comparisons_pair_the_times_of_one_round(tmp_path):
    """A machine that doubles its time every round leaves the ratio where it is."""
    case = start(tmp_path).case("s")
    case.add("ours", lambda: None, check=passes)
    case.add("theirs", lambda: None, check=passes)
    case.run()
    case.times = {"ours": [1.0, 2.0, 4.0, 8.0], "theirs": [3.0, 6.0, 12.0, 24.0]}
    case.speedup("ratio", over="theirs")
    case.overhead("overhead_fraction", over="ours")
    case.rate("images_per_s", "1/s", 16)
    value = {(r["provider"], r["metric"]): (r["p20"], r["p50"], r["p80"]) for r in case.bench.rows}
    assert value["ours", "ratio"] == ("3", "3", "3") and value["theirs", "ratio"] == ("1", "1", "1")
    assert value["theirs", "overhead_fraction"] == ("2", "2", "2")
    assert value["ours", "images_per_s"][1] == "6"


def test_fractions_are_of_the_better_ceiling_of_the_round(tmp_path):
    case = start(tmp_path).case("s")
    case.add("ours", lambda: None, check=passes)
    case.ceiling("copy", *harness.copy_bandwidth(1 << 10, CPU))
    case.ceiling("axpy", *harness.axpy_bandwidth(1 << 10, CPU))
    case.run()
    case.times = {"ours": [2.0, 2.0], "ceiling copy": [1.0, 4.0], "ceiling axpy": [3.0, 2.0]}
    case.fraction("fraction_of_copy_bandwidth", 12 * 1024, of=["copy", "axpy"])
    row = case.bench.rows[-1]
    assert row["p50"] == f"{(0.75 + 1.0) / 2:.5g}"  # best rates: 8 * 1024 / 1 s, then 12 * 1024 / 2 s


@pytest.mark.parametrize("ceiling", ["copy", "axpy", "matmul"])
def test_ceilings_work_on_random_data_and_are_credited_with_what_they_do(ceiling):
    if ceiling == "matmul":
        call, amount, unit = harness.matmul_rate(torch.float32, CPU, size=64)
        assert (amount, unit) == (2 * 64**3, "FLOP")
    else:
        make = {"copy": harness.copy_bandwidth, "axpy": harness.axpy_bandwidth}[ceiling]
        call, amount, unit = make(1000, CPU)
        assert (amount, unit) == ({"copy": 8000, "axpy": 12000}[ceiling], "B")
    assert call().std() > 0


def test_cold_runs_are_metrics_of_their_own(tmp_path):
    case = start(tmp_path, "--rounds", "1").case("s")
    case.add("p", lambda: None, check=passes)
    for cold in (False, True):
        case.run(cold=cold)
        case.rate("per_s", "1/s", 1)
    assert {"ms", "ms_cold", "per_s", "per_s_cold"} <= {r["metric"] for r in written(tmp_path)}


def test_a_case_stops_after_its_seconds_and_tells_how_many_rounds_it_made(tmp_path):
    case = start(tmp_path, "--rounds", "1000", "--seconds", "0").case("s")
    case.add("p", lambda: None, check=passes)
    case.run()
    assert next(r for r in written(tmp_path) if r["metric"] == "ms")["n"] == "2"


def test_a_trial_with_tiny_shapes_leaves_no_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    bench = Bench("toy", arguments("Toy.").parse_args(["--tiny", "--device", "cpu"]), tests=["tests/none.py"])
    case = bench.case("s")
    case.add("p", lambda: None, check=passes)
    assert case.run() and "p" in case.table() and bench.close() == 0
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="error: --device cuda"):
        start(tmp_path, "--device", "cuda")


# ---- documents from rows -----------------------------------------------------------------------------------


def toy_rows(p50="2", date="2026-01-02 03:04", provider="ours", metric="ms", device="A CPU"):
    row = rows.make(
        "toy", provider, "small", "float32", metric, "ms" if metric == "ms" else "1", [1.0, float(p50), 9.0]
    )
    where = {"device": device, "driver": "", "torch": "2.13.0", "triton": "", "commit": "abc1234", "date": date}
    return row | where


DOCUMENT = (
    "# Title\n\n<!-- begin rows toy -->\nold\n<!-- end -->\n\nBy hand.\n\n<!-- begin computed ema -->\n<!-- end -->\n"
)


def render_into(tmp_path, found):
    folder = tmp_path / "root" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(DOCUMENT)
    (tmp_path / "toy.csv").unlink(missing_ok=True)
    rows.append(found, tmp_path / "toy.csv")
    options = ["--results", str(tmp_path), "--root", str(tmp_path / "root")]
    assert table.main(options) == 0 and table.main([*options, "--check"]) == 0
    return (folder / "README.md").read_text()


def test_documents_are_filled_from_the_newest_rows_and_stay_as_they_are_elsewhere(tmp_path, capsys):
    old, new = toy_rows("3", "2026-01-01 00:00"), toy_rows("2")
    text = render_into(tmp_path, [old, new])
    assert "By hand." in text and "old" not in text
    assert "| small | float32 | ours | 2 (1.4 to 6.2) |" in text and "abc1234" in text and "| 3 |" not in text
    assert "| B/16 |" in text  # what is computed
    figure = tmp_path / "root" / "benchmarks" / "figures" / "toy-a-cpu.svg"
    assert "(figures/toy-a-cpu.svg)" in text and "ours" in figure.read_text()
    before = figure.read_bytes()
    assert render_into(tmp_path, [old, new]) == text and figure.read_bytes() == before
    table.main(["--results", str(tmp_path), "--text"])
    assert "toy small float32" in capsys.readouterr().out


def test_a_short_table_holds_the_machine_measured_last_and_the_providers_asked_for(tmp_path):
    found = [toy_rows("3", device="An old CPU"), toy_rows("2", "2026-02-01 00:00"), toy_rows("5", provider="theirs")]
    found += [toy_rows("4", "2026-02-01 00:00", provider="theirs"), toy_rows("7", "2026-02-01 00:00", provider="other")]
    block = "<!-- begin newest toy ms of ours theirs -->\n<!-- end -->"
    rows.append(found, tmp_path / "toy.csv")
    text = table.fill(block, rows.read(tmp_path), tmp_path, tmp_path)
    assert "| ours | 2" in text and "| theirs | 4" in text
    assert "An old CPU" not in text and "other" not in text


def test_a_document_out_of_date_is_told(tmp_path, capsys):
    render_into(tmp_path, [toy_rows("2")])
    rows.append([toy_rows("1", "2027-01-01 00:00")], tmp_path / "toy.csv")
    options = ["--results", str(tmp_path), "--root", str(tmp_path / "root"), "--check"]
    assert table.main(options) == 1
    assert "README.md is out of date" in capsys.readouterr().out


def test_a_benchmark_without_rows_says_how_to_measure():
    assert "python -m benchmarks toy" in table.section("toy", [], [], "figures")


def test_the_documents_of_this_checkout_are_up_to_date():
    assert table.main(["--check"]) == 0, "run python -m benchmarks.table"


def test_rows_from_elsewhere_are_folded_in_once(tmp_path):
    from_gpu = tmp_path / "gpu.csv"
    rows.append([toy_rows("2"), toy_rows("4", provider="theirs")], from_gpu)
    for _ in range(2):
        assert rows.main([str(from_gpu), "--results", str(tmp_path / "results")]) == 0
    assert len(rows.read(tmp_path / "results")) == 2


# ---- the programmes ------------------------------------------------------------------------------------------


def test_the_cpu_set_fits_into_ten_minutes_and_knows_every_benchmark():
    assert sum(part.limit for part in everything.CPU_SET.values()) < 600
    assert {p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks").glob("bench_*.py")} <= set(everything.CPU_SET)


def test_a_benchmark_that_hangs_is_stopped_with_its_children():
    hangs = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]
    assert everything.bounded(hangs, 1.0, os.environ).startswith("stopped")
    assert (
        everything.bounded([sys.executable, "-c", "raise SystemExit(3)"], 30.0, os.environ) == "failed with exit code 3"
    )


def test_a_deadline_ends_a_case_with_the_rounds_it_has(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_DEADLINE", "0")
    case = start(tmp_path, "--rounds", "1000").case("s")
    case.add("p", lambda: None, check=passes)
    assert case.run()
    assert next(r for r in written(tmp_path) if r["metric"] == "ms")["n"] == "1"


def gpu(*options):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *options]
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    "options, said",
    [(["nope"], "there is no part nope"), (["--speed"], "unknown option"), (["--peer", "/none"], "--peer")],
)
def test_the_gpu_programme_refuses_what_it_does_not_know(options, said):
    done = gpu(*options)
    assert done.returncode == 2 and said in done.stderr


def test_the_gpu_programme_is_bounded_part_by_part_and_goes_on_after_a_failure(tmp_path):
    done = gpu("--dry-run", "--limit", "0", "build", "tests", "--out", str(tmp_path / "a folder"))
    assert done.returncode == 1 and "not started: no time left" in done.stdout
    summary = (tmp_path / "a folder" / "summary.txt").read_text()
    assert "build" in summary and "tests" in summary
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    bounds = re.search(r"declare -A most=\((.*?)\)", script, re.DOTALL)[1]
    assert sum(int(n) for n in re.findall(r"\]=(\d+)", bounds)) <= 530 and "limit=530" in script


def test_the_gpu_programme_knows_which_wheels_a_bare_machine_lacks():
    """Every dependency is either what a machine with torch has anyway, or among the wheels."""
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    brought = set(re.search(r'^WHEELS="(.*)"', script, re.MULTILINE)[1].split())
    has = {"torch", "numpy", "pillow", "matplotlib", "scikit-learn", "pytest", "pytest-xdist", "hypothesis", "triton"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    wanted.remove("jepa-fast[interop]")  # its tests are skipped where transformers is missing
    assert {re.match(r"[\w-]+", w)[0] for w in wanted} <= brought | has


# ---- the committed rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(rows.RESULTS.glob("*.csv")), ids=lambda p: p.name)
def test_committed_rows_are_whole(path):
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames) != rows.COLUMNS:
            pytest.skip("another kind of table")
        for row in reader:
            assert None not in row and None not in row.values()
            assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) and int(row["n"]) >= 1
            assert row["bench"] == path.stem and row["device"] and row["commit"] and row["date"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("bench_*.py")), ids=lambda p: p.stem)
def test_every_benchmark_says_how_it_is_called(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code and "--rounds" in capsys.readouterr().out
