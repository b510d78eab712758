"""Weights split over one process, on a GPU: FSDP2 around sparse layers, its gathers, and what the kernels read."""

import contextlib
from pathlib import Path

import pytest
import torch
from support.data import write_data

from slope_cli.config import configs
from slope_cli.distributed.layouts import Layout, memory_of
from slope_cli.methods.accounting import sizes_of
from slope_cli.report import metrics
from slope_cli.train.loop import Trainer, pretrain
from sparse_kernels import sparse_layers
from sparse_kernels.packed import packed_layers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # Inductor's own
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
CHANGING = [("sparsity.start=0.3",), ("optim.name=lamb",), ("optim.name=muon",), ("method=wanda", "sparsity.start=0.3")]


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


@pytest.mark.parametrize("mode", ["selective", "block"])
def test_blocks_that_are_computed_again_are_packed_again(
    data: Path, whole: list[float], tmp_path: Path, mode: str
) -> None:
    split = ("distributed.layout=fsdp", "distributed.gather=block", "train.compile=false")
    found = losses(data, tmp_path / "run", *split, f"train.activation_checkpointing={mode}")
    assert max(abs(a - b) for a, b in zip(found, whole, strict=True)) < 5e-3


@pytest.mark.parametrize("gather", ["step", "block"])
def test_a_split_model_holds_the_packed_weights_that_a_dry_run_counts(data: Path, tmp_path: Path, gather: str) -> None:
    split = ("distributed.layout=fsdp", f"distributed.gather={gather}", "train.compile=false", "sparsity.backend=dense")
    words = [*WORDS, f"data.path={data}", *split, "train.micro_batch=2", "adapters.rank=0"]
    trainer = Trainer(configs.load("gpt2-nano", words), tmp_path / "run", torch.device("cuda", 0))
    trainer.model.train()
    with contextlib.closing(trainer.batches):
        for _ in range(2):  # of four micro-batches each
            trainer.train_step()
        assert trainer.validate() is not None
    found = {packed for _, x in sparse_layers(trainer.model) for packed in packed_layers(x.row_mask_bits)}
    matrices = [matrix for packed in found for matrix in (packed.forward, packed.backward)]
    assert len({matrix.target.data_ptr() for matrix in matrices}) == len(matrices) == 2 * len(found)
    entries = sum(matrix.rows * matrix.columns for matrix in matrices)  # of dense matrices, whatever was measured
    counted = memory_of(sizes_of(trainer.model, trainer.config), Layout("fsdp", 1, gather)).packed
    assert entries * 9 / 8 == counted


@pytest.mark.parametrize("more", CHANGING)
def test_a_split_model_changes_its_layers_and_trains_by_lamb_as_a_whole_one(
    data: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    whole = losses(data, tmp_path / "whole", "train.compile=false", *more)
    found = losses(data, tmp_path / "split", "train.compile=false", "distributed.layout=fsdp", *more)
    assert len(found) == len(whole)
    assert max(abs(a - b) for a, b in zip(found, whole, strict=True)) < 5e-3


def test_a_split_model_linearizes_as_a_whole_one(data: Path, tmp_path: Path) -> None:
    losses(data, tmp_path / "base", "train.compile=false")
    common = ("method=linearize", f"model.init={tmp_path / 'base'}", "distill.share=0.5", "linearize.window=16")
    common = (*common, "train.compile=false")
    whole = losses(data, tmp_path / "whole", *common)
    for gather in ("step", "block"):
        found = losses(data, tmp_path / gather, *common, "distributed.layout=fsdp", f"distributed.gather={gather}")
        assert len(found) == len(whole) > 0
        assert max(abs(a - b) for a, b in zip(found, whole, strict=True)) < 5e-3, gather


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
