"""`diagnose` reads what other trainers write, as they write it: their loggers' formats, restarts and cut lines included."""

import base64
import json
import math
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_fast import checkpoint
from jepa_fast.config import replace
from jepa_fast.diagnose import main
from jepa_fast.diagnose.curves import ColumnChoice, curve
from jepa_fast.diagnose.tables import read
from jepa_fast.diagnose.weights import drift, encoders
from jepa_fast.errors import UsageError
from jepa_fast.interop import save_official
from jepa_fast.log import read as lines
from jepa_fast.model.jepa import JEPA as Both
from jepa_fast.presets import preset

IJEPA = "epoch,itr,loss,mask-A,mask-B,time (ms)"
JEPA = "epoch,itr,loss,loss-jepa,reg-loss,enc-grad-norm,pred-grad-norm,gpu-time(ms),wall-time(ms)"
VJEPA2 = "epoch,itr,loss,iter-time(ms),gpu-time(ms),dataload-time(ms)"
REST = {IJEPA: "68.00000,44.00000,412", JEPA: "0.01000,0.00000,0.10000,0.10000,300,310", VJEPA2: "310,300,4"}
# written by torch.utils.tensorboard: train/loss = 1 / (step + 1), and val/acc = step / 100 in the newer tensor form
EVENTS = (
    "eNrzYICAf5M85nI2lD3VbT94y1GKN6koMTNPz7UsNa/EyihIj0unJDWvOL8oKT+xKEWvuDQ3N7GoUq+8KLMktUgvFaQqPi0zJzUe"
    "IvI8/UauHNTcm3eEjDif/YWYqyXMJcjFVQIyWz8nv7hYlIGhwf79v42PdKGqbRy7fnPqMTyDqFbiUuBiL0vM0U9MTnbi4GDUYgGp"
    "8eLm4uRiL05OzEksKq43iONXgGrWfLsygHMeVLMAF4ZlPXq7bP1Mv7LqQ9XnxsoGcOowwtVjWnf2zBlbFOtMjwWcQLFuLky7CIZ1"
    "hjzOthnCugEo1hkywdVjs87HDsW6yQ+s+lCsWwTTLodhHYcii+0zjauvUKybwQxXj2ndrJkzUa07VPenGsW6DzDtGhjW8Zw7bmNZ"
    "pzEbxTorFrh6rIGJat0Lp5OZKNZlwrQbYVi3cMECG6295fUo1q3kgKvHmlTsUazTNIz5AwAsltle"
)


def dipping(step):
    """The shape of facebookresearch/ijepa issue 41: down to a fifth, and slowly up again."""
    return 0.023 * math.exp(-step / 60) + 0.005 + 0.010 * max(0, step - 250) / 750


def falling(step):
    return 0.02 + math.exp(-step / 300)


def csv_lines(header, epochs, loss=dipping, per_epoch=100, seed=0):
    """Rows as CSVLogger prints them: one an iteration, losses to five decimals."""
    noise = random.Random(seed)
    steps = [(e, i) for e in epochs for i in range(per_epoch)]
    value = {(e, i): loss((e - 1) * per_epoch + i) * (1 + noise.gauss(0, 0.03)) for e, i in steps}
    return [f"{e},{i},{value[e, i]:.5f},{REST[header]}" for e, i in steps]


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of(path, **choice):
    return curve(read(Path(path)), ColumnChoice(**choice), str(path))


