"""The run that another one replaces in its folder: moved to RUN/replaced, removed once the new one has a checkpoint.

The folder is renamed as a whole to .replacing-RUN beside it, and becomes RUN/replaced of a new folder. A start that
finds it under the first name was preceded by a kill, and does the rest.
"""

import itertools
import os
import re
import time
from pathlib import Path

from slope_cli.checkpoint import store
from slope_cli.errors import SlopeError, UsageError, os_reason
from slope_cli.utils import files

LOG_ENDINGS = (".log", ".out", ".err")
"""A batch system may have opened its log in the folder before the run begins, and goes on writing there."""
SEEN = 90.0
"""Seconds in which every process must see a new folder: NFS shows an old one for 60 at most."""


def move_away(run: Path) -> None:
    """Begin to replace a run, whose folder this process holds; `finish` does the rest.

    Raises:
        UsageError: the folder cannot be renamed.
    """
    own = run.resolve()  # a link to the folder stays, and leads to the new one
    try:
        os.rename(own, _moved(own))
        own.mkdir()
    except OSError as error:
        raise UsageError(f"{run}: cannot be moved aside: {os_reason(error)}; choose another --out") from None


def finish(run: Path) -> None:
    """In a new folder, which this process holds: take in the run that it replaces, and the logs of batch systems."""
    own = run.resolve()
    moved, target = _moved(own), own / store.REPLACED
    if not moved.is_dir():
        return
    for log in (path for path in moved.iterdir() if path.suffix in LOG_ENDINGS):
        os.rename(log, own / log.name)
    if not store.folders(target):  # absent, or what a kill has left of it in `settle`
        files.remove(target)
        os.rename(moved, target)
    files.remove(moved)


def settle(run: Path) -> None:
    """Once a run will not be undone: of those that it has replaced, one after another, keep the last with a checkpoint.

    So what achieved nothing does not take the place of what did. If none has a checkpoint, the first one stays.
    """
    own = run.resolve()
    while (inner := own / store.REPLACED / store.REPLACED).is_dir():
        if store.folders(inner.parent):
            files.remove(inner)
        else:
            os.rename(inner, _moved(own))
            finish(run)


def put_back(run: Path, written: re.Pattern[str]) -> None:
    """Undo what `move_away` and `finish` have done, for a new run that has come to nothing; OSError if that fails.

    Args:
        written: the names of what a run writes. All else that is in the folder comes along, under another name if the
            run before has such a name, too.
    """
    own = run.resolve()
    moved = _moved(own)
    os.rename(own / store.REPLACED, moved)
    for path in (path for path in own.iterdir() if not written.fullmatch(path.name)):
        names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(1)))
        os.rename(path, next(moved / name for name in names if not os.path.lexists(moved / name)))
    files.remove(own)
    os.rename(moved, own)


def require_seen(run: Path) -> None:
    """Wait until this process sees the new folder: a network file system may show it the old one for some time.

    Raises:
        SlopeError: it does not.
    """
    end = time.monotonic() + SEEN
    while not (run / store.REPLACED).is_dir():
        if time.monotonic() >= end:
            raise SlopeError(f"{run}: is not the new folder that rank 0 has made; do all nodes share it?")
        time.sleep(0.1)


def _moved(own: Path) -> Path:
    return own.with_name(f".replacing-{own.name}")
