"""The log of a run: what a kill leaves of it, what a resumed run drops, and a disk that takes no more."""

import io
import json
import re
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.processes import full_disk
from support.runs import copied, slope, trained

from slope_cli.errors import SlopeError
from slope_cli.report import metrics
from slope_cli.report.loggers import TensorBoard
from slope_cli.report.metrics import MetricsLog
from slope_cli.report.progress import Progress
from slope_cli.report.timing import Speed
from slope_cli.utils import jsonl

TRAIN = {"loss": 1.5, "lr": 1e-3, "grad_norm": 0.5}


def speed(tokens_per_s: int = 1234, seconds: float = 1.0) -> Speed:
    found = Speed()
    found.add(round(tokens_per_s * seconds), seconds)
    return found


def write(run: Path, *steps: int, start: int = 0) -> None:
    log = MetricsLog(run, start)
    for step in steps:
        log.write("train", step, loss=step / 3)
    log.sync()
    log.close()


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    assert metrics.read(tmp_path) == [{"kind": "train", "step": step, "loss": step / 3} for step in (1, 2)]


def test_a_record_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    assert log.write("val", 1, loss=2.0) == metrics.read(tmp_path)[0]
    log.close()


def test_a_resumed_log_drops_later_records_and_a_line_cut_short(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4)
    with (tmp_path / metrics.JSONL).open("a") as file:
        file.write('{"kind": "train", "st')
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 3, 4]
    write(tmp_path, 3, 4, 5, start=2)
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    path = tmp_path / metrics.JSONL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"nonsense\n" + lines[2])
    with pytest.raises(SlopeError, match=r"metrics\.jsonl:2 is damaged"):
        metrics.read(tmp_path)


def test_a_folder_without_a_log_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(SlopeError, match="not the folder of a run"):
        metrics.read(tmp_path)


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 5):  # 67 bytes each
        log.write("train", step, loss=1.0)
    full = pytest.raises(SlopeError, match=r"metrics\.jsonl: cannot be written, the disk \(or quota\) is full")
    with full_disk(300):
        with full:
            log.write("train", 5, loss=1.0)
        log.close()
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / metrics.JSONL).read_bytes().endswith(b"\n")  # nothing of the line is left


def test_a_log_that_cannot_be_opened_is_an_error_of_ours_or_the_systems(tmp_path: Path) -> None:
    (tmp_path / metrics.JSONL).mkdir()
    with pytest.raises(OSError, match=metrics.JSONL):
        MetricsLog(tmp_path, 0)


def test_tensorboard_has_the_same_numbers_and_forgets_what_is_done_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path, 0, mirrors=[TensorBoard(tmp_path, 0)])
    for step in (1, 2, 3, 4):
        log.write("train", step, loss=float(step))
    log.write("sample", 4, text="some words")
    log.write("val", 4, loss=4.0, by_source={"a/b": 1.0, "c": {"d": 2}})
    log.close()
    time.sleep(1 - time.time() % 1)  # files are read in the order of their names, which hold the second they began in
    log = MetricsLog(tmp_path, 2, mirrors=[TensorBoard(tmp_path, 2)])
    log.write("train", 3, loss=30.0)
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert events.Tags()["tensors"] == ["sample/text/text_summary"]
    assert {tag for tag in events.Tags()["scalars"] if "val" in tag} == {
        "val/loss",
        "val/by_source/a/b",
        "val/by_source/c/d",
    }


class Failing:
    """A logger whose library fails at the second record."""

    place = "elsewhere"

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.closed = False

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self.kinds.append(kind)
        if len(self.kinds) == 2:
            raise ConnectionError("the service is gone")

    def close(self) -> None:
        self.closed = True


def test_a_logger_that_fails_ends_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound, failing = TensorBoard(tmp_path, 0), Failing()
    log = MetricsLog(tmp_path, 0, mirrors=[failing, sound])
    for step in (1, 2, 3):
        log.write("train", step, loss=1.0)
    log.close()
    assert capsys.readouterr().err == "warning: elsewhere ends at step 2: the service is gone\n"
    assert (failing.kinds, failing.closed) == (["train", "train"], False)
    assert len(metrics.read(tmp_path)) == 3


