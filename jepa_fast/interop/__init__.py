"""Other projects' weights: read into our encoders, and written back in a form their libraries load.

`load_encoder` reads any of them; `load_official` and `save_official` a whole facebookresearch/ijepa checkpoint; `vit` and
`hf` map names; the verb `jepa_fast.export` writes.
"""

from jepa_fast.interop.official import load_official, save_official
from jepa_fast.interop.pretrained import Pretrained, Which, initial_weights, load_encoder, load_jepa

__all__ = [
    "Pretrained", "Which", "initial_weights", "load_encoder", "load_jepa", "load_official", "save_official",
]  # fmt: skip
