"""Runs of several processes: the same run as one process makes, stopped together, ended together."""

import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import prepared, scratch
from support.marks import slow
from support.ranks import Ranks, together
from support.runs import RECIPE, final_state, records, sized, slope, tiny, trained
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slope_cli.checkpoint import run_folder
from slope_cli.checkpoint.load import load_model
from slope_cli.config.schema import Config
from slope_cli.distributed.collectives import Group
from slope_cli.distributed.layouts import GATHERS, Layout
from slope_cli.distributed.sharding import Sharding
from slope_cli.report import metrics
from slope_cli.train import init
from slope_cli.train.parallel import built_on

LONG = ("train.steps=4000", "log.every=1", "log.save_every=0", "log.val_every=0")


def words(*more: str, model: str = "gpt2-nano", out: Path) -> list[str]:
    """The command line of the tiny run."""
    data = prepared("wordpiece" if model.startswith("bert") else "bytes")
    settings = (f"data.path={data}", "train.tokens_per_step=256", "model.dropout=0", *more)
    return ["pretrain", str(RECIPE), *sized(model), *settings, "--out", str(out)]


def numbers(run: Path) -> list[tuple[str, int, float]]:
    """What a run logged of its losses."""
    found = [(r["kind"], r["step"], r.get("loss", r.get("mse"))) for r in metrics.read(run)]
    return [(kind, step, loss) for kind, step, loss in found if loss is not None]


def assert_close(run: Path, other: Path, tolerance: float = 1e-4) -> None:
    """Two runs logged the same records, with losses that differ by rounding alone."""
    ours, theirs = numbers(run), numbers(other)
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    assert max(abs(a[2] - b[2]) / max(1, abs(b[2])) for a, b in zip(ours, theirs, strict=True)) < tolerance


@cache
def not_split(command: Callable[..., list[str]], *more: str, world: int = 1) -> Path:
    """A finished run of a command with whole weights, trained once. It is read only."""
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    ranks = Ranks(world, command(*more, out=folder / "run"), folder / "logs")
    assert ranks.finish() == [0] * world, ranks.printed()
    return folder / "run"


METHODS = {
    "slope": ("train.steps=50", "adapters.start=0.5"),
    "fst": ("method=fst", "train.steps=20", "fst.mask_update_interval=3"),
    "dense then sparse": ("train.steps=20", "sparsity.start=0.3", "slope.before=sr_ste"),
    "muon": ("optim.name=muon", "train.steps=20", "adapters.start=0.5"),
    "wanda, lamb": ("method=wanda", "train.steps=20", "sparsity.start=0.3", "optim.name=lamb"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_two_and_four_processes_make_the_same_run(method: str, tmp_path: Path) -> None:
    for world in (1, 2, 4):
        settings = (*METHODS[method], "train.micro_batch=1")
        ranks = Ranks(world, words(*settings, out=tmp_path / f"{world}"), tmp_path / f"logs-{world}")
        assert ranks.finish() == [0] * world, ranks.printed()
    tolerance = 5e-3 if method == "fst" else 1e-4  # its unbiased pruning draws on each rank for itself
    assert_close(tmp_path / "2", tmp_path / "1", tolerance)
    assert_close(tmp_path / "4", tmp_path / "1", tolerance)


def test_two_processes_make_the_run_of_one(tmp_path: Path) -> None:
    for world in (1, 2):
        ranks = Ranks(world, words("train.steps=12", out=tmp_path / f"{world}"), tmp_path / f"logs-{world}")
        assert ranks.finish() == [0] * world, ranks.printed()
    assert_close(tmp_path / "2", tmp_path / "1", 1e-5)
    assert "2 sequences x 2 micro-batches x 2 ranks = 256 tokens" in ranks.printed(0)
    assert ranks.printed(1) == "", "only rank 0 speaks"
    assert "validation loss" in ranks.printed(0)
    (start,) = [json.loads(line) for line in (tmp_path / "2/environment.jsonl").read_text().splitlines()]
    assert [member["rank"] for member in start["ranks"]] == [0, 1]


@pytest.mark.slow
def test_a_masked_model_weighs_targets_over_all_ranks(tmp_path: Path) -> None:
    more = ("train.steps=12", "train.micro_batch=1")
    for world in (1, 2, 4):
        ranks = Ranks(world, words(*more, model="bert-base", out=tmp_path / f"{world}"), tmp_path / f"logs-{world}")
        assert ranks.finish() == [0] * world, ranks.printed()
    assert_close(tmp_path / "2", tmp_path / "1")
    assert_close(tmp_path / "4", tmp_path / "1")


def linearizing(*more: str, out: Path) -> list[str]:
    """The command line of a run that linearizes a sparse model with adapters."""
    settings = ("train.steps=8", "train.micro_batch=2", "train.tokens_per_step=256", "train.seq_len=32", "log.every=1")
    settings += ("linearize.window=8", "log.val_tokens=512", "train.device=cpu", *more)
    return ["linearize", str(trained()), *settings, "--out", str(out)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), *(("distributed.layout=fsdp", f"distributed.gather={x}") for x in GATHERS)])