def refused(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("error: ")
    return said.err


@pytest.mark.parametrize(
    ("header", "kind"), [(IJEPA, "I-JEPA's CSV"), (JEPA, "V-JEPA's CSV"), (VJEPA2, "V-JEPA 2's CSV")]
)
def test_the_csv_of_each_official_trainer_gives_a_verdict_evidence_limits_and_a_figure(there, capsys, header, kind):
    (there / "jepa_r0.csv").write_text("\n".join([header, *csv_lines(header, range(1, 11))]) + "\n")
    assert main(["jepa_r0.csv"]) == 0
    said = capsys.readouterr().out
    assert kind in said and "100 an epoch" in said
    assert "loss minimum" in said and "limits:" in said and "without a probe nothing here is a fact" in said
    assert "Estimated from the loss alone" in said or "The loss alone does not tell" in said
    out = there / "diagnoses" / "jepa_r0-1"
    assert (out / "phase.png").stat().st_size > 5000 and (out / "report.html").exists()
    [minimum] = [e for e in lines(out / "events.jsonl") if e["kind"] == "loss_minimum"]
    assert 150 <= minimum["step"] <= 350 and minimum["evidence"]


def test_a_curve_that_only_falls_has_no_loss_minimum(there, capsys):
    (there / "log_r0.csv").write_text("\n".join([VJEPA2, *csv_lines(VJEPA2, range(1, 11), falling)]) + "\n")
    assert main(["log_r0.csv"]) == 0
    assert "loss minimum," not in capsys.readouterr().out


def test_a_restart_in_the_middle_of_an_epoch_replaces_what_it_repeats(there):
    """Killed in epoch 7, resumed from the checkpoint of epoch 5: CSVLogger appends its header and epoch 6 again."""
    first, again = csv_lines(IJEPA, range(1, 8))[:-40], csv_lines(IJEPA, range(6, 11), seed=1)
    (there / "j.csv").write_text("\n".join([IJEPA, *first, IJEPA, *again]) + "\n")
    found = of("j.csv")
    assert [r["step"] for r in found.records] == list(range(1000))
    assert found.records[550]["loss"] == float(again[50].split(",")[2])
    assert any("1 restart(s)" in note for note in found.notes)


def test_runs_appended_to_one_file_are_kept_apart(there):
    """load_checkpoint of ijepa falls back to epoch 0 in silence; the file then holds two runs."""
    one, two = csv_lines(IJEPA, range(1, 4)), csv_lines(IJEPA, range(1, 3), falling)
    (there / "j.csv").write_text("\n".join([IJEPA, *one, IJEPA, *two]) + "\n")
    last, first = of("j.csv"), of("j.csv", run="1")
    assert (len(first.records), len(last.records)) == (300, 200)
    assert last.records[0]["loss"] == float(two[0].split(",")[2])
    assert any("2 runs" in note and "--run" in note for note in last.notes)
    with pytest.raises(UsageError, match="from 1 to 2"):
        of("j.csv", run="3")


def test_a_killed_line_zero_bytes_and_lost_losses_are_told_and_left_out(there):
    rows = csv_lines(IJEPA, range(1, 3))
    rows[150] = "2,50,nan,68.00000,44.00000,412"
    (there / "j.csv").write_bytes(("\n".join([IJEPA, *rows]) + "\n3,0,0.0").encode() + b"\0" * 64)
    found = of("j.csv")
    assert len(found.records) == 199
    assert any("1 line(s) cut short" in n for n in found.notes) and any("first at step 150" in n for n in found.notes)


def test_a_long_log_is_averaged_and_its_minimum_stays_where_it_was(there):
    (there / "j.csv").write_text(
        "\n".join([VJEPA2, *csv_lines(VJEPA2, range(1, 11), lambda s: dipping(s / 10), 1000)]) + "\n"
    )
    found = of("j.csv")
    assert len(found.records) == 4000 and found.records[-1]["step"] == 9999
    assert 1500 < min(found.records, key=lambda r: r["loss"])["step"] < 3500


def test_tensorboard_events_are_read_without_tensorboard(there):
    folder = there / "version_0"
    folder.mkdir()
    data = zlib.decompress(base64.b64decode(EVENTS))
    (folder / "events.out.tfevents.1.host.2.0").write_bytes(data)
    found = of(folder, others=(("probe/target", "val/acc"),))
    assert [r["step"] for r in found.records] == [0, 10, 20, 30, 40, 50]
    assert [r["loss"] for r in found.records] == pytest.approx([1 / (s + 1) for s in range(0, 60, 10)])
    assert [r["probe/target"] for r in found.records] == pytest.approx([s / 100 for s in range(0, 60, 10)])
    (folder / "events.out.tfevents.1.host.2.0").write_bytes(data[:-30])  # a killed run
    assert len(of(folder / "events.out.tfevents.1.host.2.0").records) == 6


def test_tensorboard_events_agree_with_tensorboard(there):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    for begun in (0, 30):  # the second process resumed from step 30
        writer = tensorboard.SummaryWriter("run")
        for step in range(begun, 60):
            writer.add_scalar("loss", begun + step / 7, step)
        writer.close()
    found = of("run")
    assert [r["loss"] for r in found.records] == pytest.approx(
        [(30 if s >= 30 else 0) + s / 7 for s in range(60)], rel=1e-6
    )


def test_a_wandb_chart_of_several_runs_asks_which(there, capsys):
    head = ["Step"] + [
        f"{run} - train/loss{end}" for run in ("calm-sun-1", "bold-sea-2") for end in ("", "__MIN", "__MAX")
    ]
    rows = [[s, *[dipping(s)] * 3, *([falling(s)] * 3 if s < 500 else [""] * 3)] for s in range(0, 1000, 10)]
    text = "\n".join(",".join(f'"{v}"' for v in row) for row in [head, *rows])
    (there / "wandb.csv").write_text(text)
    assert "calm-sun-1, bold-sea-2" in refused(capsys, "wandb.csv")
    assert len(of("wandb.csv", run="bold-sea-2").records) == 50
    assert of("wandb.csv", run="calm-sun-1").records[3]["loss"] == pytest.approx(dipping(30))
    assert of("wandb.csv", loss="calm-sun-1 - train/loss").records[3]["loss"] == pytest.approx(dipping(30))
    assert "did you mean calm-sun-1" in refused(capsys, "wandb.csv", "--run", "calm-sun")


def test_a_wandb_history_and_lightnings_metrics_have_holes(there):
    (there / "history.csv").write_text(
        ",_step,_runtime,train_loss,val/acc\n"
        + "".join(f"{i},{i * 5},{i}.5,{falling(i) if i % 2 else ''},\n" for i in range(20))
    )
    assert [r["step"] for r in of("history.csv").records] == list(range(5, 100, 10))
    (there / "metrics.csv").write_text("epoch,step,train_loss,val_loss\n0,49,0.5,\n0,50,,0.7\n1,99,0.4,\n")
    assert of("metrics.csv").records == [{"step": 49, "loss": 0.5}, {"step": 99, "loss": 0.4}]


@pytest.mark.parametrize(
    "text",
    [
        "".join(json.dumps({"it": i, "train": {"jepa_l": falling(i)}}) + "\n" for i in range(30)) + '{"it": 30, "tr',
        json.dumps({"best": None, "log_history": [{"step": i, "train": {"jepa_l": falling(i)}} for i in range(30)]}),
        "it;train/jepa_l\n" + "".join(f"{i};{falling(i)}\n" for i in range(30)),
    ],
    ids=["jsonl", "trainer_state", "semicolons"],
)
def test_any_table_will_do_with_a_loss_column(there, text):
    (there / "log.txt").write_text(text)
    records = of("log.txt", loss="train/jepa_l").records
    assert [r["step"] for r in records] == list(range(30))
    assert [r["loss"] for r in records] == pytest.approx([falling(i) for i in range(30)])


def test_columns_that_bear_our_names_are_taken_as_ours(there):
    (there / "log.csv").write_text("step,loss,probe/target,spread,lr\n0,1,0.5,2,1e-3\n10,0.5,,3,1e-3\n")
    assert of("log.csv").records == [
        {"step": 0, "loss": 1, "probe/target": 0.5, "spread": 2},
        {"step": 10, "loss": 0.5, "spread": 3},
    ]


@pytest.mark.parametrize(
    "prefix", ["INFO:root:", "[INFO    ][2024-02-14 12:00:00][main                     ] ", "{main} ", ""]
)
def test_printed_epoch_losses_of_issue_41_are_a_log_too(there, prefix):
    losses = (0.028, 0.005, 0.005, 0.006, 0.008, 0.012, 0.015)
    (there / "out.log").write_text(
        "".join(f"{prefix}Epoch {e}\n{prefix}[{e},     0] loss: {v:.3f} masks: 68.8 44.1\n{prefix}avg. loss {v:.3f}\n"
                for e, v in enumerate(losses, 1))
    )  # fmt: skip
    assert [r["loss"] for r in of("out.log").records] == list(losses)


def test_our_own_run_folder_keeps_all_its_curves(there):
    run = there / "run"
    run.mkdir()
    rows = [{"step": s, "loss": falling(s), "discrepancy/visible": 1.0, "probe/target": 0.5} for s in range(0, 100, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert of("run").records == rows


# ---- checkpoints ----------------------------------------------------------------------------------


def official(path, epoch, lag, prefix="module.", steps=None):
    """A checkpoint with the entries, prefixes and optimizer state of facebookresearch/ijepa."""
    torch.manual_seed(epoch)
    names = (
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.1.attn.qkv.weight",
        "norm.weight",
    )
    encoder = {prefix + name: torch.randn(4, 4) for name in names}
    target = {name: value + (0 if "pos_embed" in name else lag) for name, value in encoder.items()}
    opt = {
        "state": {0: {"step": torch.tensor(float(steps)), "exp_avg": torch.zeros(1)}} if steps else {},
        "param_groups": [],
    }
    torch.save(
        {"encoder": encoder, "predictor": {}, "target_encoder": target, "opt": opt, "scaler": None, "epoch": epoch,
         "loss": 0.01, "batch_size": 128, "world_size": 16, "lr": 1e-3}, path
    )  # fmt: skip


def test_checkpoints_give_the_distance_of_the_encoders_layer_by_layer(there, capsys):
    (there / "jepa_r0.csv").write_text("\n".join([IJEPA, *csv_lines(IJEPA, range(1, 11))]) + "\n")
    for epoch, lag in ((2, 0.1), (4, 0.3), (6, 0.2)):
        official(there / f"jepa-ep{epoch + 1}.pth.tar", epoch, lag)
    official(there / "jepa-latest.pth.tar", 10, 0.05, "module.backbone.", steps=987)  # vjepa2 wraps its encoder
    assert main(["jepa_r0.csv", "--checkpoints", "jepa-*.pth.tar"]) == 0
    said = capsys.readouterr().out
    rows = {r["step"]: r for r in lines(there / "diagnoses" / "jepa_r0-1" / "metrics.jsonl") if "drift/total" in r}
    assert list(rows) == [200, 400, 600, 987]  # epochs x 100 iterations, or the optimizer's own count
    assert rows[400]["drift/blocks.1"] == pytest.approx(0.3 * 4, rel=1e-5)  # 16 equal entries
    assert rows[400]["drift/total"] == pytest.approx(0.3 * 4 * 2, rel=1e-5)  # four layers; the position table is none
    assert "2.4 at step 400" in said


def test_the_drift_of_our_own_checkpoints_is_the_drift_the_run_logged(tiny_run):
    run, records = tiny_run
    for step in (3, 6):
        state = checkpoint.load(run / "checkpoints" / f"step-{step}")
        measured = drift(*encoders(state, run), "run")
        logged = {k: v for k, v in next(r for r in records if r["step"] == step).items() if k in measured}
        assert logged == pytest.approx(measured, rel=1e-4)


def test_with_data_each_checkpoint_is_probed_beside_the_untrained_encoder(tiny_run, there, capsys):
    run, _ = tiny_run
    losses = "".join(json.dumps({"step": s, "loss": falling(s)}) + "\n" for s in range(12))
    (there / "theirs.jsonl").write_text(losses)
    data = series_file(there)
    assert main(["theirs.jsonl", "--checkpoints", str(run / "checkpoints" / "step-*"), "--data", str(data)]) == 0
    rows = [r for r in lines(there / "diagnoses" / "theirs-1" / "metrics.jsonl") if "probe/target" in r]
    assert [r["step"] for r in rows] == [3, 6]
    for key in ("probe/context", "probe/untrained", "probe/majority", "rankme", "discrepancy/full", "drift/total"):
        assert all(math.isfinite(r[key]) for r in rows), key


def test_heads_that_weights_do_not_tell_are_given(there, capsys):
    config = replace(
        preset("digits"), {"model.width": 48, "model.heads": 4, "model.depth": 1, "model.predictor_depth": 1}
    )
    save_official(Both(config), there / "ours.pth.tar", epoch=3)
    for i in range(20):
        (there / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        grey = np.random.default_rng(i).integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(grey).save(there / "photos" / "ab"[i % 2] / f"{i}.png")
    (there / "theirs.csv").write_text("epoch,loss\n" + "".join(f"{e},{falling(e):.4f}\n" for e in range(12)))
    asked = ["theirs.csv", "--checkpoints", "ours.pth.tar", "--data", "photos"]
    assert main(asked) == 2 and "--heads" in capsys.readouterr().err
    assert main(["theirs.csv", "--heads", "4"]) == 2 and not (there / "diagnoses").exists()
    assert main([*asked, "--heads", "4"]) == 0
    assert any("discrepancy/full" in r for r in lines(there / "diagnoses" / "theirs-1" / "metrics.jsonl"))


def series_file(folder):
    noise = random.Random(0)
    file = folder / "mine_TRAIN.tsv"
    rows = [[i % 2, *(math.sin((0.1 + 0.2 * (i % 2)) * t + noise.random() * 6) for t in range(500))] for i in range(40)]
    text = "\n".join("\t".join(f"{v:.4f}" for v in row) for row in rows)
    file.write_text(text)
    (folder / "mine_TEST.tsv").write_text(text)
    return file


# ---- bad input ------------------------------------------------------------------------------------


class Malice:
    def __reduce__(self):
        return (Path("executed").touch, ())


def test_a_pickle_is_neither_a_log_nor_executed(there, capsys):
    import pickle

    (there / "log.pkl").write_bytes(pickle.dumps(Malice()))
    assert "is a pickle" in refused(capsys, "log.pkl")
    (there / "ok.csv").write_text("step,loss\n" + "".join(f"{i},{falling(i)}\n" for i in range(30)))
    torch.save({"encoder": Malice(), "target_encoder": {}}, there / "bad.pth.tar")
    assert "nothing in it was executed" in refused(capsys, "ok.csv", "--checkpoints", "bad.pth.tar")
    assert not (there / "executed").exists() and not (there / "diagnoses").exists()


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("step,l\n1,0.5\n", (), "name it with --loss-column"),
        ("step,loss\n1,0.5\n", ("--loss-column", "los"), "did you mean loss?"),
        ("step,a_loss,b_loss\n1,0.5,2\n", (), "a_loss, b_loss"),
        ("step,loss\n1,nan\n2,inf\n", (), "finite"),
        ("step,loss\n", (), "a header and no rows"),
        ("", (), "is empty"),
        ("it was a dark night\nand no numbers\n", (), "no log that can be read"),
        ("step,loss\n0.5,1\n0.7,2\n", ("--step-column", "step"), "no whole number"),
        ("step,loss\n1,0.5\n", ("--column", "probe"), "KEY=NAME"),
        ("step,loss\n1,0.5\n", ("--data", "x"), "--checkpoints"),
        ("step,loss\n1,0.5\n", ("--checkpoints", "no*.pt"), "matches no file"),
        ("step,loss\n1,0.5\n", ("--colour",), "unrecognized"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_nothing_is_written(there, capsys, text, arguments, says):
    (there / "log.csv").write_text(text)
    assert says in refused(capsys, "log.csv", *arguments)
    assert [p.name for p in there.iterdir()] == ["log.csv"]


def test_checkpoints_that_are_no_pair_are_told(there, capsys):
    (there / "ok.csv").write_text("step,loss\n" + "".join(f"{i},{falling(i)}\n" for i in range(30)))
    torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": 1}, there / "one.pt")
    assert "does not hold two encoders" in refused(capsys, "ok.csv", "--checkpoints", "one.pt")
    official(there / "nan.pt", 1, float("nan"))
    assert "NaN" in refused(capsys, "ok.csv", "--checkpoints", "nan.pt")
    assert "cannot read nothing.csv" in refused(capsys, "nothing.csv")


def test_nothing_is_written_over(there, capsys):
    (there / "ok.csv").write_text("step,loss\n" + "".join(f"{i},{falling(i)}\n" for i in range(30)))
    (there / "mine").mkdir()
    (there / "mine" / "thesis.tex").write_text("x")
    assert "nothing was written over" in refused(capsys, "ok.csv", "--out", "mine")
    assert main(["ok.csv"]) == main(["ok.csv"]) == 0
    assert sorted(p.name for p in (there / "diagnoses").iterdir()) == ["ok-1", "ok-2"]
