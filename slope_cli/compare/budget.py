"""The steps that an amount of time buys, from the time of a step in each phase of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from slope_cli.config.schema import Config
from slope_cli.methods import phases_of

ROUNDING = 1e-9
"""By what share sums of the same times may differ."""


@dataclass(frozen=True)
class PhaseTime:
    """The steps that a run spends in a phase, and the seconds of each."""

    phase: str
    steps: int
    step_seconds: float


@dataclass(frozen=True)
class Budget:
    """The steps of a run whose length time decides; all of them take `seconds` by the measured step times.

    rule: what the runs that are compared have in common, in words.
    """

    rule: str
    phases: list[PhaseTime]

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return sum(each.steps for each in self.phases)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.seconds_until(self.steps)

    def seconds_until(self, step: int) -> float:
        """The seconds of the first `step` steps."""
        seconds, left = 0.0, step
        for each in self.phases:
            seconds += min(left, each.steps) * each.step_seconds
            left -= min(left, each.steps)
        return seconds


def with_steps(config: Config, steps: int) -> Config:
    """A config with another number of steps; its phases and learning rates follow as far as they are shares."""
    return replace(config, train=replace(config.train, steps=steps))


def budget(config: Config, step_seconds: Mapping[str, float], rule: str) -> Budget:
    """The time of a run with the steps that its config has.

    Args:
        step_seconds: of each phase, by its name. A phase that is not among them, because the run in which they were
            measured was too short to have it, lasts for a step or two, and takes the time of the slowest.
    """
    phases, slowest = phases_of(config).distinct, max(step_seconds.values())
    ends = [*(phase.first for phase in phases[1:]), config.train.steps]
    return Budget(
        rule,
        [
            PhaseTime(phase.name, end - phase.first, step_seconds.get(phase.name, slowest))
            for phase, end in zip(phases, ends, strict=True)
        ],
    )


def steps_bought(config: Config, step_seconds: Mapping[str, float], seconds: float) -> int:
    """The most steps that take no longer than `seconds`, phases included, but one at least.

    Args:
        step_seconds: as of `budget`.
    """

    def fits(steps: int) -> bool:
        return budget(with_steps(config, steps), step_seconds, "").seconds <= seconds * (1 + ROUNDING)

    low, high = 1, 2 + int(seconds * (1 + ROUNDING) / min(step_seconds.values()))  # that many do not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