@pytest.mark.parametrize(
    "more",
    [
        ("linearize.adjust_maps=true",),
        ("linearize.adjust_maps=true", "distill.share=0.5"),
        ("linearize.train=all", "linearize.state=gated", "distill.share=0.5"),
        ("linearize.train=all", "linearize.state=delta"),
        ("linearize.keep_softmax=heads:3",),
    ],
    ids=" ".join,
)
def test_two_processes_linearize_as_one(tmp_path: Path, more: tuple[str, ...], layout: tuple[str, ...]) -> None:
    ranks = Ranks(2, linearizing(*more, *layout, out=tmp_path / "2"), tmp_path / "logs")
    assert ranks.finish() == [0, 0], ranks.printed()
    assert_close(tmp_path / "2", not_split(linearizing, *more))


def _has_allocated(rank: int) -> None:
    """Let torch say that the GPU of rank 1 has allocated more than that of rank 0."""
    torch.cuda.max_memory_allocated = lambda: (3 + rank) << 30  # type: ignore[assignment]


def test_the_peak_memory_of_a_run_is_that_of_the_rank_with_most(tmp_path: Path) -> None:
    command = words("train.steps=4", "log.val_every=2", out=tmp_path / "run")
    ranks = Ranks(2, command, tmp_path / "logs", prepare_child=_has_allocated)
    assert ranks.finish() == [0, 0], ranks.printed()
    noted = [(r["step"], r["peak_memory"]) for r in metrics.read(tmp_path / "run") if "peak_memory" in r]
    assert noted == [(2, 4 << 30), (4, 4 << 30)]
    assert "peak memory of a GPU, the largest of all: 4.00 GiB" in ranks.printed(0).splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "train"), [("step 3/", "adapters"), ("step 10/", "adapters"), ("step 12/", "all")])
