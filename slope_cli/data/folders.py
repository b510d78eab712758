"""Which files of a folder are training text, and what is left out of it."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from slope_cli.data.formats import format_of, why_unread
from slope_cli.data.token_file import read_error
from slope_cli.errors import UsageError

SHOWN_NAMES = 3
CARDS = re.compile(
    r"(readme|licen[cs]e|copying|copyright|notice|citation|data[-_ ]?sheet|data(set)?[-_ ]?card)([-_. ].*)?", re.I
)
METADATA = re.compile(
    r"_.*|(dataset_infos?|dataset_dict|state|metadata|manifest|stats|config|index|croissant)\.json"
    r"|(md5|sha\d+)(sums?)?(\.txt)?|check-?sums?(\.txt)?|.*\.(md5|sha1|sha256|sha512|sig|asc)",
    re.I,
)
"""Names that start with _ are markers (Spark's _SUCCESS), which the programs that write them never read as data."""
SPLITS = re.compile(
    r"(.*[-_. ])?(test|testing|validation|valid|val|dev|eval|evaluation|held[-_]?out)(set)?([-_. \d].*)?", re.I
)
"""The names by which the Hugging Face Hub tells splits apart: a word of a file's or folder's name."""


def text_files(folder: Path, encoding: str, say: Callable[[str], None]) -> list[tuple[Path, str, os.stat_result]]:
    """The text files below a folder, each with the place to which its links lead, and its status.

    Links are followed, and nothing is taken twice. `say` gets one line on what is left out: hidden and empty files,
    data set cards, licences, metadata, validation and test files, formats that are not read, links to nothing.
    UsageError if no file is left, or one cannot be read.
    """
    folder = Path(os.path.abspath(folder))
    found: list[tuple[Path, str, os.stat_result]] = []
    left_out: dict[str, list[str]] = {}
    targets: set[str] = set()
    for path, target, status in _entries(folder, encoding):
        name = str(path.relative_to(folder))
        is_folder = bool(status and stat.S_ISDIR(status.st_mode))
        reason = _why_left_out(path, status, encoding)
        if not reason and (is_folder or target in targets):
            reason = "taken under another name"
        if reason or not status:
            left_out.setdefault(reason or "", []).append(name + "/" * is_folder)
            continue
        if not os.access(path, os.R_OK):
            raise UsageError(read_error(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
        targets.add(target)
        found.append((path, target, status))
    line = "; ".join(f"{some(names)} ({reason})" for reason, names in left_out.items())
    if not found:
        what = f"no text: left out are {line}; name a file itself to take it" if line else "no files"
        raise UsageError(f"{folder}: contains {what}")
    if line:
        say(f"warning: left out of {folder}: {line}; name a file itself to take it")
    return found


def some(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(sorted(names)[:SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _entries(folder: Path, encoding: str) -> Iterator[tuple[Path, str, os.stat_result | None]]:
    """The files below a folder, and the folders that are left out, with their targets; no status: a dangling link.

    Linked folders come last, so that what is in two places keeps its own name.
    """
    waiting = deque([(str(folder), os.path.realpath(folder))])
    seen: set[str] = set()
    while waiting:
        place, real_place = waiting.popleft()
        if real_place in seen:
            yield Path(place), real_place, os.stat(place)
            continue
        seen.add(real_place)
        try:
            with os.scandir(place) as listing:
                entries = sorted(listing, key=lambda entry: (entry.is_symlink(), entry.name))
            for entry in entries:
                is_link = entry.is_symlink()
                target = os.path.realpath(entry.path) if is_link else os.path.join(real_place, entry.name)
                try:
                    status = entry.stat()
                except OSError as error:
                    if not is_link or error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                        raise
                    yield Path(entry.path), target, None
                    continue
                path = Path(entry.path)
                if not stat.S_ISDIR(status.st_mode) or _why_left_out(path, status, encoding):
                    yield path, target, status
                elif is_link:
                    waiting.append((entry.path, target))
                else:
                    waiting.appendleft((entry.path, target))
        except OSError as error:
            raise UsageError(read_error(Path(error.filename or place), error)) from error


def _why_left_out(path: Path, status: os.stat_result | None, encoding: str) -> str | None:
    """Why a file, or all of a folder, is no training text; None if it is."""
    if path.name.startswith("."):
        return "hidden"
    if status is None:
        return "a link to nothing"
    if SPLITS.fullmatch(path.name):
        return "validation or test text"
    if METADATA.fullmatch(path.name):
        return "metadata"
    if stat.S_ISDIR(status.st_mode):
        return None
    if not stat.S_ISREG(status.st_mode):
        return "neither a file nor a folder"
    form = format_of(path, encoding)
    if status.st_size == 0:
        return "empty"
    if not form.rows and CARDS.fullmatch(path.name):
        return "a data set card or licence"
    return why_unread(path, form)
