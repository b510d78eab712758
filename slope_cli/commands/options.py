"""What several commands share: options, the set-up of a process, and the printing of a result."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from slope_cli.distributed import launch
from slope_cli.distributed.caches import node_caches

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run, or a folder that transformers reads.")]


def one_of_several() -> launch.Ranks:
    """Set up this process as one that srun or torchrun may have started with others; before torch is imported."""
    launch.use_granted_cores()
    ranks = launch.ranks()
    node_caches(ranks)
    return ranks


def print_result(result: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Print a result on standard output: its lines, or all of it as JSON."""
    print(json.dumps(result, indent=1) if as_json else "\n".join(lines))
