"""The report says what happened, whatever happened, of any run folder."""

import io
import json
import math
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jepa_fast import report
from jepa_fast.cli import parse
from jepa_fast.config import replace, to_json
from jepa_fast.monitor import phase
from jepa_fast.presets import preset
from jepa_fast.report import coverage

STEPS = range(0, 1001, 10)
VOID = {"meta", "link", "br"}


def run_of(loss, target=None, untrained=0.6):
    """Records with the loss of `loss(step)` and, every 100 steps, the target probe of `target(step)`."""
    records = []
    for step in STEPS:
        record = {"step": step, "loss": loss(step), "discrepancy/visible": 3.0, "spread": 2.0, "drift/total": 0.1,
                  "drift/norm": 0.01, "drift/blocks.0": 0.1, "images_per_s": 100.0}  # fmt: skip
        if target and step % 100 == 0:
            record |= {"probe/target": target(step), "probe/untrained": untrained, "probe/majority": 0.3}
        records.append(record)
    return records


def dipping(step):
    return math.exp(-step / 100) + 0.02 + 0.3 * max(0, step - 400) / 600


def falling(step):
    return math.exp(-step / 300)


def write(folder, records, config=True, events=None):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if config:
        (folder / "config.json").write_text(to_json(preset("demo")))
    if events is None:
        events = [vars(e) for e in phase.detect(records)]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


def told(records, description="data of /data/x"):
    return report.verdict(records, [vars(e) for e in phase.detect(records)], description)


