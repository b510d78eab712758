"""Random SIGKILLs: a command that is killed at any moment and started again ends as the uninterrupted one, bit for bit.

    python -m slope_cli.benchmarks.kills --work DIR --kills N --jobs J --seed S --out FILE

A life of a command begins with its first start and ends when a start reaches its end; until then its process group is
killed up to MOST times. Each of `commands`, on tiny models, one thread per process, gets an equal share of the kills.
Half of the moments lie anywhere in the command's uninterrupted length, half after the start-up. Of a command of several
ranks, all are killed, or one once they have met, and the others must end within HANG seconds. A life that ends wrong
keeps its folder in DIR.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import slope_cli
from slope_cli.checkpoint import store
from slope_cli.report import metrics
from slope_cli.utils.files import LOCK, file_sha256, write_json

from .records import KillResults, KillRow

MOST = 4
"""Kills of one life."""
LIMIT = 600
"""Seconds after which a start counts as hanging."""
HANG = 60
"""Seconds in which the ranks that were not killed must end."""
SOURCES = 6
WORDS = "the a cat dog saw took small green house river and then but never morning light with under walked slowly"
SHAPE = [f"model.overrides.{size}" for size in ("n_layer=2", "n_embd=32", "n_head=2", "n_positions=64")]
SHORT = [
    *("train.tokens_per_step=128", "train.micro_batch=2", "train.seq_len=32", "train.device=cpu"),
    *("log.val_every=5", "log.val_tokens=256", "log.sample_every=5", "log.sample_tokens=4", "log.save_every=2"),
    *("log.tensorboard=false", "adapters.rank=4"),
]
PRETRAIN = [*SHAPE, *SHORT, "model.dropout=0.1", "slope.mask_update_interval=3", "adapters.start=0.5", "train.steps=40"]
BASE = [*SHAPE, *SHORT, "method=dense", "train.steps=10"]
RANKS = ["train.micro_batch=1", "train.steps=30", "distributed.rendezvous_timeout=25"]
"""What differs where several ranks share the batch."""
LINEARIZE = [*SHORT, "linearize.window=2", "train.steps=40"]


@dataclass(frozen=True)
class Command:
    """A command that resumes. words: without --out; end: what a folder that it wrote holds, to be compared."""

    name: str
    words: Sequence[str]
    end: Callable[[Path], dict[str, Any]]
    ranks: int = 1

    @property
    def folder(self) -> str:
        """The beginning of the names of its folders."""
        return self.name.replace(",", "").replace(" ", "-")


@dataclass(frozen=True)
class Uninterrupted:
    """A command's length, the part of it before it writes the first file, and its end."""

    seconds: float
    setup_s: float
    end: dict[str, Any]


@dataclass
class Life:
    """How one life went: its kills, the seconds of the start that reached the end, and what is wrong with that."""

    kills: int = 0
    hangs: int = 0
    last_start_s: float = 0.0
    lost: str = ""
    unequal: list[str] = field(default_factory=list)


def commands(work: Path) -> list[Command]:
    """The commands, after what they read is made in `work`."""
    rng, words = random.Random(0), WORDS.split()
    texts = [work / f"text-{number}.txt" for number in range(SOURCES)]
    for path in texts:
        path.write_text("\n\n".join(" ".join(rng.choices(words, k=60)) for _ in range(400)))
    inputs = [f"source{number}={path}" for number, path in enumerate(texts)]
    preparing = ["data", "prepare", *inputs, "--val-fraction", "0.1", "--workers", "2"]
    data, base = work / "data", work / "base"
    _made([*preparing, "--out", str(data)], work)
    _made(["pretrain", "gpt2-nano", *BASE, f"data.path={data}", "--out", str(base)], work)
    pretraining = ["pretrain", "gpt2-nano", *PRETRAIN, f"data.path={data}"]
    return [
        Command("pretrain", pretraining, run_end),
        *(Command(f"pretrain, {ranks} ranks", [*pretraining, *RANKS], run_end, ranks) for ranks in (2, 4)),
        Command("data prepare", preparing, folder_end),
        Command("linearize", ["linearize", str(base), *LINEARIZE, f"data.path={data}"], run_end),
    ]


