"""Records go to Weights & Biases, offline here: what its own file holds, one run for all starts, rank 0 alone."""

import importlib.metadata
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.data import prepared
from support.ranks import Ranks
from support.runs import RECIPE, SHORT, Result, records, sized, slope

from slope_cli.report import loggers

try:
    importlib.metadata.version("wandb")
    MISSING = False
except importlib.metadata.PackageNotFoundError:
    MISSING = True

installed = pytest.mark.skipif(MISSING, reason="wandb is not installed")
WORDS = (*sized("gpt2-nano"), *SHORT, "log.wandb=true", "log.wandb_project=tests", "log.save_every=3")


def offline(folder: Path) -> dict[str, str]:
    """The environment without a network, and without the user's settings."""
    places = {"WANDB_DIR": folder, "WANDB_CONFIG_DIR": folder / "settings", "WANDB_CACHE_DIR": folder / "cache"}
    return {"WANDB_MODE": "offline", **{name: str(place) for name, place in places.items()}}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in offline(tmp_path).items():
        monkeypatch.setenv(name, value)


def command(run: Path, *more: str) -> list[str]:
    return ["pretrain", str(RECIPE), *WORDS, f"data.path={prepared()}", *more, "--out", str(run)]


def pretrain(run: Path, *more: str) -> Result:
    return slope(*command(run, *more))


def written(folder: Path) -> list[Path]:
    """The files of wandb's starts, the oldest first."""
    return sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def messages(path: Path) -> Iterator[Any]:
    """The records of wandb's file, a LevelDB log: blocks of 32 KiB, whose parts have a head of crc, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def history(path: Path) -> list[dict[str, str]]:
    """What was logged, by name; values as JSON."""
    logged = [message.history for message in messages(path) if message.HasField("history")]
    return [{"/".join(item.nested_key) or item.key: item.value_json for item in each.item} for each in logged]


def test_without_wandb_one_line_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("slope_cli.utils.environment.version", missing)
    result = pretrain(tmp_path / "run")
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: log.wandb=true: wandb is missing; install the extra wandb (docs/start.md#install)\n"
    assert not (tmp_path / "run" / "config.yaml").exists()


@installed
def test_a_run_and_its_later_starts_are_one_run_of_wandb_with_all_numbers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(run, "log.norms_every=3").code == 0
    longer = pretrain(run, "train.steps=8")
    assert longer.code == 0, longer.err
    own = (run / loggers.WANDB_ID).read_text().strip()
    first, second = written(tmp_path)
    assert f"wandb: {second.parent}, which `wandb sync` can send" in longer.err.splitlines()
    assert {path.name for path in (first, second)} == {f"run-{own}.wandb"}
    (described,) = [message.run for message in messages(first) if message.HasField("run")]
    assert (described.run_id, described.project, described.display_name) == (own, "tests", "run")
    settings = {item.key: item.value_json for item in described.config.update}
    assert '"steps": 6' in settings["train"].replace('":6', '": 6')
    rows = [*history(first), *history(second)]
    losses = [(int(row["step"]), float(row["train/loss"])) for row in rows if "train/loss" in row]
    assert losses == [(r["step"], r["loss"]) for r in records(run) if r["kind"] == "train"]
    assert [int(row["step"]) for row in rows if "val/by_source/text" in row] == [6, 8]
    assert [int(row["step"]) for row in rows if "norms/gradient/transformer.h.1.mlp.c_fc" in row] == [3, 6]
    # A finished run is told no more; a new run in its folder is a new run of wandb, too.
    assert pretrain(run, "train.steps=8").code == 0
    assert written(tmp_path) == [first, second]
    assert pretrain(run, "--overwrite").code == 0
    assert (run / loggers.WANDB_ID).read_text().strip() not in ("", own)


@installed
@pytest.mark.slow
def test_a_wandb_that_cannot_start_is_an_error_at_first_and_later_a_warning(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(run).code == 0
    (run / loggers.WANDB_ID).write_text("../evil\n")
    later = pretrain(run, "train.steps=8")
    assert later.code == 0
    assert f"warning: {run / loggers.WANDB_ID}: is not the id of a wandb run; remove" in later.err
    # Without a key of the user, in a process of its own: wandb reads the environment once.
    none = {
        **offline(tmp_path),
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "NETRC": str(tmp_path / "none"),
    }
    ranks = Ranks(1, command(tmp_path / "other"), tmp_path / "logs", variables={**none, "WANDB_API_KEY": ""})
    assert ranks.finish() == [1], ranks.printed()
    last = ranks.printed().splitlines()[-1]
    assert last.startswith("error: log.wandb=true: wandb cannot start (")
    assert last.endswith("); log in with `wandb login`, or set WANDB_MODE=offline or log.wandb=false")


@pytest.mark.slow
@installed
def test_rank_0_alone_tells_wandb(tmp_path: Path) -> None:
    ranks = Ranks(2, command(tmp_path / "run", "train.micro_batch=1"), tmp_path / "logs", variables=offline(tmp_path))
    assert ranks.finish() == [0, 0], ranks.printed()
    (only,) = written(tmp_path)
    steps = [int(row["step"]) for row in history(only) if "train/loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
