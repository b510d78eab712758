"""The progress of long work on standard error: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich import progress as bars
from rich.console import Console

from slope_cli.report.tables import clock, utilization_text
from slope_cli.report.terminal import one_row
from slope_cli.report.timing import Speed


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
        # The text is last: where the terminal is narrow, it is what is cut.
        texts = (bars.TextColumn(f"{{task.{text}}}", markup=False) for text in ("fields[eta]", "description"))
        columns = (bars.BarColumn(bar_width=24), *texts)
        self._bar = bars.Progress(*columns, console=self._console, disable=quiet or not self._console.is_interactive)
        self._task = self._bar.add_task("", total=total or None, completed=done, eta="")

    def update(self, done: int, text: str, left: float | None = None) -> None:
        """Show how much of the work is done, a line of text about it, and the time left.

        Args:
            left: the seconds left; None for what the work has taken since this object was made says.
        """
        if left is None and done > self._first and self.total:
            left = (time.monotonic() - self._started) / (done - self._first) * (self.total - done)
        eta = "" if left is None else f"eta {clock(left)}"
        self._bar.start()
        self._bar.update(self._task, completed=done, description=one_row(text), eta=eta)
        if self._bar.disable and self._is_due(done):
            self.say(f"{text}  {eta}".rstrip())

    def step(self, record: Mapping[str, Any], speed: Speed, utilization: Mapping[str, float] | None = None) -> None:
        """Show a training record of `MetricsLog`, the smoothed speed, and the time left at it.

        Args:
            utilization: at that speed, by the names in records; see `accounting.Flops.utilization`.
        """
        step = record["step"]
        loss = f"loss {record['loss']:.4f}" if "loss" in record else f"mse {record['mse']:.3e}"
        text = f"lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}  {speed.tokens_per_s:,.0f} tok/s"
        text += f"  MFU {utilization_text(utilization)}" if utilization else ""
        self.update(step, f"step {step}/{self.total}  {loss}  {text}", speed.seconds_for(self.total - step))

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
