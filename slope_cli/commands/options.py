"""What several commands share: options, the set-up of a process, and the printing of a result."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from slope_cli.config import configs
from slope_cli.config.values import known_keys
from slope_cli.distributed import launch
from slope_cli.distributed.caches import node_caches

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[
    Path,
    typer.Argument(metavar="RUN[@STEP]|DIR", help="A run, a fine-tuning, or a folder that transformers reads."),
]


def recipes_with(incomplete: str) -> list[str]:
    """The recipes whose names begin so, for the shell."""
    return [name for name in configs.recipe_names() if name.startswith(incomplete)]


def keys_with(incomplete: str) -> list[str]:
    """The keys that begin so, and the sections, for the shell."""
    keys = known_keys()
    sections = {key.partition(".")[0] for key in keys}
    return [name for name in sorted({*keys, *sections}) if name.startswith(incomplete)]


def one_of_several() -> launch.Ranks:
    """Set up this process as one that srun or torchrun may have started with others; before torch is imported."""
    launch.use_granted_cores()
    ranks = launch.ranks()
    node_caches(ranks)
    return ranks


def print_result(result: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Print a result on standard output: its lines, or all of it as JSON."""
    print(json.dumps(result, indent=1) if as_json else "\n".join(lines))
