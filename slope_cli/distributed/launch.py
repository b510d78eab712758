"""The processes of a run: how many there are, which one this is, and its device.

A run is one process, or one task of srun for each GPU, or the workers of torchrun on one node. They find one another by
the variables that srun and torchrun set.
"""

import os
import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slope_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

SRUN, TORCHRUN, ALONE = "srun", "torchrun", ""
FIRST_PORT, PORTS = 20000, 10000


@dataclass(frozen=True)
class Ranks:
    """Which of a run's processes this one is.

    Attributes:
        rank, world: its number and how many there are.
        local_rank, local_world: the same among those of its host.
        hosts: of each rank; () where that is not known before they meet.
        address: of rank 0 as HOST:PORT; "" for a single process.
        launcher: what started them: srun, torchrun, or "" for a single process.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    hosts: tuple[str, ...] = ()
    address: str = ""
    launcher: str = ALONE

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    @property
    def host(self) -> str:
        """The name of this host."""
        return os.environ.get("SLURMD_NODENAME") or platform.node()

    @property
    def name(self) -> str:
        """Of this process, for messages."""
        return f"rank {self.rank} on {self.host}"


def ranks() -> Ranks:
    """Which of a run's processes this one is, by the variables of srun and torchrun.

    Raises:
        UsageError: they contradict one another.
    """
    # Not SLURM_NTASKS: sbatch sets it to the job's tasks even for a script that starts one process without srun.
    tasks = _number("SLURM_STEP_NUM_TASKS", 1) if "SLURM_PROCID" in os.environ else 1
    workers = _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1
    if tasks > 1 and "RANK" in os.environ:
        raise UsageError(
            f"SLURM_STEP_NUM_TASKS={tasks} and RANK={os.environ['RANK']}: started by srun and by torchrun at once; "
            "start one srun task for each GPU, without torchrun"
        )
    if tasks > 1:
        return _of_srun(tasks)
    return _of_torchrun(workers) if workers > 1 else Ranks()


def require_one_process() -> None:
    """Refuse to start as one of several processes.

    Raises:
        UsageError: torchrun or srun started more than one.
    """
    if (world := ranks().world) > 1:
        raise UsageError(f"started as {world} processes: this command works in one; start a single task")


def _number(key: str, default: int | None = None) -> int:
    text = os.environ.get(key)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise UsageError(f"{key}={text}: is not a number, though other variables of the launcher are set")
    return int(text)


def _of_torchrun(world: int) -> Ranks:
    rank, local_rank, local_world = _number("RANK"), _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
    _require_below("RANK", rank, world)
    _require_below("LOCAL_RANK", local_rank, local_world)
    address = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{_number('MASTER_PORT')}"
    return Ranks(rank, world, local_rank, local_world, address=address, launcher=TORCHRUN)


def _of_srun(world: int) -> Ranks:
    rank, local_rank = _number("SLURM_PROCID"), _number("SLURM_LOCALID")
    _require_below("SLURM_PROCID", rank, world)
    nodes = expand_nodes(os.environ.get("SLURM_STEP_NODELIST", ""))
    counts = expand_counts(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    hosts = tuple(node for node, count in zip(nodes, counts, strict=False) for _ in range(count))
    if len(hosts) != world:
        lists = "SLURM_STEP_NODELIST and SLURM_STEP_TASKS_PER_NODE"
        raise UsageError(f"SLURM_STEP_NUM_TASKS={world}: {lists} are of {len(hosts)} tasks; start them with srun")
    local_world = counts[_number("SLURM_NODEID", 0)]
    _require_below("SLURM_LOCALID", local_rank, local_world)
    # Without a block distribution a rank's host is another one; messages then name ranks alone.
    block = os.environ.get("SLURM_DISTRIBUTION", "block").split(":")[0] == "block"
    here = local_world == world
    host = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if here else nodes[0])
    job, step = _number("SLURM_JOB_ID", 0), os.environ.get("SLURM_STEP_ID", "0")
    port = os.environ.get("MASTER_PORT") or _port(job, int(step) if step.isdecimal() else 0)
    return Ranks(rank, world, local_rank, local_world, hosts if block else (), f"{host}:{port}", SRUN)


def _port(job: int, step: int) -> int:
    """Two steps of a node rarely share it, and all ranks of one know it."""
    return FIRST_PORT + (job * 31 + step) % PORTS


def _require_below(key: str, number: int, count: int) -> None:
    if number >= count:
        raise UsageError(f"{key}={number}: there are only {count} processes")


def expand_nodes(text: str) -> list[str]:
    """The names in a node list of SLURM such as "n[1-3,07],login", in order."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        parts = re.split(r"\[([^\]]*)\]", item)
        expanded = [parts[0]]
        for ranges, rest in zip(parts[1::2], parts[2::2], strict=True):
            expanded = [f"{before}{number}{rest}" for before in expanded for number in _numbers(ranges)]
        names += expanded
    return names


