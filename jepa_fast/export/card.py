"""The model card that travels with an export. In: an encoder and the run it is of. Out: README.md's text."""

import re
import subprocess
from pathlib import Path
from typing import Any

from jepa_fast import __version__
from jepa_fast.bounded import shown
from jepa_fast.config import Config
from jepa_fast.data.readers.generated import SETS
from jepa_fast.inputs import find
from jepa_fast.interop import Pretrained
from jepa_fast.interop.vit import timm_arguments
from jepa_fast.log import read

LOADING = {
    "hf": """from transformers import IJepaModel
model = IJepaModel.from_pretrained(FOLDER, attn_implementation="sdpa")
features = model(pixel_values=pixels).last_hidden_state.mean(1)""",
    "timm": """import timm
model = timm.create_model("local-dir:" + FOLDER, pretrained=True)  # strict: every tensor is used
features = model(pixels)                                           # average-pooled

# or, without timm's reading of the folder
model = timm.create_model("vit_base_patch16_224", {arguments})
model.load_state_dict(safetensors.torch.load_file(FOLDER + "/model.safetensors"))""",
    "official": """import torch
held = torch.load(FOLDER + "/jepa.pth.tar", weights_only=True)
held["target_encoder"]  # what papers evaluate; held["encoder"] is the context encoder, held["predictor"]""",
    "safetensors": """import jepa_fast
found = jepa_fast.load_encoder(FOLDER + "/model.safetensors", which="{which}")
features = jepa_fast.features(found, PATH_OF_DATA)""",
}


def card(found: Pretrained, run: Path, format: str) -> str:
    """Which encoder, trained on what and how long, its probes beside the untrained encoder's, preprocessing, loading."""
    config = found.config
    assert config is not None
    held = "both encoders and the predictor" if format == "official" else f"the **{found.which} encoder**"
    library = {"hf": "transformers", "timm": "timm"}.get(format, "jepa-fast")
    code = LOADING[format].replace("{which}", found.which)
    if format == "timm":
        code = code.replace("{arguments}", ", ".join(f"{k}={v!r}" for k, v in timm_arguments(found.encoder).items()))
    other = "" if format == "official" else _other(found.which)
    return f"""---
library_name: {library}
tags: [jepa, {find(config.data.kind).method.lower()}, self-supervised, feature-extraction]
---
# {plain(config.preset)}: {held.replace("*", "")}

This holds {held} of a JEPA after {found.step:,} optimizer steps. {other}

| | |
|---|---|
| data | {_data(config)} |
| recipe | preset `{plain(config.preset)}`, batch {config.train.batch_size}, masks `{config.masks.mode}`, loss `{config.objective.loss}`, EMA decay {config.ema.decay:g} to {config.ema.final_decay:g} ({config.ema.schedule}), seed {config.train.seed} |
| encoder | width {config.model.width}, depth {config.model.depth}, {config.model.heads} heads, {config.num_tokens} tokens, no class token |
| steps | {found.step:,} |
| written by | jepa-fast {__version__}{_commit()} |

## What its features are worth

{_probes(read(run / "metrics.jsonl"), found.step or 0)}

## Preprocessing

{find(config.data.kind).preprocessing(config)}

## Loading

```python
{code}
```
"""


def plain(name: str) -> str:
    """A name as it may stand in Markdown, in YAML and on a terminal: what has a meaning there becomes `_`."""
    return re.sub(r"[^\w .,:+@=/-]", "_", shown(name), flags=re.ASCII)[:100].strip() or "_"


def _other(which: str) -> str:
    if which == "target":
        return "The target encoder (the slow average) is the one that papers evaluate; the context encoder is another."
    return "The context encoder is the one that gradients train; papers evaluate the target encoder, which is another."


def _data(config: Config) -> str:
    if config.data.path:
        return f"`{plain(Path(config.data.path).name)}`, {config.data.kind}"
    return SETS[config.data.embedded].description if config.data.embedded in SETS else config.data.kind


def _probes(records: list[dict[str, Any]], step: int) -> str:
    probed = [r for r in records if "probe/target" in r and r.get("step", 0) <= step]
    if not probed:
        return "No probe was run (no labels), so nothing is known about its features."
    last = probed[-1]
    rows = [("target encoder", "probe/target"), ("context encoder", "probe/context"),
            ("the same encoder, untrained", "probe/untrained"), ("always the most common class", "probe/majority")]  # fmt: skip
    table = "\n".join(f"| {name} | {last[key]:.3f} |" for name, key in rows if isinstance(last.get(key), float))
    return f"Accuracy of a linear probe on frozen, average-pooled features, at step {last['step']:,}:\n\n| | |\n|---|---|\n{table}"


def _commit() -> str:
    """', commit abc1234' of the checkout this runs from; '' of an installed package."""
    try:
        said = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f", commit {said.stdout.strip()}" if said.returncode == 0 else ""
