"""What a run is: frozen dataclasses, their dotted names, and what is refused.

A leaf: every stage may import it and it imports no stage.
"""

from jepa_fast.config.check import check
from jepa_fast.config.names import flatten, from_json, get, replace, to_json
from jepa_fast.config.sections import (
    EMA,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Checkpoint,
    Config,
    Data,
    Init,
    Log,
    Masks,
    Model,
    Monitor,
    Objective,
    Optim,
    Parallel,
    Perturb,
    Profile,
    Regularizer,
    RunFolder,
    Teacher,
    Train,
)

__all__ = [
    "EMA", "IMAGENET_MEAN", "IMAGENET_STD", "Checkpoint", "Config", "Data", "Init", "Log", "Masks", "Model", "Monitor",
    "Objective", "Optim", "Parallel", "Perturb", "Profile", "Regularizer", "RunFolder", "Teacher", "Train", "check", "flatten", "from_json", "get",
    "replace", "to_json",
]  # fmt: skip
