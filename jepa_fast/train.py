"""Train a JEPA: `python -m jepa_fast.train [PRESET] [--section.field VALUE]`, or under torchrun.

shards -> masks -> encoders -> predictor -> loss -> optimizer -> fused EMA -> monitor -> report
"""

import sys

from jepa_fast import cli, optim, parallel, schedules
from jepa_fast.config import to_json
from jepa_fast.errors import one_line_errors
from jepa_fast.perturb import perturb
from jepa_fast.run import Run, close, save, set_up, show


def train(run: Run) -> None:
    """The paper's algorithm. At the top of the loop `step` updates have been made; the last pass only measures."""
    config, world = run.config, run.world
    for batch in run.loader:
        step, last = batch.step, batch.step == run.steps
        inputs, masks = batch.inputs.to(world.device, non_blocking=True), batch.plan.to(world.device)

        # Look at both encoders on the fixed probe set, now and then, before they move.
        run.monitor.examine(last)

        # Forward: target encoder on everything, context encoder on the visible tokens, predictor, loss.
        with parallel.precision(config, world):
            output = run.model(inputs, masks)

        # Record what holds at these weights; the only host synchronisation, on log steps.
        record = run.monitor.observe(
            output.loss, output.context, output.target, masks.context_rows, masks.target_rows,
            hidden_weight=masks.target_weight, step=step, wait=batch.wait, last=last,
        )  # fmt: skip
        if record:
            show(run, record)
        if last:
            break

        # Backward, optimizer: a step with a non-finite value changes nothing.
        output.loss.backward()
        lr = schedules.learning_rate(config.optim, step, run.steps, run.warmup)
        optim.set_rates(run.optimizer, lr, schedules.weight_decay(config.optim, step, run.steps))
        finite = optim.step_if_finite(run.optimizer, output.loss, config.optim.clip)
        perturb(run.jepa.context_encoder, config.perturb, config.train.seed, step)

        # Target encoder: EMA, and its distance from the context encoder, in one pass.
        decay = schedules.ema_decay(config.ema, step, run.steps)
        run.ema.update(decay, gate=finite)
        run.monitor.updated(decay, finite)

        if (config.checkpoint.every and (step + 1) % config.checkpoint.every == 0) or step + 1 == run.steps:
            save(run, step + 1)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    command = cli.parse(sys.argv[1:] if argv is None else argv)
    if command.action != "train":
        print(
            {"help": cli.USAGE, "list": cli.listing(), "print-config": to_json(command.config).rstrip()}[command.action]
        )
        return 0
    world = parallel.join(command.config)
    try:
        run = set_up(command.config, command.resume, world)
        train(run)
        close(run)
    finally:
        parallel.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