def test_in_a_file_a_line_comes_every_few_steps_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5, every=2)
    for step in range(1, 6):
        progress.step({"step": step, **TRAIN}, speed())
    progress.say("step 5: [bold] as it is")
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[1] for line in err.splitlines()] == ["2/5", "4/5", "5/5", "5:"]
    assert err.splitlines()[0] == "step 2/5  loss 1.5000  lr 1.00e-03  grad 0.50  recent 1,234 tok/s  eta 0:00:03"
    assert err.splitlines()[-1] == "step 5: [bold] as it is"


def terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> io.StringIO:
    """What a terminal of so many columns gets, which standard error now is."""
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    return screen


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, 140)
    progress = Progress(4, done=1, every=1)
    progress.step({"step": 3, **TRAIN}, speed())
    progress.say("a line with [brackets]")
    progress.step({"step": 3, **TRAIN}, speed(seconds=75), {"mfu_dense_equivalent": 0.5, "mfu_real": 0.25})
    progress.close()
    assert "a line with [brackets]" in screen.getvalue()
    assert "3/4" in screen.getvalue()
    assert "loss 1.5000" in screen.getvalue()
    assert "eta 0:01:15" in screen.getvalue()
    assert "MFU 50.0% dense-equivalent, 25.0% real" in screen.getvalue()


def test_a_bar_is_drawn_a_few_times_a_second_and_only_when_a_step_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, 100)
    progress = Progress(1000, every=400)
    for step in range(1, 501):
        progress.step({"step": step, **TRAIN}, speed())
    drawn = len(screen.getvalue())
    time.sleep(0.3)  # a long step: nothing has changed
    assert len(screen.getvalue()) == drawn
    progress.close()
    lines = screen.getvalue().splitlines()
    assert any("step 400/1000  loss 1.5000" in line and line.endswith("tok/s  eta 0:10:00") for line in lines)
    assert screen.getvalue().count("eta ") < 12  # 500 steps in much less than a second
    assert "eta 0:08:20  step 500/1000" in screen.getvalue()


def test_a_bar_takes_the_width_that_the_text_leaves_and_the_time_left_is_cut_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bars = {}
    for width in (50, 100, 160):
        screen = terminal(monkeypatch, width)
        progress = Progress(4)
        progress.step({"step": 3, **TRAIN}, speed())
        progress.close()
        shown = screen.getvalue()
        assert "eta 0:00:01  step 3/4  loss 1.5000" in shown
        last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).strip().split("\r")[-1].strip("\n")
        assert len(last) <= width
        bars[width] = last.count("━") + last.count("╸") + last.count("╺")
    assert bars[50] == 0
    assert bars[160] == bars[100] + 60 > 60


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, ["0 rows", "1 rows", "2 rows"]), (3600.0, ["0 rows"])])
def test_without_a_number_of_steps_lines_are_seconds_apart(
    capsys: pytest.CaptureFixture[str], seconds: float, shown: list[str]
) -> None:
    progress = Progress(0, seconds=seconds)
    for done in range(3):
        progress.update(done, f"{done} rows")
    progress.close()
    assert capsys.readouterr().err.splitlines() == shown  # without the time left, as the total is unknown


def test_a_quiet_progress_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(2, every=1, quiet=True)
    progress.update(1, "half")
    progress.say("a line")
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_records_are_plain_json(tmp_path: Path) -> None:
    write(tmp_path, 1)
    record = json.loads((tmp_path / metrics.JSONL).read_text())
    checksum = int(record.pop("crc32"), 16)
    assert record == {"kind": "train", "step": 1, "loss": 1 / 3}
    assert checksum == zlib.crc32(json.dumps(record)[:-1].encode())  # of the line before the key


