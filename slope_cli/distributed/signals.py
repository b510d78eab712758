"""Signals that ask a process to stop, and the exit code that says it did."""

import signal
from types import FrameType

from slope_cli.errors import SlopeError

STOPPED = 75
"""Exit code (EX_TEMPFAIL) of a run that was asked to stop and has saved a checkpoint: start it again to go on."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # NCCL catches SIGUSR1, so SLURM is told USR2


class Stopped(SlopeError):
    """A signal asked for it, and what was at work has saved a checkpoint."""

    exit_code = STOPPED


class StopFlag:
    """While open, a first SIGTERM, SIGINT or SIGUSR2 only sets `name`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.name = ""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __enter__(self) -> "StopFlag":
        self._old = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
