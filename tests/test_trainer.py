"""SparsityCallback in a Trainer: zeros stay, masks follow, adapters join, checkpoints resume bit for bit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import SENTENCES
from support.marks import slow
from support.models import tiny_model
from support.runs import slope, trained
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from slope_cli.checkpoint.load import load_model
from sparse_kernels import adapters_of, sparse_layers, sparsify, update_masks
from sparse_kernels.masks import double_prune
from sparse_kernels.trainer import SparsityCallback

ROOT = Path(__file__).parent.parent
STEPS = 6
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # of a Trainer without GPU
]
ROWS = [
    {"input_ids": ids, "labels": ids} for ids in torch.randint(3, 96, (64, 16), generator=torch.Generator()).unbind()
]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    usual = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    usual |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    return TrainingArguments(str(folder), **(usual | more))


def trainer(model: PreTrainedModel, folder: Path, callback: TrainerCallback, **more: Any) -> Trainer:
    return Trainer(model, arguments(folder, **more), train_dataset=ROWS, callbacks=[callback])


@pytest.mark.parametrize("family", ["gpt2-nano", slow("llama3-8b")])
def test_a_dense_model_becomes_sparse_and_is_saved_with_its_zeros(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    callback = SparsityCallback(model, exclude_modules=["1.*down_proj|1.*mlp.c_proj"])
    masks = {name: layer.row_mask() for name, layer in sparse_layers(model)}
    loop = trainer(model, tmp_path, callback)
    loop.train()
    for name, layer in sparse_layers(model):
        assert torch.equal(layer.row_mask(), masks[name])
        assert torch.equal(layer.backward_mask(), double_prune(layer.weight, layer.row_mask(), 2, 4))
    loop.save_model(tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    saved = loaded.state_dict()
    assert saved.keys() == dense.keys()
    assert len(masks) >= 6
    for name, mask in masks.items():
        weight = saved[f"{name}.weight"].t() if "gpt2" in family else saved[f"{name}.weight"]
        assert (weight.contiguous().view(torch.int32)[~mask] == 0).all()
        before = dense[f"{name}.weight"].t() if "gpt2" in family else dense[f"{name}.weight"]
        assert not torch.isclose(weight[mask], before[mask]).all()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_input_gradient_is_double_pruned_and_the_steps_are_those_of_a_loop_by_hand(tmp_path: Path) -> None:
    model, other = tiny_model("gpt2-nano"), tiny_model("gpt2-nano")
    plain = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0}
    seen: list[torch.Tensor] = []

    class Batches(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **more: Any) -> Any:
            seen.append(inputs["input_ids"])
            return super().compute_loss(model, inputs, **more)

    callback = SparsityCallback(model, mask_update_interval=2)
    Batches(model, arguments(tmp_path, **plain), train_dataset=ROWS, callbacks=[callback]).train()
    sparsify(other)
    other.train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    for number, ids in enumerate(seen, 1):
        other(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 2 == 0:
            update_masks(other)
    assert len(seen) == STEPS
    ours, theirs = dict(sparse_layers(model)), dict(sparse_layers(other))
    for name, layer in ours.items():
        torch.testing.assert_close(layer.values, theirs[name].values, rtol=1e-4, atol=1e-5)


def test_an_export_keeps_exactly_its_zeros(tmp_path: Path) -> None:
    run = trained("llama3-8b", "adapters.rank=0")
    assert slope("export", run, tmp_path / "export").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    SparsityCallback(model)
    found, expected = dict(sparse_layers(model)), dict(sparse_layers(load_model(run).model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(layer.row_mask_bits, expected[name].row_mask_bits) for name, layer in found.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    with pytest.raises(ValueError, match="is sparse already, and sparse layers keep their zeros: leave out n"):
        SparsityCallback(again, n=1)


def test_adapters_join_and_peft_reads_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("gpt2-nano")
    callback = SparsityCallback(model, adapter_rank=4, adapters_from=0.5, adapter_alpha=8)
    seen: list[int] = []

    class Counting(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(len(adapters_of(model)))

    loop = trainer(model, tmp_path, callback)
    loop.add_callback(Counting)
    loop.train()
    count = len(list(sparse_layers(model)))
    assert seen == [0, 0, 0, count, count, count]
    for adapter in adapters_of(model).values():
        assert adapter.lora_B.abs().max() > 0
        assert adapter.scaling == 2
    callback.save_pretrained(tmp_path / "saved")
    ids = torch.arange(5, 25)[None]
    bare, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "saved" / "adapter").eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stop", [slow(2), 5], ids=["before adapters", "after them"])
def test_a_checkpoint_resumes_bit_for_bit(stop: int, tmp_path: Path) -> None:
    def run(folder: str, resume: bool = False, **more: Any) -> dict[str, torch.Tensor]:
        model = tiny_model("gpt2-nano")
        callback = SparsityCallback(model, adapter_rank=4, adapters_from=4)
        loop = trainer(model, tmp_path / folder, callback, seed=3, **more)
        loop.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}") if resume else None)
        return {name: tensor.clone() for name, tensor in model.named_parameters()} | dict(model.named_buffers())

    whole = run("whole", save_strategy="steps", save_steps=stop)
    resumed = run("resumed", resume=True)
    assert whole.keys() == resumed.keys()
    assert any(".adapter." in name for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_the_best_model_is_loaded_in_the_end(tmp_path: Path) -> None:
    """Its learning rate is so high that the first checkpoint is the best."""
    model = tiny_model("gpt2-nano")
    more = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
    more |= {"save_steps": 2, "eval_steps": 2, "learning_rate": 0.5}
    loop = Trainer(
        model,
        arguments(tmp_path, **more),
        train_dataset=ROWS,
        eval_dataset=ROWS[:8],
        callbacks=[SparsityCallback(model)],
    )
    loop.train()
    best = Path(loop.state.best_model_checkpoint)
    expected = AutoModelForCausalLM.from_pretrained(best).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


RANK = """
import sys
import torch
import torch.distributed as dist
from test_trainer import SparsityCallback, double_prune, sparse_layers, tiny_model, trainer, Path
torch.set_num_threads(1)
model = tiny_model("gpt2-nano")
callback = SparsityCallback(model, adapter_rank=4, adapters_from=0)
loop = trainer(model, Path(sys.argv[1]), callback, ddp_broadcast_buffers=False, ddp_backend="gloo")
loop.train()
assert loop.args.world_size == 2
for name, layer in sparse_layers(model):
    found = [None, None]
    dist.all_gather_object(found, (layer.values.detach(), layer.backward_mask_bits, layer.adapter.lora_B.detach()))
    assert all(torch.equal(*pair) for pair in zip(*found)), name
    assert torch.equal(layer.backward_mask(), double_prune(layer.weight, layer.row_mask(), 2, 4)), name
