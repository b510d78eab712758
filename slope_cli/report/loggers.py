"""Where a run's records go beside metrics.jsonl: TensorBoard and Weights & Biases, each a kind of Logger.

They are for looking at; only metrics.jsonl is read by this program. A resumed run repeats the steps after its last
checkpoint: TensorBoard hides the first ones, and wandb has both, which are equal.
"""

import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from slope_cli.errors import SlopeError, first_line, missing
from slope_cli.utils import files
from slope_cli.utils.environment import package_version

TENSORBOARD = "tensorboard"
WANDB = "wandb"
WANDB_ID = "wandb.id"
"""The file in a run's folder with the id of its wandb run, by which a later start continues it."""


class Logger(Protocol):
    """Takes the records of a run.

    Attributes:
        place: where they go, for a warning.
    """

    place: str

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Take a record: numbers, texts, and mappings of these by name; what it cannot show it leaves out."""

    def close(self) -> None:
        """Bring everything to its place."""


class TensorBoard:
    """Writes TensorBoard's files to RUN/tensorboard; those of steps after `step` are hidden from now on."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.place = str(run / TENSORBOARD)
        self._writer = SummaryWriter(self.place, purge_step=step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in _flat(kind, values):
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Sends records to Weights & Biases, as a run whose id is kept in RUN/wandb.id.

    wandb's own files lie where it puts them, in $WANDB_DIR or the current folder: it makes links to elsewhere among
    them, which a run's folder must not have.

    Raises:
        UsageError: wandb is missing.
        SlopeError: it cannot start.
    """

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]) -> None:
        require_wandb()
        import wandb

        # Neither the terminal nor the program's code is sent: the log of this program goes to standard error as it is.
        settings = wandb.Settings(console="off", silent=True, save_code=False)
        how: dict[str, Any] = {"id": _wandb_id(run), "name": run.resolve().name, "config": dict(config)}
        try:
            self._run = wandb.init(project=project, resume="allow", settings=settings, **how)
        except Exception as error:  # wandb's own, or of one of the libraries that it is made of
            advice = "log in with `wandb login`, or set WANDB_MODE=offline or log.wandb=false"
            raise SlopeError(f"log.wandb=true: wandb cannot start ({first_line(error)}); {advice}") from error
        self.place = self._run.url or f"{Path(self._run.dir).parent}, which `wandb sync` can send"
        # Steps are an axis of their own: wandb's must not go back, and those of a resumed run do.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({**dict(_flat(kind, values)), "step": step})

    def close(self) -> None:
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))


def require_wandb() -> None:
    """UsageError if wandb is not installed."""
    if package_version(WANDB) is None:
        raise missing("log.wandb=true", WANDB, "wandb")


def _wandb_id(run: Path) -> str:
    """The id of a run's wandb run, chosen at its first start; SlopeError if the file holds none."""
    path = run / WANDB_ID
    if not path.exists():
        with files.atomic_file(path) as file:
            file.write(f"{secrets.token_hex(4)}\n".encode())
    text = path.read_text(errors="replace").strip()
    if re.fullmatch(r"[0-9A-Za-z_-]{1,64}", text) is None:
        raise SlopeError(f"{path}: is not the id of a wandb run; remove the file to begin a new one")
    return text


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float | str]]:
    """Numbers and texts by their full names, such as train/loss or val/by_source/text."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}/{name}", value)
        elif isinstance(value, int | float | str):
            yield f"{prefix}/{name}", value
