"""The progress of long work on standard error: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich import progress as bars
from rich.console import Console

from slope_cli.report.tables import clock
from slope_cli.report.terminal import one_row


class Progress:
    """A live bar on a terminal, from the first update until `close`; plain lines elsewhere.

    Args:
        total: the amount of work, in any unit; 0 if unknown.
        done: the amount that an earlier start has done.
        every: print a plain line at each multiple of this amount, and at the end.
        seconds: without `every`, print a plain line at the first update, then at most one in so many seconds.
        quiet: show nothing.
    """

    def __init__(
        self, total: int, done: int = 0, *, every: int = 0, seconds: float = 10.0, quiet: bool = False
    ) -> None:
        self.total, self._first, self._every, self._seconds = total, done, every, seconds
        self._started, self._next_line = time.monotonic(), 0.0
        self._console = Console(stderr=True, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)
        text = bars.TextColumn("{task.description}", markup=False)
        columns = (bars.BarColumn(bar_width=24), text, bars.TimeRemainingColumn())
        self._bar = bars.Progress(*columns, console=self._console, disable=quiet or not self._console.is_interactive)
        self._task = self._bar.add_task("", total=total or None, completed=done)

    def update(self, done: int, text: str) -> None:
        """Show how much of the work is done, and a line of text about it."""
        self._bar.start()
        self._bar.update(self._task, completed=done, description=one_row(text))
        if self._bar.disable and self._is_due(done):
            self.say(text + self._time_left(done))

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a training record of `MetricsLog`."""
        loss = f"loss {record['loss']:.4f}" if "loss" in record else f"mse {record['mse']:.3e}"
        rates = f"lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}  {record['tokens_per_s']:,.0f} tok/s"
        self.update(record["step"], f"step {record['step']}/{self.total}  {loss}  {rates}")

    def say(self, line: str) -> None:
        """Show one line as it is, above the bar."""
        self._console.print(one_row(line))

    def close(self) -> None:
        """Stop the bar; it stays on the screen."""
        self._bar.stop()

    def _is_due(self, done: int) -> bool:
        if self._every:
            return done % self._every == 0 or done == self.total
        now = time.monotonic()
        if now < self._next_line:
            return False
        self._next_line = now + self._seconds
        return True

    def _time_left(self, done: int) -> str:
        if done <= self._first or not self.total:
            return ""
        per_unit = (time.monotonic() - self._started) / (done - self._first)
        return f"  eta {clock(per_unit * (self.total - done))}"
