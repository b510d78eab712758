"""recipes/slurm/pretrain.sbatch on a real SLURM: however a job is interrupted, it ends as an uninterrupted one.

SLURM overlaps the jobs of tests in several processes, and keeps waiting what its nodes cannot bear at once.
"""

import fcntl
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from jobs import Job, command, submit, until
from support.runs import RECIPE, assert_same_run, final_state, records, sized, tiny

from slope_cli.config.schema import Config
from slope_cli.train.loop import pretrain

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

WORDS = ("train.steps=120", "train.tokens_per_step=256", "log.save_every=40", "log.val_every=50")
SHAPES = {
    1: ("--nodes=1", "--gpus-per-node=1"),
    2: ("--nodes=1", "--gpus-per-node=2"),
    4: ("--nodes=2", "--gpus-per-node=2"),
}
DONE = "COMPLETED", "0:0"
at_each_size = pytest.mark.parametrize("tasks", [1, 4])


def train(folder: Path, shared: Path, tasks: int, *words: str, options: tuple[str, ...] = ()) -> Job:
    """Submit the tests' run."""
    run = folder / "run"
    own = [*sized("gpt2-nano"), *WORDS, f"data.path={shared / 'data'}", *words, "--out", run]
    return submit("pretrain", run, RECIPE, *own, options=(*SHAPES[tasks], *options))


def config(shared: Path, *words: str) -> Config:
    return tiny(shared / "data", *WORDS, *words)


def assert_uninterrupted(job: Job, shared: Path, tasks: int) -> None:
    """The run's log and state are bit for bit those of one that nothing interrupted, with as many tasks."""
    folder = shared / f"uninterrupted-{tasks}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first test that needs it makes it
        if not (folder / "run").is_dir():
            whole = train(folder, shared, tasks)
            assert whole.ends() == (*DONE, 0), whole.describe()
    assert_same_run(config(shared), job.run, folder / "run")


@at_each_size
def test_a_job_trains_to_the_end(tmp_path: Path, shared: Path, tasks: int) -> None:
    job = train(tmp_path, shared, tasks)
    assert job.ends() == (*DONE, 0), job.describe()
    assert_uninterrupted(job, shared, tasks)


@at_each_size
def test_before_the_time_limit_a_job_saves_and_is_requeued(tmp_path: Path, shared: Path, tasks: int) -> None:
    """The shipped lead of 300 s: a limit that is nearer makes SLURM send the signal at once."""
    job = train(tmp_path, shared, tasks)
    job.at_step(5)
    with job.frozen(signal.SIGUSR2):
        job.set(TimeLimit=4)
    job.restarted()
    job.set(TimeLimit=60)
    assert job.ends() == (*DONE, 1), job.describe()
    assert job.stopped_by(signal.SIGUSR2), job.describe()
    assert f"restart 1 of SLURM job {job.number}" in job.said()
    assert_uninterrupted(job, shared, tasks)


@at_each_size
def test_an_operators_requeue(tmp_path: Path, shared: Path, tasks: int) -> None:
    job = train(tmp_path, shared, tasks)
    job.at_step(5)
    command("scontrol", "requeue", job.number)
    assert job.ends() == (*DONE, 1), job.describe()
    assert job.stopped_by(signal.SIGTERM), job.describe()
    assert_uninterrupted(job, shared, tasks)


@at_each_size
def test_a_preempted_job_goes_on_when_the_urgent_one_is_done(tmp_path: Path, shared: Path, tasks: int) -> None:
    job = train(tmp_path, shared, tasks, options=("--partition=spot",))
    job.at_step(5)
    urgent = ("--partition=urgent", "--nodes=2", "--gpus-per-node=2", "--output=/dev/null")
    with job.frozen(signal.SIGTERM):
        command("sbatch", *urgent, "--wrap=sleep 1")
    assert job.ends() == (*DONE, 1), job.describe()
    assert job.stopped_by(signal.SIGTERM), job.describe()
    assert_uninterrupted(job, shared, tasks)


@at_each_size
def test_scancel_saves_and_does_not_requeue(tmp_path: Path, shared: Path, tasks: int) -> None:
    job = train(tmp_path, shared, tasks)
    job.at_step(5)
    command("scancel", job.number)
    state, _, restarts = job.ends()
    assert (state, restarts) == ("CANCELLED", 0), job.describe()
    until(lambda: not job.ranks(), job.describe)
    assert job.stopped_by(signal.SIGTERM), job.describe()
    again = train(tmp_path, shared, tasks)
    assert again.ends() == (*DONE, 0), again.describe()
    assert_uninterrupted(again, shared, tasks)


