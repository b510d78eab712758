"""Warnings: said on standard error, and of a run kept in its folder, where they outlive the terminal.

RUN/warnings.jsonl   each distinct warning of all starts of the run, with the time at which it first came
"""

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slope_cli.errors import SlopeError
from slope_cli.utils import jsonl

WARNINGS = "warnings.jsonl"
OWN = ("slope_cli", "sparse_kernels")
"""The packages whose Python warnings are said and kept as this program's; those of other libraries stay as they are."""
_keepers: list[Callable[[str], None]] = []


def warn(text: str, say: Callable[[str], None] | None = None) -> None:
    """Say a warning of one line, and keep it with the run that this process trains.

    Args:
        say: shows a line; by default it goes to standard error.
    """
    line = f"warning: {text}"
    if say is None:
        print(line, file=sys.stderr)
    else:
        say(line)
    for keep in _keepers:
        keep(text)


@contextlib.contextmanager
def kept(run: Path) -> Iterator[None]:
    """Keep what is warned of meanwhile in the folder of a run, with its paths as seen from there.

    What cannot be kept is said all the same: a warning must not end a run.
    """
    known = set(recorded(run))

    def keep(text: str) -> None:
        text = text.replace(f"{run}/", "")
        if text not in known:
            known.add(text)
            with contextlib.suppress(SlopeError):
                jsonl.append(run / WARNINGS, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "warning": text})

    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *where: Any, **more: Any) -> None:
        folders = (Path(sys.modules[name].__file__ or "").parent for name in OWN if name in sys.modules)
        if any(Path(filename).is_relative_to(folder) for folder in folders):
            warn(str(message))
        else:
            shown(message, category, filename, *where, **more)

    _keepers.append(keep)
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
        _keepers.remove(keep)


def recorded(run: Path) -> list[str]:
    """The warnings of a run so far; what is damaged, which `slope check` names, is left out."""
    path, found = run / WARNINGS, list[str]()
    with contextlib.suppress(SlopeError):
        for record, _ in jsonl.lines(path) if path.is_file() else ():
            if record and isinstance(text := record.get("warning"), str):
                found.append(text)
    return found