def test_a_split_run_that_linearizes_resumes_to_the_same_bits(stop: str, train: str, tmp_path: Path) -> None:
    more = ("distributed.layout=fsdp", "distill.share=0.5", "train.steps=16", "linearize.window_dropout=0.2")
    more += (f"linearize.train={train}",)
    whole = Ranks(2, linearizing(*more, out=tmp_path / "whole"), tmp_path / "logs-whole")
    cut = Ranks(2, linearizing(*more, out=tmp_path / "cut"), tmp_path / "logs-cut")
    cut.wait_for(stop)
    cut.send(1, signal.SIGTERM)
    assert cut.finish() == [75, 0], cut.printed()
    assert whole.finish() == [0, 0], whole.printed()
    assert Ranks(2, linearizing(*more, out=tmp_path / "cut"), tmp_path / "logs-again").finish() == [0, 0]
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    config = run_folder.open_config(tmp_path / "whole")
    states = [final_state(config, tmp_path / name) for name in ("cut", "whole")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_dropout_differs_between_ranks_and_repeats(tmp_path: Path) -> None:
    for name in "ab":
        ranks = Ranks(2, words("train.steps=3", "model.dropout=0.5", out=tmp_path / name), tmp_path / f"logs-{name}")
        assert ranks.finish() == [0, 0], ranks.printed()
    assert records(tmp_path / "a") == records(tmp_path / "b")


def stop_in(text: str, rank: int, number: int, tmp_path: Path, *more: str) -> tuple[Ranks, Path]:
    """Start two ranks, and send one of them a signal once rank 0 has printed a text."""
    run = tmp_path / "run"
    ranks = Ranks(2, words(*LONG, *more, out=run), tmp_path / "logs")
    ranks.wait_for(text)
    ranks.send(rank, number)
    return ranks, run


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGUSR2)])
def test_a_signal_to_any_rank_stops_all_after_the_same_step(rank: int, number: int, tmp_path: Path) -> None:
    ranks, run = stop_in("step 3/", rank, number, tmp_path)
    assert ranks.finish(60) == [75, 0], ranks.printed()
    name = signal.Signals(number).name
    assert f"stopped by {name} on rank {rank} after step" in ranks.printed(0)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert metrics.read(run)[-1]["step"] == int(checkpoint.name[-8:])
    assert "error" not in ranks.printed()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("distributed.layout=ddp",),
        ("distributed.layout=fsdp",),
        ("distributed.layout=fsdp", "optim.name=lamb", "sparsity.start=0.1"),
        ("distributed.layout=fsdp", "optim.name=muon", "sparsity.start=0.1"),
        ("distributed.layout=fsdp", "method=fst", "sparsity.start=0.1", "fst.mask_update_interval=5"),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(settings: tuple[str, ...], tmp_path: Path) -> None:
    """With four ranks: a sum of two does not depend on its order."""
    more = ("train.steps=24", "log.every=1", "model.dropout=0.1", "train.micro_batch=1", *settings)
    whole = Ranks(4, words(*more, out=tmp_path / "whole"), tmp_path / "logs-whole")
    cut = Ranks(4, words(*more, out=tmp_path / "cut"), tmp_path / "logs-cut")
    cut.wait_for("step 6/")
    cut.send(1, signal.SIGTERM)
    assert cut.finish() == [75, 0, 0, 0]
    assert whole.finish() == [0] * 4
    assert Ranks(4, words(*more, out=tmp_path / "cut"), tmp_path / "logs-cut").finish() == [0] * 4
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    config = tiny(prepared("bytes"), "train.tokens_per_step=256", *more)
    states = [final_state(config, tmp_path / name) for name in ("cut", "whole")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("optim.name=muon",), ("optim.name=muon", "distributed.layout=fsdp")])
def test_a_run_resumes_with_other_numbers_of_processes(settings: tuple[str, ...], tmp_path: Path) -> None:
    run, more = tmp_path / "run", ("train.steps=40", "log.every=1", "train.micro_batch=1", "log.save_every=0")
    more = (*more, *settings)
    assert Ranks(1, words(*more, out=tmp_path / "whole"), tmp_path / "logs").finish() == [0]
    for world, text in ((4, "step 5/"), (2, "step 12/"), (1, "step 20/")):
        ranks = Ranks(world, words(*more, out=run), tmp_path / f"logs-{world}")
        ranks.wait_for(text)
        ranks.send(world - 1, signal.SIGTERM)
        assert ranks.finish() == [75] + [0] * (world - 1), ranks.printed()
    assert Ranks(4, words(*more, out=run), tmp_path / "logs").finish() == [0] * 4
    assert_close(run, tmp_path / "whole")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_others_at_once(rank: int, tmp_path: Path) -> None:
    ranks, _ = stop_in("step 3/", rank, signal.SIGKILL, tmp_path)
    killed = time.monotonic()
    codes = ranks.finish(30)
    assert time.monotonic() - killed < 20
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    assert ranks.printed(1 - rank).splitlines()[-1] == f"error: rank {rank} died; all processes end"


