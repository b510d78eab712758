"""Weights split over one process, on a GPU: FSDP2 around sparse layers, its gathers, and what the kernels read."""

from pathlib import Path

import pytest
import torch
from support.data import write_data

from slope_cli.config import configs
from slope_cli.report import metrics
from slope_cli.train.loop import pretrain

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
WORDS = (
    "model.overrides.n_layer=3",
    "model.overrides.n_embd=256",
    "model.overrides.n_head=4",
    "model.dropout=0",
    "train.steps=12",
    "train.micro_batch=4",
    "train.seq_len=128",
    "train.tokens_per_step=1024",
    "train.cuda_graph=false",
    "adapters.start=0.5",
    "adapters.rank=16",
    "optim.lr=1e-3",
    "log.val_tokens=4096",
    "log.save_every=0",
    "log.sample_tokens=8",
)
CHANGING = [("sparsity.start=0.3",), ("optim.name=lamb",), ("method=wanda", "sparsity.start=0.3")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def losses(data: Path, run: Path, *more: str) -> list[float]:
    pretrain(configs.load("gpt2-nano", [*WORDS, f"data.path={data}", *more]), run)
    return [record["loss"] for record in metrics.read(run) if record["kind"] in ("train", "val")]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(data, tmp_path_factory.mktemp("whole") / "run", "train.compile=false")


@pytest.mark.parametrize("gather", ["step", "block"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_split_model_trains_as_a_whole_one(
    data: Path, whole: list[float], tmp_path: Path, gather: str, compiled: bool
) -> None:
    split = ("distributed.layout=fsdp", f"distributed.gather={gather}", f"train.compile={compiled}")
    found = losses(data, tmp_path / "run", *split)
    assert len(found) == len(whole)
    assert max(abs(a - b) for a, b in zip(found, whole, strict=True)) < 5e-3  # bf16: as two sizes of micro-batch


@pytest.mark.parametrize("more", CHANGING)
def test_a_split_model_changes_its_layers_and_trains_by_lamb_as_a_whole_one(
    data: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    whole = losses(data, tmp_path / "whole", "train.compile=false", *more)
    found = losses(data, tmp_path / "split", "train.compile=false", "distributed.layout=fsdp", *more)
    assert len(found) == len(whole)
    assert max(abs(a - b) for a, b in zip(found, whole, strict=True)) < 5e-3


@pytest.mark.parametrize("gather", ["step", "block"])
def test_a_split_model_linearizes_as_a_whole_one(data: Path, tmp_path: Path, gather: str) -> None:
    losses(data, tmp_path / "base")
    common = ("method=linearize", f"model.init={tmp_path / 'base'}", "linearize.distill=0.5", "linearize.window=16")
    common = (*common, "train.compile=false")
    whole = losses(data, tmp_path / "whole", *common)
    found = losses(data, tmp_path / "split", *common, "distributed.layout=fsdp", f"distributed.gather={gather}")
    assert len(found) == len(whole) > 0
    assert max(abs(a - b) for a, b in zip(found, whole, strict=True)) < 5e-3


@pytest.mark.parametrize("gather", ["step", "block"])
def test_a_split_model_resumes_to_the_same_bits(data: Path, tmp_path: Path, gather: str) -> None:
    split = (
        "distributed.layout=fsdp",
        f"distributed.gather={gather}",
        "train.compile=false",
        "train.deterministic=true",
    )
    once = losses(data, tmp_path / "once", *split)
    config = configs.load("gpt2-nano", [*WORDS, f"data.path={data}", *split, "log.save_every=7"])
    pretrain(config, tmp_path / "again")
    newest = max((tmp_path / "again/checkpoints").iterdir())
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    pretrain(config, tmp_path / "again")
    again = [record["loss"] for record in metrics.read(tmp_path / "again") if record["kind"] in ("train", "val")]
    assert again == once


def test_two_sizes_of_micro_batch_differ_as_much(data: Path, whole: list[float], tmp_path: Path) -> None:
    """What the tolerance above is measured by."""
    found = losses(data, tmp_path / "run", "train.compile=false", "train.micro_batch=2")
    assert 0 < max(abs(a - b) for a, b in zip(found, whole, strict=True)) < 5e-3
    assert torch.cuda.is_available()
