"""What a run's encoders are worth: `python -m jepa_fast.probe RUN`.

Frozen encoders, average pooling over all tokens, a linear head by SGD, beside ridge regression and kNN. Both encoders,
always next to the untrained encoder and the majority class; on the run's data or on another set (--data.path,
--data.embedded), as the paper probes ImageNet encoders on CIFAR. Writes probe.json into the run folder.
"""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jepa_fast.config import Config, replace
from jepa_fast.data.dataset import open_dataset
from jepa_fast.data.sample import BadSample, Source
from jepa_fast.data.sources import evaluated
from jepa_fast.errors import Arguments, UsageError, one_line_errors, reading
from jepa_fast.inputs import find
from jepa_fast.interop.pretrained import build, open_run
from jepa_fast.model.jepa import JEPA
from jepa_fast.monitor import probes

CHUNK = 256  # samples in memory at a time
COLUMNS = {
    "sgd": "SGD head", "sgd/balanced": "balanced", "ridge": "ridge", "ridge/balanced": "balanced",
    "ridge/raw": "ridge, raw", "knn": "kNN",
}  # fmt: skip


def load(folder: Path, step: int | None = None) -> tuple[Config, dict[str, nn.Module], str]:
    """(configuration, {context encoder, target encoder, untrained encoder}, where they come from). Raises UsageError.

    folder: of a run, or one of its checkpoints.
    """
    if step is not None and (folder / "meta.json").is_file():
        raise UsageError(f"--step {step}: {folder} is one checkpoint already; give the folder of its run")
    config, state, path = open_run(folder, step)
    trained = build(config, state["model"], str(path))
    torch.manual_seed(config.train.seed)  # as the run drew its weights, before --init.from if there was one
    untrained = JEPA(config).context_encoder
    trained.load_state_dict(state["model"])
    encoders = {"context": trained.context_encoder, "target": trained.target_encoder, "untrained": untrained}
    return config, {name: encoder.eval() for name, encoder in encoders.items()}, path.resolve().name


@torch.no_grad()
def pooled(source: Source, count: int, encoders: dict[str, nn.Module], device: torch.device, workers: int):
    """({encoder: features [n, D]}, labels int64 [n]) of `count` samples (or all) in a fixed random order.

    What cannot be read is left out.
    """
    assert source.labels is not None
    order = np.random.default_rng(0).permutation(len(source))[:count]
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}
    labels: list[int] = []

    def read(index: int) -> np.ndarray | None:
        try:
            return evaluated(source, int(index))
        except BadSample:
            return None

    with ThreadPoolExecutor(workers) as pool:
        for begin in range(0, len(order), CHUNK):
            rows = order[begin : begin + CHUNK]
            loaded = [(i, x) for i, x in zip(rows, pool.map(read, rows), strict=True) if x is not None]
            if not loaded:
                continue
            labels += [int(source.labels[i]) for i, _ in loaded]
            inputs = torch.from_numpy(np.stack([x for _, x in loaded])).to(device)
            for name, encoder in encoders.items():
                features[name].append(encoder(inputs).float().mean(1))
    if not labels:
        raise UsageError("not one sample of the probe set can be read; check the data")
    return {name: torch.cat(parts) for name, parts in features.items()}, torch.tensor(labels, device=device)


def score(x: Tensor, y: Tensor, test: Tensor, truth: Tensor, num_classes: int, config: Config) -> dict[str, float]:
    """Accuracies by protocol, of one encoder's features; `sgd` and `ridge` on features standardised by the training ones."""
    a, b = probes.standardise(x, test)
    by_sgd, rate = probes.sgd_predict(a, y, b, num_classes)
    sgd = {"sgd": probes.accuracy(by_sgd, truth), "sgd/balanced": probes.balanced_accuracy(by_sgd, truth)}
    return sgd | probes.score(x, y, test, truth, num_classes, config.monitor) | {"sgd/rate": rate}


