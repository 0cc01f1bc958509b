"""One console script over the verbs: `jepa-fast train ...` is `python -m jepa_fast.train ...`."""

import importlib
import sys

from jepa_fast.errors import UsageError, one_line_errors, suggest

VERBS = {
    "train": "train a JEPA and say which phase it is in",
    "shards": "make, verify and describe shards",
    "report": "write a run's report.html again, or a figure of the paper from runs",
    "probe": "say what a run's encoders are worth, on its data or another set",
    "sweep": "train over a grid of fields, and compare",
    "fork": "branch a run under several interventions, and compare",
    "theorem": "train the theorem's own setting, where the bound is a bound",
    "diagnose": "read another trainer's log and say which phase it shows",
    "export": "write an encoder for timm, transformers, ijepa or as safetensors",
    "doctor": "say what this machine can do, and test every kernel",
}


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        print("usage: jepa-fast VERB ...\n\n" + "\n".join(f"  {name:<{width}}  {says}" for name, says in VERBS.items()))
        return 0
    if verb not in VERBS:
        raise UsageError(f"unknown verb {verb!r}{suggest(verb, VERBS)}; known are {', '.join(VERBS)}")
    return importlib.import_module(f"jepa_fast.{verb}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
