"""The length of a run that has begun: what a start says when nothing is left to do, or more than there was."""

from dataclasses import replace

from slope_cli.config.schema import Config
from slope_cli.methods import optim, phases_of


def finished_line(config: Config) -> str:
    """That all steps of a run are done, and what to do for more."""
    more = "a larger train.steps extends it, --overwrite starts it anew"
    return f"finished: all of its {config.train.steps:,} steps are done; {more}"


def extension_lines(config: Config, step: int) -> list[str]:
    """That a run was extended at its newest checkpoint, if it was, and how each learning rate goes on there.

    Args:
        step: of that checkpoint, the finished steps.
    """
    train = config.train
    if not train.extended or train.extended[-1][0] != step or not step:
        return []
    before = replace(config, train=replace(train, steps=train.extended[-1][1], extended=train.extended[:-1]))
    then, now = _rates(before, step - 1), _rates(config, step)
    jumps = [
        f"the learning rate of {group} is {then[group]:.2e} in step {step:,} and {now[group]:.2e} in step {step + 1:,}"
        for group in now.keys() & then.keys()
    ]
    return [f"extended from {before.train.steps:,} to {train.steps:,} steps; {'; '.join(sorted(jumps))}"]


def _rates(config: Config, step: int) -> dict[str, float]:
    """The learning rate of each trained group in a step, counted from 0."""
    rates = phases_of(config).at(step).rates
    return {group: optim.learning_rate(rate, step, config.optim) for group, rate in rates.items()}
