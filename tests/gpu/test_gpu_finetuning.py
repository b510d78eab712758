"""On a GPU, too, fine-tuning keeps every zero, and what is written is what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import slope
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer, TrainingArguments

from slope_cli.data.tokenizer import load_tokenizer
from sparse_kernels import sparse_layers, sparsify, to_dense
from sparse_kernels.trainer import SparsityCallback


def model() -> PreTrainedModel:
    """Of sides that the kernels take."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=272, n_positions=256, n_embd=256, n_layer=2, n_head=4))


def exported(folder: Path) -> Path:
    """A 2:4 model as an export has it."""
    sparse = model()
    sparsify(sparse)
    to_dense(sparse)
    sparse.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


def zeros_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    found = {name: tensor.view(torch.int32) == 0 for name, tensor in tensors.items() if tensor.dim() == 2}
    return {name: zeros for name, zeros in found.items() if zeros.float().mean() >= 0.5}


@pytest.mark.parametrize("more", [(), ("--lora", "16")], ids=["weights", "adapters"])
def test_sft(more: tuple[str, ...], tmp_path: Path) -> None:
    rows = [{"prompt": ask, "completion": ask.upper() * 20} for ask in "abcdefgh" * 16]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out", "--lr", "1e-3", "--micro-batch", "16")
    result = slope("finetune", exported(tmp_path / "export"), "SFT", *words, *more, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["after"]["loss"] < found["before"]["loss"]
    before, after = zeros_of(tmp_path / "export"), zeros_of(tmp_path / "out" / "model")
    assert len(before) == found["sparse_layers"] >= 7
    assert all(torch.equal(zeros, after[name]) for name, zeros in before.items())


def test_trainer(tmp_path: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(exported(tmp_path / "export"))
    callback = SparsityCallback(trained, adapter_rank=16, adapters_from=5)
    ids = torch.randint(256, (256, 128), generator=torch.Generator().manual_seed(0)).unbind()
    usual: dict[str, Any] = {"max_steps": 10, "per_device_train_batch_size": 16, "bf16": True, "report_to": "none"}
    rows = [{"input_ids": x, "labels": x} for x in ids]
    args = TrainingArguments(str(tmp_path / "run"), **usual)
    assert args.n_gpu > 0  # it is found when it is asked for
    args._n_gpu = 1  # where a process sees several, the Trainer would use all of them
    Trainer(trained, args, train_dataset=rows, callbacks=[callback]).train()
    callback.save_pretrained(tmp_path / "saved")
    before, after = zeros_of(tmp_path / "export"), zeros_of(tmp_path / "saved")
    assert all(torch.equal(zeros, after[name]) for name, zeros in before.items())
    for _, layer in sparse_layers(trained):
        layer.validate()
        assert layer.adapter is not None
