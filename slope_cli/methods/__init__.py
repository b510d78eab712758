"""What a method trains in each step of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from slope_cli.config.schema import Config
from slope_cli.methods import sparse
from slope_cli.methods.linearize import linearize
from slope_cli.methods.phases import Phase, Phases

METHODS: Mapping[str, Callable[[Config], list[Phase]]] = {
    "slope": sparse.slope,
    "dense": sparse.dense,
    "sr_ste": sparse.sr_ste,
    "fst": sparse.fst,
    "s_ste": sparse.s_ste,
    "wanda": sparse.wanda,
    "linearize": linearize,
}


def phases_of(config: Config) -> Phases:
    """The phases of a run."""
    phases = METHODS[config.method](config)
    if config.learns_from_teacher:
        phases = [replace(phase, step="distill") for phase in phases]
    if config.train.precision != "fp8":
        return Phases(phases)
    return Phases(_in_fp8(phases, config.train.step_at(1 - config.train.bf16_finish, rest=0), config.train.steps))


def _in_fp8(phases: Sequence[Phase], end: int, steps: int) -> Iterator[Phase]:
    """The phases, in fp8 until step `end` and from there on as they were."""
    for phase in phases:
        if phase.first < end:
            yield replace(phase, fp8=True)
    if end < steps:
        yield replace(Phases(phases).at(end), first=end)
    yield from (phase for phase in phases if phase.first > end)
