"""Runs of two processes with a GPU each, through NCCL: the same run as one GPU makes, stopped and ended together."""

import fcntl
import itertools
import signal
from pathlib import Path

import pytest
import torch
from support.data import prepared
from support.ranks import Ranks

from slope_cli.checkpoint.load import load_model
from slope_cli.distributed import checks
from slope_cli.report import metrics

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
WORDS = (
    *("model.overrides.n_layer=3", "model.overrides.n_embd=256", "model.overrides.n_head=4", "model.dropout=0"),
    *("train.steps=100", "train.micro_batch=4", "train.seq_len=128", "train.tokens_per_step=2048"),
    *("train.device=cuda", "adapters.start=0.5", "adapters.rank=16", "optim.lr=1e-3"),
    *("log.every=1", "log.val_tokens=4096", "log.save_every=0", "log.sample_tokens=8", "log.tensorboard=false"),
)
LAYOUTS = {
    "ddp": ("distributed.layout=ddp", "train.cuda_graph=true"),
    "ddp without graphs": ("distributed.layout=ddp", "train.cuda_graph=false"),
    "step": ("distributed.layout=fsdp", "distributed.gather=step"),
    "block": ("distributed.layout=fsdp", "distributed.gather=block"),
}
EAGER = "train.compile=false"
METHODS = {
    "slope": (),  # compiled
    "mask updates": (EAGER, "method=fst", "fst.mask_update_interval=10", "sparsity.start=0.2"),
    "dense then sparse": (EAGER, "method=wanda", "sparsity.start=0.3"),
    "muon": (EAGER, "optim.name=muon"),
}


def _share_gpus(rank: int) -> None:
    """Other tests are on these GPUs, too."""
    checks.LEAST_MEMORY = 0.0


def ranks(world: int, run: Path, shared: Path, *more: str) -> Ranks:
    """The command with so many GPUs; its kernels are compiled and measured once for all tests."""
    words = ["pretrain", "gpt2-nano", f"data.path={prepared('bytes')}", *WORDS, *more, "--out", str(run)]
    how = {"variables": {"SLOPE_CACHE_DIR": str(shared / "cache")}, "prepare_child": _share_gpus}
    return Ranks(world, words, run.parent / f"logs-{run.name}-{world}", **how)


def finish(started: Ranks, *expected: int) -> None:
    assert started.finish(300) == list(expected), started.printed()


def losses(run: Path) -> torch.Tensor:
    """Of the steps, (steps,)."""
    return torch.tensor([record["loss"] for record in metrics.read(run) if record["kind"] == "train"])


def on_one(shared: Path, micro_batch: int, *more: str) -> Path:
    """A finished run on one GPU, made by the first of the tests' processes that asks for it."""
    run = shared / "-".join(["gpu", str(micro_batch), *more])
    done = run.with_name(f"{run.name}.done")
    with done.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            finish(ranks(1, run, shared, *more, f"train.micro_batch={micro_batch}"), 0)
            done.touch()
    return run


def of_rounding(shared: Path, *more: str) -> float:
    """How far losses are apart, on average over the steps, by the rounding of other micro-batches on one GPU."""
    runs = [losses(on_one(shared, size, *more)) for size in (2, 4, 8)]
    return max(float((a - b).abs().mean()) for a, b in itertools.combinations(runs, 2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_make_the_run_of_one(layout: str, method: str, shared: Path, tmp_path: Path) -> None:
    more = METHODS[method]
    finish(ranks(2, tmp_path / "run", shared, *more, *LAYOUTS[layout]), 0, 0)
    apart = (losses(tmp_path / "run") - losses(on_one(shared, 4, *more))).abs()
    print(f"{method}, {layout}: {float(apart.mean()):.2e} on average, {float(apart.max()):.2e} at most")
    assert len(apart) == 100
    assert float(apart.mean()) <= 1.5 * of_rounding(
        shared, *more
    )  # the largest of three draws of what this is a fourth of
    if method == "slope":  # masks that are drawn, not chosen by values that rounding changes
        states = [load_model(run).model.state_dict() for run in (tmp_path / "run", on_one(shared, 4))]
        masks = [{name: t for name, t in state.items() if name.endswith("row_mask_bits")} for state in states]
        assert masks[0].keys() == masks[1].keys() != set()
        assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_with_other_numbers_of_gpus(layout: str, shared: Path, tmp_path: Path) -> None:
    length = (EAGER, "train.steps=400")
    run, more = tmp_path / "run", (*length, *LAYOUTS[layout])
    for world, text in ((2, "step 20/"), (1, "step 60/")):
        started = ranks(world, run, shared, *more)
        started.wait_for(text, seconds=240)
        started.send(world - 1, signal.SIGTERM)
        finish(started, 75, *[0] * (world - 1))
    finish(ranks(2, run, shared, *more), 0, 0)
    apart = (losses(run) - losses(on_one(shared, 4, *length))).abs()
    assert len(apart) == 400
    assert float(apart.mean()) <= 1.5 * of_rounding(shared, *length)


@pytest.mark.parametrize(("rank", "layout"), list(zip((0, 1, 0, 1), LAYOUTS, strict=True)))
def test_a_rank_that_dies_ends_the_other_at_once(rank: int, layout: str, shared: Path, tmp_path: Path) -> None:
    started = ranks(2, tmp_path / "run", shared, EAGER, "train.steps=4000", *LAYOUTS[layout])
    started.wait_for("step 20/", seconds=240)
    started.send(rank, signal.SIGKILL)
    codes = started.finish(30)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    assert started.printed(1 - rank).splitlines()[-1] == f"error: rank {rank} died; all processes end"
