"""Measuring programs; each writes a file with hardware and versions in it to benchmarks/results/."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slope_cli.utils.files import atomic_file

RESULTS = Path(__file__).parent / "results"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
