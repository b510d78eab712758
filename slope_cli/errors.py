"""The two errors that a user sees as one line, and how they are worded; anything else keeps its traceback."""

import difflib
import errno
from collections.abc import Iterable


class SlopeError(Exception):
    """A known problem of a run, its files or its machine: one clear line, exit code 1."""

    exit_code = 1


class UsageError(SlopeError):
    """A wrong command line, config or input: one clear line that says what to set, exit code 2."""

    exit_code = 2


def missing(purpose: str, package: str | None, extra: str) -> UsageError:
    """The error that `purpose` needs a package which an extra of setup.cfg installs."""
    return UsageError(f"{purpose}: {package} is missing; {install(extra)}")


def install(extra: str) -> str:
    """How to install an extra of setup.cfg; by what command depends on where slope comes from."""
    return f"install the extra {extra} (docs/start.md#install)"


ADVICE = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: close some, or ask its administrator",
    errno.ENOMEM: "the machine has too little free memory: close other programs",
    errno.EACCES: "give yourself the right to it (chmod +r to read, +w to write)",
    errno.EPERM: "give yourself the right to it, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "put it back or correct the path, and run the same command again",
    errno.ENOTDIR: "a part of the path is a file: choose another path",
    errno.EISDIR: "give the path of a file",
    errno.EEXIST: "it is there already: remove it or choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle: remove them",
    errno.ENOSPC: "free some space, and run the same command again",
    errno.EDQUOT: "free some space, and run the same command again",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or free some space",
    errno.ESTALE: "the file system has lost it: run the same command again",
    errno.EIO: "the disk or network failed: copy the file elsewhere",
}


def os_reason(error: OSError) -> str:
    """Why the system refused a file, and what to do."""
    advice = ADVICE.get(error.errno or 0, "mend this, and run the same command again")
    return f"{error.strerror or first_line(error)}; {advice}"


def did_you_mean(unknown: str, known: Iterable[str], listed: str = "") -> str:
    """A hint for an unknown name: the closest known ones; if none is close all of them, or where they are listed."""
    names = list(known)
    near = nearest(unknown, names)
    return f"did you mean {' or '.join(near)}?" if near else listed or f"known are {', '.join(names)}"


def nearest(unknown: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The names that are closest to an unknown one, at most three; none that is less like it than `cutoff`, of 1."""
    lowered = {name.lower(): name for name in reversed(list(known))}
    near = difflib.get_close_matches(unknown.lower(), lowered, n=3, cutoff=cutoff)
    # Further names only if they are about as close as the closest.
    ratios = [difflib.SequenceMatcher(None, unknown.lower(), name).ratio() for name in near]
    return [lowered[name] for name, ratio in zip(near, ratios, strict=True) if ratio > ratios[0] - 0.1]


def is_utf8(text: str) -> bool:
    """Whether a word of the command line, or the name of a file, is text: Python keeps other bytes as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none. Other libraries' errors share no base class."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(": ") if lines else type(error).__name__


def one_line(error: Exception) -> str:
    """The message of a known error, in one line; empty for a bug, which keeps its traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and error.strerror:
        return " ".join(f"{error.filename}: {os_reason(error)}".split())
    if isinstance(error, SlopeError | OSError):
        return text
    # A GPU says the first, PyTorch's allocator on the CPU the second, numpy raises MemoryError.
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return (
            f"out of memory ({text.partition('. ')[0]}); take a smaller batch (train.micro_batch) or shorter sequences"
        )
    return ""
