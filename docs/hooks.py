"""What mkdocs generates: a page for every preset, the examples' page, and the facts of the runs that a page shows."""

import inspect
import logging
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import figures

from jepa_fast.config import Config, flatten, get
from jepa_fast.inputs import find
from jepa_fast.monitor import phase
from jepa_fast.presets import PRESETS
from jepa_fast.report import verdict

logging.getLogger("matplotlib").setLevel(logging.ERROR)
HIDDEN = ("preset", "run.dir", "data.hint")
SECTIONS = {
    "Series": ("demo", "forda", "fordb", "faultdetection-a", "faultdetection-b", "series"),
    "ImageNet": ("in1k-", "in100-"),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    pages = [{name: f"recipes/{name}.md"} for name in PRESETS]
    assert config.nav is not None
    config.nav.append({"Recipes": ["recipes/index.md", *pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "recipes/index.md", content=_index()))
    files.append(File.generated(config, "loops.md", content=_loops()))
    for name in PRESETS:
        files.append(File.generated(config, f"recipes/{name}.md", content=_recipe(name)))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    for name in figures.RUNS:
        markdown = markdown.replace(f"<!-- run: {name} -->", _run(name))
    return markdown


def _loops() -> str:
    """examples/README.md as a page: links to its programs become names, links into docs/ lead there."""
    text = (Path(__file__).parent.parent / "examples" / "README.md").read_text()
    return re.sub(r"\[([\w.]+\.py)\]\(\1\)", r"`examples/\1`", text).replace("](../docs/", "](")


def _index() -> str:
    rows = "\n".join(
        f"| [{name}]({name}.md) | {(make.__doc__ or '').splitlines()[0]} |" for name, make in PRESETS.items()
    )
    return f"# Recipes\n\nA preset is a function that returns a configuration; `--section.field VALUE` changes one field.\n\n| preset | |\n|---|---|\n{rows}\n"


def _recipe(name: str) -> str:
    """Docstring, command, and every field that differs from the defaults."""
    make = PRESETS[name]
    config, default = make(), Config()
    first, _, rest = inspect.getdoc(make).partition("\n")
    kind = find(config.data.kind).method
    facts = [
        ("tokens", f"{config.num_tokens} ({' x '.join(map(str, config.grid))})"),
        ("model", f"{kind}, encoder {config.model.width} x {config.model.depth}, {config.model.heads} heads"),
        ("batch", config.train.batch_size),
        ("length", f"{config.train.steps:,} steps" if config.train.steps else f"{config.train.epochs:g} epochs"),
        ("EMA decay", f"{config.ema.decay:g} to {config.ema.final_decay:g}, {config.ema.schedule}"),
        ("loss", config.objective.loss),
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in facts)
    changed = [(k, v) for k, v in flatten(config).items() if k not in HIDDEN and v != get(default, k)]
    fields = "\n".join(f"| `--{k}` | `{v}` |" for k, v in changed)
    return f"# {name}\n\n{first}\n\n{rest.strip()}\n\n| | |\n|---|---|\n{table}\n\n## Fields\n\nThose that differ from the defaults; `--print-config` shows all.\n\n| field | value |\n|---|---|\n{fields}\n"


def _run(name: str) -> str:
    records = figures.curves(name)
    events = [vars(event) for event in phase.detect(records)]
    lines = (
        "\n".join(f"- {e['kind'].replace('_', ' ')}, step {e['step']:,}: {e['evidence'][0]}" for e in events)
        or "- no event"
    )
    return f"The command: `python -m jepa_fast.train {figures.RUNS[name]}`\n\nWhat jepa-fast says of it: *{verdict(records, events, '')}*\n\n{lines}"