def _nan_at_step(rank: int) -> None:
    """Let the first norm of the third step overflow on rank 1."""
    forward, calls = nn.LayerNorm.forward, 0

    def overflowing(self: nn.LayerNorm, x: Tensor) -> Tensor:
        nonlocal calls
        calls += self.training
        return forward(self, x) * (float("nan") if calls > 21 else 1.0)

    if rank == 1:
        nn.LayerNorm.forward = overflowing  # type: ignore[method-assign]


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_names_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = Ranks(2, words("log.every=1", out=run), tmp_path / "logs", prepare_child=_nan_at_step)
    assert ranks.finish(60) == [1, 1]
    (line,) = [line for line in ranks.printed().splitlines() if line.startswith("error")]
    host = socket.gethostname()
    assert f"rank 1 on {host}: the loss is not finite, first in the output of transformer.h.0.ln_1" in line
    assert "rank 0" not in line


def _fails_alone(rank: int) -> None:
    """Let rank 1 run out of memory in its second step."""
    forward, calls = nn.LayerNorm.forward, 0

    def failing(self: nn.LayerNorm, x: Tensor) -> Tensor:
        nonlocal calls
        calls += self.training
        if calls > 12:
            raise MemoryError("out of memory")
        return forward(self, x)

    if rank == 1:
        nn.LayerNorm.forward = failing  # type: ignore[method-assign]


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_and_says_whose_it_is(tmp_path: Path) -> None:
    ranks = Ranks(2, words(*LONG, out=tmp_path / "run"), tmp_path / "logs", prepare_child=_fails_alone)
    assert ranks.finish(60) == [1, 1]
    assert f"error: rank 1 on {socket.gethostname()}: out of memory" in ranks.printed(1)
    assert "Traceback" not in ranks.printed()


@pytest.mark.parametrize(
    ("world", "setting", "advice"),
    [
        (3, "train.micro_batch=2", "set train.tokens_per_step=192 or train.tokens_per_step=384"),
        (4, "train.micro_batch=4", "set train.micro_batch=2 or train.tokens_per_step=512"),
    ],
)
def test_a_step_that_the_ranks_cannot_share_is_one_line(world: int, setting: str, advice: str, tmp_path: Path) -> None:
    ranks = Ranks(world, words(setting, out=tmp_path / "run"), tmp_path / "logs")
    assert ranks.finish(60) == [2] * world
    (line,) = ranks.printed().splitlines()
    assert line.startswith("error: train.tokens_per_step=256: is no multiple")
    assert line.endswith(advice)
    assert not (tmp_path / "run").exists()


def test_a_claimed_folder_is_refused_by_all_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").touch()
    ranks = Ranks(2, words(out=tmp_path / "run"), tmp_path / "logs")
    assert ranks.finish(60) == [2, 2]
    (line,) = ranks.printed().splitlines()
    assert "thesis.tex" in line


def _without(absent: int, rank: int) -> None:
    """End a rank before it meets the others."""
    if rank == absent:
        os._exit(7)


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    command = words("distributed.rendezvous_timeout=3", out=tmp_path / "run")
    ranks = Ranks(3, command, tmp_path / "logs", prepare_child=partial(_without, 1))
    assert ranks.finish(60) == [1, 7, 1]
    assert "error: rank 1 did not come within 3 s" in ranks.printed(0)