def probe(folder: Path, changes: dict[str, Any], step: int | None, num_train: int, num_test: int) -> dict[str, Any]:
    """Everything that the command prints."""
    config, encoders, at = load(folder, step)
    on = replace(config, changes)
    dataset = open_dataset(on, typed="data.path" in changes)
    if dataset.probe_train is None or dataset.probe_test is None:
        raise UsageError(f"{dataset.description}: a probe needs labels; give a labelled set with --data.path")
    expected = find(config.data.kind).shape(config)
    if dataset.shape != expected:
        raise UsageError(
            f"samples of {dataset.description.split(':')[0]} are {list(dataset.shape)}, the encoder takes {list(expected)}: give a set of that shape"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders = {name: encoder.to(device) for name, encoder in encoders.items()}
    x, y = pooled(dataset.probe_train, num_train, encoders, device, config.data.workers)
    test, truth = pooled(dataset.probe_test, num_test, encoders, device, config.data.workers)
    majority = probes.majority(y, truth, dataset.num_classes)
    return {
        "checkpoint": at, "data": dataset.description, "train": len(y), "test": len(truth),
        "classes": dataset.num_classes,
        "test_per_class": truth.bincount(minlength=dataset.num_classes).tolist(),
        "encoders": {name: score(x[name], y, test[name], truth, dataset.num_classes, config) for name in encoders},
        "majority": probes.accuracy(majority, truth), "majority/balanced": probes.balanced_accuracy(majority, truth),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    error = math.sqrt(0.25 / found["test"])
    lines = [
        f"{found['data']}; {found['checkpoint']}",
        f"fitted on {found['train']:,} samples, scored on {found['test']:,}; standard error up to {error:.3f}",
        f"{'':20}" + "".join(f"{head:>12}" for head in COLUMNS.values()),
    ]
    names = {"context": "context encoder", "target": "target encoder", "untrained": "untrained encoder"}
    for name, said in names.items():
        lines.append(f"{said:20}" + "".join(f"{found['encoders'][name][key]:12.3f}" for key in COLUMNS))
    for key in ("majority", "majority/balanced"):
        lines.append(f"{key.replace('majority/', 'majority, '):20}{found[key]:12.3f}")
    counts, head = [count for count in found["test_per_class"] if count], "sgd"
    if max(counts) > 1.5 * min(counts):
        head, error = "sgd/balanced", math.sqrt(sum(0.25 / count for count in counts)) / len(counts)
        lines.append(
            f"classes are unequal ({min(counts)} to {max(counts)} test samples): read the balanced columns, "
            f"standard error up to {error:.3f}"
        )
    best, untrained = (max(found["encoders"][n][head] for n in names) for names in (("context", "target"), ("untrained",)))  # fmt: skip
    clear = 2 * math.sqrt(2) * error
    if best <= untrained - clear:
        lines.append("both encoders stand clearly below the untrained one")
    elif best < untrained + clear:
        lines.append("neither encoder stands clearly above the untrained one")
    return "\n".join(lines)


def _earlier(file: Path) -> list[dict[str, Any]]:
    """What probe.json holds from before. Raises UsageError if it cannot be read."""
    if not file.exists():
        return []
    with reading(file, "the record of earlier probes"):
        held = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(entry, dict) and {"checkpoint", "data"} <= entry.keys() for entry in held):
            raise ValueError("no list of probes; move it away")
        return held


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = Arguments("probe", __doc__.split("\n")[0])
    parser.add_argument("run", metavar="RUN", help="folder of a run, or one of its checkpoints: RUN/checkpoints/best")
    parser.add_argument("--step", type=int, help="checkpoint to probe; default: the newest")
    parser.add_argument("--data.path", dest="path", help="another data set of the same kind and shape")
    parser.add_argument("--data.embedded", dest="embedded", help="or one that is made here: sensor, digits, textures")
    parser.add_argument("--num_train", type=int, default=50_000, help="labelled samples to fit on, at most")
    parser.add_argument("--num_test", type=int, default=10_000, help="and to score on")
    args = parser.parse_args(argv)
    if args.num_train < 10 or args.num_test < 1:
        raise UsageError("--num_train must be at least 10, --num_test at least 1")
    if args.path and args.embedded:
        raise UsageError("give --data.path or --data.embedded, not both")
    changes: dict[str, Any] = {}
    if args.path:
        changes = {"data.path": args.path, "data.label_filter": ""}
    elif args.embedded:
        if args.embedded not in ("sensor", "digits", "textures", "textures224"):
            raise UsageError(f"--data.embedded {args.embedded}: known are sensor, digits, textures, textures224")
        changes = {"data.path": "", "data.embedded": args.embedded}
    folder = Path(args.run)
    found = probe(folder, changes, args.step, args.num_train, args.num_test)
    folder = folder.parent.parent if (folder / "meta.json").is_file() else folder
    print(table(found))
    beside = folder / ".probe.json.partial"
    earlier = _earlier(folder / "probe.json")
    kept = [e for e in earlier if (e["checkpoint"], e["data"]) != (found["checkpoint"], found["data"])]
    beside.write_text(json.dumps([*kept, found], indent=1) + "\n", encoding="utf-8")
    beside.rename(folder / "probe.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
