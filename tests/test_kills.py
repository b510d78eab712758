"""`slope_cli.benchmarks.kills`: killed commands end as the uninterrupted ones, and another end is noticed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from support.ranks import Ranks

from slope_cli.benchmarks import kills
from slope_cli.distributed import peers


@pytest.mark.slow
def test_killed_commands_end_as_the_uninterrupted_ones(tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    words = ["--work", str(tmp_path / "work"), "--kills", "3", "--jobs", "2", "--seed", "3", "--out", str(out)]
    words += ["--only", "pretrain,data-prepare,linearize"]
    command = [sys.executable, "-P", "-m", "slope_cli.benchmarks.kills", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert [(row["command"], row["ranks"], row["kills"]) for row in result["rows"]] == [
        ("pretrain", 1, 1),
        ("data prepare", 1, 1),
        ("linearize", 1, 1),
    ]
    assert all(row["lost"] == row["unequal"] == [] and row["longest_restart_s"] > 0 for row in result["rows"])
    assert all(row["hangs"] == 0 for row in result["rows"])
    assert result["machine"]["torch"]
    assert not list((tmp_path / "work").glob("*-[0-9]-[0-9]*"))  # the folders of sound ends go


@pytest.mark.slow
def test_five_kills_of_one_of_two_ranks_or_of_both_lose_nothing_and_leave_none_hanging(tmp_path: Path) -> None:
    """At random moments of a run that saves after every second step."""
    (command,) = (command for command in kills.commands(tmp_path) if command.ranks == 2)
    row = kills.measure(command, 5, 1, 7, tmp_path)
    assert (row.kills, row.hangs, row.lost, row.unequal) == (5, 0, [], [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "lost", "unequal"),
    [
        (["data", "prepare", "TEXT"], "", ["train/text.tok"]),
        (["data", "prepare", "missing.txt"], "exit code 2", []),
    ],
)
def test_an_end_that_is_lost_or_unequal_is_noticed_and_kept(
    words: list[str], lost: str, unequal: list[str], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("A short text. " * 50)
    named = [str(tmp_path / "text.txt") if word == "TEXT" else word for word in words]
    command = kills.Command("prepare", named, kills.folder_end)
    life = kills.live(command, kills.Uninterrupted(0.5, 0.1, {}), tmp_path / "out", 1, random.Random(0))
    assert life.lost == lost
    assert set(unequal) <= set(life.unequal)
    assert (tmp_path / "out.log").is_file()


def _dies_before_it_connects(rank: int) -> None:
    if rank == 1:
        peers.connect = lambda *_: os._exit(9)


@pytest.mark.slow
def test_a_rank_killed_between_coming_and_connecting_leaves_none_hanging(tmp_path: Path) -> None:
    ranks = Ranks(
        2, ["pretrain", "gpt2-nano", "--out", str(tmp_path / "run")], tmp_path, prepare_child=_dies_before_it_connects
    )
    assert ranks.finish(50) == [1, 9]
    assert "error: no connection from rank 1 within 20 s" in ranks.printed(0)


def test_what_differs_of_two_ends_is_named(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "both").write_text(text)
        (tmp_path / name / "equal").touch()
    (tmp_path / "a" / "more").touch()
    assert kills.differing(kills.folder_end(tmp_path / "a"), kills.folder_end(tmp_path / "b")) == ["both", "more"]
