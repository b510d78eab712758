"""`slope check`: is everything in a run's folder what was written there?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slope_cli import checkpoint, data, metrics, runs
from slope_cli.errors import SlopeError, UsageError


def check(run: Path) -> dict[str, Any]:
    """Verify config, log, embedded data and every checkpoint of a run, and load the newest sound one.

    Returns:
        `lines`, one for each thing looked at, and `faults`, those of them that are wrong.

    Raises:
        UsageError: not the folder of a run.
    """
    if not (run / runs.CONFIG).is_file():
        raise UsageError(f"{run}: is not the folder of a run (no {runs.CONFIG})")
    looks: list[tuple[str, Callable[[], object]]] = [
        (runs.CONFIG, lambda: runs.open_config(run)),
        (metrics.JSONL, lambda: metrics.read(run)),
    ]
    if (run / "data").is_dir():
        looks.append(("data", lambda: data.open_dataset(run / "data")))
    saved = checkpoint.folders(run)
    looks += [(folder.name, lambda folder=folder: checkpoint.verify(folder)) for folder in saved]  # type: ignore[misc]
    if saved:
        looks.append(("model and tokenizer", lambda: _load(run)))
    lines, faults = [], []
    for what, look in looks:
        try:
            look()
            lines.append(f"{what}: sound")
        except (SlopeError, ValueError) as error:
            lines.append(f"{what}: FAULT: {error}")
            faults.append(f"{what}: {error}")
    return {"run": str(run), "lines": lines, "faults": faults}


def _load(run: Path) -> None:
    """Put config, newest sound checkpoint and tokenizer together; every sparse layer must keep its own rules."""
    from sparse_kernels import sparse_layers

    _, model, _, _ = runs.load_trained(run)
    for name, layer in sparse_layers(model):
        try:
            layer.validate()
        except ValueError as error:
            raise SlopeError(f"{name}: {error}") from None
