"""Command line -> configuration: a preset, then --section.field VALUE over it. tyro parses; errors are one line."""

import contextlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from jepa_fast import parallel, rundir
from jepa_fast.config import Config, check, flatten, replace, to_json
from jepa_fast.errors import UsageError, suggest
from jepa_fast.presets import PRESETS, preset

USAGE = """usage: python -m jepa_fast.train [PRESET] [--section.field VALUE ...]
       torchrun --nproc_per_node=8 -m jepa_fast.train [PRESET] ...

  --list            the presets        --print-config    the whole configuration, and stop
  --resume          continue the run of --run.dir (or the newest of the preset)
  --resume auto     continue it if it has a checkpoint, else start it
  --data.path PATH  shards, image folder, CIFAR folder, series file
  --train.steps N   --train.seed N   --log.every N   --checkpoint.every N   --run.dir PATH
  --init.from CHECKPOINT   --parallel.mode auto|single|ddp|fsdp|hsdp
  --dry-run [N]     what N processes need in memory and communication, and stop

SIGTERM, SIGINT or SIGUSR1: a checkpoint at the end of the step, and exit status 75. Bad input: 2.

Without a preset: `demo` on a CPU, `in1k-vitb16` on CUDA."""


@dataclass(frozen=True)
class Command:
    """What was asked for."""

    config: Config
    resume: str  # '', 'must' or 'auto'
    action: str = "train"  # or 'list', 'print-config', 'dry-run', 'help'
    processes: int = 1  # of the dry run
    typed: bool = False  # data.path is what the command line (or the preset) says, not what a file says


def parse(argv: list[str]) -> Command:
    """Raises UsageError: unknown preset or field (with the nearest name), a value of the wrong kind or out of range."""
    rest, resume = _take_resume(list(argv))
    restarted = bool(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))) and not resume
    resume = "auto" if restarted else resume  # torchrun started us again: go on, but with no run of another job
    rest, processes = _take_dry_run(rest)
    if processes:
        return Command(_configuration(rest, resume, restarted)[0], resume, "dry-run", processes)
    for action in ("help", "list", "print-config"):
        if f"--{action}" in rest or (action == "help" and "-h" in rest):
            rest = [a for a in rest if a not in (f"--{action}", "-h")]
            if action != "print-config":
                return Command(Config(), resume, action)
            return Command(_configuration(rest, resume, restarted)[0], resume, action)
    config, typed = _configuration(rest, resume, restarted)
    return Command(config, resume, typed=typed)


def _take_resume(argv: list[str]) -> tuple[list[str], str]:
    rest, resume, i = [], "", 0
    while i < len(argv):
        arg = argv[i]
        if arg == "--resume" and argv[i + 1 : i + 2] == ["auto"]:
            resume, i = "auto", i + 1
        elif arg == "--resume":
            resume = "must"
        elif arg.startswith("--resume="):
            resume = arg.split("=", 1)[1]
            if resume != "auto":
                raise UsageError(f"--resume={resume}: write --resume, or --resume auto")
        else:
            rest.append(arg)
        i += 1
    return rest, resume


def _take_dry_run(argv: list[str]) -> tuple[list[str], int]:
    """The rest, and how many processes `--dry-run [N]` asks about (0: it is not there)."""
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--dry-run=") else [arg])]
    if "--dry-run" not in argv:
        return argv, 0
    i = argv.index("--dry-run")
    given = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("-") else ""
    if given and given not in PRESETS:
        if not given.isdecimal() or not int(given):
            raise UsageError(f"--dry-run {given}: give a number of processes, as in --dry-run 8")
        return argv[:i] + argv[i + 2 :], int(given)
    return argv[:i] + argv[i + 1 :], int(os.environ.get("WORLD_SIZE", 1))


def answer(command: Command) -> str:
    """What an action other than training prints."""
    if command.action == "dry-run":
        return parallel.dry_run(command.config, command.processes)
    if command.action == "print-config":
        return to_json(command.config).rstrip()
    return USAGE if command.action == "help" else listing()


