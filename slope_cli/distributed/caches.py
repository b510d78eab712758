"""Where compilers keep what they have compiled: on a node's own disk, where a run has several processes."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slope_cli.distributed.launch import Ranks

CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUPY_CACHE_DIR": "cupy",
    "SLOPE_CACHE_DIR": "slope",
}
"""The variables that place the caches of Inductor, Triton, CuPy and of measured kernels, and our folder for each."""


def node_caches(ranks: Ranks) -> dict[str, str]:
    """Set those of CACHES that the user has not set to a folder on this node's disk; returns what it set.

    For several processes only: all of them at once in a home folder on a network file system are slow, and its renames
    and locks may not hold between nodes. Call it before torch, triton or cupy are imported. The folder is in
    $SLURM_TMPDIR, $TMPDIR or /tmp, one for each user and version of torch. Nothing is set where it cannot be made.

    No process waits for another one here. Each of the four writes its files under other names and renames them, or
    under a lock, so that processes of one node at worst compile the same thing at the same time: which takes as long as
    waiting for the first one would.
    """
    if ranks.world == 1:
        return {}
    folder = _private_folder()
    chosen = (
        {} if folder is None else {key: str(folder / name) for key, name in CACHES.items() if key not in os.environ}
    )
    os.environ.update(chosen)
    return chosen


def _private_folder() -> Path | None:
    """A folder that only this user can write to: others' files in it would be run as this user's code."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "none"
    base = Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())
    own = base / f"slope-caches-{os.getuid()}"
    folder = own / f"torch-{torch}-python-{sys.version_info.major}.{sys.version_info.minor}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        status = own.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            return None
        folder.mkdir(exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