def _numbers(ranges: str) -> list[str]:
    """The numbers of "1-3,07", with their leading zeros."""
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def expand_counts(text: str) -> list[int]:
    """The numbers in a list of SLURM such as "4(x2),3"."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts


def use_granted_cores() -> None:
    """Let the libraries of this process use as many threads as SLURM granted cores; call it before torch is imported.

    OMP_NUM_THREADS, where it is set, stays as it is.
    """
    if (cores := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal() and "SLURM_PROCID" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", cores)


# ------------------------------------------------------------------------------------------------------- the device


def _granted_gpus() -> str:
    """The variable that says this process was given GPUs, as KEY=VALUE; empty if none was, or they are hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # the last word: an empty one hides them on purpose
        hidden = visible.strip() in ("", "NoDevFiles") or visible.strip().startswith("-1")
        return "" if hidden else f"CUDA_VISIBLE_DEVICES={visible}"
    for key, value in sorted(os.environ.items()):
        if key.startswith("SLURM_GPUS"):  # a number, or TYPE:NUMBER for several types
            given = any(part.rpartition(":")[2].strip() not in ("", "0") for part in value.split(","))
        elif key in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):  # which ones, so that 0 is one
            given = bool(value.strip())
        else:  # "all" stands in container images, whether or not they run with a GPU
            given = key == "NVIDIA_VISIBLE_DEVICES" and value.strip() not in ("", "all", "none", "void")
        if given:
            return f"{key}={value}"
    return ""


def pick_device(name: str, ranks: Ranks | None = None) -> "torch.device":
    """The device called `name`; for "auto" the GPU, or the CPU where no GPU was granted.

    Each of several processes gets a GPU of its own.

    Raises:
        UsageError: no such device here, a GPU was granted and torch finds none, or there are more processes on this
            host than GPUs, or under srun fewer.
    """
    import torch

    ranks = ranks or Ranks()
    if name == "auto" and not torch.cuda.is_available():
        if granted := _granted_gpus():
            raise UsageError(
                f"{granted}, but torch finds no GPU (`slope doctor` says more); "
                "for the CPU set train.device=cpu, or CUDA_VISIBLE_DEVICES to nothing"
            )
        return torch.device("cpu")
    if ranks.world > 1 and name in ("auto", "cuda"):
        return torch.device("cuda", _own_gpu(ranks, torch.cuda.device_count()))
    if ranks.world > 1 and name != "cpu":
        raise UsageError(f"train.device={name}: each of {ranks.world} processes has a GPU of its own; say cuda or auto")
    try:
        device = torch.device("cuda" if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"train.device={name}: {str(error).splitlines()[0]}") from None
    return device


def _own_gpu(ranks: Ranks, visible: int) -> int:
    """The index of this process's GPU among the visible ones: all of the host's, or where SLURM binds them its own."""
    if visible == 1 and ranks.launcher == SRUN:
        return 0
    there = f"{ranks.host} has {ranks.local_world} processes and {visible} GPUs"
    if visible < ranks.local_world:
        raise UsageError(f"{there}: start one task for each GPU")
    if visible > ranks.local_world and ranks.launcher == SRUN:
        raise UsageError(f"{there}: start one task for each GPU (--ntasks-per-node), or ask for fewer GPUs")
    return ranks.local_rank
