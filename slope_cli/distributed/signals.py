"""Signals that ask a process to stop, and the exit code of a process that did."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from slope_cli.errors import SlopeError

STOPPED = 75
"""Exit code (EX_TEMPFAIL): stopped by a signal; the same command resumes."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""SLURM is told to send USR2, because NCCL catches USR1; a run in one process does not start NCCL."""


AGAIN = b"\nstopping as soon as what is done can be kept; Ctrl-C again ends at once, without keeping it\n"
"""What a terminal shows after the first Ctrl-C."""


class Stopped(SlopeError):
    """Stopped by a signal; the same command resumes."""

    exit_code = STOPPED


class StopFlag:
    """While open, the first of STOP_SIGNALS only sets `name`; a second SIGINT interrupts at once.

    A signal that is ignored stays ignored, as nohup and a shell's & ask for. Python handles signals in the main thread
    only: a flag that is opened in another thread is never set.
    """

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[signal.Signals, Any] = {}

    def check(self, where: object) -> None:
        """Raise Stopped if a signal came, for work that the same command resumes; the line begins with `where`."""
        if self.name:
            raise Stopped(f"{where}: stopped by {self.name}; run the same command again to resume")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if number == signal.SIGINT and os.isatty(2):
            os.write(2, AGAIN)  # Python's own streams may be in the middle of a write

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