def run_end(run: Path) -> dict[str, Any]:
    """The hashes of the tensors of each of a run's checkpoints, and its log but for the clock."""
    tensors = [path for checkpoint in store.folders(run) for path in checkpoint.glob("*.distcp")]
    records = metrics.without_clock(metrics.read(run))
    return {
        **{str(path.relative_to(run)): file_sha256(path) for path in tensors},
        **{f"{metrics.JSONL}:{number}": record for number, record in enumerate(records, 1)},
    }


def folder_end(folder: Path) -> dict[str, Any]:
    """The hash of each file of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


class Start:
    """`slope WORDS…` of this installation, each rank in a process group of its own; what they print goes to a file."""

    def __init__(self, words: Sequence[str], log: Path, ranks: int = 1) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        own = str(Path(slope_cli.__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        if ranks > 1:  # as torchrun would start them
            environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        command = [sys.executable, "-P", "-m", "slope_cli", *words]
        self.processes = []
        for rank in range(ranks):
            number = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            with log.open("ab") as file:
                how: dict[str, Any] = {"stdout": file, "stderr": file, "start_new_session": True}
                self.processes.append(subprocess.Popen(command, cwd=log.parent, env=environment | number, **how))

    def ended(self, seconds: float) -> bool:
        """Whether all ranks end within a time; they are left zombies, so that their numbers stay their own."""
        end, flags = time.monotonic() + seconds, os.WEXITED | os.WNOHANG | os.WNOWAIT
        while not (done := all(p.returncode is not None or os.waitid(os.P_PID, p.pid, flags) for p in self.processes)):
            if time.monotonic() >= end:
                break
            time.sleep(min(0.01, max(0.0, end - time.monotonic())))
        return done

    def kill(self, rank: int | None = None) -> bool:
        """Kill the process group of a rank, or of all; whether one had not ended before."""
        chosen = self.processes if rank is None else [self.processes[rank]]
        for process in chosen:
            os.killpg(process.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
        return -signal.SIGKILL in [process.wait() for process in chosen]

    def hangs(self) -> bool:
        """Whether a rank still works HANG seconds after another was killed; then all are."""
        others = [process for process in self.processes if process.returncode is None]
        end = time.monotonic() + HANG
        for process in others:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                for other in others:
                    if other.poll() is None:
                        os.killpg(other.pid, signal.SIGKILL)
                        other.wait()
                return True
        return False

    def finish(self) -> str:
        """Wait for the end; what is wrong with it, or ''."""
        if not self.ended(LIMIT):
            self.kill()
            return f"hangs for {LIMIT} s"
        codes = {process.wait() for process in self.processes} - {0}
        return f"exit code {min(codes)}" if codes else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def uninterrupted(command: Command, work: Path) -> Uninterrupted:
    """Run a command without a kill."""
    out = work / f"uninterrupted-{command.folder}"
    began, setup_s = time.monotonic(), 0.0
    started = Start([*command.words, "--out", str(out)], out.with_suffix(".log"), command.ranks)
    while not started.ended(0.01):
        setup_s = setup_s or (time.monotonic() - began if out.is_dir() and any(out.iterdir()) else 0.0)
    seconds = time.monotonic() - began
    if fault := started.finish():
        raise SystemExit(f"{out.with_suffix('.log')}: {command.name}: {fault}")
    return Uninterrupted(seconds, setup_s, command.end(out))


def _made(words: Sequence[str], work: Path) -> None:
    log = work / "made.log"
    if fault := Start(words, log).finish():
        raise SystemExit(f"{log}: {words[0]}: {fault}")


def live(command: Command, whole: Uninterrupted, out: Path, most: int, moments: random.Random) -> Life:
    """One life, with at most so many kills. Its folder and log go unless something is wrong."""
    life, words, log = Life(), [*command.words, "--out", str(out)], out.with_suffix(".log")
    while True:
        began, started = time.monotonic(), Start(words, log, command.ranks)
        moment = moments.uniform(moments.choice((0.0, whole.setup_s)), whole.seconds)
        # Before the ranks have met, only a launcher can notice that one has died; it ends the others.
        met = command.ranks > 1 and moment > whole.setup_s
        rank = moments.choice([None, *range(command.ranks)]) if met else None
        if life.kills == most or started.ended(moment) or not started.kill(rank):
            break
        life.kills += 1
        life.hangs += (hangs := started.hangs())
        with log.open("a") as file:
            which = "all ranks" if rank is None else f"rank {rank}"
            print(f"--- killed {which} after {moment:.2f} s" + hangs * "; the others hang", file=file)
    life.lost = started.finish()
    life.last_start_s = time.monotonic() - began
    if not life.lost:
        try:
            life.unequal = differing(command.end(out), whole.end)
        except Exception as error:  # whatever cannot be read is lost
            life.lost = f"{type(error).__name__}: {error}"
    if not (life.lost or life.unequal or life.hangs):
        shutil.rmtree(out)
        log.unlink()
    return life


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def lives(command: Command, whole: Uninterrupted, kills: int, jobs: int, seed: int, work: Path) -> Iterator[Life]:
    """Lives with so many kills in all, some of them at the same time."""

    def job(number: int, wanted: int) -> list[Life]:
        moments, done = random.Random(f"{seed} {command.name} {number}"), list[Life]()
        while wanted > 0:  # a kill that comes after the end does not count
            out = work / f"{command.folder}-{number}-{len(done)}"
            done.append(live(command, whole, out, moments.randint(1, min(MOST, wanted)), moments))
            wanted -= done[-1].kills
        return done

    shares = [min(MOST, kills - first) for first in range(0, kills, MOST)]
    with ThreadPoolExecutor(jobs) as pool:
        yield from itertools.chain.from_iterable(pool.map(job, itertools.count(), shares))


def measure(command: Command, kills: int, jobs: int, seed: int, work: Path) -> KillRow:
    """Kill one command so many times."""
    whole = uninterrupted(command, work)
    all_lives = list(lives(command, whole, kills, jobs, seed, work))
    return KillRow(
        command=command.name,
        ranks=command.ranks,
        kills=sum(life.kills for life in all_lives),
        hangs=sum(life.hangs for life in all_lives),
        lives=len(all_lives),
        lost=[life.lost for life in all_lives if life.lost],
        unequal=[", ".join(life.unequal) for life in all_lives if life.unequal],
        uninterrupted_s=whole.seconds,
        setup_s=whole.setup_s,
        longest_restart_s=max((life.last_start_s for life in all_lives if life.kills), default=None),
    )


def main() -> None:
    """Kill, print each command's row as it comes, and write the file; exit code 1 for a hang or a wrong end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="lives at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--only", default="", help="some of pretrain, pretrain-2-ranks, pretrain-4-ranks, data-prepare, linearize"
    )
    words = parser.parse_args()
    work = words.work.resolve()
    work.mkdir(parents=True)
    results = KillResults(seed=words.seed, jobs=words.jobs)
    planned = [command for command in commands(work) if not words.only or command.folder in words.only.split(",")]
    for number, command in enumerate(planned):
        kills = (words.kills + number) // len(planned)
        results.rows.append(measure(command, kills, words.jobs, words.seed, work))
        print(json.dumps(asdict(results.rows[-1])), flush=True)
        write_json(words.out, asdict(results))
    if any(row.lost or row.unequal or row.hangs for row in results.rows):
        raise SystemExit(f"a hang, or an end that is lost or unequal; see {words.out} and the folders in {work}")


if __name__ == "__main__":
    main()
