"""Speed and time: tokens are rate times time, what is left is what the speed says, and no second is lost."""

import itertools
import os
import re
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.data import prepared
from support.runs import copied, tiny, trained
from torch import Tensor

from slope_cli.checkpoint import run_folder
from slope_cli.data.dataset import open_dataset
from slope_cli.report import metrics
from slope_cli.report.timing import PARTS, Cores, Speed, Times, crowded, time_shares
from slope_cli.train.loop import pretrain
from slope_cli.train.step import Step
from slope_cli.train.summary import report_lines, summarize


def test_threads_that_get_too_few_cores_on_a_busy_machine_are_named() -> None:
    busy = (os.cpu_count() or 1) + 1.0
    assert "torch's 8 threads had 2.0 cores on average" in crowded(8, 2.0, busy)
    assert "OMP_NUM_THREADS=1" in crowded(8, 2.0, busy)
    assert crowded(8, 7.0, busy) == ""  # they get what they need
    assert crowded(8, 2.0, 0.5) == ""  # a small model leaves cores idle


def test_a_crowded_process_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slope_cli.report.timing.CROWDED_AFTER", 0.2)
    monkeypatch.setattr(os, "getloadavg", lambda: (1e6, 0.0, 0.0))
    cores, alone = Cores(4), Cores(1)
    assert cores.warning() == ""  # too early to tell
    time.sleep(0.25)
    assert cores.warning().startswith("torch's 4 threads had 0.")
    assert cores.warning() == ""
    assert alone.warning() == ""


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.booleans()), min_size=1), st.integers(0, 10**6))
def test_the_tokens_left_are_the_speed_times_the_time_left(steps: list[tuple[float, bool]], left: int) -> None:
    speed = Speed()
    for seconds, first in steps:
        speed.add(4096, seconds, first=first)
    assert speed.tokens_per_s * speed.seconds_for(left) == pytest.approx(4096 * left)
    taken = [seconds for seconds, _ in steps]
    assert 4096 / max(taken) * 0.999 <= speed.tokens_per_s <= 4096 / min(taken) * 1.001


def test_a_speed_is_smooth_and_follows_a_lasting_change() -> None:
    speed = Speed()
    for _ in range(100):
        speed.add(100, 1.0)
    speed.add(100, 2.0)  # one slow step
    assert 94 < speed.tokens_per_s < 96
    for _ in range(100):
        speed.add(100, 2.0)
    assert speed.tokens_per_s == pytest.approx(50, rel=0.01)


def test_a_new_phase_has_the_old_speed_until_its_second_step() -> None:
    speed = Speed()
    speed.add(100, 60.0, first=True)  # compiles: nothing better is known
    assert speed.seconds_for(10) == pytest.approx(600)
    speed.add(100, 1.0)
    speed.add(100, 1.0)
    assert (speed.tokens_per_s, speed.seconds_for(10)) == pytest.approx((100, 10))
    speed.add(100, 60.0, first=True)
    assert (speed.tokens_per_s, speed.seconds_for(10)) == pytest.approx((100, 10))
    speed.add(100, 4.0)
    assert (speed.tokens_per_s, speed.seconds_for(10)) == pytest.approx((25, 40))


def test_every_second_is_credited_to_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100.0, 0.5)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    times, records = Times(), []
    for part in (*PARTS, "steps"):
        times.credit(part)
        if part == "sampling":
            records.append({"kind": "time", **times.record()})
    records.append({"kind": "time", **times.record()})
    assert sum(record["seconds"] for record in records) == pytest.approx(6 * 0.5)
    shares = time_shares([{"kind": "train", "step": 1}, *records])
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["steps"] == pytest.approx(2 / 6)
    assert time_shares([{"kind": "train", "step": 1}]) == {}


def test_progress_records_and_summary_of_a_run_agree(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backward = Step.backward

    def slow(self: Step, *args: Any) -> Tensor:
        time.sleep(0.02)
        return backward(self, *args)

    monkeypatch.setattr(Step, "backward", slow)
    run, began = tmp_path / "run", time.monotonic()
    summary = pretrain(tiny(data, "log.every=1", "train.steps=20", "log.save_every=12", "log.sample_every=10"), run)
    took = time.monotonic() - began
    pattern = r"step (\d+)/20 .* ([\d,]+) tok/s  eta (\d+):(\d\d):(\d\d)$"
    lines = re.findall(pattern, capsys.readouterr().err, flags=re.MULTILINE)
    first_of_a_phase = {1, 11}  # these lines come before the speed is known
    assert [int(step) for step, *_ in lines] == [step for step in range(1, 21) if step not in first_of_a_phase]
    rates = [int(rate.replace(",", "")) for _, rate, *_ in lines]
    for (step, _, hours, minutes, seconds), rate in zip(lines, rates, strict=True):
        eta = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
        assert eta * rate == pytest.approx(128 * (20 - int(step)), abs=0.51 * rate)  # it is in whole seconds
    logged = [record["tokens_per_s"] for record in metrics.read(run) if record["kind"] == "train"]
    assert max(logged) < 3200  # two micro-batches of 64 tokens take 0.04 s at least
    assert min(logged) - 1 <= rates[-1] <= max(logged) + 1
    times = [record for record in metrics.read(run) if record["kind"] == "time"]
    assert [record["step"] for record in times] == [12, 20]
    assert 20 * 0.04 < sum(record["seconds"] for record in times) < took
    saved_before = time_shares(times)
    assert summary["time"]["saving"] > saved_before["saving"]  # it has the last checkpoint, too
    assert all(summary["time"][part] <= saved_before[part] for part in PARTS if part != "saving")
    assert sum(summary["time"].values()) == pytest.approx(1)
    assert summary["time"]["steps"] * took > 18 * 0.04
    assert min(summary["time"].values()) > 0  # the run had all parts
    assert summary["tokens_per_s"] == median(logged[2:])


def test_a_summary_of_a_run_of_an_earlier_version_lacks_what_it_did_not_note(tmp_path: Path) -> None:
    run = copied(trained(), tmp_path)
    config, dataset = run_folder.open_config(run), open_dataset(prepared())
    assert any(line.startswith("time: start ") for line in report_lines(summarize(run, config, dataset), run))
    lines = (run / metrics.JSONL).read_bytes().splitlines(keepends=True)
    (run / metrics.JSONL).write_bytes(b"".join(line for line in lines if b'"kind": "time"' not in line))
    assert not any(line.startswith("time: ") for line in report_lines(summarize(run, config, dataset), run))
