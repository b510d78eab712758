"""A run that was killed or stopped, at whatever moment, and started again is the uninterrupted run, bit for bit."""

import errno
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.processes import die_in_save, finish, printed, start
from support.runs import assert_same_run, records, tiny

from slope_cli.checkpoint import store
from slope_cli.distributed.signals import Stopped
from slope_cli.errors import UsageError
from slope_cli.report import metrics
from slope_cli.train.loop import Trainer, pretrain
from slope_cli.train.step import StepOutput
from slope_cli.utils import files


def wait_for_steps(run: Path, count: int) -> None:
    """Wait until the log of a run has so many training steps."""
    for _ in range(6000):
        log = run / metrics.JSONL
        if log.is_file() and log.read_bytes().count(b'"kind": "train"') >= count:
            return
        time.sleep(0.01)
    pytest.fail("the run does not get on")


def stop_after(step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """In this process: the signal comes in the middle of a step (from 1)."""
    train_step = Trainer.train_step

    def signalled(t: Trainer) -> tuple[StepOutput, float]:
        if t.step + 1 == step:
            os.kill(os.getpid(), number)
        return train_step(t)

    Trainer.train_step = signalled  # type: ignore[method-assign]


def slow_steps(seconds: float) -> None:
    """In this process: a step takes so much longer."""
    train_step = Trainer.train_step

    def slow(t: Trainer) -> tuple[StepOutput, float]:
        time.sleep(seconds)
        return train_step(t)

    Trainer.train_step = slow  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------------- killed


@pytest.mark.slow
def test_killed_at_random_moments(data: Path, finished: Path, tmp_path: Path) -> None:
    """With saves after every step, so that many kills fall into one."""
    run, config = tmp_path / "run", tiny(data, "log.save_every=1")
    moments = random.Random(5)
    kills = 0
    while kills < 10:
        child = start(config, run, slow_steps, 0.1)
        if not store.folders(run):
            wait_for_steps(run, 1)
        child.join(0.2 + moments.random() * 0.3)
        if child.exitcode is not None:
            break
        child.kill()
        assert finish(child) == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    pretrain(config, run)
    assert_same_run(config, run, finished)


@pytest.mark.slow
def test_killed_at_every_operation_of_a_save(data: Path, finished: Path, tmp_path: Path) -> None:
    """Before each write to the disk, each rename, and each removal, while step 12 is saved and step 4 is dropped."""
    config = tiny(data)
    before = tmp_path / "before"
    assert finish(start(config, before, die_in_save, 12, 1)) == -signal.SIGKILL
    states = set()
    for operation in range(2, 100):
        run = tmp_path / f"run{operation}"
        shutil.copytree(before, run)
        if finish(start(config, run, die_in_save, 12, operation)) == 0:
            break
        found = store.latest(run)
        assert found is not None
        assert found[2] == []
        assert found[1]["step"] in (8, 12)
        states.add((found[1]["step"], tuple(sorted(p.name for p in (run / "checkpoints").iterdir()))))
        pretrain(config, run)
        assert_same_run(config, run, finished)
        assert [f.name for f in (run / "checkpoints").iterdir() if f.name.startswith(".")] == []
    assert operation >= 9
    assert len(states) >= 3, states  # unfinished, finished beside both old ones, and in the middle of a removal


@pytest.mark.parametrize("step", [4, 8])
def test_killed_in_the_first_save_and_in_that_after_the_adapters_joined(
    data: Path, finished: Path, tmp_path: Path, step: int
) -> None:
    run, config = tmp_path / "run", tiny(data)
    assert finish(start(config, run, die_in_save, step, 3)) == -signal.SIGKILL
    pretrain(config, run)
    assert_same_run(config, run, finished)


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 3, 5, 6, 7])
def test_killed_after_a_save_before_at_and_after_the_adapters_and_the_mask_updates(
    data: Path, finished: Path, tmp_path: Path, every: int
) -> None:
    """Killed between a save and the next one: what was done in between is done again, and is in the log once."""
    run, config = tmp_path / "run", tiny(data, f"log.save_every={every}")
    assert finish(start(config, run, die_in_save, 2 * every if every < 6 else 12, 1)) == -signal.SIGKILL
    assert [folder.name for folder in store.folders(run)][:1] == [f"step-{every:08d}"]
    pretrain(config, run)
    assert_same_run(config, run, finished)
    assert [record["step"] for record in records(run) if record["kind"] == "phase"] == [7]


