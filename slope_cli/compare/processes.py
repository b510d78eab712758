"""The processes of `slope compare`: each unfinished run is trained by a `slope pretrain` of its own.

OUT/configs/<run>.yaml   its resolved config
OUT/<run>.log            the output of its process
OUT/starts.jsonl         a line for each start: how many runs were training then
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from slope_cli.compare.variants import PlannedRun
from slope_cli.config import configs
from slope_cli.distributed.signals import STOPPED, StopFlag, Stopped
from slope_cli.utils import jsonl
from slope_cli.utils.files import atomic_file
from sparse_kernels import children

POLL = 0.1
"""Seconds between two polls of the processes."""


class Child:
    """A process that trains one run."""

    def __init__(self, run: PlannedRun, out: Path, jobs: int) -> None:
        config, self.run, self.log = out / "configs" / f"{run.name}.yaml", run, out / f"{run.name}.log"
        config.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(config) as file:
            file.write(configs.dump(run.config).encode())
        jsonl.append(out / "starts.jsonl", {"run": run.name, "jobs": jobs})
        self._earlier_bytes = self.log.stat().st_size if self.log.is_file() else 0
        # Processes that each use all cores mostly wait for one another.
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
        arguments = ["pretrain", str(config), "--out", str(out / run.name)]
        with self.log.open("ab") as log:
            self.process = started("from slope_cli.cli import main; main()", arguments, log, threads)

    def error(self, code: int) -> str:
        """Why the process failed, in one line."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        with self.log.open("rb") as file:
            file.seek(self._earlier_bytes)
            return last_line(file.read()) or f"exit code {code}"


def started(
    work: str, arguments: Sequence[str], log: BinaryIO, variables: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[bytes]:
    """A Python process that does `work` and writes to a log.

    If this process is killed, that one ends: it must not go on unseen, and hold its folder.

    Args:
        work: Python, which finds the arguments in sys.argv.
        variables: of its environment, unless they are set here.
    """
    code = f"from slope_cli.utils.parent import end_with; end_with({os.getpid()}); {work}"
    command, environment = children.python(code, arguments)
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env={**variables, **environment}, **streams)


def last_line(log: bytes) -> str:
    """What a process that failed has said last, without "error: "; empty if nothing."""
    lines = [line.strip() for line in log.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else ""


def train(
    planned: Sequence[PlannedRun], finished: Container[str], out: Path, jobs: int, stop: StopFlag
) -> dict[str, str]:
    """Train the runs that are not finished, `jobs` at a time, until `stop`, an open flag, is set.

    Returns:
        The error of each run that failed, by its name.

    Raises:
        Stopped: this process or one of the runs received a signal.
    """
    waiting = [run for run in planned if run.name not in finished]
    done, errors = len(planned) - len(waiting), dict[str, str]()
    running: list[Child] = []
    if done:
        _say(f"{done} of {len(planned)} runs are already finished")
    try:
        while (waiting or running) and not stop.name:
            while waiting and len(running) < jobs:
                running.append(Child(waiting.pop(0), out, min(jobs, len(waiting) + len(running) + 1)))
                _say(f"{running[-1].run.name}: training; its log is {running[-1].log}")
            time.sleep(POLL)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                done += _ended(child, errors, stop)
        if stop.name:
            done += _stop_all(running)
        if done + len(errors) < len(planned):
            text = f"{done} of {len(planned)} runs are finished; run the same command to resume"
            raise Stopped(f"stopped by {stop.name}: {text}")
    finally:
        for child in running:
            child.process.kill()
            child.process.wait()
    return errors


def _ended(child: Child, errors: dict[str, str], stop: StopFlag) -> bool:
    """Report how a process ended, and return whether its run is finished. A signal to one process stops all."""
    code, name = child.process.wait(), child.run.name
    if code == STOPPED:
        stop.name = stop.name or f"a signal to {name}"
    elif code:
        errors[name] = child.error(code)
        _say(f"{name}: failed: {errors[name]}")
    else:
        _say(f"{name}: finished")
    return code == 0


def _stop_all(running: list[Child]) -> int:
    """Tell all processes to save and stop, wait for them, and return how many finished their runs instead."""
    for child in running:
        child.process.terminate()
    codes = [child.process.wait() for child in running]
    running.clear()
    return codes.count(0)


def most_at_once(planned: Sequence[PlannedRun], out: Path) -> int:
    """The largest number of runs that were ever trained together with one of these."""
    path, names = out / "starts.jsonl", {run.name for run in planned}
    # Tasks of a job array append to it side by side, which some network file systems do not keep apart.
    starts = [start for start, _ in jsonl.lines(path) if start] if path.is_file() else []
    return max((start.get("jobs", 1) for start in starts if start.get("run") in names), default=1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
