"""Signals, devices, and starts as one of several processes."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from slope_cli import cli
from slope_cli.distributed.launch import pick_device, require_one_process
from slope_cli.distributed.signals import STOP_SIGNALS, StopFlag, Stopped
from slope_cli.errors import UsageError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_first_signal_only_sets_the_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        stop.check("work")
        assert stop.name == ""
        os.kill(os.getpid(), number)
        assert stop.name == number.name
        with pytest.raises(Stopped, match=f"^work: stopped by {number.name}; run the same command again to resume$"):
            stop.check("work")
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with StopFlag():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name


def test_outside_of_the_main_thread_a_flag_opens_and_is_never_set() -> None:
    opened = []

    def work() -> None:
        with StopFlag() as stop:
            opened.append(stop.name)

    before = list(map(signal.getsignal, STOP_SIGNALS))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert opened == [""]
    assert list(map(signal.getsignal, STOP_SIGNALS)) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_pretrain_prepares_its_text_stops_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    data = tmp_path / "run/data"

    def send_when_at_work() -> None:
        while not (data / ".parts/plan.json").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(sys, "argv", ["slope", "pretrain", "gpt2-nano", "train.steps=1", "--out", str(data.parent)])
    before = list(map(signal.getsignal, STOP_SIGNALS))
    sender = threading.Thread(target=send_when_at_work, daemon=True)
    sender.start()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    sender.join(timeout=10)
    assert ended.value.code == 75
    assert list(map(signal.getsignal, STOP_SIGNALS)) == before
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"{data}: stopped by {number.name}; run the same command again to resume\n"
    assert not (data / "dataset.json").exists()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, "SLURM_STEP_NUM_TASKS=4"),
        ({"WORLD_SIZE": "1", "RANK": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "4"}, None),  # inside salloc, with no srun
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # sbatch --ntasks=8, with no srun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # and with srun --ntasks=1
        ({}, None),
    ],
)
def test_one_of_several_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str | None
) -> None:
    for key in ("WORLD_SIZE", "RANK", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    if named is None:
        require_one_process()
    else:
        with pytest.raises(UsageError, match=named):
            require_one_process()


def test_a_device_that_is_not_there_is_one_line() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99", "cpux"):
        with pytest.raises(UsageError, match=f"train.device={name}: [^\n]+$"):
            pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
        ({"SLURM_GPUS": "a100:2"}, "SLURM_GPUS=a100:2"),
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0"),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "0"}, None),  # hidden on purpose
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"SLURM_GPUS": "0"}, None),
        ({}, None),
    ],
)
def test_gpus_that_torch_does_not_find_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], named: str | None
) -> None:
    for key in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS", "SLURM_JOB_GPUS"):
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert pick_device("auto") == torch.device("cpu")
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {named}, but torch finds no GPU; using the CPU") if named else said == ""
    assert pick_device("cpu") == torch.device("cpu")
    assert capsys.readouterr().err == ""