def test_masks_that_follow_from_the_values_are_left_out_and_computed_again(data: Path, tmp_path: Path) -> None:
    """Updated by magnitude in every step, the default; and the scale of the input gradient with them."""
    config = tiny(data, "slope.mask_update_interval=1", "slope.backward_rescale=true", "log.save_every=2")
    reference, run = tmp_path / "reference", tmp_path / "run"
    pretrain(config, reference)
    (newest, *_) = store.folders(reference)
    assert store.verify(newest)["derived"] == ["backward_mask_bits"]
    assert b"backward_mask_bits" not in (newest / ".metadata").read_bytes()
    assert finish(start(config, run, die_in_save, 6, 2)) == -signal.SIGKILL
    pretrain(config, run)
    assert_same_run(config, run, reference)


@pytest.mark.slow
def test_a_bert_resumes_bit_for_bit_too(bert_data: Path, tmp_path: Path) -> None:
    config = tiny(bert_data, model="bert-base")
    reference, run = tmp_path / "reference", tmp_path / "run"
    pretrain(config, reference)
    assert finish(start(config, run, die_in_save, 8, 2)) == -signal.SIGKILL
    pretrain(config, run)
    assert_same_run(config, run, reference)


def test_what_is_measured_does_not_touch_what_is_trained(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ("log.save_every=3", "log.val_every=1", "log.sample_every=2", "log.keep=9", "log.sample_prompt=a")
    assert finish(start(tiny(data, *words), run, die_in_save, 9, 1)) == -signal.SIGKILL
    capsys.readouterr()
    pretrain(tiny(data), run)  # log.* may change from one start to the next
    assert "changed since the last start: log.keep: 9 -> 2; log.sample_every: 2 -> " in capsys.readouterr().err
    assert [store.step_of(folder) for folder in store.folders(run)][-2:] == [6, 3]  # they were to be kept
    ours, theirs = ([r for r in records(folder) if r["kind"] == "train"] for folder in (run, finished))
    assert ours == theirs


def test_a_finished_run_is_left_as_it_is(data: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert pretrain(tiny(data), run)["step"] == 12
    assert (run / metrics.JSONL).read_bytes() == (finished / metrics.JSONL).read_bytes()
    assert_same_run(tiny(data), run, finished)


# -------------------------------------------------------------------------------------------------- stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_stops_the_run_with_a_checkpoint(
    data: Path, finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run, config = tmp_path / "run", tiny(data)
    step = {signal.SIGTERM: 1, signal.SIGUSR2: 6, signal.SIGINT: 9}[number]
    assert finish(start(config, run, stop_after, step, number)) == 75
    said = printed(run).splitlines()
    assert (
        said[-1]
        == f"error: stopped by {number.name} after step {step}, checkpoint saved; run the same command to resume"
    )
    assert store.folders(run)[0].name == f"step-{step:08d}"
    pretrain(config, run)
    assert_same_run(config, run, finished)


def test_a_signal_in_the_last_step_leaves_the_last_validation_to_the_next_start(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert finish(start(tiny(data), run, stop_after, 12)) == 75
    assert [record["kind"] for record in records(run) if record["step"] == 12] == ["train"]
    pretrain(tiny(data), run)
    assert_same_run(tiny(data), run, finished)


def stop_in_save(step: int) -> None:
    """In this process: the signal comes while a periodic checkpoint is saved."""
    save = store.save

    def signalled(run: Path, at: int, *args: object, **kwargs: object) -> Path:
        if at == step:
            os.kill(os.getpid(), signal.SIGUSR2)
        return save(run, at, *args, **kwargs)  # type: ignore[arg-type]

    store.save = signalled  # type: ignore[assignment]


def test_a_signal_during_a_save_stops_after_the_step_that_is_taken(data: Path, finished: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tiny(data)
    assert finish(start(config, run, stop_in_save, 4)) == 75
    newest, previous = (folder.name for folder in store.folders(run))
    assert (previous, newest) in [("step-00000004", f"step-0000000{step}") for step in (5, 6)]
    pretrain(config, run)
    assert_same_run(config, run, finished)


def test_a_signal_before_the_first_step_still_leaves_a_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Trainer.fit

    def signalled(t: Trainer, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        fit(t, *args)

    monkeypatch.setattr(Trainer, "fit", signalled)
    with pytest.raises(Stopped, match="after step 1, checkpoint saved"):
        pretrain(tiny(data), tmp_path / "run")
    assert store.latest(tmp_path / "run") is not None


@pytest.mark.slow
def test_the_command_line_stops_with_75_resumes_and_a_second_ctrl_c_ends_at_once(data: Path, tmp_path: Path) -> None:
    run, tests = tmp_path / "run", Path(__file__).parent
    program = f"""
import sys
sys.path.insert(0, {str(tests)!r})
from test_resume import slow_steps
from slope_cli.cli import main
slow_steps(0.4)
main()
"""
    words = [f"model.overrides.{size}" for size in ("n_layer=1", "n_embd=32", "n_head=2")]
    words += [f"data.path={data}", "log.save_every=0", "--out", str(run)]
    command = [sys.executable, "-P", "-c", program, "pretrain", str(tests / "tiny.yaml"), *words]

    def run_until(step: int, *signals: signal.Signals) -> tuple[int, str, str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        wait_for_steps(run, step)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.05)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    code, out, err = run_until(1, signal.SIGTERM)
    assert (code, out) == (75, "")
    (done,) = store.folders(run)
    assert err.splitlines()[-1].startswith(f"stopped by SIGTERM after step {int(done.name[-8:])}, checkpoint saved")
    code, out, err = run_until(int(done.name[-8:]) + 1, signal.SIGINT, signal.SIGINT)
    assert f"resuming from {done}" in err
    assert (code, out) not in ((0, ""), (75, ""))
    assert "Traceback" not in err
    assert store.folders(run) == [done]


@pytest.mark.slow
def test_a_signal_while_torch_is_imported_stops_the_run_too(data: Path, tmp_path: Path) -> None:
    """It comes at the first import of torch, whenever that is."""
    run, tests = tmp_path / "run", Path(__file__).parent
    program = """
import os, signal, sys
from slope_cli.cli import main

class Signal:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGUSR2)

sys.meta_path.insert(0, Signal())
main()
"""
    words = [f"model.overrides.{size}" for size in ("n_layer=1", "n_embd=32", "n_head=2")]
    command = [sys.executable, "-P", "-c", program, "pretrain", str(tests / "tiny.yaml"), *words, f"data.path={data}"]
    done = subprocess.run([*command, "--out", str(run)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[-1].endswith("stopped by SIGUSR2; run the same command again to resume")
    assert store.folders(run) == [], "it stops before its first step"


# ------------------------------------------------------------------------------------------ whose folder it is


def test_a_second_process_in_the_same_folder_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = tmp_path / "run", tiny(data, "train.steps=100000", "log.save_every=0")
    child = start(config, run)
    try:
        wait_for_steps(run, 1)
        monkeypatch.setattr(files, "LOCK_WAIT", 0.3)
        with pytest.raises(UsageError) as refused:
            pretrain(config, run)
        holder = f"process {child.pid} on {platform.node()}"
        assert str(refused.value) == f"{run}: another process is at work in it; wait until {holder} ends, or end it"
    finally:
        child.kill()
        finish(child)


def test_a_restart_waits_for_a_process_that_is_ending(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after the failure of a node: the one before holds the lock a little longer."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    holder = "import fcntl,sys,time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    command = [sys.executable, "-P", "-c", f"{holder}; time.sleep(1)", str(run / files.LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        pretrain(tiny(data), run)
    said = "another process is at work in it; waiting up to 30 s for it to end"
    assert capsys.readouterr().err.splitlines().count(f"{run}: {said}") == 1


def test_a_file_system_without_locks_is_one_warning(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)

    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", without_locks)
    pretrain(tiny(data), run)
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "locks" in line]
    assert warning.startswith(f"warning: {run}: its file system has no locks (No locks available)")


def test_killed_between_the_last_save_and_the_removal_of_an_old_one(data: Path, finished: Path, tmp_path: Path) -> None:
    """The run is at its end and saves no more, yet keeps no checkpoint too many after the next start."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.copytree(run / "checkpoints" / "step-00000008", run / "checkpoints" / "step-00000004")
    manifest = run / "checkpoints" / "step-00000004" / store.MANIFEST
    files.write_sealed(manifest, files.read_sealed(manifest) | {"step": 4})
    pretrain(tiny(data), run)
    assert [folder.name for folder in store.folders(run)] == ["step-00000012", "step-00000008"]
    assert_same_run(tiny(data), run, finished)
