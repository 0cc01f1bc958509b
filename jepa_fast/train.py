"""Train a JEPA: `python -m jepa_fast.train [PRESET] [--section.field VALUE]`, or under torchrun.

shards -> masks -> encoders -> predictor -> loss -> optimizer -> fused EMA -> monitor -> report
"""

import sys

from jepa_fast import cli, optim, parallel, schedules
from jepa_fast.config import to_json
from jepa_fast.errors import one_line_errors
from jepa_fast.run import Interval, Run, close, save, set_up, write_record


def train(run: Run) -> None:
    """The paper's algorithm. At the top of the loop `step` updates have been made; the last pass only measures."""
    config, world, interval = run.config, run.world, run.interval
    for batch in run.loader:
        step, last = batch.step, batch.step == run.steps
        inputs, masks = batch.inputs.to(world.device, non_blocking=True), batch.plan.to(world.device)

        # Look at both encoders on the fixed probe set, before they move.
        examined = run.monitor.examine(run.jepa) if run.examines(step) else {}

        # Forward: target encoder on everything, context encoder on the visible tokens, predictor, loss.
        with parallel.precision(config, world):
            output = run.model(inputs, masks)
        interval.add(output.loss, len(inputs), batch.wait)

        # Record what holds at these weights; the only host synchronisation.
        if step % config.log.every == 0 or step % config.monitor.every == 0 or last:
            write_record(run, step, interval, run.monitor.signals(run.jepa, output, masks), examined)
            interval = run.interval = Interval(world.device, interval.bad_in_a_row)
        if last:
            break

        # Backward, optimizer: a step with a non-finite value changes nothing.
        output.loss.backward()
        lr = schedules.learning_rate(config.optim, step, run.steps, run.warmup)
        optim.set_rates(run.optimizer, lr, schedules.weight_decay(config.optim, step, run.steps))
        finite = optim.step_if_finite(run.optimizer, output.loss, config.optim.clip)

        # Target encoder: EMA, and its distance from the context encoder, in one pass.
        run.ema.update(schedules.ema_decay(config.ema, step, run.steps), gate=finite)
        interval.judge(finite)

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
