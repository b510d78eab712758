"""What a method trains in each step of a run."""

from collections.abc import Callable, Mapping

from slope_cli.config.schema import Config
from slope_cli.methods import sparse
from slope_cli.methods.linearize import linearize
from slope_cli.methods.phases import Phase, Phases

METHODS: Mapping[str, Callable[[Config], list[Phase]]] = {
    "slope": sparse.slope,
    "dense": sparse.dense,
    "sr_ste": sparse.sr_ste,
    "fst": sparse.fst,
    "wanda": sparse.wanda,
    "linearize": linearize,
}


def phases_of(config: Config) -> Phases:
    """The phases of a run."""
    return Phases(METHODS[config.method](config))
