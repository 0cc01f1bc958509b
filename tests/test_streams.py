"""Remote shards: fetched by the webdataset library, cached, shared out, and honest about what they cannot promise."""

import functools
import http.server
import os
import threading

import numpy as np
import pytest

from jepa_fast.config import replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.loading.loader import Loader
from jepa_fast.data.shards import streams
from jepa_fast.data.shards.writer import write_shards
from jepa_fast.errors import UsageError
from jepa_fast.presets import preset

COUNT = 50  # samples in 5 shards of 10


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JEPA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streams, "TRIES", (0.0, 0.0))
    samples = ({"__key__": f"{i:03}", "npy": np.full((1, 20), i, np.float32), "cls": i % 2} for i in range(COUNT))
    return write_shards(tmp_path / "set", {"train": samples}, "s", 10)


@pytest.fixture
def server(folder):
    """A web server over the folder: (its address, the paths asked for)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}", asked
        http_server.shutdown()


def config(path, **changes):
    return replace(preset("series"), {
        "data.path": path, "data.series_norm": "none", "data.channels": 1, "data.series_length": 20,
        "train.batch_size": 10, "data.workers": 2, **changes,
    })  # fmt: skip


def values(source, cfg, steps, rank=0, size=1):
    """The numbers that the samples hold, in the order of the batches."""
    loader = Loader(cfg, source, 0, rank, size, 0, steps)
    try:
        return [int(v) for batch in loader for v in batch.inputs[:, 0, 0]]
    finally:
        loader.close()


def test_http_shards_come_pass_after_pass_and_are_fetched_once(server):
    address, asked = server
    cfg = config(f"{address}/s-train-{{0000..0004}}.tar")
    data = open_dataset(cfg, typed=True)
    assert any("not exact" in note for note in data.notes)
    got = values(data.train, cfg, 10)
    assert sorted(got[:COUNT]) == list(range(COUNT))
    assert sorted(got[COUNT:]) == list(range(COUNT))
    assert got[:COUNT] != got[COUNT:]
    assert sorted(p for p in asked if p.endswith(".tar")) == [f"/s-train-{i:04}.tar" for i in range(5)]
    assert got == values(open_dataset(cfg, typed=True).train, cfg, 10)  # the same again, from the cache


def test_pipe_shards_and_the_probe_of_their_first(folder):
    cfg = config(f"pipe:cat '{folder}/s-train-0000.tar'::pipe:cat '{folder}/s-train-0003.tar'")
    data = open_dataset(cfg, typed=True)
    assert len(data.probe_train) + len(data.probe_test) == 10 and data.num_classes == 2
    assert sorted(values(data.train, cfg, 2)) == [*range(10), *range(30, 40)]


@pytest.mark.parametrize("size", [2, 10])
def test_processes_share_a_stream_and_none_runs_dry(folder, size):
    """Five shards over two processes: uneven; over ten: fewer shards than processes."""
    cfg = config(f"pipe:cat '{folder}/s-train-000{{0..4}}.tar'")
    got = [values(open_dataset(cfg, typed=True).train, cfg, 20, rank, size) for rank in range(size)]
    assert all(len(mine) == 20 * 10 // size for mine in got)
    first = [set(mine[: (20 if size == 2 else 5)]) for mine in got]
    assert len(set.union(*first)) == sum(map(len, first))  # nobody's samples are another's


def test_a_bad_sample_of_a_stream_is_replaced_and_named(folder, tmp_path):
    good = ({"__key__": f"{i:03}", "npy": np.full((1, 20), np.nan if i == 3 else i, np.float32)} for i in range(20))
    bad = write_shards(tmp_path / "bad", {"train": good}, "b", 10)
    cfg = config(f"pipe:cat '{bad}/b-train-000{{0..1}}.tar'", **{"data.num_samples": 20})
    loader = Loader(cfg, open_dataset(cfg, typed=True).train, 0, 0, 1, 0, 6)
    got = [int(v) for batch in loader for v in batch.inputs[:, 0, 0]]
    loader.close()
    assert len(got) == 60 and 3 not in got
    assert [(b.kind, b.key.rpartition(":")[2]) for b in loader.bad] == [("not_finite", "003")]


def test_what_a_stream_lost_is_counted_under_the_name_of_its_shard(folder):
    file = folder / "s-train-0001.tar"
    file.write_bytes(file.read_bytes()[:9000])
    pattern = f"pipe:cat '{folder}/s-train-000{{0..4}}.tar'"
    cfg = config(pattern, **{"data.num_samples": 50})
    loader = Loader(cfg, open_dataset(cfg, typed=True).train, 0, 0, 1, 0, 12)
    got = {int(v) for batch in loader for v in batch.inputs[:, 0, 0]}
    loader.close()
    (lost,) = loader.bad
    assert lost.kind == "lost" and "the shard ends" in lost.reason
    assert lost.key.startswith(pattern.replace("{0..4}", "1")) and got < set(range(50)) - {int(lost.key[-3:])}


def test_a_copy_that_an_earlier_run_left_damaged_is_fetched_again_and_a_whole_one_is_not(folder):
    file = folder / "s-train-0001.tar"
    whole, url = file.read_bytes(), f"pipe:cat '{file}'"
    file.write_bytes(whole[:9000])
    assert streams.bring(url).read_bytes() == whole[:9000]
    file.write_bytes(whole)
    assert streams.bring(url).read_bytes() == whole[:9000]  # in this run it is what it is
    streams._BROUGHT.clear()
    assert streams.bring(url).read_bytes() == whole
    file.unlink()
    assert streams.bring(url).read_bytes() == whole


def test_a_shard_damaged_at_its_source_gives_what_it_holds_pass_after_pass(folder):
    file = folder / "s-train-0001.tar"
    file.write_bytes(file.read_bytes()[:9000])
    for url in (f"pipe:cat '{file}'", f"pipe:cat '{folder}/s-train-000{{0..2}}.tar'"):
        for _ in range(2):  # the second run begins with a damaged copy
            streams._BROUGHT.clear()
            cfg = config(url, **{"data.num_samples": 30, "data.max_bad_share": 0.2})
            loader = Loader(cfg, open_dataset(cfg, typed=True).train, 0, 0, 1, 0, 20)
            list(loader)
            loader.close()
            assert {b.kind for b in loader.bad} == {"lost"} and len(loader.bad) == 1


def test_what_cannot_be_fetched_is_one_sentence_and_leaves_nothing(folder, server, tmp_path):
    for path in (f"{server[0]}/missing.tar", "pipe:false", "pipe:echo no tar", "foo://x/y.tar"):
        with pytest.raises(UsageError, match="cannot fetch shard") as raised:
            open_dataset(typed=True, config=config(path))
        assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").rglob("*.tar*"))


def test_shards_of_two_hosts_are_not_taken_for_one_another(folder, tmp_path):
    other = write_shards(
        tmp_path / "other", {"train": iter([{"__key__": "x", "npy": np.full((1, 20), 77, np.float32)}])}, "s"
    )
    a, b = streams.bring(f"pipe:cat '{folder}/s-train-0000.tar'"), streams.bring(f"pipe:cat '{other}/s-train-0000.tar'")
    assert a != b and a.read_bytes() != b.read_bytes()


@pytest.mark.parametrize("scheme, program, called", [("s3", "aws", "s3 cp {} -"), ("gs", "gsutil", "cat {}")])
def test_buckets_are_read_through_their_own_programs(folder, tmp_path, monkeypatch, scheme, program, called):
    """Stand-ins of the two programs, that hand out what lies in a folder and take no other call."""
    script = tmp_path / "programs" / program
    script.parent.mkdir()
    script.write_text(
        f'''#!/bin/sh
for word; do case "$word" in {scheme}://*) url=$word;; esac; done
[ "$*" = "{called.format("$url")}" ] || exit 64
exec cat "{tmp_path}/${{url#{scheme}://a bucket/}}"
'''
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    cfg = config(f"{scheme}://a bucket/set/s-train-{{0000..0004}}.tar")
    data = open_dataset(cfg, typed=True)
    assert sorted(values(data.train, cfg, 5)) == list(range(COUNT))
    with pytest.raises(
        UsageError, match=rf"cannot fetch shard {scheme}://a bucket/set/gone.tar \(the command ended with 1"
    ):
        streams.bring(f"{scheme}://a bucket/set/gone.tar")


def test_what_a_stream_cannot_do_is_refused(folder):
    url = f"pipe:cat '{folder}/s-train-0000.tar'"
    with pytest.raises(UsageError, match="remote shards cannot be mixed"):
        open_dataset(typed=True, config=config(f"{url}::{folder}"))
    with pytest.raises(UsageError, match=r"--data.label_filter needs shards on this machine"):
        open_dataset(typed=True, config=config(url, **{"data.label_filter": "x"}))
