"""How the files of each kind of input are read. A new kind sets `READERS[kind]`; what it is otherwise, `inputs` says."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jepa_fast.config import Data
from jepa_fast.data.opened import Opened
from jepa_fast.data.readers import from_series, image_folder
from jepa_fast.data.sample import Source
from jepa_fast.data.shards.reader import Shards
from jepa_fast.errors import UsageError


def _nothing(data: Data) -> None:
    pass


@dataclass(frozen=True)
class KindReader:
    """The functions raise UsageError for what they cannot read."""

    payloads: tuple[str, ...]  # extensions of its samples in shards
    open_files: Callable[[str, Data], Opened]  # what lies at a path that names no shards
    of_shards: Callable[[Shards, Data], Callable[[Shards, np.ndarray | None], Source]]  # (first, data)(part, labels)
    refuse_stream: Callable[[Data], None] = _nothing  # settings that remote shards cannot have

    def refuse_other_payload(self, held: Shards, path: str) -> None:
        """Raise UsageError, naming the right preset, if the shards hold samples of another kind."""
        payload = held.payload(0)
        if payload in self.payloads:
            return
        kind = next((name for name, reader in READERS.items() if payload in reader.payloads), "images")
        raise UsageError(
            f"the shards of --data.path {path} hold .{payload} samples: use a preset for {kind}, "
            f"as in python -m jepa_fast.train {kind} --data.path {path}"
        )


READERS = {
    "images": KindReader(image_folder.PAYLOADS, image_folder.open_images, image_folder.of_shards),
    "series": KindReader(("npy",), from_series.open_files, from_series.of_shards, from_series.refuse_stream),
}


def reader_of(data: Data) -> KindReader:
    return READERS[data.kind]
