"""Copies of token files on a node's own disk, for `data.local_copy`: made once a node, shared by its runs."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from slope_cli.data.dataset import Dataset
from slope_cli.data.token_file import TokenFile
from slope_cli.errors import SlopeError, UsageError, os_reason
from slope_cli.utils.files import held_folder, open_own

COARSEST_NS = 2_000_000_000
"""Some file systems keep times to two seconds."""


def stage(dataset: Dataset, directory: Path, warn: Callable[[str], None], check: Callable[[], None]) -> None:
    """Copy the token files that are not in `directory` yet, each checked and whole or absent.

    For one process of a node: the others wait until it returns, then all of them call `staged`. It waits for another
    run that copies the same data. Where the disk is full or cannot be written, `warn` gets a line, and nothing of
    this call stays there.

    Args:
        check: called now and then; what it raises ends this.

    Raises:
        SlopeError: a file of the data set is damaged or cannot be read.
    """
    folder = _folder(dataset, directory)
    copied: list[Path] = []
    try:
        directory.expanduser().mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _require_own(folder)
        with held_folder(folder, check=check):  # a copy of another run may take an hour
            missing = [file for file in _files(dataset) if _copy_of(file, dataset, folder) is None]
            _require_room(folder, sum(file.identity.size for file in missing))
            for file in missing:
                copied.append(folder / file.path.relative_to(dataset.folder))
                _copy(file, copied[-1], check)
    except (OSError, UsageError) as error:
        for path in copied:
            path.unlink(missing_ok=True)
        reason = f"{error.filename or folder}: {os_reason(error)}" if isinstance(error, OSError) else str(error)
        warn(f"data.local_copy={directory}: {reason}; the data are read from {dataset.folder}")


def staged(dataset: Dataset, directory: Path) -> Dataset:
    """The data set with its token files in `directory`, where a copy is there and the same; else the file itself."""
    folder = _folder(dataset, directory)
    try:
        _require_own(folder)
    except OSError:
        return dataset

    def place(file: TokenFile) -> TokenFile:
        return _copy_of(file, dataset, folder) or file

    val = {source: place(file) for source, file in dataset.val.items()}
    return replace(dataset, train=tuple(map(place, dataset.train)), val=val)


def _folder(dataset: Dataset, directory: Path) -> Path:
    """Where copies of this data set lie, for all runs of a user."""
    return directory.expanduser() / f"slope-{os.getuid()}-{dataset.fingerprint[:32]}"


def _files(dataset: Dataset) -> tuple[TokenFile, ...]:
    return (*dataset.train, *dataset.val.values())


def _require_own(folder: Path) -> None:
    """OSError if the folder is not one that this user made: in a directory for all, others could make it first."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "is no folder of this user", str(folder))


def _require_room(folder: Path, size: int) -> None:
    if size > (free := shutil.disk_usage(folder).free):
        full = f"the data need {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB free"
        raise OSError(errno.ENOSPC, full, str(folder))


def _copy_of(file: TokenFile, dataset: Dataset, folder: Path) -> TokenFile | None:
    """The copy of a file, if there is one of the same size, time and header."""
    try:
        copy = TokenFile.open(folder / file.path.relative_to(dataset.folder))
    except SlopeError:
        return None
    one, other = copy.identity, file.identity
    same_time = abs(one.mtime_ns - other.mtime_ns) < COARSEST_NS
    return copy if same_time and (one.size, one.header) == (other.size, other.header) else None


def _copy(file: TokenFile, target: Path, check: Callable[[], None]) -> None:
    """Copy a file, with its time; OSError if that cannot be written, SlopeError if the file is damaged."""
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a run that was killed
    try:
        with open(open_own(temporary, os.O_RDWR | os.O_EXCL), "wb") as out:
            for piece in file.verified():
                check()
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())  # a name must not outlive its bytes when the machine fails
        os.utime(temporary, ns=(file.identity.mtime_ns, file.identity.mtime_ns))
        os.rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
