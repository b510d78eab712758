"""Saving checkpoints while training goes on."""

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor

from slope_cli.checkpoint import dcp, store
from slope_cli.distributed.collectives import Group

SPARE = 1.2
"""A copy is made where so many times its size is free."""
CGROUPS = Path("/sys/fs/cgroup")


class Saver:
    """Writes the checkpoints of a run, one after the other; every rank has one.

    What need not wait is copied to host memory, where that has room, and written from there by a thread, so that
    training waits for the copy alone.
    """

    def __init__(self, run: Path, group: Group) -> None:
        self._run, self._group = run, group
        self._memory: dict[str, Tensor] = {}
        self._writing: tuple[int, Future[Path]] | None = None

    def save(self, step: int, plan: dcp.Plan, metadata: dict[str, Any], *, wait: bool, **how: Any) -> Path | None:
        """Save a checkpoint as `store.save`, once `finished` has told of the one before.

        Args:
            wait: until it is written.

        Returns:
            Its folder; None if it is being written in the background.
        """
        assert self._writing is None
        if wait or not self._has_room(plan):
            return store.save(self._run, step, plan, metadata, group=self._group, **how)
        plan.copy(self._memory)
        written: Future[Path] = Future()
        group = self._group.apart

        def write() -> None:
            try:
                written.set_result(store.save(self._run, step, plan, metadata, group=group, **how))
            except BaseException as error:  # raised where it is waited for
                written.set_exception(error)

        self._writing = step, written
        # Nothing waits for it when the process ends at once, as at a second Ctrl-C.
        threading.Thread(target=write, name="save", daemon=True).start()
        return None

    def finished(self, *, wait: bool) -> tuple[int, Path] | None:
        """Step and folder of the checkpoint that was written in the background, once; None if there is none.

        Args:
            wait: until it is written.

        Raises:
            SlopeError: it could not be written.
        """
        if self._writing is None or not (wait or self._writing[1].done()):
            return None
        (step, written), self._writing = self._writing, None
        return step, written.result()

    def _has_room(self, plan: dcp.Plan) -> bool:
        """Whether the hosts of all ranks have the memory for a copy."""
        need = plan.copy_bytes - sum(tensor.nbytes for tensor in self._memory.values())
        return all(self._group.gather(SPARE * need * self._group.ranks.local_world <= free_memory()))


def free_memory() -> int:
    """Bytes of host memory that this process can still take; 0 where the system does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        own = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    except (OSError, ValueError, KeyError):
        return 0
    for folder in (CGROUPS / own, *(CGROUPS / own).parents):  # SLURM limits the memory of a job in one of them
        try:
            limit = int((folder / "memory.max").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, limit - int((folder / "memory.current").read_text()) + int(stat["file"]))
        except (OSError, ValueError, KeyError):  # no limit
            continue
    return free
