"""Losses of a small comparison over the time of a larger model."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from slope_cli.benchmarks import projection, records
from slope_cli.benchmarks.records import CaseResult, StepResults, StepRow
from slope_cli.compare.summary import Comparison
from slope_cli.errors import UsageError
from slope_cli.utils.typed_json import from_json

MINI = Path(__file__).parent.parent / "benchmarks" / "results" / "quality-mini.json"


def comparison(**variants: tuple[str, str, list[float]]) -> Comparison:
    """Variants, each with its method, precision and losses after a half and all of the tokens, of a real file."""
    real: dict[str, Any] = json.loads(MINI.read_text())
    summary, run = (next(row for row in real[key] if row["variant"] == "dense") for key in ("variants", "runs"))
    found: dict[str, Any] = {**real, "variants": [], "runs": [], "rates": []}
    for name, (method, precision, losses) in variants.items():
        curve = {**summary["curve"], "mean": losses}
        loss = {**summary["loss"], "mean": losses[-1]}
        found["variants"].append({**summary, "variant": name, "curve": curve, "loss": loss})
        train = {**run["config"]["train"], "precision": precision}
        found["runs"].append({**run, "variant": name, "config": {**run["config"], "method": method, "train": train}})
    return from_json(Comparison, found)


def timed(*rows: tuple[str, str, float]) -> StepResults:
    """Steps of a whole model, beside a dense one's of 100 ms."""
    made = [
        StepRow(
            case="opt-2.7b",
            depth=32,
            variant=f"{method} {precision}",
            method=method,
            alternated=True,
            precision=precision,
            step_ms=ms,
            dense_ms=100,
        )
        for method, precision, ms in (("dense", "bf16", 100.0), *rows)
    ]
    case = CaseResult(name="opt-2.7b", seq_len=8, tokens=64, depths=(32,), blocks=32, rows=made)
    return StepResults(machine={"gpu": "H200"}, libraries={}, cases=[case])


def test_times_are_the_larger_models_and_losses_the_smaller_ones() -> None:
    losses = comparison(
        dense=("dense", "auto", [4.5, 4.0]),
        sparse=("slope", "bf16", [4.5, 3.9]),
        fp8=("slope", "fp8", [4.5, 4.1]),
        untimed=("dense", "fp8", [4.5, 4.0]),
    )
    found = projection.project(losses, timed(("slope", "bf16", 80), ("slope", "fp8", 50)), "opt-2.7b")
    rows = {row.variant: row for row in found.rows}
    assert [*rows] == ["dense", "sparse", "fp8"]
    assert [(row.time, row.times) for row in found.rows] == [(1, [0.5, 1]), (0.8, [0.4, 0.8]), (0.5, [0.25, 0.5])]
    assert rows["dense"].until == 1
    assert rows["sparse"].until == pytest.approx(0.4 + 0.4 * 5 / 6)  # 4.0 is five sixths of the way from 4.5 to 3.9
    assert rows["fp8"].until is None
    assert found.trained == "a model of 30 million parameters"


def test_a_loss_that_is_reached_at_once_and_a_curve_that_rises_again() -> None:
    assert projection._first([1.0, 2.0, 3.0], [4.0, 5.0, 3.0], 4.0) == 1
    assert projection._first([1.0, 2.0, 3.0], [5.0, 3.0, 4.5], 4.0) == 1.5
    assert projection._first([1.0, 2.0], [5.0, 4.5], 4.0) is None


@pytest.mark.parametrize(
    ("model", "method", "said"),
    [
        ("opt-13b", "dense", "opt-13b: was not timed; there are opt-2.7b"),
        ("opt-2.7b", "slope", "no dense variant in bf16"),
    ],
)
def test_what_cannot_be_projected_is_refused(model: str, method: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        projection.project(comparison(one=(method, "auto", [5.0, 4.0])), timed(), model)


def test_the_command_writes_a_file_and_a_picture(tmp_path: Path) -> None:
    losses = comparison(dense=("dense", "auto", [4.5, 4.0]), sparse=("slope", "auto", [4.6, 4.0]))
    for name, part in (("compare", losses), ("step", timed(("slope", "bf16", 80)))):
        (tmp_path / f"{name}.json").write_text(json.dumps(asdict(part)))
    words = [tmp_path / "compare.json", tmp_path / "step.json", "--model", "opt-2.7b", "--out", tmp_path / "found.json"]
    command = [sys.executable, "-m", "slope_cli.benchmarks.projection", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0.800" in done.stdout
    rows = from_json(records.Projection, json.loads((tmp_path / "found.json").read_text())).rows
    assert [row.variant for row in rows] == ["dense", "sparse"]
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
