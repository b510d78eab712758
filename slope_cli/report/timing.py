"""How fast a run is, how long it still takes, and where its time went."""

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

CROWDED_AFTER = 30.0
"""Seconds of training on a CPU after which a run looks once whether its threads get the cores that they need."""
FADE = 0.95
"""How much an older step counts for the speed, compared with the one after it."""
PARTS = ("start", "steps", "validation", "sampling", "saving")
"""What the time of a run is spent on. start: on setting up, on changes of phase, and on the first step after each of
these, which compiles, measures kernels and captures graphs. saving: what training waits for."""


class Speed:
    """The smoothed speed of steps: what the last ones took together, in which older ones count less and less.

    So tokens are rate times time, for those that it has seen and for those that it says are left.
    """

    def __init__(self) -> None:
        self._steps = self._tokens = self._seconds = 0.0
        self._anew = True

    def add(self, tokens: int, seconds: float, *, first: bool = False) -> None:
        """Take in a step; the `first` one of a phase, which compiles, counts only until another one is known."""
        if first and self._steps:
            self._anew = True
            return
        fade = 0.0 if self._anew else FADE
        self._anew = first
        self._steps, self._tokens = fade * self._steps + 1, fade * self._tokens + tokens
        self._seconds = fade * self._seconds + seconds

    @property
    def tokens_per_s(self) -> float:
        """Of the steps so far, one at least; in a new phase that of the old one until its second step."""
        return self._tokens / max(self._seconds, 1e-9)

    def seconds_for(self, steps: int) -> float:
        """How long so many steps more take at this speed, without validations, samples and checkpoints."""
        return steps * self._seconds / max(self._steps, 1.0)


class Cores:
    """Looks once whether a process on a CPU shares its cores with so many others that its threads wait."""

    def __init__(self, threads: int) -> None:
        self._threads, self._done = threads, threads < 2
        self._began, self._used = time.monotonic(), time.process_time()

    def warning(self) -> str:
        """A line to show, once CROWDED_AFTER seconds have gone by, if the threads get too little; else ""."""
        seconds = time.monotonic() - self._began
        if self._done or seconds < CROWDED_AFTER:
            return ""
        self._done = True
        return crowded(self._threads, (time.process_time() - self._used) / seconds, os.getloadavg()[0])


def crowded(threads: int, cores: float, load: float) -> str:
    """What to do about threads that get too few cores on a machine whose cores are all in use; "" if there is nothing.

    Args:
        threads: how many compute together.
        cores: how many cores they had on average.
        load: how many threads of the machine want to run.
    """
    if cores > 0.7 * threads or load <= (os.cpu_count() or 1):
        return ""
    had = f"torch's {threads} threads had {cores:.1f} cores on average, since other programs use them too"
    return f"{had}; stop the run, and start it again with OMP_NUM_THREADS=1 before the command"


class Times:
    """Where the time goes: all of it is credited to one of PARTS, from the making of this object on."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def credit(self, part: str) -> None:
        """Credit the time since the last call to a part."""
        now = time.monotonic()
        self._seconds[part] += now - self._last
        self._last = now

    def record(self) -> dict[str, float]:
        """The seconds credited since the last record, and the share of each part, for the log."""
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return {"seconds": sum(taken.values()), **_shares(taken)}


def time_shares(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The share of each part in the time of a whole run, from its records; {} for a run of an earlier version.

    Of a start that was killed only what it had saved counts.
    """
    taken = dict.fromkeys(PARTS, 0.0)
    for record in records:
        if record["kind"] == "time":
            for part in PARTS:
                taken[part] += record["seconds"] * record[part]
    return _shares(taken) if any(taken.values()) else {}


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    whole = max(sum(seconds.values()), 1e-9)
    return {part: value / whole for part, value in seconds.items()}
