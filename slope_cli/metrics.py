"""What a run says while it goes: metrics.jsonl always, TensorBoard, and a progress display on standard error."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from slope_cli.durable import write_error
from slope_cli.errors import SlopeError

JSONL = "metrics.jsonl"
TENSORBOARD = "tensorboard"
STEPS = ("train", "transfer")
"""The kinds of records of which each step has one: of training, with a loss in nats; of transfer, with an mse, the
mean squared error of a layer's output."""


def read(run: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; a last line that a kill cut short is left out.

    Raises:
        SlopeError: there are none, or a line in the middle is damaged.
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

    Opened at a step, it first drops the records beyond it: what a killed run did after its last checkpoint is done
    again, and each step stays in the log once.
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
            SlopeError: metrics.jsonl cannot be written. TensorBoard's copy is given up with a warning instead.
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
        """Bring what was written to the disk, so that no checkpoint is newer than its log."""
        with self._writing():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        # Each record was flushed when it was written; what a full disk refused then is refused here once more.
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


class Progress:
    """A live bar on a terminal; in a file, a plain line every few steps and for each event."""

    def __init__(self, step: int, steps: int, every: int, tokens_per_step: int) -> None:
        from rich.console import Console

        self.steps, self.every, self.tokens_per_step = steps, every, tokens_per_step
        self._start, self._start_step = time.monotonic(), step
        self._console = Console(stderr=True)
        self._bar: Any = None
        if self._console.is_terminal:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task("", total=steps, completed=step, text="")
            self._bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a training record."""
        step = record["step"]
        loss = f"loss {record['loss']:.4f}" if "loss" in record else f"mse {record['mse']:.3e}"
        text = f"{loss}  lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}"
        text += f"  {record['tokens_per_s']:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step % self.every == 0 or step == self.steps:
            left = (time.monotonic() - self._start) / (step - self._start_step) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  {text}  eta {clock(left)}")

    def say(self, line: str) -> None:
        """Show one line of text, as it is."""
        if self._bar is not None:
            self._console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar(console: Any) -> Any:
    from rich import progress

    columns = (
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[text]}"),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=console)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
