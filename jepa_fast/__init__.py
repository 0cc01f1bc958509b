"""jepa-fast: train I-JEPA and TS-JEPA, and know while it runs which phase you are in.

The names below are for notebooks (see `jepa_fast.api`); they are imported when first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jepa_fast.api import Features as Features
    from jepa_fast.api import PredictorSkill as PredictorSkill
    from jepa_fast.api import Pretrained as Pretrained
    from jepa_fast.api import features as features
    from jepa_fast.api import lidar as lidar
    from jepa_fast.api import load_encoder as load_encoder
    from jepa_fast.api import predictor_skill as predictor_skill
    from jepa_fast.api import probe_scores as probe_scores
    from jepa_fast.api import rankme as rankme
    from jepa_fast.api import untrained as untrained
    from jepa_fast.api import views as views

__version__ = "0.1.0"
_NOTEBOOK = (
    "Features",
    "PredictorSkill",
    "Pretrained",
    "features",
    "lidar",
    "load_encoder",
    "predictor_skill",
    "probe_scores",
    "rankme",
    "untrained",
    "views",
)
__all__ = ["__version__", *_NOTEBOOK]


def __getattr__(name: str) -> Any:
    if name in _NOTEBOOK:
        from jepa_fast import api

        return getattr(api, name)
    raise AttributeError(f"module 'jepa_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NOTEBOOK})
