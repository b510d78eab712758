"""The other recipes on a real SLURM: arrays that share work, the job that ends it, and linearize."""

import json
from pathlib import Path

import pytest
from jobs import Job, command, submit
from support.data import texts
from support.runs import RECIPE, small

from slope_cli.data.prepare import prepare
from slope_cli.evaluate.evaluate import evaluate
from slope_cli.report import metrics

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

DONE = "COMPLETED", "0:0", 0


def array(script: str, out: Path, tasks: int, *words: str | Path) -> list[Job]:
    """Submit an array and the job that ends its work, as the script's header says; the jobs, the last one last."""
    shares = submit(script, out, *words, options=(f"--array=1-{tasks}",))
    last = submit(script, out, *words, options=(f"--dependency=afterany:{shares.number}",))
    return [*(Job(f"{shares.number}_{task}", out, last.log) for task in range(1, tasks + 1)), last]


def test_an_array_prepares_what_one_job_would(tmp_path: Path, shared: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = [f"text={texts()}", "--val-fraction=0.2"]
    jobs = array("prepare", out, 3, *words, "--out", out)
    assert [job.ends() for job in jobs] == [DONE] * 4, jobs[-1].describe()
    prepare(words[:1], whole, val_fraction=0.2, workers=1, progress=False)
    made, expected = ({file.relative_to(at): file.read_bytes() for file in files(at)} for at in (out, whole))
    assert made == expected


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_array_trains_the_runs_of_a_comparison(tmp_path: Path, shared: Path) -> None:
    out = tmp_path / "out"
    own = [*small("gpt2-nano"), f"data.path={shared / 'data'}"]
    jobs = array("compare", out, 2, RECIPE, *own, "--methods=dense,slope", "--seeds=1", "--out", out)
    assert [job.ends() for job in jobs] == [DONE] * 3, jobs[-1].describe()
    assert (out / "compare.md").read_text() in jobs[-1].said() or "slope" in jobs[-1].said()
    assert "2 of 2 runs are already finished" in jobs[-1].said()


@pytest.mark.parametrize("gpus", [1, 2])
def test_linearize(tmp_path: Path, shared: Path, gpus: int) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    own = (*small("gpt2-nano"), f"data.path={shared / 'data'}")
    trained = submit("pretrain", model, RECIPE, *own, "--out", model)
    assert trained.ends() == DONE, trained.describe()
    words = (
        "train.device=cpu",
        "train.steps=6",
        "train.seq_len=32",
        "train.tokens_per_step=128",
        "train.micro_batch=2",
    )
    words = (*words, "linearize.window=8")
    job = submit("linearize", run, model, *words, "--out", run, options=(f"--gpus-per-node={gpus}",))
    assert job.ends() == DONE, job.describe()
    assert metrics.read(run)[-1]["step"] == 6


def test_tasks_on_two_nodes_share_an_evaluation(tmp_path: Path, shared: Path) -> None:
    run = tmp_path / "run"
    job = submit("pretrain", run, RECIPE, *small("gpt2-nano"), f"data.path={shared / 'data'}", "--out", run)
    assert job.ends() == DONE, job.describe()
    shape = ("--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1")
    printed = command("srun", *shape, "slope", "eval", run, "--batch=1", "--json")
    found = json.loads(printed)["perplexity"]
    assert found["loss"] == pytest.approx(evaluate(run, batch=1)["perplexity"]["loss"], rel=1e-6)
