"""Signals, devices, and starts as one of several processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.runs import slope

import slope_cli
from slope_cli import cli
from slope_cli.distributed import launch
from slope_cli.distributed.launch import pick_device, require_one_process
from slope_cli.distributed.signals import STOP_SIGNALS, StopFlag, Stopped
from slope_cli.errors import UsageError
from sparse_kernels import children


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


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_says_at_once_that_a_ctrl_c_was_heard(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "isatty", lambda _: terminal)
    with StopFlag():
        os.kill(os.getpid(), signal.SIGTERM)
    with StopFlag():
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err.count("Ctrl-C again") == terminal


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


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "3",
}


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({**TORCHRUN, "MASTER_PORT": "9"}, "2 processes"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK=None: is not a number"),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2: there are only 2"),
        ({**SRUN, "SLURM_PROCID": "3"}, "4 processes"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2"}, "are of 2 tasks"),
        ({**SRUN, "SLURM_LOCALID": "2"}, "SLURM_LOCALID=2: there are only 2"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "4"}, "by srun and by torchrun at once"),
        ({"WORLD_SIZE": "1", "RANK": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "4"}, None),  # inside salloc, with no srun
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # sbatch --ntasks=8, with no srun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # and with srun --ntasks=1
        ({}, None),
    ],
)
def test_one_of_several_processes_is_refused_where_one_works(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str | None
) -> None:
    for key in [key for key in os.environ if key.startswith("SLURM_")] + ["WORLD_SIZE", "RANK", "MASTER_ADDR"]:
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    if named is None:
        require_one_process()
    else:
        with pytest.raises(UsageError, match=named):
            require_one_process()


@pytest.mark.parametrize(
    ("nodes", "counts", "hosts"),
    [
        ("gpu[08-10]", "1(x3)", ["gpu08", "gpu09", "gpu10"]),
        ("a,b[1,3-4]-x", "2,1(x3)", ["a", "a", "b1-x", "b3-x", "b4-x"]),
        ("r[1-2]n[1-2]", "1(x4)", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_the_hosts_of_ranks_follow_from_slurms_lists(
    monkeypatch: pytest.MonkeyPatch, nodes: str, counts: str, hosts: list[str]
) -> None:
    own = {"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_NODEID": "0"}
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for key, value in {**SRUN, **own, "SLURM_STEP_NUM_TASKS": str(len(hosts))}.items():
        monkeypatch.setenv(key, value)
    found = launch.ranks()
    assert found.hosts == tuple(hosts)
    assert found.address.startswith(f"{hosts[0]}:")
    monkeypatch.setenv("SLURM_STEP_ID", "4")
    assert launch.ranks().address != found.address, "two steps of a node do not meet"
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "77")
    assert launch.ranks().address == "10.0.0.1:77"


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
        ({"CUDA_VISIBLE_DEVICES": "GPU-5c1f"}, "CUDA_VISIBLE_DEVICES=GPU-5c1f"),
        ({"SLURM_GPUS": "a100:2"}, "SLURM_GPUS=a100:2"),
        ({"SLURM_GPUS": "a100:0,h100:1"}, "SLURM_GPUS=a100:0,h100:1"),
        ({"SLURM_GPUS_ON_NODE": "1"}, "SLURM_GPUS_ON_NODE=1"),
        ({"SLURM_GPUS_PER_TASK": "h100:1"}, "SLURM_GPUS_PER_TASK=h100:1"),
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0"),
        ({"SLURM_STEP_GPUS": "3"}, "SLURM_STEP_GPUS=3"),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-5c1f"}, "NVIDIA_VISIBLE_DEVICES=GPU-5c1f"),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, None),  # of the image
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, None),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "0"}, None),  # hidden on purpose
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS": "1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"SLURM_GPUS": "0"}, None),
        ({"SLURM_GPUS": "a100:0"}, None),
        ({"SLURM_JOB_GPUS": ""}, None),
        ({}, None),
    ],
)
def test_granted_gpus_that_torch_does_not_find_are_an_error_unless_the_cpu_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str | None
) -> None:
    for key in [key for key in os.environ if key.startswith(("CUDA_VISIBLE", "NVIDIA_VISIBLE", "SLURM"))]:
        monkeypatch.delenv(key)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    if named is None:
        assert pick_device("auto") == torch.device("cpu")
    else:
        with pytest.raises(UsageError, match=f"^{named}, but torch finds no GPU [^\n]*train.device=cpu[^\n]*$"):
            pick_device("auto")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_job_without_a_gpu_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    done = slope("pretrain", "gpt2-nano", "train.steps=1", "--out", str(tmp_path / "run"))
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("error: CUDA_VISIBLE_DEVICES=0, but torch finds no GPU")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inherited", ["", os.pathsep.join(["", ".", "HERE"])])
def test_a_child_process_imports_nothing_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inherited: str
) -> None:
    """Not by -c, nor by an entry of PYTHONPATH or of this process's path; this installation is found all the same."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working folder')")
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", inherited.replace("HERE", str(tmp_path / "link")))
    monkeypatch.setattr(sys, "path", ["", ".", str(tmp_path), str(tmp_path / "link"), *sys.path])
    command, environment = children.python("import json, slope_cli; print(slope_cli.__file__, *sys.argv[1:])", "ab")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{slope_cli.__file__} a b\n"


def test_the_workers_of_prepare_import_nothing_from_the_working_folder(tmp_path: Path) -> None:
    """A process in its own right, since a console script's path is not that of the tests."""
    for name in ("json", "pickle", "struct"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working folder')")
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    arguments = ["data", "prepare", "text.txt", "--out", "data", "--workers", "2"]
    command, environment = children.python("from slope_cli.cli import main; main()", arguments)
    command.remove("-P")  # as `slope` itself is started
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, done.stderr)
    assert (tmp_path / "data" / "dataset.json").is_file()
