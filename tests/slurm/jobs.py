"""Jobs of the recipes as shipped, on the cluster of cluster.sh: what a user types, and what SLURM says of them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slope_cli.report import metrics

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes/slurm"
CONF = Path("/run/slope-slurm/slurm.conf")
ENVIRONMENT = {
    # Without what a job around the tests may have set.
    **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
    "SLURM_CONF": str(CONF),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    # The nodes' names do not resolve, and all of them are this machine.
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
SUBMITTED: list[str] = []
"""The numbers of this process's jobs."""
WAIT = 400.0
"""Seconds within which anything that a test waits for must happen; they are many, as all tests share the machine."""


def command(*words: str | Path) -> str:
    """Run a client of SLURM, and return what it printed."""
    done = subprocess.run(list(map(str, words)), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stderr}")
    return done.stdout.strip()


def until(true: Callable[[], Any], what: Callable[[], str], every: float = 0.5) -> Any:
    """Wait for something, and return it; `what` describes what is there instead if it does not come."""
    end = time.monotonic() + WAIT
    while not (value := true()):
        if time.monotonic() > end:
            raise TimeoutError(what())
        time.sleep(every)
    return value


@dataclass(frozen=True)
class Job:
    """A submitted job, and the folder of its run."""

    number: str
    run: Path
    log: Path

    def show(self) -> dict[str, str]:
        """SLURM's record of the job."""
        text = command("scontrol", "show", "job", "--oneliner", self.number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    @property
    def state(self) -> str:
        """Such as RUNNING."""
        return self.show()["JobState"]

    def set(self, **changes: str | int) -> None:
        """Change a property of the job, such as its time limit in minutes."""
        command("scontrol", "update", f"JobId={self.number}", *(f"{key}={value}" for key, value in changes.items()))

    def at_step(self, step: int) -> None:
        """Wait until a step of the run is logged."""
        path = self.run / metrics.JSONL
        until(lambda: path.is_file() or self.state in ENDED, self.describe)

        def there() -> bool:
            return any(record["step"] >= step for record in metrics.read(self.run))

        assert path.is_file(), self.describe()
        until(there, self.describe, every=0.1)

    def restarted(self, times: int = 1) -> None:
        """Wait until the job is requeued."""
        until(lambda: int(self.show()["Restarts"]) >= times or self.state in ENDED, self.describe)
        assert int(self.show()["Restarts"]) == times, self.describe()

    def ends(self) -> tuple[str, str, int]:
        """Wait for the job's end: its state, its script's exit code as CODE:SIGNAL, and how often it was requeued."""
        until(lambda: self.state in ENDED, self.describe)
        shown = self.show()
        return shown["JobState"], shown["ExitCode"], int(shown["Restarts"])

    def ranks(self) -> dict[int, int]:
        """The processes of the run that live, by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end meanwhile
                words = (folder / "cmdline").read_bytes().split(b"\0")
                environment = (folder / "environ").read_bytes()
                rank = re.search(rb"\0SLURM_PROCID=(\d+)\0", environment)
                mine = f"\0SLURM_JOB_ID={self.number}\0".encode() in environment and b"pretrain" in words
                if mine and rank and (folder / "comm").read_text().strip() != "srun":
                    found[int(rank[1])] = int(folder.name)
        return found

    @contextlib.contextmanager
    def frozen(self, awaited: signal.Signals) -> Any:
        """Stop the first rank, and let it go on once SLURM has sent the signal, however fast its steps are."""
        pid = self.ranks()[0]
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
            until(lambda: _pending(pid) >> (awaited - 1) & 1, self.describe)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def stopped_by(self, number: signal.Signals) -> bool:
        """Whether the log has that a signal stopped the run, after a step and with a checkpoint."""
        return bool(
            re.search(rf"^stopped by {number.name}( on rank \d)? after step \d+, checkpoint", self.said(), re.M)
        )

    def said(self) -> str:
        """The job's log, of all its starts."""
        return self.log.read_text()

    def describe(self) -> str:
        """SLURM's record and the log's end, for the report of a failure."""
        log = self.said()[-3000:] if self.log.is_file() else "(no log)"
        return f"{command('scontrol', 'show', 'job', self.number)}\n{log}"


def _pending(pid: int) -> int:
    """The signals that wait for a process, as bits; all of them once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)


def submit(script: str, run: Path, *words: str | Path, options: tuple[str, ...] = ()) -> Job:
    """`sbatch OPTIONS SCRIPT WORDS`; only where, for how long and with how many CPUs differ from what is shipped."""
    name, cpus = f"{run.name}-{time.monotonic_ns()}", "--cpus-per-task=1" if script == "prepare" else "--cpus-per-gpu=1"
    how = ["--parsable", "--time=60", cpus, f"--job-name={name}", f"--chdir={run.parent}", *options]
    number = command("sbatch", *how, RECIPES / f"{script}.sbatch", *words)
    SUBMITTED.append(number)
    return Job(number, run, run.parent / f"{name}-{number}.log")