loop.save_model(Path(sys.argv[1]) / "saved")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_same_weights_and_masks(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "rank.py", "out"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "saved" / "model.safetensors").is_file()


def test_a_dense_weight_with_other_zeros_is_refused() -> None:
    model = tiny_model("gpt2-nano")
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    SparsityCallback(model)
    with pytest.raises(RuntimeError, match="the weight is not zero where the layer is"):
        model.load_state_dict(dense)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model, other = tiny_model("gpt2-nano"), tiny_model("gpt2-nano")
    callback = SparsityCallback(model, adapter_rank=4)
    with pytest.raises(ValueError, match="is not the one that this SparsityCallback was made with"):
        trainer(other, tmp_path, callback).train()
    model.transformer.h[1].mlp.c_fc.values.requires_grad_(False)
    callback = SparsityCallback(model, adapter_rank=4, adapters_from=1)
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc is not trained by the optimizer"):
        trainer(model, tmp_path, callback).train()
    for more, fault in (
        ({"fsdp": True}, "leave out fsdp"),
        ({"n_gpu": 2}, "one process for each GPU"),
        ({"world_size": 2}, "ddp_broadcast_buffers=False is missing"),
        ({"world_size": 2, "ddp_broadcast_buffers": False}, "set adapters_from=0"),
    ):
        args: Any = type("Arguments", (), {**ARGUMENTS, **more})
        with pytest.raises(ValueError, match=fault):
            SparsityCallback(tiny_model("gpt2-nano"), adapter_rank=4).on_init_end(args, loop_state(), loop_state())


ARGUMENTS = {"fsdp": None, "deepspeed": None, "n_gpu": 1, "world_size": 1, "ddp_broadcast_buffers": None}


def loop_state() -> Any:
    return None


def test_the_documents_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "docs" / "finetuning.md").read_text().split("```python\n")[2].split("```")[0]
    assert slope("export", trained("llama3-8b", "adapters.rank=0"), tmp_path / "exported").code == 0
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 8))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(source, "docs/finetuning.md", "exec"), names)
    before, after = (dict(sparse_layers(load_model(tmp_path / name).model)) for name in ("exported", "continued"))
    assert before.keys() == after.keys()
    for name, layer in after.items():
        assert torch.equal(layer.row_mask_bits, before[name].row_mask_bits)
        assert not torch.equal(layer.values, before[name].values)
        assert layer.adapter is not None
