"""Render the result files into the marked places of README.md, so that no figure there is typed by hand.

    python -m slope_cli.benchmarks.render

A place is a pair of comments, `<!-- result: cpu -->` and `<!-- end -->`; what is between them is replaced.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slope_cli.benchmarks.machine import RESULTS

README = Path(__file__).parent.parent / "README.md"


def _cpu(result: dict[str, Any]) -> str:
    rows = ["| model | tokens a step | dense step | sparse step | ratio |", "|---|---|---|---|---|"]
    for r in result["steps"]:
        times = f"{r['dense_s'] * 1e3:,.0f} ms | {r['sparse_s'] * 1e3:,.0f} ms"
        rows.append(f"| {r['model']} | {r['tokens']:,} | {times} | {r['ratio']:.2f} |")
    rows += ["", "| checkpoint of | dense | sparse | ratio |", "|---|---|---|---|"]
    rows += [
        f"| {r['model']} | {r['dense_bytes'] / 1e6:,.1f} MB | {r['sparse_bytes'] / 1e6:,.1f} MB | {r['ratio']:.3f} |"
        for r in result["checkpoints"]
    ]
    m = result["machine"]
    return "\n".join([*rows, "", f"{m['processor']}, {m['cores']} cores, torch {m['torch']}, {m['date']}."])


def _demo(result: dict[str, Any]) -> str:
    m = result["machine"]
    where = f"{m['cores']} cores ({m['processor']}, torch {m['torch']})"
    losses = f"{result['loss']:.3f} nats a byte, where a bigram model of the same text has {result['bigram_loss']:.3f}"
    return f"It took {result['seconds']:.0f} s on {where} and ended with a validation loss of {losses}."


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"cpu": _cpu, "demo": _demo}


def render(text: str) -> str:
    """README's text with every marked place filled from its result file."""

    def fill(place: re.Match[str]) -> str:
        name = place.group(1)
        body = TABLES[name](json.loads((RESULTS / f"{name}.json").read_text()))
        return f"<!-- result: {name} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- result: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite README.md; with --check, fail where it is not what the result files say."""
    old = README.read_text()
    new = render(old)
    if "--check" in sys.argv and new != old:
        raise SystemExit("README.md is not what benchmarks/results say: run make render")
    README.write_text(new)


if __name__ == "__main__":
    main()