@at_each_size
def test_a_job_whose_node_fails_is_requeued(tmp_path: Path, shared: Path, tasks: int) -> None:
    job = train(tmp_path, shared, tasks, options=("--partition=frail",))
    job.at_step(5)
    failed = command("scontrol", "show", "hostnames", job.show()["NodeList"]).split()[-1]
    command("scontrol", "update", f"NodeName={failed}", "State=DOWN", "Reason=test")
    job.restarted()
    command("scontrol", "update", f"NodeName={failed}", "State=RESUME")
    assert job.ends() == (*DONE, 1), job.describe()
    assert_uninterrupted(job, shared, tasks)


@at_each_size
def test_a_killed_task_fails_the_job_at_once(tmp_path: Path, shared: Path, tasks: int) -> None:
    """Its exit code is no request to requeue, and the same command goes on from the last checkpoint."""
    job = train(tmp_path, shared, tasks)
    job.at_step(45)
    killed, began = job.ranks(), time.monotonic()
    os.kill(killed[max(killed)], signal.SIGKILL)
    state, code, restarts = job.ends()
    until(lambda: not job.ranks(), job.describe)
    assert time.monotonic() - began < 60
    assert (state, restarts) == ("FAILED", 0), job.describe()
    assert code in ("137:0", "143:0"), job.describe()  # of the killed task, or of those that srun ends after it
    assert tasks == 1 or re.search(r"^error: rank 3 on n\d died; all processes end$", job.said(), re.M), job.describe()
    again = train(tmp_path, shared, tasks)
    assert again.ends() == (*DONE, 0), again.describe()
    assert_uninterrupted(again, shared, tasks)


def test_a_wrong_key_fails_once(tmp_path: Path, shared: Path) -> None:
    job = train(tmp_path, shared, 1, "train.stepz=3")
    assert job.ends() == ("FAILED", "2:0", 0), job.describe()
    assert "train.stepz" in job.said()
    assert not job.run.exists()


def test_a_requeue_that_fails_is_said(tmp_path: Path, shared: Path) -> None:
    job = train(tmp_path, shared, 1, options=("--no-requeue",))
    job.at_step(5)
    command("scancel", "--signal=USR2", job.number)
    assert job.ends() == ("FAILED", "75:0", 0), job.describe()
    assert f"\njob {job.number} stopped and can go on, but was not requeued: " in job.said()


def test_a_run_goes_on_with_other_numbers_of_tasks(tmp_path: Path, shared: Path) -> None:
    """4, 2, 1 and 4 tasks end, but for rounding, where one process does."""
    whole = ("model.dropout=0",)  # each task draws its own
    for tasks, until_step in ((4, 20), (2, 50), (1, 80)):
        job = train(tmp_path, shared, tasks, *whole)
        job.at_step(until_step)
        command("scancel", job.number)
        assert job.ends()[0] == "CANCELLED", job.describe()
        until(lambda job=job: not job.ranks(), job.describe)
        assert job.stopped_by(signal.SIGTERM), job.describe()
    job = train(tmp_path, shared, 4, *whole)
    assert job.ends() == (*DONE, 0), job.describe()

    reference = tmp_path / "one"
    pretrain(config(shared, *whole), reference)
    losses, expected = (
        [record["loss"] for record in records(run) if record["kind"] in ("train", "val")]
        for run in (job.run, reference)
    )
    assert losses == pytest.approx(expected, abs=1e-4)
    ours, theirs = (weights(config(shared, *whole), run) for run in (job.run, reference))
    apart = {name: float((ours[name] - tensor).norm() / tensor.norm()) for name, tensor in theirs.items()}
    assert max(apart.values()) < 0.01, apart


def weights(config: Config, run: Path) -> dict[str, torch.Tensor]:
    """The weights of a run, without the biases of keys: softmax ignores them, so their gradients are rounding alone."""
    state = {name: tensor for name, tensor in final_state(config, run).items() if name.startswith("model.")}
    for name, tensor in state.items():
        if name.endswith("attn.c_attn.bias"):
            tensor.view(3, -1)[1] = 0
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
