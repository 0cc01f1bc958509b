"""How many devices there are, and what follows. Only these files know.

`launch` says who started this process; `world` joins the processes and lets them agree on values; `memory` works out what fits and chooses the mode; `wrap`
builds the model and cuts it up.
"""

from jepa_fast.parallel.launch import launched
from jepa_fast.parallel.memory import Layout, choose, dry_run
from jepa_fast.parallel.world import (
    World,
    average,
    barrier,
    gather,
    here,
    join,
    lead,
    leave,
    mean,
    refusal,
    same_everywhere,
    shorten_timeouts,
)
from jepa_fast.parallel.wrap import accumulating, build, distribute, full, gathered, precision, roots, settle

__all__ = [
    "Layout", "World", "accumulating", "average", "barrier", "build", "choose", "distribute", "dry_run", "full", "gather", "gathered", "here",
    "join", "launched", "lead", "leave", "mean", "precision", "refusal", "roots", "same_everywhere", "settle", "shorten_timeouts",
]  # fmt: skip
