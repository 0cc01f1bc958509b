"""Where records go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio.

A new one is a class and a line of SINKS here, and a field of `config.Log`.
"""

import importlib
from pathlib import Path
from typing import Any, ClassVar

from jepa_fast.config import Config, flatten
from jepa_fast.errors import UsageError
from jepa_fast.log import Sink


class TensorBoard(Sink):
    """Scalars under RUN/tensorboard. After a resume those from `start` on are hidden."""

    package, module = "tensorboard", "torch.utils.tensorboard"

    def __init__(self, config: Config, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)

    def record(self, record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Tracker(Sink):
    """A package with the interface of wandb: init, log, finish. A resumed run goes on in the same entry."""

    package: ClassVar[str]

    def __init__(self, config: Config, folder: Path, start: int):
        self._tracker = importlib.import_module(self.package)
        project = getattr(config.log, self.package)
        try:
            self._run = self._tracker.init(
                project=project, name=folder.name, config=flatten(config), **self.identity(folder, start)
            )
        except Exception as error:  # each package has its own kinds: no network, no login, no such project
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(f"--log.{self.package} {project}: {said}; fix that, or leave it out") from error

    def identity(self, folder: Path, start: int) -> dict[str, Any]:
        """Arguments of `init` that say which entry it is."""
        return {"resume": "allow" if start else "never"}

    def record(self, record: dict[str, Any]) -> None:
        self._run.log(_numbers(record), step=int(record["step"]))

    def close(self) -> None:
        self._run.finish()


class WandB(Tracker):
    """The id is kept in RUN/wandb.id, because names need not be unique in a project."""

    package = module = "wandb"

    def identity(self, folder: Path, start: int) -> dict[str, Any]:
        held = folder / "wandb.id"
        if start and held.is_file():
            return {"dir": str(folder), "id": held.read_text(encoding="utf-8").strip(), "resume": "allow"}
        return {"dir": str(folder)}

    def __init__(self, config: Config, folder: Path, start: int):
        super().__init__(config, folder, start)
        (folder / "wandb.id").write_text(f"{self._run.id}\n", encoding="utf-8")


class Trackio(Tracker):
    package = module = "trackio"


SINKS: dict[str, type[TensorBoard | WandB | Trackio]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def check(config: Config) -> None:
    """Raises UsageError if a sink that the configuration asks for lacks its package."""
    for name, sink in _asked(config).items():
        try:
            importlib.import_module(sink.module)
        except ImportError:
            raise UsageError(f"--log.{name} needs a package: pip install {sink.package}, or leave it out") from None


def opened(config: Config, folder: Path, start: int) -> list[Sink]:
    """The sinks that the configuration asks for. `start`: steps already made, when resumed. Raises UsageError."""
    return [sink(config, folder, start) for sink in _asked(config).values()]


def _asked(config: Config) -> dict[str, type[TensorBoard | WandB | Trackio]]:
    return {name: sink for name, sink in SINKS.items() if getattr(config.log, name)}


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, (int, float))}