def _configuration(args: list[str], resume: str, restarted: bool) -> tuple[Config, bool]:
    """(what to run, whether its data.path was typed and not read from the folder of a run)."""
    name = args.pop(0) if args and not args[0].startswith("-") else ""
    base = preset(name) if name else default_config()
    config = _override(base, args)
    path = config.data.path
    if resume:
        folder = Path(config.run.dir) if config.run.dir else rundir.newest(config.preset, own=restarted)
        saved = rundir.saved_config(folder) if folder else None
        if saved is not None:  # the run's own configuration is the base; the command line goes over it
            if name and saved.preset != name:
                raise UsageError(
                    f"{folder} holds preset {saved.preset}, not {name}: leave the preset out, or give another --run.dir"
                )
            config = _override(replace(saved, {"run.dir": str(folder)}), args)
        elif resume == "must":
            raise UsageError(f"--resume: no run in {folder or 'runs/'}; leave out --resume to start one")
    return check(config), config.data.path == path


def default_config() -> Config:
    """What the machine is for: `demo` on a CPU; on CUDA ImageNet from $JEPA_FAST_DATA, or generated 224-pixel textures."""
    if not torch.cuda.is_available():
        return preset("demo")
    config = preset("in1k-vitb16")
    if os.environ.get("JEPA_FAST_DATA"):
        return replace(config, {"data.path": os.environ["JEPA_FAST_DATA"]})
    return replace(
        config,
        {"data.embedded": "textures224", "train.steps": 1000, "optim.warmup_epochs": 0.0, "optim.warmup_steps": 100},
    )


def override(base: Config, fields: dict[str, str]) -> Config:
    """`base` with fields as the command line gives them, in words. Raises UsageError as `parse` does."""
    return check(_override(base, [part for name, value in fields.items() for part in (f"--{name}", value)]))


def _override(base: Config, args: list[str]) -> Config:
    _refuse_unknown(args, base)
    args = [re.sub(r"^--(init|teacher)\.from\b", r"--\1.from_", arg) for arg in args]  # `from` is a keyword of Python
    args = _named_norm(args)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(Config, default=base, args=args, config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        raise UsageError(_first_message(said.getvalue())) from None


def _named_norm(args: list[str]) -> list[str]:
    """`--objective.target_norm True` or `False`, as commands of version 0.1 have it, by its name today."""
    said = {"True": "layer", "False": "none"}
    joined = [re.sub(r"^(--objective\.target.norm=)(True|False)$", lambda m: m[1] + said[m[2]], arg) for arg in args]
    return [
        said.get(arg, arg) if re.fullmatch(r"--objective\.target.norm", before) else arg
        for before, arg in zip(["", *joined], joined, strict=False)
    ]


def _refuse_unknown(args: list[str], base: Config) -> None:
    known = flatten(base)
    for before, arg in zip(["", *args], args, strict=False):
        if arg in PRESETS and not before.startswith("--"):
            raise UsageError(f"the preset comes first: python -m jepa_fast.train {arg} ...")
        if arg.startswith("--"):
            field = arg[2:].split("=", 1)[0].replace("-", "_")
            if field not in known:
                options = [f"--{name}" for name in (*known, "list", "print-config", "resume", "dry-run", "help")]
                raise UsageError(
                    f"unknown option {arg.split('=')[0]}{suggest(arg, options)}; --print-config lists all fields"
                )
        elif arg.startswith("-") and not re.match(r"-[\d.]", arg):
            raise UsageError(f"unknown option {arg}; options are --section.field VALUE, --print-config lists them")


def _first_message(printed: str) -> str:
    """What tyro says in its box (drawn with lines, or on plain terminals with dashes), on one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    text = re.sub(r"╭[^\n]*╮", "\n" + "-" * 9, text)
    text = re.sub(r"(?m)^ *[│├╰]*|[│┤╯]* *$", "", text).replace("─", "-")
    _, message, *further = [" ".join(part.split()) for part in re.split(r"-{9,}", text)] + ["", ""]
    wants = re.match(r"Argument helptext: (--\S+(?: [A-Z\[\]|.]+(?![a-z]))+)", next(iter(further), ""))
    said = re.sub(r"(--[\w.-]+)", lambda name: name[0][:2] + name[0][2:].replace("-", "_"), message)
    said = said.replace(
        "Unrecognized options:", "the preset comes first, options are --section.field VALUE; not known:"
    )
    return said.removeprefix("Error parsing ") + (f"; give {wants[1]}" if wants else "") or "it cannot be read"


def listing() -> str:
    """The presets, a line each."""
    width = max(map(len, PRESETS))
    return "\n".join(f"  {name:<{width}}  {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items())
