"""The progress of long work on standard error: plain lines, and on a terminal a live bar below them."""

import time
from collections.abc import Mapping
from typing import Any

from rich import progress as bars
from rich.console import Console

from slope_cli.report.tables import clock, utilization_text
from slope_cli.report.terminal import one_row
from slope_cli.report.timing import Speed

REDRAWN = 0.3
"""Seconds from one drawing of the bar to the next, at least: a terminal may be a slow line, or be recorded."""


class Progress:
    """On a terminal a live bar, from the first update until `close`; plain lines elsewhere, and with `every` there too.

    Args:
        total: the amount of work, in any unit; 0 if unknown.
        done: the amount that an earlier start has done.
        every: print a plain line at each multiple of this amount, and at the end, where a bar does not show it.
        seconds: without `every`, print a plain line at the first update, then at most one in so many seconds.
        quiet: show nothing.
    """

    def __init__(
        self, total: int, done: int = 0, *, every: int = 0, seconds: float = 10.0, quiet: bool = False
    ) -> None:
        self.total, self._first, self._every, self._seconds = total, done, every, seconds
        self._started, self._next_line, self._next_drawing = time.monotonic(), 0.0, 0.0
        self._console = Console(stderr=True, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)
        text = bars.TextColumn("{task.description}", markup=False)
        columns = (bars.BarColumn(bar_width=None), text)  # a bar as wide as the text leaves it
        hidden = quiet or not self._console.is_interactive
        self._bar = bars.Progress(*columns, console=self._console, disable=hidden, auto_refresh=False)
        self._task = self._bar.add_task("", total=total or None, completed=done)

    def update(self, done: int, text: str, left: float | None = None, *, line: str = "") -> None:
        """Show how much of the work is done, a line of text about it, and the time left.

        Args:
            left: the seconds left; None for what the work has taken since this object was made says.
            line: a plain line for this amount, whether or not one is due; empty for none.
        """
        if left is None and done > self._first and self.total:
            left = (time.monotonic() - self._started) / (done - self._first) * (self.total - done)
        eta = "" if left is None else f"eta {clock(left)}"
        self._bar.start()
        if redraw := (now := time.monotonic()) >= self._next_drawing or done == self.total:
            self._next_drawing = now + REDRAWN
        # Where the terminal is narrow the end is cut, so the time left comes first.
        self._bar.update(self._task, completed=done, description=one_row(f"{eta}  {text}".lstrip()), refresh=redraw)
        if line or self._is_due(done):
            self.say(line or f"{text}  {eta}".rstrip())

    def step(
        self,
        record: Mapping[str, Any],
        speed: Speed,
        utilization: Mapping[str, float] | None = None,
        *,
        first: bool = False,
    ) -> None:
        """Show a training record of `MetricsLog`, the recent speed, which is smoothed, and the time left at it.

        Args:
            utilization: at that speed, by the names in records; see `accounting.Flops.utilization`.
            first: of a start or a phase: it has a plain line, with the loss's unit and without the speed, which is not
                known before the second one.
        """
        step = record["step"]
        loss, unit = (f"loss {record['loss']:.4f}", " nats per token") if "loss" in record else ("", "")
        loss = loss or f"mse {record['mse']:.3e}"
        head, rates = f"step {step}/{self.total}  {loss}", f"lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}"
        text = f"{head}  {rates}  recent {speed.tokens_per_s:,.0f} tok/s"
        text += f"  MFU {utilization_text(utilization)}" if utilization else ""
        line = f"{head}{unit}  {rates}" if first else ""
        self.update(step, text, speed.seconds_for(self.total - step), line=line)

    def say(self, line: str) -> None:
        """Show one line as it is, above the bar."""
        self._console.print(one_row(line))

    def close(self) -> None:
        """Stop the bar; it stays on the screen."""
        self._bar.stop()

    def _is_due(self, done: int) -> bool:
        if not self._bar.disable:
            return bool(self._every) and done % self._every == 0 and done != self.total
        if self._every:
            return done % self._every == 0 or done == self.total
        now = time.monotonic()
        if now < self._next_line:
            return False
        self._next_line = now + self._seconds
        return True
