"""Diagnostics of the collapse phase: what is measured, by whom, and what it says.

`CollapseMonitor` watches a training loop, ours or any other; `phase.detect` reads a log without a model.
"""

from jepa_fast.monitor.collapse import CollapseMonitor, sentence
from jepa_fast.monitor.examination import FULL_INPUTS, Examination

__all__ = ["FULL_INPUTS", "CollapseMonitor", "Examination", "sentence"]
