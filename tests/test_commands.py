"""`pipe:COMMAND` runs where the user typed it, and nowhere else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_checkpoint_trust import sign
from test_streams import config, folder, server, values  # noqa: F401  (fixtures)

from jepa_fast import api, probe, shards, train
from jepa_fast.checkpoint import state
from jepa_fast.config import replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.shards import paths
from jepa_fast.data.shards.writer import write_shards
from jepa_fast.errors import UsageError

COMMAND = "pipe:mkdir executed; #.tar"
SPELLINGS = [COMMAND, "PIPE:mkdir executed", " pipe:mkdir executed", "pi\tpe:mkdir executed", "pipe://;mkdir executed",
             "Pipe://;mkdir executed", "\x01pipe://;mkdir executed", "{pipe:mkdir executed #,http}://x.tar",
             "http://127.0.0.1:9/a.tar::pipe:mkdir executed"]  # fmt: skip


def forge(run, **changes):
    """The newest checkpoint of a run, with another state."""
    step = run / "checkpoints" / "step-6"
    state.write(state.read(step) | changes, step)
    sign(step)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jepa_fast.data.shards.streams.TRIES", (0.0,))
    yield
    assert not Path("executed").exists()


@pytest.mark.parametrize("path", SPELLINGS)
def test_a_configuration_from_a_file_runs_no_command(path):
    with pytest.raises(UsageError, match=r"runs a command|hides a command|no program is known") as raised:
        open_dataset(config(path))
    assert "\n" not in str(raised.value)


def test_a_saved_run_with_a_command_is_neither_probed_nor_resumed(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    held = json.loads((run / "config.json").read_text())
    path, held["data"]["path"] = held["data"]["path"], COMMAND
    (run / "config.json").write_text(json.dumps(held))
    forge(run, config=json.dumps(held))
    assert probe.main([str(run)]) == 2
    assert train.main(["--resume", "--run.dir", str(run), "--train.steps", "8"]) == 2
    said = capsys.readouterr().err
    assert said.count("runs a command, and it comes from a file, not from you") == 2 and said.count("\n") == 2
    assert probe.main([str(run), "--data.path", path]) == 0


def test_an_export_whose_header_names_a_command_gives_no_features(tiny_run):
    found = api.load_encoder(tiny_run[0])
    forged = api.Pretrained(found.encoder, found.which, "export", config=replace(found.config, {"data.path": COMMAND}))
    with pytest.raises(UsageError, match="runs a command"):
        api.features(forged)


@pytest.mark.parametrize("line", SPELLINGS[:6])
def test_a_list_runs_no_command(tmp_path, line, capsys):
    (tmp_path / "list.txt").write_text(f"a.tar\n{line}\n")
    with pytest.raises(UsageError, match=r"list\.txt holds .* which runs a command"):
        open_dataset(config("list.txt"), typed=True)
    assert shards.main(["list.txt", "out"]) == 2


def test_a_file_name_that_a_pattern_found_is_only_a_name(tmp_path):
    samples = ({"__key__": f"{i}", "npy": np.full((1, 20), i, np.float32)} for i in range(12))
    made = write_shards(tmp_path / "set", {"train": samples}, "s", 12)
    (made / "s-train-0000.tar").rename(tmp_path / COMMAND)
    assert paths.expand("*.tar") == [COMMAND]
    assert shards.main(["*.tar", "out"]) == 0
    assert len(open_dataset(config("*.tar")).train) == 12


def test_typed_commands_run(folder, capsys):  # noqa: F811
    path = f"pipe:cat '{folder}/s-train-0000.tar'"
    assert len(open_dataset(config(path), typed=True).train) == 10
    assert shards.main([path, "out"]) == 0


def test_a_url_is_a_url_and_no_pattern_of_files(server):  # noqa: F811
    address, asked = server
    cfg = config(f"{address}/s-train-0000.tar?sig=a*b[1]&x=%2F?")
    assert sorted(values(open_dataset(cfg).train, cfg, 1)) == list(range(10))
    assert asked == ["/s-train-0000.tar?sig=a*b%5B1%5D&x=%2F?"]


# ---- braces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern, names", [
    ("a", ["a"]), ("{0..2}", ["0", "1", "2"]), ("x{08..11}y", ["x08y", "x09y", "x10y", "x11y"]), ("{2..0}", ["2", "1", "0"]),
    ("{-1..1}", ["-1", "0", "1"]), ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]), ("{a,{b,c}d}", ["a", "bd", "cd"]),
    ("awk '{print}'", ["awk '{print}'"]), ("{}", ["{}"]), ("{a,}", ["a", ""]), ("${X}", ["${X}"]), ("a}", ["a}"]),
])  # fmt: skip
def test_braces_stand_for_names_as_in_a_shell(pattern, names):
    assert paths.expand(pattern) == names


@pytest.mark.parametrize("pattern, said", [
    ("{0..999999999999}.tar", "stands for more than 1,000,000 names"), ("{0..999}" * 4, "stands for more than"),
    ("{a,b}" * 40, "stands for more than"), ("{" * 99, "more than 50 braces"), ("a{0..1", "the brace at character 2 is not closed"),
])  # fmt: skip
def test_a_pattern_of_too_many_names_is_refused_before_it_is_written_out(pattern, said):
    with pytest.raises(UsageError, match=said):
        paths.expand(pattern)


@pytest.mark.parametrize(
    "text, said", [(b"", "is an empty list"), (b"# x\n\n", "is an empty list"), (b"\xff\xfe", "no text in UTF-8")]
)
def test_a_list_that_is_none_is_one_line(tmp_path, text, said):
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(UsageError, match=said):
        open_dataset(config("list.txt"))
