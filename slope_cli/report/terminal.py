"""What reaches the terminal: control characters of prompts, samples and file names are shown, not obeyed."""

import contextlib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but the newline and the tab, those that reorder text, and bytes of names that are no text."""
MOST_COLUMNS = 100
"""The longest lines of text that are still easy to read."""
DRAWING = ("rich", "tqdm")
"""Libraries that move the cursor; what slope gives them is `printable` already."""


def printable(text: str) -> str:
    """A text with its control characters escaped, in a form that JSON has too where JSON leaves them as they are."""
    return _CONTROL.sub(lambda found: (r"\x{:02x}" if found[0] < " " else r"\u{:04x}").format(ord(found[0])), text)


def one_row(text: str) -> str:
    """`printable` text without newlines and tabs, for one row of a log or a cell of a table."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def columns() -> int:
    """The width of text: the terminal's, but at most MOST_COLUMNS; 80 elsewhere."""
    return min(shutil.get_terminal_size((80, 24)).columns, MOST_COLUMNS)


def wrapped(text: str, indent: str = "", hanging: str | None = None) -> list[str]:
    """The lines of a text of `columns`; words are never broken, because a command or path is to be copied.

    Args:
        indent, hanging: what the first line and the others begin with; by default the same.
    """
    others = indent if hanging is None else hanging
    whole: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, columns(), initial_indent=indent, subsequent_indent=others, **whole)


def named_lines(texts: Mapping[str, str]) -> list[str]:
    """Texts beside their names: a line for each, for programs that search; on a terminal as many as its width needs."""
    lines: list[str] = []
    width = max(map(len, texts), default=0)
    on_terminal = sys.stdout is not None and sys.stdout.isatty()  # it may be closed
    for name, text in texts.items():
        first = f"{name:{width}}  "
        lines += wrapped(text, first, " " * len(first)) if on_terminal else [first + text]
    return lines


class Escaped:
    """A standard stream that escapes control characters, and outlives its reader."""

    def __init__(self, stream: Any, *, log: bool) -> None:
        """log: whether a full disk, too, may cost the rest of the text but not the work."""
        self.stream, self._lost = stream, OSError if log else BrokenPipeError
        if hasattr(stream, "reconfigure"):  # an encoding may lack a character
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        writer = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        with self._outliving_the_reader():
            self.stream.write(text if writer in DRAWING else printable(text))
        return len(text)

    def flush(self) -> None:
        with self._outliving_the_reader():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @contextlib.contextmanager
    def _outliving_the_reader(self) -> Iterator[None]:
        try:
            yield
        except self._lost as error:
            if isinstance(error, BrokenPipeError):  # or Python would fail again when it flushes at its end
                with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())


@contextlib.contextmanager
def escaped_streams() -> Iterator[None]:
    """Within it, standard output and standard error are `Escaped`; a closed one stays closed."""
    with contextlib.ExitStack() as stack:
        if sys.stdout is not None:
            stack.enter_context(contextlib.redirect_stdout(Escaped(sys.stdout, log=False)))
        if sys.stderr is not None:
            stack.enter_context(contextlib.redirect_stderr(Escaped(sys.stderr, log=True)))
        yield


@contextlib.contextmanager
def flushed_output() -> Iterator[None]:
    """Flush standard output at the end, where a full disk can still be reported."""
    try:
        yield
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()
