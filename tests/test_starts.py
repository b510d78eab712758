"""A requeued job says what its starts achieved, and one whose starts only ever set up is stopped with advice."""

import os
import platform
import shutil
import signal
import threading
from pathlib import Path

import pytest
from support.processes import die_in_save, finish, printed
from support.processes import start as start_process
from support.runs import tiny

from slope_cli.checkpoint import run_folder
from slope_cli.distributed.signals import StopFlag, Stopped
from slope_cli.errors import SlopeError, UsageError
from slope_cli.report import metrics
from slope_cli.train import starts
from slope_cli.train.loop import Trainer, pretrain
from slope_cli.utils import files, jsonl


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


# ------------------------------------------------------------------------------------ that fail before their first step


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder by its path, but for the lock; of folders b""."""
    files_there = (path for path in folder.rglob("*") if path.name != files.LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in files_there}


FAULTS = {
    "no data": ("data.path=nowhere",),
    "another tokenizer": ("model.overrides.vocab_size=100",),
    "too few positions": ("log.sample_prompt=" + "x" * 256,),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_new_run_that_does_not_start_leaves_nothing(fault: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        pretrain(tiny(data, *FAULTS[fault]), tmp_path / "runs" / "new" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "slurm-1.out").write_text("the log of the job")
    for name in ("empty", "logs"):
        with pytest.raises(UsageError):
            pretrain(tiny(data, *FAULTS[fault]), tmp_path / name)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"empty", "logs", "logs/slurm-1.out"}
    assert pretrain(tiny(data, "train.steps=1"), tmp_path / "empty")["step"] == 1


@pytest.mark.parametrize("existing", ["resume", "replace"])
def test_a_run_that_is_there_stays_as_it_was_if_a_start_fails(
    existing: run_folder.Existing, data: Path, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = contents(run)
    longer = "train.steps=20" if existing == "resume" else "optim.lr=0.1"
    with pytest.raises(UsageError, match="sample_prompt"):
        pretrain(tiny(data, longer, *FAULTS["too few positions"]), run, existing=existing)
    assert contents(run) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("existing", ["resume", "replace", None])
def test_what_others_write_while_a_start_fails_stays(
    existing: run_folder.Existing | None, data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command may export a run, or its user take notes, while a start compiles or waits for memory."""
    run = tmp_path / "run"
    if existing:
        shutil.copytree(finished, run)
        (run / "finetune").mkdir()
    before = contents(run)

    def step(_: Trainer) -> object:
        (run / "exported").mkdir()
        (run / "exported" / "model.safetensors").write_text("weights")
        (run / "notes.md").write_text("mine")
        (run / "finetune").mkdir(exist_ok=True)
        raise SlopeError("the machine is too small")

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(SlopeError, match="too small"):
        pretrain(tiny(data, "train.steps=20"), run, existing=existing or "resume")
    others = {"exported": b"", "exported/model.safetensors": b"weights", "notes.md": b"mine", "finetune": b""}
    if existing == "replace":
        others["finetune-1"] = b""
    assert contents(run) == before | others


def test_the_names_of_what_a_run_writes_are_known(data: Path, tmp_path: Path) -> None:
    words = ("data.path=embedded", "train.steps=2", "adapters.start=0.5", "log.plot=true", "log.tensorboard=true")
    pretrain(tiny(data, *words), tmp_path / "run")
    again = ("distill.share=0.5", f"distill.teacher={tmp_path / 'run'}")
    pretrain(tiny(data, *words, *again), tmp_path / "taught")
    names = {path.name for run in ("run", "taught") for path in (tmp_path / run).iterdir()}
    assert {name for name in names if not run_folder.OWN.fullmatch(name)} == set()
    assert names >= {"config.yaml", "base.json", "data", "tensorboard", "loss.png"}


def test_what_fails_in_the_first_step_leaves_nothing_and_in_a_later_one_stays(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = Trainer.train_step

    def failing(at: int) -> None:
        def step(trainer: Trainer) -> object:
            if trainer.step == at:
                raise SlopeError("the machine is too small")
            return train_step(trainer)

        monkeypatch.setattr(Trainer, "train_step", step)
        with pytest.raises(SlopeError, match="too small"):
            pretrain(tiny(data), tmp_path / "run")

    failing(0)
    assert list(tmp_path.iterdir()) == []
    failing(2)
    assert [record["step"] for record in metrics.read(tmp_path / "run") if record["kind"] == "train"] == [1, 2]


def test_a_start_that_waits_for_one_that_fails_makes_the_folder_anew(data: Path, tmp_path: Path) -> None:
    """The lock that it waited for is of a file that is gone: it must not train in a folder that nobody sees."""
    run, ended = tmp_path / "run", threading.Event()
    reached = threading.Event()

    def slow(*_: object) -> None:
        reached.set()
        ended.wait(20)
        raise UsageError("no data")

    def fail() -> None:
        with (
            pytest.raises(UsageError, match="no data"),
            run_folder.claimed(run, tiny(data), "resume", lambda: False),
        ):
            slow()

    first = threading.Thread(target=fail)
    first.start()
    assert reached.wait(20)
    threading.Timer(0.3, ended.set).start()
    with run_folder.claimed(run, tiny(data), "resume", lambda: True):
        first.join()
        assert run_folder.is_run(run)
        assert (run / files.LOCK).read_text() == f"{os.getpid()} {platform.node()}\n"
