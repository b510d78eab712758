"""Commands, or a function, as several ranks on this machine, which meet by torchrun's variables."""

import gc
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from slope_cli.distributed.collectives import join
from slope_cli.distributed.launch import ranks
from support.processes import forkserver, run_command


class Ranks:
    """The ranks of one command, each in a process of its own; what rank N prints is in FOLDER/rank-N.log.

    Args:
        words: of the command line.
        nodes: on so many hosts, as the ranks see it.
        variables: of the environment, besides those of torchrun.
        prepare_child: called in each process first, with its rank.
    """

    def __init__(
        self,
        world: int,
        words: list[str],
        folder: Path,
        *,
        nodes: int = 1,
        variables: Mapping[str, str] | None = None,
        prepare_child: Callable[[int], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.processes = folder, list[BaseProcess]()
        local = world // nodes
        shared: dict[str, Any] = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local, "GLOO_SOCKET_IFNAME": "lo"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        for rank in range(world):
            own: dict[str, Any] = {**shared, "RANK": rank, "LOCAL_RANK": rank % local, **(variables or {})}
            environment = {key: str(value) for key, value in own.items()}
            arguments = (words, folder / f"rank-{rank}.log", environment, prepare_child, rank)
            self.processes.append(forkserver.Process(target=run_command, args=arguments))
            self.processes[-1].start()

    def finish(self, seconds: float = 120) -> list[int]:
        """Wait for the ends; their exit codes, minus the signal's number for those killed by one."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in codes, f"hangs: {codes}, {self.printed()}"
        return [code for code in codes if code is not None]

    def printed(self, rank: int | None = None) -> str:
        """What a rank printed, or all of them."""
        files = sorted(self.folder.glob("rank-*.log" if rank is None else f"rank-{rank}.log"))
        return "".join(file.read_text() for file in files)

    def wait_for(self, text: str, rank: int = 0, seconds: float = 90) -> None:
        """Wait until a rank has printed a text."""
        deadline = time.monotonic() + seconds
        while text not in self.printed(rank):
            assert time.monotonic() < deadline, f"{text!r} is not in {self.printed()}"
            time.sleep(0.01)

    def send(self, rank: int, number: int) -> None:
        """Send a signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)


def together(world: int, work: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
    """What `work(group, *args)` returns on each of so many ranks; an error of one fails the test."""
    variables = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    pipes, children = [], []
    for rank in range(world):
        ours, theirs = forkserver.Pipe()
        own = {key: str(value) for key, value in {**variables, "RANK": rank, "LOCAL_RANK": rank}.items()}
        children.append(forkserver.Process(target=_rank, args=(theirs, own, work, args)))
        children[-1].start()
        theirs.close()
        pipes.append(ours)
    results = []
    for pipe in pipes:
        assert pipe.poll(seconds), "a rank hangs"
        results.append(pipe.recv())
    for child in children:
        child.kill()
        child.join()
    assert not [result for result in results if isinstance(result, str)], "\n".join(map(str, results))
    return [result[0] for result in results]


def _rank(pipe: Any, variables: dict[str, str], work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    gc.freeze()
    try:
        group = join(ranks(), torch.device("cpu"))
        result: Any = (work(group, *args),)
        group.barrier()
    except BaseException:
        result = traceback.format_exc()
    pipe.send(result)
    signal.pause()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
