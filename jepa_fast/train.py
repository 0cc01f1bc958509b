"""Train a JEPA: `python -m jepa_fast.train [PRESET] [--section.field VALUE]`, or under torchrun.

shards -> masks -> encoders -> predictor -> loss -> optimizer -> fused EMA -> monitor -> report
"""

import sys
from functools import partial

import torch

from jepa_fast import cli, optim, parallel, preemption, schedules
from jepa_fast.assemble import set_up
from jepa_fast.errors import one_line_errors
from jepa_fast.flops import step_flops
from jepa_fast.perturb import perturb
from jepa_fast.profiling import profiled
from jepa_fast.run import MicroBatch, Run, close, joined, keep_best, release, save, show, stop_here, watched


def train(run: Run) -> None:
    """The paper's algorithm. At the top of the loop `step` updates have been made; the last pass only measures."""
    config, world, clock = run.config, run.world, run.clock
    for batch in profiled(run.loader, config.profile, run.folder, world):
        step, last = batch.step, batch.step == run.steps
        clock.begin(step, batch.wait)

        # Look at both encoders on the fixed probe set, now and then, before they move.
        with clock.phase("examine"):
            run.monitor.examine(last)

        # Forward, micro batch by micro batch: target encoder on everything, context encoder on the visible tokens,
        # predictor, loss. Backward: gradients add up to those of the mean over the global batch.
        loss, predicted = torch.zeros(2, device=world.device)
        seen, run.jepa.regularizer.step = list[MicroBatch](), step
        for i, (inputs, masks, share) in enumerate(batch.parts(world.device), start=1):
            with parallel.accumulating(run.model, more=i < len(batch.plans)):
                with clock.phase("forward"), parallel.precision(config, world):
                    output = run.model(inputs, masks)
                if not last:
                    with clock.phase("backward"):
                        (output.loss * share).backward()
            loss += output.loss.detach() * share
            predicted += output.terms["prediction"] * share
            tokens = output.context.shape[0] + output.target.shape[0] * output.target.shape[1]
            clock.count(tokens, step_flops(config, batch.plans[i - 1]).total)
            if run.records(step) or not seen:
                seen.append((output, masks, share))

        # Record what holds at these weights; the only host synchronisation, on log steps.
        output, masks = joined(seen)
        record = run.monitor.observe(
            predicted, output.context, output.target, masks.context_rows, masks.target_rows,
            hidden_weight=masks.target_weight, statistics=output.statistics, step=step, wait=batch.wait, last=last,
            wanted=output.wanted if run.jepa.pixels else None, more=partial(run.more, output), num_inputs=len(batch.inputs),
        )  # fmt: skip
        if record:
            show(run, record)
            with clock.phase("checkpoint"):
                keep_best(run, record)
            release(run, record)
        if last:
            break

        # Optimizer: a step with a non-finite value on any process changes nothing. Before that the checkpoint of the
        # weights as they were has been copied.
        with clock.phase("checkpoint"):
            run.writer.staged()
        lr = schedules.learning_rate(config.optim, step, run.steps, run.warmup)
        optim.set_rates(run.optimizer, lr, schedules.weight_decay(config.optim, step, run.steps))
        with clock.phase("optimizer"):
            finite = optim.step_if_finite(run.optimizer, loss, config.optim.clip)
        perturb(run.jepa.context_encoder, config.perturb, config.train.seed, step, gate=finite)

        # Target encoder: EMA, and its distance from the context encoder, in one pass.
        decay = run.ema.decay(step, run.steps)
        with clock.phase("ema"):
            run.ema.update(decay, gate=finite)
            run.jepa.targets.update(gate=finite)
        run.monitor.updated(decay, finite)

        # Between two steps: all processes hear of a signal at the same one.
        signal = run.stop.asked()
        if signal or run.saves(step + 1):
            with clock.phase("checkpoint"):
                save(run, step + 1)
        if signal:
            stop_here(run, signal, step + 1)
        if step == run.start:
            parallel.shorten_timeouts(config)
            run.stop.moving = True


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parallel.launched()
    command = cli.parse(sys.argv[1:] if argv is None else argv)
    if command.action != "train":
        print(cli.answer(command))
        return 0
    world = parallel.join(command.config)
    try:
        with preemption.Preemption(world) as stop:
            with preemption.in_company(world):
                run = set_up(command.config, command.resume, world, stop, command.typed)
            with watched(run):
                train(run)
            close(run)
    except preemption.Preempted as stopped:
        if world.is_main:
            print(f"\n{stopped}", flush=True)
        return preemption.PREEMPTED
    finally:
        parallel.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
