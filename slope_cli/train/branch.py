"""`--from RUN[@STEP]`: a run that begins with what another one had learned by a step."""

import json
from pathlib import Path

from slope_cli.checkpoint import load, run_folder, store
from slope_cli.config import configs
from slope_cli.errors import UsageError
from slope_cli.methods import phases_of
from slope_cli.methods.phases import Phase
from slope_cli.train.init import began_with

BEGINNINGS: tuple[tuple[str, ...], ...] = (
    (),
    ("sparsity.start=0",),
    ("sparsity.start=0", "adapters.start=0"),
    ("sparsity.start=0", "fst.dense_finish=1"),
)
"""The words with which a run begins in the first or a later phase of its method."""


def branch(source: str, run: Path | None, *, with_optimizer: bool) -> tuple[str, list[str]]:
    """The recipe of a run that begins with the model of another one, and the overrides that its beginning needs.

    That is the other's own configuration, but for the phases that its model has behind it.

    Args:
        source: RUN, or RUN@STEP for another checkpoint than the newest.
        run: the one to go on with, if there is one. If it began with `source`, its own configuration is the recipe: the
            other one may be gone by now, or have newer checkpoints.
        with_optimizer: begin with the optimizer's state, too.

    Raises:
        UsageError: no run that another one can begin with, or it has no such checkpoint.
    """
    folder, step = run_folder.place(source)
    optimizer = f"model.init_optimizer={str(with_optimizer).lower()}"
    if run is not None and began_with(run_folder.open_config(run), source):
        return str(run / run_folder.CONFIG), [optimizer]
    config = run_folder.open_config(folder)
    load.require_initial(folder)
    step = store.newest_step(folder) if step is None else step
    store.require_step(folder, step)
    phase = phases_of(config).at(step - 1)
    init = [f"model.init={json.dumps(f'{folder}@{step}')}", optimizer, "train.extended=[]"]
    init += [f"{key}=null" for key in sorted(config.following_lr)]  # they were null, and go on to be what optim.lr is
    recipe = str(folder / run_folder.CONFIG)
    return recipe, [*init, *_beginning(recipe, init, phase)]


def _beginning(recipe: str, words: list[str], phase: Phase) -> tuple[str, ...]:
    """The words more with which the run of a recipe begins in a phase."""
    for begin in BEGINNINGS:
        first = phases_of(configs.load(recipe, [*words, *begin])).at(0)
        if (first.layers, first.adapters) == (phase.layers, phase.adapters):
            return begin
    raise UsageError(f"{recipe}: no run can begin in the phase {phase.name!r}")
