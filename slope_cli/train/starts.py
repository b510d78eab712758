"""The starts of a run: a requeued job whose starts achieve nothing must not go on forever.

RUN/starts.jsonl has a line for the beginning of each start, with the step that it begins from, and one for its end. A
start whose end is missing was killed. Earlier versions wrote no line for the beginning.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slope_cli.checkpoint import run_folder
from slope_cli.errors import SlopeError
from slope_cli.report.tables import clock, counted
from slope_cli.utils import jsonl

STARTS = "starts.jsonl"
BEGINS = "begins_from"
"""The key of the step in the line of a beginning."""
KILLED = "saved_when_killed"
"""The key, in memory, of the steps that a killed start saved."""
IN_A_ROW = 3
"""So many starts of one job that mostly set up, or are killed before they save a step, end it."""
LEAST = 0.1
"""The least share of a start's time that steps must take."""


class Start:
    """One start of a run: its time, and that of its steps."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._in_steps, self._steps = 0.0, 0

    @property
    def has_stepped(self) -> bool:
        """Whether a step is finished."""
        return self._steps > 0

    def step(self, seconds: float) -> None:
        """Note a step. The time of the first one is that of setting up: it compiles, and measures kernels."""
        self._in_steps += seconds if self._steps else 0.0
        self._steps += 1

    def record(self) -> dict[str, Any]:
        """What this start has achieved so far."""
        seconds = time.monotonic() - self._began
        return {**_job(), "steps": self._steps, "seconds": seconds, "seconds_in_steps": self._in_steps}


@contextlib.contextmanager
def recorded(run: Path, start: Start | None = None) -> Iterator[Start]:
    """A start of a run, recorded at its beginning and end; what a requeued job's earlier starts achieved is said first.

    Args:
        start: by default one that begins now.

    Raises:
        SlopeError: each of the last starts of this job spent most of its time on setting up, or was killed before it
            saved a step.
    """
    path, job, step = run / STARTS, _job(), run_folder.saved_steps(run)
    restarts = int(job["slurm_restarts"])
    if restarts and job["slurm_job"]:
        own = [start for start in _earlier(path, step) if start.get("slurm_job") == job["slurm_job"]]
        done = "; ".join(map(_text, own[-IN_A_ROW:])) or "they left no record"
        print(f"restart {restarts} of SLURM job {job['slurm_job']}; its last starts: {done}", file=sys.stderr)
        if len(own) >= IN_A_ROW and not any(map(_worked, own[-IN_A_ROW:])):
            raise SlopeError(
                f"{run}: each of the last {IN_A_ROW} starts of job {job['slurm_job']} was killed before it saved a "
                f"step, or spent less than {LEAST:.0%} of its time in steps; submit the job again with a longer "
                "--time, more --mem, or a shorter lead in --signal=USR2@SECONDS that still exceeds a step and a save"
            )
    start = start or Start()
    jsonl.append(path, {**job, BEGINS: step})
    try:
        yield start
    finally:
        jsonl.append(path, start.record())


def is_restart(run: Path) -> bool:
    """Whether this start is that of a requeued job which has started the run in this folder before.

    Its command is the same as then, and what it says of the run that was in the folder has been done.
    """
    job, path = _job(), run / STARTS
    own = (record for record, _ in jsonl.lines(path) if record) if path.is_file() and job["slurm_job"] else ()
    before = (record.get("slurm_restarts") for record in own if record.get("slurm_job") == job["slurm_job"])
    return any(isinstance(number, int) and number < job["slurm_restarts"] for number in before)


def goes_on(run: Path, existing: run_folder.Existing) -> bool:
    """Whether a start goes on with the run in a folder; not if it is none, or is replaced."""
    return run_folder.is_run(run) and (existing != "replace" or is_restart(run))


def first_steps(run: Path, records: Iterable[Mapping[str, Any]]) -> set[int]:
    """The steps, counted from 1, in which starts and phases of a run compiled and measured kernels.

    Args:
        records: of its log.
    """
    path = run / STARTS
    own = (record for record, _ in jsonl.lines(path) if record) if path.is_file() else ()
    begun = {record[BEGINS] + 1 for record in own if isinstance(record.get(BEGINS), int)}
    return {1} | begun | {record["step"] for record in records if record["kind"] == "phase"}


def _job() -> dict[str, Any]:
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    number = int(restarts) if restarts.isdecimal() else 0
    return {"slurm_job": os.environ.get("SLURM_JOB_ID"), "slurm_restarts": number}


def _earlier(path: Path, step: int) -> Iterator[dict[str, Any]]:
    """What each start achieved before one that begins from a step.

    A damaged record must not end a run, and is left out.
    """
    records = [record for record, _ in jsonl.lines(path) if record] if path.is_file() else []
    begun: dict[str, Any] | None = None
    for record in (*records, {BEGINS: step}):
        if not isinstance(record.get(BEGINS), int):
            begun = None
            yield record
            continue
        if begun is not None:  # its end is missing
            yield {**begun, KILLED: max(0, record[BEGINS] - begun[BEGINS])}
        begun = record


def _worked(start: dict[str, Any]) -> bool:
    return start[KILLED] > 0 if KILLED in start else _share(start) >= LEAST


def _share(start: dict[str, Any]) -> float:
    return float(start.get("seconds_in_steps", 0)) / max(float(start.get("seconds", 0)), 1e-9)


def _text(start: dict[str, Any]) -> str:
    if KILLED in start:
        return f"was killed, {counted(start[KILLED], 'step')} saved"
    steps, time = counted(start.get("steps", 0), "step"), clock(start.get("seconds", 0))
    return f"{steps} in {time}, {_share(start):.0%} of it in steps"