def test_without_rank_0_the_others_end_in_time_with_a_line(tmp_path: Path) -> None:
    command = words("distributed.rendezvous_timeout=2", out=tmp_path / "run")
    ranks = Ranks(2, command, tmp_path / "logs", prepare_child=partial(_without, 0))
    assert ranks.finish(60) == [7, 1]
    (line,) = ranks.printed(1).splitlines()
    assert "rank 0 did not answer at 127.0.0.1:" in line
    assert "within 2 s" in line


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "gpt2-nano"],
        ["generate", "RUN", "text"],
        slow(["export", "RUN", "OUT"]),
        slow(["finetune", "RUN", "RTE"]),
        slow(["bench", "memory"]),
        slow(["data", "prepare", "a.txt", "--out", "OUT"]),
    ],
)
def test_commands_of_one_process_refuse_to_start_as_several(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key, value in {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n1")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2")
    result = slope(*[str(tmp_path / "out") if word == "OUT" else word for word in command])
    assert (result.code, result.out) == (2, "")
    assert "works in one; start a single task" in result.err
    assert not (tmp_path / "out").exists()


def test_a_group_of_one_process_does_nothing() -> None:
    group, calls = Group(), list[int]()
    tensor = torch.ones(3)
    work: Callable[[], Any] = lambda: calls.append(1) or 5  # noqa: E731
    assert (group.first(work), group.agreed(work), calls) == (5, 5, [1, 1])
    assert group.gather("x") == ["x"]
    assert group.mean_(tensor) is tensor
    assert group.stopped_by(None) == ""
    with pytest.raises(ZeroDivisionError):
        group.first(lambda: 1 // 0)


# -------------------------------------------------------------------------------------------------- split weights

SPLIT = {
    "sparse, adapters join": ("train.steps=20", "adapters.start=0.5"),
    "rescaled": ("train.steps=12", "slope.backward_rescale=true", "slope.rescale=true"),
    "random masks": ("train.steps=12", "slope.backward_mask=random"),
    "wanda": ("train.steps=8", "sparsity.mask=wanda"),
    "sr_ste": ("method=sr_ste", "train.steps=12"),
    "dense": ("method=dense", "train.steps=12"),
    "dense, then sparse": ("train.steps=12", "sparsity.start=0.4", "adapters.start=0.7", "slope.rescale=true"),
    "sr_ste, then sparse": ("train.steps=12", "sparsity.start=0.4", "slope.before=sr_ste"),
    "dense, then sr_ste": ("method=sr_ste", "train.steps=12", "sparsity.start=0.4"),
    "fst": ("method=fst", "train.steps=12", "sparsity.start=0.2", "fst.dense_finish=0.3", "fst.mask_update_interval=2"),
    "sparse_relu2": ("model.activation=sparse_relu2", "train.steps=12", "method=dense"),
    "row masks": (
        "train.steps=12",
        "slope.row_mask_until=0.7",
        "slope.row_mask_update_interval=3",
        "adapters.start=0.5",
    ),
    "s_ste": ("method=s_ste", "train.steps=12", "sparsity.start=0.2", "s_ste.mvue=false"),
    "dense, then wanda": ("method=wanda", "train.steps=12", "sparsity.start=0.4"),
    "lamb": ("optim.name=lamb", "train.steps=12", "adapters.start=0.5", "optim.weight_decay=0.1"),
    "muon": ("optim.name=muon", "train.steps=12", "sparsity.start=0.3", "adapters.start=0.7"),
    "compiled": ("train.steps=8", "adapters.start=0.5", "train.compile=true"),
    "checkpointed": ("train.steps=8", "adapters.start=0.5", "train.activation_checkpointing=block"),
}


def _split_from_rank_0(group: Group, config: Config, layout: Layout) -> None:
    cpu = torch.device("cpu")
    sharding = Sharding(layout, group.ranks.world, cpu, None)
    model, _ = init.start(config, Path(), built_on(config, sharding, cpu), calibrate=lambda *_: {})
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"cpu" if group.ranks.first else "meta"}
    sharding.split(model)
    whole, _ = init.start(config, Path(), "cpu", calibrate=lambda *_: {})
    expected = dict([*whole.named_parameters(), *whole.named_buffers()])
    found = dict([*model.named_parameters(), *model.named_buffers()])  # one name each of tied ones
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.requires_grad == expected[name].requires_grad
        assert isinstance(tensor, DTensor) == (tensor.dim() > 1 and isinstance(tensor, nn.Parameter))
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(full, expected[name]), name
    others = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    assert not any(value.is_meta for value in others)


@pytest.mark.parametrize("model", ["gpt2-nano", *map(slow, ("llama3-8b", "bert-base", "model.init"))])
def test_a_model_that_rank_0_alone_has_is_split_bit_for_bit(model: str, finished: Path) -> None:
    more, world = ["slope.backward_rescale=true", "adapters.start=0"], 2
    if model == "model.init":
        model, more, world = "gpt2-nano", [f"model.init={finished}", "adapters.start=0", "train.seed=7"], 3
    together(world, _split_from_rank_0, tiny("unused", *more, model=model), Layout("fsdp", world, "block"))


@pytest.mark.slow
@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("method", SPLIT)
def test_split_weights_make_the_run_of_one_process(method: str, gather: str, tmp_path: Path) -> None:
    settings = (*SPLIT[method], "train.micro_batch=1")
    whole = not_split(words, *settings, world=2 if method == "fst" else 1)  # each rank prunes at random
    for world in (2, 4) if method == "sparse, adapters join" else (2,):
        split = ("distributed.layout=fsdp", f"distributed.gather={gather}")
        ranks = Ranks(world, words(*settings, *split, out=tmp_path / f"{world}"), tmp_path / f"logs-{world}")
        assert ranks.finish() == [0] * world, ranks.printed()
        assert_close(tmp_path / f"{world}", whole)
        ours, theirs = (dict(load_model(run).model.named_buffers()) for run in (tmp_path / f"{world}", whole))
        assert ours.keys() == theirs.keys()
        pairs = [(mask, theirs[name]) for name, mask in ours.items() if "mask" in name]
        differ = sum(int((a != b).sum()) for a, b in pairs)
        # Masks chosen from trained weights, which differ by rounding, may differ where two weights are nearly equal.
        trained = any(key.startswith(("method=", "sparsity.start", "slope.row_mask")) for key in settings)
        assert differ <= (sum(mask.numel() for mask, _ in pairs) / 500 if trained else 0)


@pytest.mark.parametrize(
    "settings",
    [
        ("sparsity.start=0.3",),
        slow(("method=wanda", "sparsity.start=0.3")),
        slow(("train.precision=fp8", "train.bf16_finish=0.3")),
    ],
)
def test_weights_gathered_in_16_bits_change_as_whole_ones(settings: tuple[str, ...], tmp_path: Path) -> None:
    for layout in ("ddp", "fsdp"):
        more = (f"distributed.layout={layout}", "train.precision=bf16", "train.steps=10", *settings)
        ranks = Ranks(1, words(*more, out=tmp_path / layout), tmp_path / f"logs-{layout}")
        assert ranks.finish() == [0], ranks.printed()
    assert_close(tmp_path / "fsdp", tmp_path / "ddp", 5e-3)


@pytest.mark.slow
def test_weights_split_within_nodes_make_the_run_of_one_process(tmp_path: Path) -> None:
    settings = ("train.steps=16", "sparsity.start=0.3", "adapters.start=0.5", "train.micro_batch=1")
    assert Ranks(1, words(*settings, out=tmp_path / "1"), tmp_path / "logs-1").finish() == [0]
    split = words(*settings, "distributed.layout=hsdp", out=tmp_path / "4")
    ranks = Ranks(4, split, tmp_path / "logs-4", nodes=2)
    assert ranks.finish() == [0] * 4, ranks.printed()
    assert "hsdp of 2" in ranks.printed(0)
    assert_close(tmp_path / "4", tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["opt-125m", "llama3-8b", "bert-base"])
def test_models_of_every_family_can_be_split(model: str, tmp_path: Path) -> None:
    settings = ("train.steps=8", "adapters.start=0.5")
    for world, split in ((1, ()), (2, ("distributed.layout=fsdp",))):
        ranks = Ranks(world, words(*settings, *split, model=model, out=tmp_path / f"{world}"), tmp_path / f"l{world}")
        assert ranks.finish() == [0] * world, ranks.printed()
    assert_close(tmp_path / "2", tmp_path / "1")


def test_rows_that_cannot_be_split_are_refused(tmp_path: Path) -> None:
    more = ("train.tokens_per_step=192", "distributed.layout=fsdp")
    ranks = Ranks(3, words(*more, out=tmp_path / "run"), tmp_path / "logs")
    assert ranks.finish() == [2, 2, 2]
    reason = "the rows of sparse layers cannot be split over 3 GPUs in groups of 8"
    assert ranks.printed(0).splitlines()[-1] == f"error: distributed.layout=fsdp: {reason}"
