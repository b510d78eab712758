"""The log of a run: what a kill leaves of it, what a resumed run drops, and a disk that takes no more."""

import io
import json
import sys
from pathlib import Path

import pytest
from support.processes import full_disk

from slope_cli.errors import SlopeError
from slope_cli.report import metrics
from slope_cli.report.metrics import MetricsLog
from slope_cli.report.progress import Progress

TRAIN = {"loss": 1.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1234.0}


def write(run: Path, *steps: int, start: int = 0) -> None:
    log = MetricsLog(run, start, tensorboard=False)
    for step in steps:
        log.write("train", step, loss=step / 3)
    log.sync()
    log.close()


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    assert metrics.read(tmp_path) == [{"kind": "train", "step": step, "loss": step / 3} for step in (1, 2)]


def test_a_record_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False)
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
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in range(4):  # 45 bytes each
        log.write("train", step, loss=1.0)
    full = pytest.raises(SlopeError, match=r"metrics\.jsonl: cannot be written, the disk \(or quota\) is full")
    with full_disk(200):
        with full:
            log.write("train", 4, loss=1.0)
        log.close()
    assert [record["step"] for record in metrics.read(tmp_path)] == [0, 1, 2, 3]


def test_a_log_that_cannot_be_opened_is_an_error_of_ours_or_the_systems(tmp_path: Path) -> None:
    (tmp_path / metrics.JSONL).mkdir()
    with pytest.raises(OSError, match=metrics.JSONL):
        MetricsLog(tmp_path, 0, tensorboard=False)


def test_tensorboard_has_the_same_numbers_and_forgets_what_is_done_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    for step in (1, 2, 3, 4):
        log.write("train", step, loss=float(step))
    log.write("sample", 4, text="some words")
    log.close()
    log = MetricsLog(tmp_path, 2, tensorboard=True)
    log.write("train", 3, loss=30.0)
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert events.Tags()["tensors"] == ["sample/text/text_summary"]


def test_in_a_file_a_line_comes_every_few_steps_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5, every=2)
    for step in range(1, 6):
        progress.step({"step": step, **TRAIN})
    progress.say("step 5: [bold] as it is")
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[1] for line in err.splitlines()] == ["2/5", "4/5", "5/5", "5:"]
    assert err.splitlines()[0].startswith("step 2/5  loss 1.5000  lr 1.00e-03  grad 0.50  1,234 tok/s  eta 0:00:")
    assert err.splitlines()[-1] == "step 5: [bold] as it is"


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress(3, done=1, every=1)
    progress.step({"step": 2, **TRAIN})
    progress.say("a line with [brackets]")
    progress.step({"step": 3, **TRAIN})
    progress.close()
    assert "a line with [brackets]" in screen.getvalue()
    assert "3/3" in screen.getvalue()
    assert "loss 1.5000" in screen.getvalue()


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
    assert json.loads((tmp_path / metrics.JSONL).read_text()) == {"kind": "train", "step": 1, "loss": 1 / 3}
