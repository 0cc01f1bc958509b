"""The collapse monitor: a training loop's loss, features and weights in; metrics.jsonl and events.jsonl out."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from jepa_fast import parallel
from jepa_fast.log import RunLog
from jepa_fast.model.targets import Statistics, TargetNorm, centred_by_own, norm_of, regress
from jepa_fast.model.targets import statistics as statistics_of
from jepa_fast.monitor import phase
from jepa_fast.monitor.accumulator import Accumulator
from jepa_fast.monitor.examination import Examination
from jepa_fast.monitor.measures import bound, discrepancy, skill
from jepa_fast.monitor.measures.drift import Drift, Identity, Weights
from jepa_fast.monitor.spikes import loss_spike
from jepa_fast.monitor.tokens import Tokens, as_tokens, rows_of

Record = dict[str, Any]
RECORDS_A_LOOK = 10  # without an examination: records between checks of the identity and spectral norms
TRIANGLE = 1e-4  # of the features' norm: rounding in float32 stays below, a fault does not


class CollapseMonitor:
    """Watches any training loop with a context encoder and a slow target encoder. Owns no loop, optimizer or data.

    In three lines:

        monitor = CollapseMonitor("runs/mine", (encoder, target_encoder), loss="smooth_l1", target_norm=True)
        monitor.observe(loss, context=z, target=h, visible=masks_enc, hidden=masks_pred)  # every step, after the forward
        monitor.close()

    folder: where metrics.jsonl and events.jsonl go; None keeps them in memory (`records`, `events`); or a RunLog that is
    open, which the monitor then writes through and does not close.
    weights: what the drift is measured on. A FusedEMA (its distances cost nothing more), or (context encoder, target
    encoder), or pairs of tensors (theta, theta_bar), named or not; None: no drift.
    loss, target_norm: which loss it is, and how targets are normalised in it (a name of `--objective.target_norm`, or
    True for `layer`, False for `none`): with them and `hidden` the predictor's skill is measured (equal numbers of inputs
    on all processes). grid: tokens along each axis; None: a square where the number of tokens is one, else a line.
    every: steps between records. spectral_every: steps between spectral norms of the drift; 0: as the examination.
    examination: what is measured on a fixed set (probes, spectra, mismatches), on a period of its own.
    start: None for a new log; on resume the number of the next step, and what was logged from there on is dropped.
    say: called with every event, once; None: silence.

    On several processes call it on all: values are averaged over them, the first writes. Everything stays on the
    device except on the steps of a record. Raises FileExistsError if the folder has a log and `start` is None.
    """

    def __init__(
        self,
        folder: str | Path | RunLog | None,
        weights: Weights | None = None,
        *,
        loss: Literal["l2", "smooth_l1", "l1"] | None = None,
        target_norm: TargetNorm | bool = "none",
        grid: tuple[int, ...] | None = None,
        every: int = 10,
        spectral_every: int = 0,
        examination: Examination | None = None,
        start: int | None = None,
        say: Callable[[str], None] | None = print,
    ):
        if every < 1:
            raise ValueError(f"every is {every}; give a number of steps of at least 1")
        self.loss, self.target_norm, self.grid = loss, norm_of(target_norm), grid
        self.every, self.examination = every, examination
        self.spectral_every = spectral_every
        self.drift = Drift(weights) if weights is not None else None
        self.identity = Identity(self.drift.ema) if self.drift else None
        self.world = parallel.here()
        self.log = None
        if self.world.is_main:
            self.log = folder if isinstance(folder, RunLog) else _open(folder, start)
        self._owns_log = not isinstance(folder, RunLog)
        self._detector = phase.Detector()
        for record in self.records:  # of a log that goes on: its events were reported already
            self._detector.add(record)
        self.step = start or 0  # of the next observation
        self.accumulator = Accumulator()
        self.bad_in_a_row = 0  # steps up to the last record that changed nothing
        self._say = say
        self._num_records = 0
        self._examined: tuple[int, dict[str, float]] | None = None

    # ---- every step -------------------------------------------------------------------------------

    def observe(
        self,
        loss: Tensor | float,
        context: Tensor | None = None,
        target: Tensor | None = None,
        visible: Tokens = None,
        hidden: Tokens = None,
        *,
        hidden_weight: Tensor | None = None,
        statistics: Statistics | None = None,
        wanted: Tensor | None = None,
        step: int | None = None,
        wait: float = 0.0,
        last: bool = False,
        more: Callable[[], dict[str, float]] | None = None,
        num_inputs: int | None = None,
    ) -> Record | None:
        """One step, after its forward and before the optimizer's step. Returns the record if this step wrote one.

        context: f(x), features [B, K, D] of the visible tokens (I-JEPA's z before the predictor), or packed [T, D].
        target: g(x_hat), features [B, N, D] of all tokens, before any layer norm of the loss; or [B, D].
        visible: which of the N tokens `context` is of: token numbers [B, K] (or a list of such: I-JEPA's masks_enc),
        a bool mask [B, N], or rows [T] of the flattened [B * N]. None: target is of the same tokens as context.
        hidden: likewise the tokens that the loss is taken at, `hidden_weight` [T] their weights in it (None: equal).
        statistics: what the loss normalised its targets with (model.targets.statistics); None: those of `target`, taken
        over all processes where `target_norm` needs any. wanted: what the loss regresses on before any normalisation, where
        that is not `target`: [B, N, P], the patches, for example.
        step: optimizer steps made so far; None counts calls. wait: seconds this step waited for data.
        last: write a record (and examine) whatever the period. more: asked on the steps of a record, on all processes,
        for what else belongs into it. num_inputs: of this step, if features are of a part.
        """
        self.step = self.step if step is None else step
        inputs = target if target is not None else context
        device = None if isinstance(loss, Tensor) or inputs is None else inputs.device
        loss = torch.as_tensor(loss, device=device).detach().float()
        held = len(inputs) if inputs is not None else 0
        self.accumulator.add(loss, held if num_inputs is None else num_inputs, wait)
        record = None
        if last or self.step % self.every == 0 or self._examines(last):
            looks = self._examines(last) if self.examination else self._num_records % RECORDS_A_LOOK == 0
            examined = self.examine(last) | (more() if more else {})
            with torch.no_grad():
                signals = self._signals(loss, context, target, visible, hidden, hidden_weight, statistics, wanted)
            record = self._write(signals, self._drift(examined, looks), examined)
            if looks and self.identity:
                self.identity.remember()
        self.step += 1
        return record

    def updated(self, decay: float | None = None, finite: Tensor | None = None) -> None:
        """Optional, after optimizer and EMA have moved the weights of the step that was observed.

        decay: the EMA decay of this update: then the identity D_t = decay (D_{t-1} + theta_t - theta_{t-1}) is checked
        now and then. finite: bool on the device, whether the step changed anything; steps that did not are counted.
        """
        if finite is not None:
            self.accumulator.judge(finite)
        if self.identity and self.identity.remembers:
            made = finite is None or bool(finite)
            self.identity.check(decay if made else None)

    def examine(self, last: bool = False) -> dict[str, float]:
        """The examination of the coming step, if it is due: `observe` makes it, unless it was made by hand before.

        By hand, ahead of the forward, it does not add to the peak of memory.
        """
        if self.examination is None or not self._examines(last):
            return {}
        if not (self.world.is_main or self.examination.everywhere):
            return {}
        if self._examined is None or self._examined[0] != self.step:
            began = time.monotonic()
            self._examined = (self.step, self.examination.look(self.step, everything=last))
            self.accumulator.examining += time.monotonic() - began
        return self._examined[1]

    def _examines(self, last: bool) -> bool:
        return self.examination is not None and (last or self.examination.due(self.step))

    # ---- records ----------------------------------------------------------------------------------

    def _signals(
        self, loss: Tensor, context: Tensor | None, target: Tensor | None, visible: Tokens, hidden: Tokens,
        hidden_weight: Tensor | None, statistics: Statistics | None, wanted: Tensor | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Device scalars of one step, without a synchronisation."""
        if target is None:
            return {}
        target = as_tokens(target.detach(), "target").float()
        b, n, _ = target.shape
        spread = discrepancy.instance_spread(target)
        signals = {"spread": spread}
        if context is not None:
            context = context.detach().flatten(0, -2)  # [T, D]
            rows = rows_of(visible, b, n, target.device)
            if len(rows) != len(context):
                raise ValueError(f"{len(context)} context tokens, but `visible` names {len(rows)} of {b} x {n} tokens")
            signals |= discrepancy.readings(context, target.flatten(0, 1)[rows], spread)
        if self.loss is not None and hidden is not None and context is not None:
            hidden_rows = rows_of(hidden, b, n, target.device)
            weight = (
                target.new_full((len(hidden_rows),), 1 / len(hidden_rows)) if hidden_weight is None else hidden_weight
            )
            copied = context if wanted is None else wanted.flatten(0, 1)[rows]  # what a trivial predictor could copy
            wanted = target if wanted is None else as_tokens(wanted.detach(), "wanted").float()
            statistics = statistics or statistics_of(wanted, self.target_norm)
            signals |= skill.trivial_skills(
                loss, regress(wanted, self.target_norm, statistics),
                regress(copied, self.target_norm, statistics, positions=rows % n), rows, hidden_rows, weight, self.loss,
                self.grid or skill.likely_grid(n), num_processes=self.world.size,
                mean=partial(parallel.mean, world=self.world), centred=centred_by_own(self.target_norm, statistics),
            )  # fmt: skip
        return signals

    def _drift(self, examined: dict[str, float], looks: bool) -> dict[str, float]:
        """Distances of the weights, and what needs them. Called on every process."""
        if self.drift is None:
            return {}
        record = self.drift.by_layer()
        if "bound/mask_term" in examined:
            record |= bound.complete(examined, record["drift/total"])
        if self.step % self.spectral_every == 0 if self.spectral_every else looks:
            began = time.monotonic()
            record |= self.drift.spectral()
            record["time/spectral"] = time.monotonic() - began
            self.accumulator.examining += record["time/spectral"]
        if self.identity and self.identity.worst is not None:
            record["identity/residual"] = self.identity.worst
        return record

    def _write(self, signals: dict[str, Tensor], drift: dict[str, float], examined: dict[str, float]) -> Record:
        """One line of metrics.jsonl and the events it calls. Synchronises."""
        values = parallel.average(self.accumulator.sums() | signals, self.world)
        highest = values.pop("highest")
        bad, self.bad_in_a_row = round(values.pop("bad")), round(values.pop("bad_in_a_row"))
        record = {"step": self.step, **values, **drift, **examined, **self.accumulator.times(self.world.size)}
        self.accumulator.begin()
        self._num_records += 1
        if self.log:
            spike = loss_spike(self.log.records, highest)
            called = self._detector.add(record)
            record |= self._detector.fields()
            self.log.record(record)
            if spike:
                self.log.event("loss_spike", self.step, **spike)
            if bad:
                self.log.event("skipped_step", self.step, count=bad)
            self._check_theory(record)
            self._announce(called)
        if self.identity:
            self.identity.worst = None  # reported
        return record

    def _check_theory(self, record: Record) -> None:
        """What cannot be otherwise is asserted: a violation says that something is wrong with the run or with us."""
        assert self.log is not None
        if not record.get("mismatch/excess", 0.0) <= TRIANGLE:  # NaN too
            self.log.event("triangle_violated", self.step, excess=record["mismatch/excess"])
            said = f"equation 4 is off by {record['mismatch/excess']:.2g} of the features' norm"
            self._tell(f"event: triangle violated, step {self.step:,}: {said}")
        residual = record.get("identity/residual", 0.0)
        if self.identity and not residual <= 1:
            self.log.event("identity_violated", self.step, residual=residual, tensor=self.identity.where)
            said = f"the update is off theorem 4.2 by {residual:.3g} times what rounding explains"
            self._tell(f"event: identity violated, step {self.step:,}: {said}, in {self.identity.where}")

    def _announce(self, called: list[phase.Event]) -> None:
        """Events that this record has decided."""
        assert self.log is not None
        for event in called:
            self.log.event(event.kind, event.step, **event.entry())
            self._tell(sentence(self.log.events[-1]))

    def _tell(self, text: str) -> None:
        if self._say:
            self._say(text)

    @property
    def records(self) -> list[Record]:
        """What metrics.jsonl holds; empty on other processes than the first."""
        return self.log.records if self.log else []

    @property
    def events(self) -> list[Record]:
        """What events.jsonl holds."""
        return self.log.events if self.log else []

    def close(self) -> list[Record]:
        """Close the files that it opened. Returns all phase events; a collapse phase with its share of the whole run."""
        if self.log:
            for event in self._detector.phase_so_far():
                self.log.event(event.kind, event.step, **event.entry())
            if self._owns_log:
                self.log.close()
        return phase.latest([e for e in self.events if "evidence" in e])

    def __enter__(self) -> "CollapseMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed loop needs, beside `start`: sums of the open interval, and the untrained encoder's probe."""
        parts = {
            "interval": self.accumulator,
            "examination": self.examination,
            "identity": self.identity,
            "drift": self.drift,
        }
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parts = {
            "interval": self.accumulator,
            "examination": self.examination,
            "identity": self.identity,
            "drift": self.drift,
        }
        for name, part in parts.items():
            if part is not None and name in state:
                part.load_state_dict(state[name])


def _open(folder: str | Path | None, start: int | None) -> RunLog:
    path = Path(folder) if folder is not None else None
    if path is not None:
        if start is None and (path / "metrics.jsonl").exists():
            raise FileExistsError(
                f"{path} holds a log already: give another folder, or start= the step to continue it from"
            )
        path.mkdir(parents=True, exist_ok=True)
    return RunLog(path, start or 0)


def sentence(event: Record) -> str:
    """A phase event on one line."""
    return f"event: {event['kind'].replace('_', ' ')}, step {event['step']:,}: {'; '.join(event['evidence'])}"