DAMAGED = [
    b'{"kind": "train", "stfp": 1, "loss": 1.5}\n',
    b'{"kind": "train", "step": 1, "lo3s": 1.5}\n',
    b'{"kind": "train", "step": "1", "loss": 1.5}\n',
    b'{"kind": "train", "step": 0, "loss": 1.5}\n',
    b'{"kind": "train", "step": 1, "loss": null}\n',
    b'{"kint": "train", "step": 1, "loss": 1.5}\n',
    b'{"kind": "sample", "step": 1, "text": 5}\n',
    b"[1]\n",
    b"1\n",
    b"\xff\n",
    b"[" * 100_000 + b"\n",
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_record_without_what_its_kind_needs_is_damaged_in_logs_without_checksums_too(
    line: bytes, tmp_path: Path
) -> None:
    good = b'{"kind": "train", "step": 1, "loss": 1.5}\n'
    (tmp_path / metrics.JSONL).write_bytes(good + line + good)
    with pytest.raises(SlopeError, match=r"metrics\.jsonl:2 is damaged"):
        metrics.read(tmp_path)


def test_a_log_of_an_earlier_version_is_read_and_continued_with_checksums(tmp_path: Path) -> None:
    path, old = tmp_path / metrics.JSONL, b'{"kind": "train", "step": 1, "loss": 1.5}\n'
    path.write_bytes(old)
    write(tmp_path, 2, start=1)
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2]
    path.write_bytes(path.read_bytes() + old)  # no such line can follow one with a checksum
    with pytest.raises(SlopeError, match=r"metrics\.jsonl:3 is damaged"):
        metrics.read(tmp_path)


def test_a_damaged_log_is_kept_beside_its_sound_lines_when_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 1, 2, 3, 4)
    path = tmp_path / metrics.JSONL
    damaged = path.read_bytes().replace(b'"step": 2', b'"step": 3')
    path.write_bytes(damaged)
    write(tmp_path, 4, start=3)
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 3, 4]
    assert (tmp_path / "damaged-0-metrics.jsonl").read_bytes() == damaged
    said = "is not what it was when step 3 was saved: 1 of its lines are damaged, no record is left of steps 2"
    assert capsys.readouterr().err == f"warning: {path}: {said}\n"


@pytest.mark.parametrize("whole", [b"", b'{"a": 1}\n', jsonl.encode({"text": "x" * 100_000})])
def test_what_a_full_disk_cut_short_does_not_break_later_lines(tmp_path: Path, whole: bytes) -> None:
    """The end of the file is no line: it is removed before the next is added."""
    path = tmp_path / "starts.jsonl"
    path.write_bytes(whole + jsonl.encode({"text": "y" * 100_000})[:-5])
    before = jsonl.read(path)
    jsonl.append(path, {"b": 2})
    assert jsonl.read(path) == [*before, {"b": 2}]
    with full_disk(path.stat().st_size + 9), pytest.raises(SlopeError, match=r"starts\.jsonl: cannot be written"):
        jsonl.append(path, {"c": 3})
    assert jsonl.read(path) == [*before, {"b": 2}]


@pytest.mark.parametrize(
    ("kind", "key"), [("train", "tokens"), ("train", "tokens_per_s"), ("val", "perplexity"), ("val", "by_source")]
)
def test_a_key_that_is_damaged_in_a_log_without_checksums_is_one_line(kind: str, key: str, tmp_path: Path) -> None:
    """Where it is needed, by a plot or a comparison."""
    run = copied(trained(), tmp_path)
    lines = [json.dumps(record) for record in metrics.read(run)]
    at = max(number for number, line in enumerate(lines) if f'"kind": "{kind}"' in line)
    lines[at] = lines[at].replace(f'"{key}"', f'"{key[:-1]}"')
    (run / metrics.JSONL).write_text("\n".join([*lines, ""]))
    results = [slope("plot", run, "--out", tmp_path / "plot"), slope("compare", "--runs", run, trained())]
    assert [result.err for result in results if "Traceback" in result.err] == []
    assert any(f"the {kind} record of step 6 has no {key}" in result.err for result in results)


@pytest.mark.parametrize(
    ("line", "sound"), [(b' {"kind": "x"}\r\n', True), (b'{"kind": "x"} 1\n', False), (b'{"kind": "x"}{}\n', False)]
)
def test_a_line_of_an_earlier_version_is_one_record_and_spaces(line: bytes, sound: bool, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(line)
    if sound:
        assert jsonl.read(tmp_path / "log.jsonl") == [{"kind": "x"}]
    else:
        with pytest.raises(SlopeError, match=r"log\.jsonl:1 is damaged"):
            jsonl.read(tmp_path / "log.jsonl")
