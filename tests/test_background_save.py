"""Checkpoints that are written while training goes on."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import assert_same_run, tiny

from slope_cli.checkpoint import background, dcp, store
from slope_cli.checkpoint.verify import check
from slope_cli.distributed.collectives import Group
from slope_cli.errors import SlopeError
from slope_cli.report import metrics
from slope_cli.train.loop import Trainer, pretrain

METADATA: dict[str, Any] = {"data": "", "config": {}, "tokenizer": {}}


def pause_save(monkeypatch: pytest.MonkeyPatch, step: int, until: Callable[[], bool]) -> list[threading.Thread]:
    """Let the save of a step begin only once something holds; returns the threads that save, one for each save."""
    save, threads = store.save, list[threading.Thread]()

    def paused(run: Path, at: int, *args: Any, **kwargs: Any) -> Path:
        threads.append(threading.current_thread())
        end = time.monotonic() + 30
        while at == step and not until():
            assert time.monotonic() < end
            time.sleep(0.01)
        return save(run, at, *args, **kwargs)

    monkeypatch.setattr(store, "save", paused)
    return threads


def logged(run: Path) -> int:
    """How many steps a run has logged."""
    return (run / metrics.JSONL).read_bytes().count(b'"kind": "train"')


def test_training_goes_on_while_a_checkpoint_is_written_which_is_that_of_its_step(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    with monkeypatch.context() as patch:
        threads = pause_save(patch, 4, lambda: logged(run) >= 8)  # before the next save is due
        pretrain(tiny(data, "log.keep=5"), run)
    assert [thread is threading.main_thread() for thread in threads] == [False, False, True]
    assert capsys.readouterr().err.count("step 4: saved ") == 1
    shutil.copytree(run, again)
    assert_same_run(tiny(data), run, finished)
    for folder in store.folders(again)[:2]:
        shutil.rmtree(folder)
    assert store.folders(again)[0].name == "step-00000004"
    pretrain(tiny(data), again)
    assert_same_run(tiny(data), again, finished)


def test_a_run_is_sound_while_its_log_is_ahead_of_what_is_being_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, results = tmp_path / "run", list[dict[str, Any]]()

    def checked() -> bool:
        if logged(run) < 10:
            return False
        results.append(check(run))
        return True

    pause_save(monkeypatch, 8, checked)
    pretrain(tiny(data), run)
    (result,) = results
    assert result["faults"] == []
    assert {"step-00000004: sound", f"{metrics.JSONL}: sound"} <= {*result["lines"]}


def test_where_host_memory_is_short_training_waits_for_a_save(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "free_memory", lambda: 10_000)
    threads = pause_save(monkeypatch, 0, lambda: True)
    pretrain(tiny(data), tmp_path / "run")
    assert threads == [threading.main_thread()] * 3


@pytest.mark.parametrize("error", [SlopeError("the checkpoint of step 4 cannot be written"), AssertionError("a bug")])
def test_an_error_in_the_background_is_told_once_and_only_a_bug_ends_the_run(
    error: Exception, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> bool:
        raise error

    pause_save(monkeypatch, 4, failing)
    if isinstance(error, SlopeError):
        pretrain(tiny(data), tmp_path / "run")
    else:
        with pytest.raises(AssertionError, match="a bug"):
            pretrain(tiny(data), tmp_path / "run")
    told = capsys.readouterr().err.count("warning: the checkpoint of step 4 cannot be written; training continues")
    assert told == isinstance(error, SlopeError)


def test_an_error_of_training_does_not_lose_the_save_before_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    failing, train_step = threading.Event(), Trainer.train_step

    def fail(t: Trainer) -> Any:
        if t.step == 5:
            failing.set()
            raise SlopeError("out of luck")
        return train_step(t)

    monkeypatch.setattr(Trainer, "train_step", fail)
    pause_save(monkeypatch, 4, failing.is_set)
    with pytest.raises(SlopeError, match="out of luck"):
        pretrain(tiny(data), run)
    assert [folder.name for folder in store.folders(run)] == ["step-00000004"]


def test_a_copy_is_of_its_moment_in_memory_that_is_used_again(tmp_path: Path) -> None:
    saver, live = background.Saver(tmp_path, Group()), {"model.x": torch.ones(3, 4).t(), "model.n": torch.tensor(7)}
    addresses: list[dict[str, int]] = []
    for step in (1, 2):
        saver.save(step, store.planned(tmp_path, live), METADATA, wait=False, keep=2)
        live["model.x"] += 1
        assert saver.finished(wait=True) == (step, tmp_path / f"checkpoints/step-0000000{step}")
        assert saver.finished(wait=True) is None
        addresses.append({name: tensor.data_ptr() for name, tensor in saver._memory.items()})
        read = torch.zeros(4, 3)
        dcp.saved_tensors(tmp_path / f"checkpoints/step-0000000{step}")["model.x"].read(read)
        assert torch.equal(read, torch.full((4, 3), float(step)))
    assert addresses[0] == addresses[1]
    live = {"model.x": torch.zeros(2)}
    saver.save(3, store.planned(tmp_path, live), METADATA, wait=False, keep=2)
    saver.finished(wait=True)
    assert {name: tensor.shape for name, tensor in saver._memory.items()} == {"model.x": (2,)}


def test_a_save_in_the_background_has_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"model.x": torch.randn(3, 4).t(), "model.n": torch.tensor(7)}
    folder = store.save(tmp_path / "a", 1, tensors, METADATA, keep=2)
    saver = background.Saver(tmp_path / "b", Group())
    saver.save(1, store.planned(tmp_path / "b", tensors), METADATA, wait=False, keep=2)
    assert (done := saver.finished(wait=True)) is not None
    assert (done[1] / "__0_0.distcp").read_bytes() == (folder / "__0_0.distcp").read_bytes()


def test_the_memory_that_a_job_may_take_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every control group above this process, less what its files in the page cache take."""
    whole = background.free_memory()
    assert 0 < whole < 1 << 50
    own = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    for folder, limit in ((tmp_path / own, "max"), (tmp_path, "5000")):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("memory.max", limit), ("memory.current", "4000"), ("memory.stat", "anon 3\nfile 1500")):
            (folder / name).write_text(text)
    monkeypatch.setattr(background, "CGROUPS", tmp_path)
    assert background.free_memory() == 2500
