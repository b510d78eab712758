"""Files and folders that are whole or absent, JSON that carries its checksum, folders locked by one process."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from slope_cli.errors import SlopeError, UsageError, os_reason

LOCK = ".lock"
"""The file in a folder that a process locks while it works there."""
LOCK_WAIT = 30.0
"""Seconds to wait for another process to release a folder: the one before a restart may still be ending."""


def open_own(path: Path, flags: int = os.O_RDWR | os.O_APPEND) -> int:
    """Open a file for writing, or make it; UsageError if its name is a link or a pipe that leads elsewhere."""
    try:
        handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise UsageError(f"{path}: is a link or a pipe, and is not written to; remove it") from None
        raise
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        raise UsageError(f"{path}: has other names (hard links), or is no plain file; put a copy in its place")
    return handle


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; of a link only itself."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def require_no_way_out(folder: Path) -> None:
    """UsageError if a link anywhere in a folder leads out of it: what is written there would land elsewhere."""
    inside = os.path.realpath(folder)
    for parent, folders, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in (*folders, *names)):
            if os.path.islink(path) and os.path.commonpath([inside, os.path.realpath(path)]) != inside:
                raise UsageError(f"{path}: is a link out of {folder}, which is not written through; remove it")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is whole and on the disk; until then an old one stays.

    SlopeError when the disk is full, UsageError when the folder cannot be written.
    """
    # One fixed temporary name: what a killed run left behind is overwritten, and does not pile up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        remove(temporary)  # it may be a link that leads elsewhere
        with open(open_own(temporary, os.O_RDWR | os.O_EXCL), "wb+") as file:
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

    Yields the folder to write to, a sibling called .tmp-NAME, which replaces an empty folder at `path` at the end. Who
    may read the folder may read its files.

    Raises:
        SlopeError: the disk is full.
        UsageError: the parent folder cannot be written, or another process writes this one, or has written it.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with contextlib.ExitStack() as held:
            there = False
            while not there:
                if temporary.is_symlink() or not temporary.is_dir():
                    remove(temporary)
                temporary.mkdir(parents=True, exist_ok=True)
                there = held.enter_context(_locked(temporary, f"{path}: another process is writing it"))
            try:
                for left in temporary.iterdir():
                    remove(left)
                yield temporary
                rights = temporary.stat().st_mode & 0o666
                for file in temporary.rglob("*"):
                    if file.is_file() and file.stat().st_mode & 0o666 != rights:  # safetensors' are their owner's alone
                        file.chmod(rights)
                    _sync(file)
                _sync(temporary)
                os.rename(temporary, path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        _sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


@contextlib.contextmanager
def _locked(folder: Path, taken: str) -> Iterator[bool]:
    """Lock a folder with no file in it, as `held_folder` does with one; UsageError at once if it is taken.

    Where a file system has no such locks it is not locked.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:  # another process has just renamed it
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UsageError(f"{taken}; wait until it ends, or end it") from None
    except OSError:
        pass
    try:
        yield _is_at(handle, folder)
    finally:
        os.close(handle)


def write_error(path: Path, error: OSError) -> Exception:
    """The error to raise for a write that failed: SlopeError for a full disk, UsageError for missing rights."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SlopeError(f"{path}: cannot be written, the disk (or quota) is full: {error.strerror}")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(f"{path}: cannot be written: {os_reason(error)}")
    if error.errno == errno.ENOTEMPTY:  # of a rename
        return UsageError(f"{path}: another process has written it meanwhile; choose another folder")
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
        raise SlopeError(f"{path}: cannot be read: {os_reason(error)}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that carries the hash of its content, atomically."""
    with atomic_file(path) as file:
        file.write(_sealed(as_json(content)))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote; SlopeError if it is missing or not byte for byte that."""
    try:
        written = path.read_bytes()
        content = json.loads(written)["content"]
        if isinstance(content, dict) and _sealed(content) == written:
            return content
    except FileNotFoundError:
        raise SlopeError(f"{path}: missing") from None
    except OSError as error:
        raise SlopeError(f"{path}: cannot be read: {os_reason(error)}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise SlopeError(f"{path}: damaged, its checksum does not fit")


def _sealed(content: Mapping[str, Any]) -> bytes:
    return json.dumps({"sha256": content_sha256(content), "content": content}, indent=1).encode() + b"\n"


def content_sha256(content: Mapping[str, Any]) -> str:
    """The hash of a JSON object as it is read back from a file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """An object as it is read back from JSON: its keys are text, which is sorted otherwise than numbers."""
    return dict(json.loads(json.dumps(content)))


@contextlib.contextmanager
def held_folder(
    folder: Path, part: str = "", *, shared: bool = False, check: Callable[[], None] | None = None
) -> Iterator[bool]:
    """Lock a folder, or a named part of it, for this process; the lock is released however the process ends.

    Yields whether the folder is still the one that was locked: the process before may have removed it.

    Args:
        shared: other processes may share the lock.
        check: called now and then while another process holds it, in a way that excludes this one; what it raises ends
            the wait. None waits for LOCK_WAIT at most.

    Raises:
        UsageError: another process, which is named, still holds it, or the folder cannot be written.
    """
    name, taken = (f"{LOCK}-{part}", f"on {part}") if part else (LOCK, "in it")
    taken = f"{folder}: another process is at work {taken}"
    try:
        lock = open(open_own(folder / name, os.O_RDWR), "rb+", buffering=0)  # noqa: SIM115 - held by the with below
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {os_reason(error)}") from error
    with lock:
        try:
            _lock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, taken, check)
            with contextlib.suppress(OSError):  # a full disk; the lock holds without a name
                lock.seek(0)
                lock.truncate()
                lock.write(b"" if shared else f"{os.getpid()} {platform.node()}\n".encode())
        except BlockingIOError as error:
            raise UsageError(f"{taken}; wait until {_holder(lock)} ends, or end it") from error
        except OSError as error:
            risk = "start no second process in it"
            print(f"warning: {folder}: its file system has no locks ({error.strerror}); {risk}", file=sys.stderr)
        yield _is_at(lock.fileno(), folder / name)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file or folder is the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(lock: io.RawIOBase) -> str:
    """The process that holds a lock, by the file's content; "it" where that does not say."""
    lock.seek(0)
    found = re.fullmatch(rb"(\d+) ([\w.-]+)\n", lock.read(300) or b"")
    return f"process {int(found[1])} on {found[2].decode()}" if found else "it"


def _lock(lock: io.RawIOBase, kind: int, taken: str, check: Callable[[], None] | None) -> None:
    """Lock a file, if need be after a wait, which a line from `taken` on says; BlockingIOError if it stays taken."""
    end, told = time.monotonic() + LOCK_WAIT, False
    while True:
        try:
            return fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if check is None and time.monotonic() >= end:
                raise
        if not told:
            most = "" if check else f"up to {LOCK_WAIT:.0f} s "
            print(f"{taken}; waiting {most}for {_holder(lock)} to end", file=sys.stderr)
            told = True
        if check is not None:
            check()
        time.sleep(0.1)


@contextlib.contextmanager
def claimed_folder(
    folder: Path, what: str, may_hold: Callable[[Path], bool], *, shared: bool = False
) -> Iterator[None]:
    """Make a folder, or reuse one of the same purpose, and lock it for this process.

    Args:
        what: the purpose, for errors: "run", say.
        may_hold: whether an entry that the folder already contains is of this purpose.
        shared: other processes may share the lock.

    Raises:
        UsageError: it contains something else, or a link that leads out of it, cannot be made or written, or another
            process holds it.
    """
    with contextlib.ExitStack() as held:
        there = False
        while not there:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                foreign = sorted(path.name for path in folder.iterdir() if path.name != LOCK and not may_hold(path))
            except OSError as error:
                raise UsageError(f"{folder}: cannot be made or read: {os_reason(error)}") from None
            if foreign:
                raise UsageError(
                    f"{folder}: is not empty and holds no {what} (it contains {foreign[0]}); choose another folder"
                )
            require_no_way_out(folder)
            there = held.enter_context(held_folder(folder, shared=shared))
        yield
