"""The measuring of scaling, on this machine's processor: what it runs, what it keeps, and what it draws."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.data import prepared

from slope_cli.benchmarks import scaling
from slope_cli.utils.typed_json import from_json

MODEL = ("model.overrides.n_layer=1", "model.dropout=0", "adapters.rank=0", "train.device=cpu")
SIZES = ("train.seq_len=32", "train.micro_batch=2", "train.tokens_per_step=128")


def measured(tmp_path: Path, *options: str, words: tuple[str, ...] = SIZES) -> tuple[str, list[dict[str, Any]]]:
    """What the program prints, and the rows of its file."""
    given = ["--data", str(prepared("bytes")), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    command = [sys.executable, "-P", "-m", "slope_cli.benchmarks.scaling", *given, "--models", "gpt2-nano", *options]
    done = subprocess.run([*command, *MODEL, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tmp_path / "out.json").read_text())["rows"]


@pytest.mark.slow
def test_rows_are_measured_once_and_the_next_ones_built_meanwhile(tmp_path: Path) -> None:
    layouts = "--layouts", "ddp;fsdp, gather=block"
    printed, rows = measured(tmp_path, "--gpus", "1,2", "--methods", "slope", *layouts, "--ahead")
    assert [(row["layout"], row["gpus"], row["error"]) for row in rows] == [
        *(("ddp", 1, ""), ("ddp", 2, ""), ("fsdp, gather=block", 2, ""))
    ]
    assert all(row["tokens_per_s"] > 0 and row["loss"] > 0 for row in rows)
    assert [row["state"] for row in rows] == pytest.approx([row["state_said"] for row in rows], rel=0.03)
    assert (tmp_path / "out.png").stat().st_size > 0
    assert printed.count("| gpt2-nano |") == 3
    again, as_before = measured(tmp_path, "--gpus", "1,2", "--methods", "slope", *layouts)
    assert as_before == rows
    assert "ScalingRow" not in again


@pytest.mark.slow
def test_a_row_that_fails_says_which_rank_and_why(tmp_path: Path) -> None:
    words = (*SIZES[:2], "train.tokens_per_step=160")
    _, (row,) = measured(tmp_path, "--gpus", "2", "--methods", "dense", "--layouts", "ddp", words=words)
    assert row["tokens_per_s"] is None
    assert row["error"].startswith("rank 0 ended with 1: ")
    assert "train.tokens_per_step=320" in row["error"]


def test_ratios_are_those_of_a_gpu_and_of_the_same_layout() -> None:
    rows = [
        scaling.ScalingRow(model="m", method=method, layout="ddp", gpus=gpus, tokens_per_s=speed)
        for method, gpus, speed in (("slope", 1, 120.0), ("dense", 1, 100.0), ("slope", 2, 228.0), ("dense", 2, 180.0))
    ]
    results = scaling.ScalingResults(words=[], rows=rows)
    assert [scaling.of_one_gpu(results, row) for row in rows] == pytest.approx([1, 1, 0.95, 0.9])
    assert [scaling.over_dense(results, row) for row in rows] == pytest.approx([1.2, 1, 228 / 180, 1])
    assert from_json(scaling.ScalingResults, json.loads(json.dumps(asdict(results)))) == results
