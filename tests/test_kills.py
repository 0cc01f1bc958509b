"""A loader's process is killed at a random step, for real; what goes on from the last step noted misses nothing."""

import random
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np

from jepa_fast.config import replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.loading.loader import Loader
from jepa_fast.data.loading.order import Order
from jepa_fast.data.shards.writer import write_shards
from jepa_fast.presets import preset

STEPS, BATCH, SAMPLES = 60, 16, 137
PROGRAM = """
import sys
from test_kills import batches
for step, inputs, samples in batches(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])):
    print(step, inputs, *samples, flush=True)
"""


def config(folder):
    return replace(
        preset("series"),
        {"data.path": str(folder), "train.batch_size": BATCH, "data.workers": 1, "masks.min_keep": 1, "data.channels": 1,
         "data.series_length": 20},
    )  # fmt: skip


def batches(folder, start, size):
    """(step, a sum over the inputs, samples) of each global batch, as so many loaders side by side give it."""
    made = config(folder)
    source = open_dataset(made).train
    ranks = [Loader(made, source, 7, rank, size, start, STEPS) for rank in range(size)]
    try:
        for shares in zip(*ranks, strict=True):
            inputs = zlib.crc32(b"".join(share.inputs.numpy().tobytes() for share in shares))
            yield shares[0].step, inputs, [n for share in shares for n in share.samples.tolist()]
    finally:
        for loader in ranks:
            loader.close()


def leg(folder, start, size, kill_after):
    """What a process told before it was killed."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(start), str(size)], cwd=Path(__file__).parent,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    told = []
    for line in program.stdout:
        step, inputs, *samples = map(int, line.split())
        told.append((step, inputs, samples))
        if len(told) == kill_after:
            program.send_signal(signal.SIGKILL)
            break
    program.stdout.close()
    assert program.wait() == (-signal.SIGKILL if len(told) == kill_after else 0)
    return told


def test_killed_by_signal_9_and_going_on_with_8_4_2_1_processes(tmp_path):
    rng = np.random.default_rng(0)
    samples = ({"__key__": f"{i:04}", "npy": rng.normal(size=(1, 20)).astype(np.float32)} for i in range(SAMPLES))
    folder = write_shards(tmp_path / "d", {"train": samples}, "k", 40)
    whole = list(batches(folder, 0, 1))
    assert [step for step, *_ in whole] == list(range(STEPS))

    chance, start, seen = random.Random(), 0, []  # other steps in every run of this test
    for size in (8, 4, 2, 1):
        kill_after = chance.randint(2, 14) if size > 1 else None
        told = leg(folder, start, size, kill_after)
        kept = told[: chance.randint(1, len(told))] if kill_after else told  # the checkpoint is older than the kill
        seen += kept
        start = kept[-1][0] + 1
    assert seen == whole, "other batches than in a run that was never killed"
    order = Order(len(open_dataset(config(folder)).train), BATCH, 7)
    assert [samples for *_, samples in seen] == [order.batch(step)[1].tolist() for step in range(STEPS)]
    stream = [n for *_, samples in seen for n in samples]
    for epoch in range(STEPS * BATCH // SAMPLES):
        assert sorted(stream[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES))
