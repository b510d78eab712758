"""A requeued job says what its starts achieved, and one whose starts only ever set up is stopped with advice."""

import os
import signal
from pathlib import Path

import pytest
from support.processes import die_in_save, finish, printed
from support.processes import start as start_process
from support.runs import tiny

from slope_cli.distributed.signals import StopFlag, Stopped
from slope_cli.errors import SlopeError
from slope_cli.report import metrics
from slope_cli.train import starts
from slope_cli.train.loop import pretrain
from slope_cli.utils import jsonl


def requeued(monkeypatch: pytest.MonkeyPatch, restarts: int, job: str = "77") -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))


def test_a_job_whose_starts_make_no_step_is_stopped_and_another_job_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = tiny(data, "train.steps=9"), tmp_path / "run"

    def start(restarts: int, job: str = "77") -> None:
        requeued(monkeypatch, restarts, job)
        with StopFlag() as stop:
            stop.name = "SIGUSR2"
            pretrain(config, run, stop=stop)

    for restarts in range(3):
        with pytest.raises(Stopped):
            start(restarts)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("restart")]
        done = "; ".join(["0 steps in 0:00:"] * restarts)
        assert len(said) == bool(restarts)
        assert said == [] or said[0].startswith(f"restart {restarts} of SLURM job 77; its last starts: {done[:15]}")
    with pytest.raises(SlopeError, match="less than 10% of its time in steps; submit the job again") as caught:
        start(3)
    assert caught.value.exit_code == 1
    with pytest.raises(Stopped):
        start(0, "78")
    assert not (run / metrics.JSONL).exists()


def test_without_a_batch_system_a_run_may_stop_as_often_as_one_likes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(5):
        stop = StopFlag()
        stop.name = "SIGINT"
        with pytest.raises(Stopped):
            pretrain(tiny(data, "train.steps=9"), tmp_path / "run", stop=stop)


@pytest.mark.parametrize("shares", [(0.5, 0.0, 0.0), (0.0, 0.0), (0.0, 0.0, 0.2)])
def test_a_start_that_worked_or_too_few_starts_stop_nothing(
    shares: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requeued(monkeypatch, len(shares))
    for share in shares:
        record = {"slurm_job": "77", "steps": 2, "seconds": 100.0, "seconds_in_steps": 100 * share}
        jsonl.append(tmp_path / starts.STARTS, record)
    with (tmp_path / starts.STARTS).open("a") as file:
        file.write('{"slurm_job": "77", "st')  # cut by a full disk
    with starts.recorded(tmp_path) as start:
        start.step(1.0)
        start.step(2.0)
    last = jsonl.read(tmp_path / starts.STARTS)[-1]
    assert (last["steps"], last["seconds_in_steps"], last["slurm_restarts"]) == (2, 2.0, len(shares))


def test_the_records_do_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requeued(monkeypatch, 5)
    (tmp_path / starts.STARTS).write_text('[1]\n{"slurm_job": "77"}\nnot JSON\n')
    with starts.recorded(tmp_path):
        pass


def requeue_and_die(restarts: int, step: int) -> None:
    """In a process of its own: it is killed when it saves the step."""
    os.environ.update(SLURM_JOB_ID="77", SLURM_RESTART_COUNT=str(restarts))
    die_in_save(step, 1)


@pytest.mark.slow
def test_a_job_that_is_killed_at_each_start_is_stopped(data: Path, tmp_path: Path) -> None:
    config, run = tiny(data), tmp_path / "run"
    for restarts in range(4):  # the first one saves step 4, the others nothing
        assert finish(start_process(config, run, requeue_and_die, restarts, 8)) == -signal.SIGKILL
    assert finish(start_process(config, run, requeue_and_die, 4, 8)) == 1
    said = [line for line in printed(run).splitlines() if line.startswith("restart")]
    assert said[0] == "restart 1 of SLURM job 77; its last starts: was killed, 4 steps saved"
    assert said[-1].endswith("; ".join(["was killed, 0 steps saved"] * 3))
    assert "was killed before it saved a step, or spent" in printed(run)


@pytest.mark.parametrize(
    ("steps", "now", "stopped"),
    [((0, 0, 0), 0, True), ((0, 0, 0), 4, False), ((0, 4, 4), 4, False), ((4, 4, 4), 4, True)],
)
def test_killed_starts_count_as_no_progress_if_the_next_one_begins_at_the_same_step(
    steps: tuple[int, ...], now: int, stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requeued(monkeypatch, len(steps))
    (tmp_path / f"checkpoints/step-{now:08d}").mkdir(parents=True)
    for step in steps:
        jsonl.append(tmp_path / starts.STARTS, {"slurm_job": "77", "slurm_restarts": 0, starts.BEGINS: step})
    if stopped:
        with pytest.raises(SlopeError, match="was killed before it saved a step"), starts.recorded(tmp_path):
            pass
    else:
        with starts.recorded(tmp_path):
            pass
    assert len(jsonl.read(tmp_path / starts.STARTS)) == 3 + 2 * (not stopped)


def test_an_earlier_versions_starts_and_a_killed_one_count_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requeued(monkeypatch, 3)
    job, set_up = {"slurm_job": "77", "slurm_restarts": 0}, {"steps": 1, "seconds": 60.0, "seconds_in_steps": 0.0}
    for record in (job | set_up, job | set_up, job | {starts.BEGINS: 0}):
        jsonl.append(tmp_path / starts.STARTS, record)
    with pytest.raises(SlopeError), starts.recorded(tmp_path):
        pass
    done = "1 step in 0:01:00, 0% of it in steps"
    assert capsys.readouterr().err.strip().endswith(f"its last starts: {done}; {done}; was killed, 0 steps saved")
