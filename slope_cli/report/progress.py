"""The progress of a run on standard error: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from slope_cli.report.tables import clock


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
