"""The starts of a run: a requeued job whose starts achieve nothing must not go on forever.

RUN/starts.jsonl has a line for each start that came to its end, by itself or by a signal.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slope_cli.errors import SlopeError
from slope_cli.report.tables import clock
from slope_cli.utils import jsonl

STARTS = "starts.jsonl"
IN_A_ROW = 3
"""So many starts of one job that mostly set up end it."""
LEAST = 0.1
"""The least share of a start's time that steps must take."""


class Start:
    """One start of a run: its time, and that of its steps."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._in_steps, self._steps = 0.0, 0

    def step(self, seconds: float) -> None:
        """Note a step. The time of the first one is that of setting up: it compiles, and measures kernels."""
        self._in_steps += seconds if self._steps else 0.0
        self._steps += 1

    def record(self) -> dict[str, Any]:
        """What this start has achieved so far."""
        seconds = time.monotonic() - self._began
        return {**_job(), "steps": self._steps, "seconds": seconds, "seconds_in_steps": self._in_steps}


@contextlib.contextmanager
def recorded(run: Path) -> Iterator[Start]:
    """A start of a run, recorded at its end; what the earlier starts of a requeued job achieved is said first.

    Raises:
        SlopeError: each of the last starts of this job spent most of its time on setting up.
    """
    path, job = run / STARTS, _job()
    restarts = int(job["slurm_restarts"])
    if restarts and job["slurm_job"]:
        own = [start for start in _read(path) if start.get("slurm_job") == job["slurm_job"]]
        done = "; ".join(map(_text, own[-IN_A_ROW:])) or "they left no record"
        print(f"restart {restarts} of SLURM job {job['slurm_job']}; its last starts: {done}", file=sys.stderr)
        if len(own) >= IN_A_ROW and all(_share(start) < LEAST for start in own[-IN_A_ROW:]):
            raise SlopeError(
                f"{run}: each of the last {IN_A_ROW} starts of job {job['slurm_job']} spent less than {LEAST:.0%} of "
                "its time in steps; submit the job again with a longer --time, or a shorter lead in "
                "--signal=USR2@SECONDS that still exceeds a step and a save"
            )
    start = Start()
    try:
        yield start
    finally:
        jsonl.append(path, start.record())


def _job() -> dict[str, Any]:
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    number = int(restarts) if restarts.isdecimal() else 0
    return {"slurm_job": os.environ.get("SLURM_JOB_ID"), "slurm_restarts": number}


def _read(path: Path) -> list[dict[str, Any]]:
    """The records that are whole; one that is damaged must not end a run."""
    return [record for record, _ in jsonl.lines(path) if record] if path.is_file() else []


def _share(start: dict[str, Any]) -> float:
    return float(start.get("seconds_in_steps", 0)) / max(float(start.get("seconds", 0)), 1e-9)


def _text(start: dict[str, Any]) -> str:
    steps = start.get("steps", 0)
    return f"{steps} step{'s' * (steps != 1)} in {clock(start.get('seconds', 0))}, {_share(start):.0%} of it in steps"
