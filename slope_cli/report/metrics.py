"""The metrics log of a run, metrics.jsonl, and its copy for TensorBoard."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from slope_cli.errors import SlopeError
from slope_cli.utils.files import write_error

JSONL = "metrics.jsonl"
TENSORBOARD = "tensorboard"
STEPS = ("train", "transfer")
"""The kinds of records written once per step: of training, with a loss in nats; of attention transfer, with the mean
squared error of a layer's output."""


def read(run: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; a last line that a kill cut short is left out.

    Raises:
        SlopeError: there is no log, or a line in the middle is damaged.
    """
    path = run / JSONL
    if not path.is_file():
        raise SlopeError(f"{run} holds no {JSONL}: not the folder of a run")
    return [record for record, _ in _records(path)]


def _records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each record and the offset of its end."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                raise SlopeError(f"{path}:{number} is damaged: not a JSON record") from None
            yield record, end


class MetricsLog:
    """Appends records to RUN/metrics.jsonl, a line each, flushed at once, and mirrors numbers to TensorBoard.

    It first drops the records after `step`: a resumed run repeats the steps after its last checkpoint.
    """

    def __init__(self, run: Path, step: int, *, tensorboard: bool) -> None:
        self.path = run / JSONL
        self._writer: Any = None
        with self._writing():
            if self.path.is_file():
                keep = max((end for record, end in _records(self.path) if record["step"] <= step), default=0)
                os.truncate(self.path, keep)
            self._file: IO[str] = self.path.open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / TENSORBOARD), purge_step=step + 1)

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """Record `values` of a step, counted from 1, and return the record.

        Raises:
            SlopeError: metrics.jsonl cannot be written. TensorBoard's copy only ends, with a warning.
        """
        record = {"kind": kind, "step": step, **values}
        with self._writing():
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._writer is not None:
            try:
                self._mirror(kind, step, values)
            except OSError as error:
                self._writer = None
                print(f"warning: {self.path.with_name(TENSORBOARD)} ends at step {step}: {error}", file=sys.stderr)
        return record

    def _mirror(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
            elif isinstance(value, str):
                self._writer.add_text(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Flush the log to the disk, so that no checkpoint is newer than its log."""
        with self._writing():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        # Each record was flushed when written; after a failed write, closing fails again.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(self.path, error) from error
