"""Python processes that import what this one does, and nothing from the working folder."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def python(code: str, arguments: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The command of a process that runs `code` after this installation's path is set, and its environment.

    The working folder of a run is anybody's: a json.py there must not be imported. It comes into a path by -c and -m,
    which -P turns off, and by an empty, relative or equal entry of PYTHONPATH.
    """
    here, own = os.path.realpath("."), str(Path(__file__).parents[1])
    path = [entry for entry in sys.path if os.path.isabs(entry) and os.path.realpath(entry) != here]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in inherited if entry in path)}
    # At the end, in case this installation is the working folder.
    path += [own] if own not in path else []
    return [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {path!r}; {code}", *arguments], environment