class Checker(HTMLParser):
    """Every tag closed in order; collects links and text."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)


def checked(page):
    checker = Checker()
    checker.feed(page.read_text())
    checker.close()
    assert checker.open == []
    return checker


# ---- the verdict ----------------------------------------------------------------------------------


def test_a_loss_that_ends_in_no_number_is_told_from_a_short_log():
    records = [r | {"loss": None} if r["step"] > 700 else r for r in run_of(falling)]
    assert "From step 710 on the loss is no finite, positive number" in told(records)
    assert "Too short to say: 2 of 101 records" in told([r | {"loss": None} if r["step"] > 10 else r for r in records])
    assert "finite" not in told(run_of(falling))


def test_features_that_never_rose_are_not_called_good():
    assert "no better than an untrained" in told(run_of(falling, lambda s: 0.6))


def test_synthetic_data_are_called_no_evidence():
    assert "no evidence" in told(run_of(falling), "demo: a generated, synthetic set")
    assert "no evidence" not in told(run_of(falling), "data of /data/x")


@pytest.mark.parametrize("count", range(5))
def test_a_short_run_is_called_too_short(count):
    assert "Too short" in told(run_of(falling)[:count])


# ---- the files ------------------------------------------------------------------------------------


def test_the_page_is_whole_and_needs_nothing_from_outside(tmp_path):
    folder = write(tmp_path / "run", run_of(dipping, lambda s: 0.5 if s < 600 else 0.8))
    page = report.write(folder)
    checker = checked(page)
    assert page == folder / "report.html"
    assert not [link for link in checker.links if not link.startswith(("#", "data:"))]
    words = " ".join(checker.words)
    assert "loss minimum" in words and "collapse phase" in words
    assert "train.batch_size" in words


def test_the_figures_open_and_show_something(tmp_path):
    folder = write(tmp_path / "run", run_of(dipping, lambda s: 0.5 if s < 600 else 0.8))
    report.write(folder)
    image = np.asarray(Image.open(folder / "phase.png").convert("L"))
    assert min(image.shape) > 500 and 0.01 < (image < 200).mean() < 0.5
    assert ET.parse(folder / "phase.svg").getroot().tag.endswith("svg")
    text = (folder / "phase.svg").read_text()
    for title in ("Training loss", "Linear probe", "Discrepancy", "loss minimum, step"):
        assert title in text


def test_the_same_run_gives_the_same_report(tmp_path):
    folder = write(tmp_path / "run", run_of(dipping))
    first = report.write(folder).read_bytes()
    assert report.write(folder).read_bytes() == first


def test_samples_left_out_are_counted_though_not_all_are_listed(tmp_path):
    events = [{"kind": "bad_sample", "step": i, "key": f"k{i}", "reason": "r", "why": "empty"} for i in range(60)]
    events.append({"kind": "bad_sample", "step": 70, "key": "z", "reason": "r", "why": "lost"})
    page = report.write(write(tmp_path / "run", run_of(falling), events=events)).read_text()
    assert "samples left out: 61 (60 empty, 1 lost)" in page and "of 61 entries the last 50 are shown" in page
    assert "key: k5," not in page and "key: k59," in page
    assert "left out" not in report.write(write(tmp_path / "fine", run_of(falling))).read_text()


def test_names_and_evidence_cannot_break_the_page(tmp_path):
    nasty = "<script>alert('x')</script>&"
    events = [
        {"kind": "bad_sample", "step": 5, "key": nasty, "reason": nasty},
        {"kind": nasty, "step": 5, "called_at": 6, "confidence": 0.5, "evidence": [nasty]},
    ]
    folder = write(tmp_path / "a<b>&c", run_of(falling), events=events)
    page = report.write(folder)
    assert "script" not in checked(page).open
    assert "<script" not in page.read_text() and "&lt;script&gt;" in page.read_text()
    assert "a&lt;b&gt;&amp;c" in page.read_text()


@pytest.mark.parametrize("count", [0, 1, 2, 6])
def test_a_run_of_few_records_has_a_report(tmp_path, count):
    checked(report.write(write(tmp_path / "run", run_of(dipping, lambda s: 0.6)[:count])))


def test_records_with_holes_have_a_report(tmp_path):
    records = run_of(dipping, lambda s: 0.6)
    for i, record in enumerate(records):
        for j, key in enumerate(list(record)[1:]):
            if (i + j) % 5 == 0:
                record[key] = None
            elif (i + j) % 7 == 0:
                del record[key]
    records += [{"loss": 3.0}, {"step": 1100}, {"step": 1200, "loss": 0, "drift/norm": 0.0, "spread": "wide"}]
    checked(report.write(write(tmp_path / "run", records, config=False)))


def test_constant_and_zero_curves_have_a_report(tmp_path):
    records = [{"step": s, "loss": 0.5, "spread": 0.0, "drift/total": 0.0, "drift/norm": 1.0} for s in STEPS]
    checked(report.write(write(tmp_path / "run", records)))


def test_another_projects_log_gets_its_events_too(tmp_path):
    folder = write(tmp_path / "run", [{"step": s, "loss": dipping(s)} for s in STEPS], config=False, events=[])
    assert "loss minimum" in " ".join(checked(report.write(folder)).words)


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path):
    folder = write(tmp_path / "run", run_of(falling))
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 1010, "lo')
    assert "1,000 of 1,800: in progress" in " ".join(checked(report.write(folder)).words)


def test_what_lies_behind_the_glance_has_sections_of_its_own(tmp_path):
    records = run_of(dipping, lambda s: 0.6)
    for record in records[::10]:
        record |= {"mismatch/both": 2.0, "mismatch/input": 0.5, "mismatch/ema": 1.9, "bound/gamma": 9.0,
                   "bound/measured": 3.0, "rankme": 20.0, "lidar": 40.0, "identity/residual": 0.3}  # fmt: skip
    page = report.write(write(tmp_path / "run", records))
    checker = checked(page)
    words = " ".join(checker.words)
    for said in ("Where the discrepancy comes from", "How many directions", "Which layers drift", "What the masks cover",
                 "Throughput and health", "input mismatch 0.5", "γ 9", "LiDAR 40"):  # fmt: skip
        assert said in words
    text = page.read_text()
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert all(f'id="{name}"' in text for name in re.findall(r"url\(#([^)]+)\)", text))


@pytest.mark.parametrize(("name", "says"), [
    ("demo", "remark B.1, which models it as random, does not describe"),
    ("in1k-vitb16 --masks.mode packed", "Blocks vary more than independent tokens, as remark B.2 says"),
    ("textures --masks.mode reference", "cut to a common number of tokens these do not"),
])  # fmt: skip
def test_the_masks_in_use_stand_beside_remarks_b1_and_b2(name, says):
    config = parse(name.split()).config
    found = coverage.coverage(config)
    assert found.visible.shape == found.target.shape == (config.num_tokens,)
    assert found.hidden.mean() == pytest.approx((1 - found.visible).sum(), rel=1e-6)
    assert found.target.max() <= 1
    assert (found.target.min() > 0) == (config.masks.mode != "reference")  # which never uses the last row and column
    assert says in " ".join(coverage.sentences(found))
    image = np.asarray(_drawn(coverage.coverage_figure(found)))
    assert image.std() > 10


@pytest.mark.parametrize("patches", [20, 40])
def test_independent_tokens_are_not_called_blocks_where_chance_makes_them_vary_more(patches):
    config = replace(preset("demo"), {"masks.mode": "bernoulli", "model.num_patches": patches, "masks.ratio": 0.5})
    found = coverage.coverage(config)
    assert found.hidden.var() > found.bernoulli_variance
    assert "locks" not in " ".join(coverage.sentences(found))


def _drawn(figure):
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return Image.open(out).convert("L")


# ---- the command ----------------------------------------------------------------------------------


def test_without_a_folder_the_run_that_wrote_last_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    write(tmp_path / "runs" / "demo-1", run_of(falling))
    write(tmp_path / "runs" / "demo-2", run_of(falling))
    os.utime(tmp_path / "runs" / "demo-2" / "metrics.jsonl", (1, 1))
    assert report.main([]) == 0
    assert "demo-1" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "demo-2" / "report.html").exists()


@pytest.mark.parametrize("arguments", [["nowhere"], ["a", "b"], ["--fast"], []])
def test_what_cannot_be_reported_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert report.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
