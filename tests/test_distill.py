"""Runs that learn from a teacher: their loss, the teacher that they keep, and what cannot be one."""

import shutil
from pathlib import Path

import pytest
import torch
from support.runs import assert_same_run, records, slope, tiny, trained

from slope_cli.checkpoint import base_model, store
from slope_cli.checkpoint.load import load_model
from slope_cli.checkpoint.verify import check
from slope_cli.errors import SlopeError, UsageError
from slope_cli.methods import phases_of
from slope_cli.models.loss import kl_divergence
from slope_cli.train.dry_run import describe
from slope_cli.train.loop import Trainer, pretrain

PLAIN = ("model.dropout=0", "train.tokens_per_step=64")


@pytest.fixture(scope="module")
def dense(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run, the teacher."""
    run = tmp_path_factory.mktemp("teacher") / "dense"
    pretrain(tiny(data, *PLAIN, "method=dense", "train.seed=5"), run)
    return run


def test_the_loss_is_the_text_s_and_the_teacher_s(data: Path, dense: Path, tmp_path: Path) -> None:
    config = tiny(data, *PLAIN, f"distill.teacher={dense}", "distill.share=0.7", "train.steps=1")
    trainer = Trainer(config, tmp_path / "run", torch.device("cpu"))
    (batch,) = trainer.batches.of_step(0)
    with torch.no_grad():
        student, teacher = (m(batch["input_ids"]).logits for m in (trainer.model, load_model(dense).model.eval()))
        loss = torch.nn.functional.cross_entropy(student.flatten(0, 1), batch["labels"].flatten())
        log_p, log_q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(kl_divergence(student, teacher, batch["labels"]).double(), divergence, rtol=1e-4, atol=0)
    output, _ = trainer.train_step()
    assert output.loss == pytest.approx(float(loss), rel=1e-5)
    assert output.total == pytest.approx(0.3 * float(loss) + 0.7 * float(divergence), rel=1e-5)


def test_a_model_that_is_its_teacher_has_nothing_to_learn_from_it(data: Path, dense: Path, tmp_path: Path) -> None:
    pretrain(tiny(data, *PLAIN, "method=dense", f"model.init={dense}", "distill.share=1"), tmp_path / "run")
    first = next(r for r in records(tmp_path / "run") if r["kind"] == "train")
    assert abs(first["total"]) < 1e-6
    assert first["loss"] > 1


def test_a_sparse_model_learns_from_the_dense_one_that_it_was(data: Path, dense: Path, tmp_path: Path) -> None:
    config = tiny(data, f"model.init={dense}", "distill.share=0.5")
    assert [phase.name for phase in phases_of(config)] == [
        "sparse, from a teacher",
        "sparse, with adapters, from a teacher",
    ]
    pretrain(config, tmp_path / "run")
    assert f"learns from                 {dense}, 50% of the loss" in "\n".join(describe(config)[1])
    totals = [r["total"] for r in records(tmp_path / "run") if r["kind"] == "train"]
    assert totals[-1] < totals[0]


def test_a_run_resumes_bit_for_bit_without_the_folder_of_its_teacher(data: Path, dense: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense, tmp_path / "teacher")
    config = tiny(data, f"distill.teacher={folder}", "distill.share=0.5", "log.keep=3")
    pretrain(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in ("08", "12"):
        shutil.rmtree(tmp_path / f"resumed/checkpoints/step-000000{step}")
    shutil.rmtree(folder)
    pretrain(config, tmp_path / "resumed")
    assert_same_run(config, tmp_path / "resumed", tmp_path / "whole")
    assert check(tmp_path / "resumed")["faults"] == []
    assert slope("generate", tmp_path / "resumed", "The ", "--tokens", "2").code == 0


def test_a_damaged_teacher_is_seen(data: Path, dense: Path, tmp_path: Path) -> None:
    config, run = tiny(data, f"distill.teacher={dense}", "distill.share=0.5", "train.steps=4"), tmp_path / "run"
    pretrain(config, run)
    damaged = next(path for path in (run / store.BASE).iterdir() if path.suffix == ".distcp")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    assert any("base" in fault for fault in check(run)["faults"])
    with pytest.raises(SlopeError, match="base"):
        pretrain(tiny(data, f"distill.teacher={dense}", "distill.share=0.5", "train.steps=6"), run)


def test_a_sparse_teacher_is_kept_as_the_dense_model_that_it_computes(data: Path, tmp_path: Path) -> None:
    sparse = trained()
    pretrain(tiny(data, f"distill.teacher={sparse}", "distill.share=1", "train.steps=1"), tmp_path / "run")
    ids = torch.arange(12)[None]
    kept, own = base_model.read(tmp_path / "run", "cpu").eval(), load_model(sparse).model.eval()
    torch.testing.assert_close(kept(ids).logits, own(ids).logits)


def test_what_cannot_teach_is_refused(data: Path, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"distill\.share=0\.5: needs a teacher"):
        tiny(data, "distill.share=0.5")
    for more, message in (
        ((f"distill.teacher={tmp_path / 'none'}",), "distill.teacher="),
        ((f"distill.teacher={trained('bert-base')}",), "next token"),
        ((f"distill.teacher={dense}", "model.overrides.vocab_size=300"), "logits of"),
    ):
        with pytest.raises(SlopeError, match=message):
            pretrain(tiny(data, "distill.share=0.5", *more), tmp_path / "run")
