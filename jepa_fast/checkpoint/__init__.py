"""Checkpoints: written beside and renamed, verified on the way back, never half a state, for any number of processes.

checkpoints/step-N/ holds the tensors (tensors-R.safetensors of every process R; any number of processes reads them back),
index.json (which piece of which tensor lies where), state.safetensors (what is small) and meta.json, written last: the
step, and size and SHA-256 of every file. checkpoints/latest names the newest, checkpoints/best is a link to the best so far. All of it is data: nothing is unpickled.
Checkpoints of earlier versions, which torch pickled, are read by `legacy`, which executes nothing either.
"""

import warnings

from jepa_fast.checkpoint.best import kept
from jepa_fast.checkpoint.reading import (
    check_fit,
    found,
    load,
    load_newest,
    newest,
    read_state,
    restore,
    verify,
    weights_at,
)
from jepa_fast.checkpoint.writing import Writer, sweep

__all__ = [
    "Writer", "check_fit", "found", "kept", "load", "load_newest", "newest", "read_state", "restore", "sweep", "verify",
    "weights_at",
]  # fmt: skip

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process alone is no accident
