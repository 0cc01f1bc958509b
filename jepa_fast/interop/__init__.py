"""Other projects' weights: read into our encoders, and written back in a form their libraries load.

`load_encoder` reads any of them; `vit` and `hf` map names; the verb `jepa_fast.export` writes.
"""

from jepa_fast.interop.pretrained import Pretrained, Which, initial_weights, load_encoder

__all__ = ["Pretrained", "Which", "initial_weights", "load_encoder"]
