"""Where things are kept that can be made again: generated data, and indexes of shards that lie where nobody may write."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$JEPA_FAST_CACHE, or jepa_fast under the user's cache folder."""
    if os.environ.get("JEPA_FAST_CACHE"):
        return Path(os.environ["JEPA_FAST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jepa_fast"
