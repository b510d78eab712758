"""Files and folders that are whole or absent, JSON that carries its checksum, folders locked by one process."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from slope_cli.errors import SlopeError, UsageError

LOCK = ".lock"
"""The file in a folder that a process locks while it works there."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is whole and on the disk; until then an old one stays.

    SlopeError when the disk is full, UsageError when the folder cannot be written.
    """
    # One fixed temporary name: what a killed run left behind is overwritten, and does not pile up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when all of it is written and on the disk.

    Yields the folder to write to, a sibling called .tmp-NAME, which replaces an empty folder at `path` at the end.

    Raises:
        SlopeError: the disk is full.
        UsageError: the parent folder cannot be written.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        os.rename(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_error(path: Path, error: OSError) -> Exception:
    """The error to raise for a write that failed: SlopeError for a full disk, UsageError for missing rights."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SlopeError(f"{path}: cannot be written, the disk (or quota) is full: {error.strerror}")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(f"{path}: cannot be written: {error.strerror}")
    return error


def _sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's list of names, to the disk. A rename is only safe after both."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """The sha256 of a file in hex; SlopeError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SlopeError(f"{path}: cannot be read: {error.strerror}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that carries the hash of its content, atomically."""
    with atomic_file(path) as file:
        file.write(_sealed(content))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote; SlopeError if it is missing or not byte for byte that."""
    try:
        written = path.read_bytes()
        content: dict[str, Any] = json.loads(written)["content"]
        if _sealed(content) == written:
            return content
    except FileNotFoundError:
        raise SlopeError(f"{path}: missing") from None
    except OSError as error:
        raise SlopeError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise SlopeError(f"{path}: damaged, its checksum does not fit")


def _sealed(content: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": digest, "content": content}, indent=1).encode() + b"\n"


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; the lock is released however the process ends.

    UsageError if another process holds it, or it cannot be written.
    """
    try:
        lock = open(folder / LOCK, "wb")  # noqa: SIM115 - held by the with statement below
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{folder}: another process is at work in it") from error
        except OSError:
            pass  # a file system without locks: the user must start only one process in a folder
        yield


@contextlib.contextmanager
def claimed_folder(folder: Path, what: str, may_hold: Callable[[Path], bool]) -> Iterator[None]:
    """Make a folder, or reuse one of the same purpose, and lock it for this process.

    Args:
        what: the purpose, for errors: "run", say.
        may_hold: whether an entry that the folder already contains is of this purpose.

    Raises:
        UsageError: it contains something else, cannot be made or written, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in folder.iterdir() if path.name != LOCK and not may_hold(path))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made or read: {error.strerror}") from None
    if foreign:
        raise UsageError(
            f"{folder}: is not empty and holds no {what} (it contains {foreign[0]}); choose another folder"
        )
    with held_folder(folder):
        yield
