"""`slope_cli.benchmarks.recall`: every stage runs, none runs twice, and the document has what was measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.data import write_data

from slope_cli.benchmarks import recall, render
from slope_cli.benchmarks.records import RecallResults, RecallRow


def start(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [
        "--data",
        str(tmp_path / "text" / "data"),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "recall.json"),
    ]
    command = [sys.executable, "-P", "-m", "slope_cli.benchmarks.recall", *words, "--scale", "tiny", *more]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_stages_run_one_by_one_and_none_twice(tmp_path: Path) -> None:
    write_data(tmp_path / "text")
    done = start(tmp_path, "--only", "data,teacher")
    assert done.returncode == 0, done.stderr
    assert "of the questions about 4 pairs" in done.stderr
    done = start(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "slope pretrain" not in done.stderr
    result = json.loads((tmp_path / "recall.json").read_text())
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == ["teacher", "additive", "cache-64", "heads", "window"]
    assert len({row["tokens"] for name, row in rows.items() if name != "teacher"}) == 1
    assert rows["teacher"]["tokens"] == 30 * 512
    assert len(rows["heads"]["kept"]) == 1
    assert all(row["cells"] and row["perplexity"] > 1 for row in rows.values())
    assert {name for name, row in rows.items() if not row["decode"]} == {"window"}
    # A state does not grow, softmax's memory does.
    assert rows["additive"]["remembered"]["128"] == rows["additive"]["remembered"]["256"]
    assert rows["teacher"]["remembered"]["256"] == 2 * rows["teacher"]["remembered"]["128"]
    assert rows["additive"]["remembered"]["128"] < rows["cache-64"]["remembered"]["128"]
    assert (tmp_path / "recall.png").is_file()
    assert result["machine"]["torch"]
    again = start(tmp_path)
    assert (again.returncode, "slope linearize" in again.stderr) == (0, False)
    assert again.stdout == done.stdout


def results() -> RecallResults:
    def cell(pairs: int, first: int, exact: float) -> dict[str, Any]:
        return {
            "task": "mqar",
            "pairs": pairs,
            "first": first,
            "last": 2 * first - 1,
            "n": 4,
            "exact": exact,
            "exact_stderr": 0.25,
        }

    how: dict[str, Any] = {"words": [], "tokens": 2_000_000, "seconds": 1.0, "perplexity": 3.0, "sources": {}}
    rows = [
        RecallRow(
            variant=name, cells=[cell(4, 8, 1.0), cell(4, 16, near), cell(4, 32, far)], remembered={64: 2**20}, **how
        )
        for name, near, far in (("teacher", 1.0, 0.5), ("additive", 0.5, 0.0))
    ]
    sizes: dict[str, Any] = {"parameters": 1_000_000, "layers": 4, "length": 64, "window": 4, "share": 0.2}
    return RecallResults(model="llama", scale="tiny", words=[], rows=rows, **sizes)


def test_recall_is_that_beyond_the_window() -> None:
    """At distances above 8 = 2 · window: a terrace of blocks sees so far."""
    assert recall.by_task(results()).rows == [["teacher", "0.750"], ["additive", "0.250"]]
    assert recall.distances(results()).columns == ["attention", "16-31", "32-63"]
    assert recall.distances(results()).rows[1] == ["additive", "0.500", "0.000"]


def test_a_place_without_a_result_file_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    empty = "<!-- result: recall-small-llama -->\n<!-- end -->"
    assert render.render(empty) == empty
    found = recall.asdict(results()) | {"machine": {"gpu": "a GPU", "torch": "2", "date": "2026-01-01"}}
    (tmp_path / "recall-small-llama.json").write_text(json.dumps(found))
    text = render.render(empty)
    assert "| additive | 3.00 | – | 1.0 MiB |" in text
    assert "a GPU, torch 2" in text
    assert render.render(text) == text
