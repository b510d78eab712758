"""The loop: what a step computes, when it refuses to, the adapters' entry, and the folder of a run."""

import json
import math
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import write_data
from support.processes import finish, start
from support.runs import GOLDEN, final_state, golden_losses, records, tiny
from torch import Tensor
from torch.nn import functional as F

from slope_cli.checkpoint import run_folder, store
from slope_cli.checkpoint.load import load_model
from slope_cli.config import configs
from slope_cli.config.schema import Config
from slope_cli.data.batches import Blocks, sample_indices
from slope_cli.data.dataset import MANIFEST, open_dataset
from slope_cli.data.prepare import prepare
from slope_cli.errors import SlopeError, UsageError
from slope_cli.methods import optim, phases_of
from slope_cli.methods.phases import ADAPTERS
from slope_cli.models.loss import forward, loss_fn
from slope_cli.report import metrics
from slope_cli.report.loggers import TENSORBOARD
from slope_cli.train.loop import Trainer, pretrain
from slope_cli.train.step import Step, StepOutput, step_seed
from slope_cli.utils.environment import git_commit, source_version
from sparse_kernels import masked_layers, sparse_layers
from sparse_kernels.masks import nm_mask

CPU = torch.device("cpu")
LAYER = "transformer.h.1.mlp.c_fc"


def trainer(config: Config, run: Path, steps: int = 0) -> Trainer:
    """A run after so many steps, without its log and checkpoints."""
    t = Trainer(config, run, CPU)
    t.model.train()
    take(t, steps)
    return t


def take(t: Trainer, steps: int) -> list[StepOutput]:
    """The next steps, in the phase of each."""
    outputs = []
    for _ in range(steps):
        if (to := t.phases.at(t.step)) != t.phase:
            t.enter(to)
        outputs.append(t.train_step()[0])
    return outputs


def state(t: Trainer) -> dict[str, Tensor]:
    tensors = store.state_tensors(t.model, t.optimizer)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# -------------------------------------------------------------------------------------------------------- a step


def test_golden_losses(tmp_path: Path) -> None:
    """As they were when `cd tests && python -m support.runs` wrote them: a change of the mathematics shows here."""
    assert golden_losses(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)


def test_accumulation_is_the_same_update_as_one_big_micro_batch(data: Path, tmp_path: Path) -> None:
    whole, parts = (
        trainer(tiny(data, "model.dropout=0", f"train.micro_batch={size}"), tmp_path, steps=1) for size in (4, 1)
    )
    assert (whole.config.train.accumulation(), parts.config.train.accumulation()) == (1, 4)
    before, after = state(whole), state(parts)
    for name in (name for name in before if name.endswith("exp_avg")):
        torch.testing.assert_close(before[name], after[name], rtol=1e-4, atol=1e-8)
    for ours, theirs in zip(take(whole, 3), take(parts, 3), strict=True):
        assert ours[:3] == pytest.approx(theirs[:3], rel=1e-3)


@pytest.mark.parametrize("clip", [0, 0.01, 1000])
def test_the_gradient_is_clipped_to_the_norm_and_logged_as_it_was(data: Path, tmp_path: Path, clip: float) -> None:
    t = trainer(tiny(data, f"optim.clip={clip}"), tmp_path)
    norm = take(t, 1)[0].record(layers=False)["grad_norm"]
    mean = [s["exp_avg"] / 0.1 for s in t.optimizer.state.values()]  # after one step, a tenth of the gradient
    used = torch.stack([g.norm() for g in mean]).norm().item()
    assert norm > 0.1
    assert used == pytest.approx(0.01 if clip == 0.01 else norm, rel=1e-3)


def test_a_step_is_a_function_of_its_number(data: Path, tmp_path: Path) -> None:
    """Nothing else that draws random numbers in between matters, dropout on."""
    first, second = (trainer(tiny(data), tmp_path) for _ in range(2))
    for step in range(3):
        torch.manual_seed(step * 7)
        torch.rand(step + 1)
        assert take(first, 1) == take(second, 1)
    assert_equal(state(first), state(second))
    assert len({step_seed(seed, step) for seed in range(30) for step in range(30)}) == 900


def test_tokens_per_second_are_tokens_by_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Step.backward

    def slow(self: Step, *args: Any) -> Tensor:
        time.sleep(0.05)
        return backward(self, *args)

    monkeypatch.setattr(Step, "backward", slow)
    started = time.perf_counter()
    pretrain(tiny(data, "train.steps=4"), tmp_path / "run")
    took = time.perf_counter() - started
    speeds = [record["tokens_per_s"] for record in metrics.read(tmp_path / "run") if record["kind"] == "train"]
    seconds = [128 / speed for speed in speeds]
    assert min(seconds) >= 0.1  # two micro-batches of 64 tokens
    assert sum(seconds) <= took
    tokens = [record["tokens"] for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert tokens == [128, 256, 384, 512]


def test_the_validation_loss_is_the_mean_over_the_validation_text(data: Path, finished: Path) -> None:
    config, model = tiny(data), load_model(finished).model
    (file,) = open_dataset(data).val.values()
    blocks = Blocks([file], config.train.seq_len)
    chosen = [blocks[i * len(blocks) // 8] for i in range(8)]  # log.val_tokens = 8 · 32
    ids = torch.stack([torch.from_numpy(block) for block in chosen])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits.double()
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    record = [record for record in records(finished) if record["kind"] == "val"][-1]
    assert record["loss"] == pytest.approx(expected, rel=1e-5)
    assert record["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert record["by_source"] == {"text": record["loss"]}
    nats_per_byte = record["loss"] * file.header.tokens / file.header.text_bytes
    assert record["bits_per_byte"] == pytest.approx(nats_per_byte / math.log(2))


def test_fifty_steps_with_mask_updates_keep_masks_and_weights_together(data: Path, tmp_path: Path) -> None:
    t = trainer(tiny(data, "train.steps=50", "slope.mask_update_interval=10", "adapters.rank=0"), tmp_path)
    layers = dict(sparse_layers(t.model))
    rows = {name: layer.row_mask().clone() for name, layer in layers.items()}
    backward = {name: layer.backward_mask().clone() for name, layer in layers.items()}
    take(t, 50)
    for name, layer in layers.items():
        layer.validate()
        assert torch.equal(layer.row_mask(), rows[name])
        assert not torch.equal(layer.backward_mask(), backward[name])
        assert (layer.row_mask().unflatten(1, (-1, 4)).sum(-1) == 2).all()
        dense_OI = torch.zeros(layer.out_features, layer.in_features)
        dense_OI[layer.row_mask()] = layer.values.detach().flatten()
        X = torch.randn(5, layer.in_features, requires_grad=True)
        Y = layer(X)
        torch.testing.assert_close(Y, F.linear(X, dense_OI, layer.bias), rtol=1e-5, atol=1e-6)
        (dX,) = torch.autograd.grad(Y.sum(), X)
        twice_OI = dense_OI * layer.backward_mask()
        torch.testing.assert_close(dX, torch.ones_like(Y) @ twice_OI, rtol=1e-5, atol=1e-6)


def test_masks_are_updated_in_a_run_when_they_are_due(data: Path, tmp_path: Path) -> None:
    words = ("log.save_every=1", "log.keep=9", "train.steps=7", "adapters.rank=0")
    pretrain(tiny(data, *words), tmp_path / "run")
    at = {}
    for folder in store.folders(tmp_path / "run"):
        t = Trainer(tiny(data, *words), tmp_path / "run", CPU)
        store.restore(folder, t.model, t.optimizer)
        at[int(folder.name[-8:])] = {name: layer.backward_mask_bits for name, layer in sparse_layers(t.model)}
    changed = [step for step in range(2, 8) if not torch.equal(at[step - 1][LAYER], at[step][LAYER])]
    assert changed == [3, 6]


@pytest.mark.parametrize(
    "words", [("method=dense",), ("train.precision=bf16",), ("sparsity.n=1", "sparsity.mask=random")]
)
def test_other_ways_to_train_learn_too(data: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    pretrain(tiny(data, *words), tmp_path / "run")
    losses = [record["loss"] for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    joined = [record for record in records(tmp_path / "run") if record["kind"] == "phase"]
    assert len(joined) == (0 if "method=dense" in words else 1)
    assert all(
        t.dtype in (torch.float32, torch.uint8) for t in final_state(tiny(data, *words), tmp_path / "run").values()
    )


def test_a_bert_learns_and_writes_no_samples(bert_data: Path, tmp_path: Path) -> None:
    summary = pretrain(tiny(bert_data, "train.steps=20", model="bert-base"), tmp_path / "run")
    losses = [record["loss"] for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert "sample" not in summary


def test_a_bert_logs_the_loss_that_validation_measures_and_what_was_optimised(bert_data: Path, tmp_path: Path) -> None:
    """With two micro-batches: the first is the mean over the tokens of both, the second the mean over their pairs."""
    config = tiny(bert_data, "model.dropout=0", "train.steps=1", model="bert-base")
    t = trainer(config, tmp_path)
    with torch.no_grad():
        losses = [loss_fn(forward(t.model, batch), batch) for batch in t.batches.of_step(0)]
    assert [loss.sentence_loss is not None for loss in losses] == [True, True]
    targets = [loss.targets.item() for loss in losses]
    tokens = sum(loss.token_loss.item() * n for loss, n in zip(losses, targets, strict=True)) / sum(targets)
    pairs = sum(float(loss.sentence_loss or 0) for loss in losses) / 2
    pretrain(config, tmp_path / "run")
    (record,) = [record for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert record["loss"] == pytest.approx(tokens, rel=1e-5)
    assert record["total"] == pytest.approx(tokens + pairs, rel=1e-5)
    assert record["total"] > record["loss"] + 0.1


def test_a_causal_model_logs_one_loss(finished: Path) -> None:
    assert not any("total" in record for record in records(finished))


@pytest.mark.slow
def test_kernels_that_repeat_bit_for_bit_can_be_asked_for(data: Path, tmp_path: Path) -> None:
    assert finish(start(tiny(data, "train.deterministic=true", "train.steps=2"), tmp_path / "run")) == 0


# ------------------------------------------------------------------------------------- what is not finite


def test_a_loss_that_is_not_finite_stops_before_the_update(data: Path, tmp_path: Path) -> None:
    t = trainer(tiny(data), tmp_path, steps=2)
    with torch.no_grad():
        t.model.get_submodule(LAYER).bias[3] = math.inf
    before = state(t)
    with pytest.raises(
        SlopeError,
        match=rf"^the loss became non-finite at step 3: lower optim.lr, now 0.005 \(.* output of {LAYER}; nothing",
    ):
        take(t, 1)
    assert_equal(state(t), before)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("clip", [0, 1])
def test_a_gradient_that_is_not_finite_stops_before_the_update(
    data: Path, tmp_path: Path, value: float, clip: float
) -> None:
    t = trainer(tiny(data, f"optim.clip={clip}"), tmp_path, steps=2)
    t.model.get_parameter(f"{LAYER}.values").register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), value))
    before = state(t)
    with pytest.raises(
        SlopeError,
        match=rf"^the gradient became non-finite at step 3: .*gradient of {LAYER}.values is not finite \(1 in all\);",
    ):
        take(t, 1)
    assert_equal(state(t), before)


def test_a_run_that_blows_up_keeps_its_last_checkpoint(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, train_step = tmp_path / "run", Trainer.train_step

    def poison(t: Trainer) -> tuple[StepOutput, float]:
        if t.step == 5:
            t.model.get_parameter("transformer.ln_f.weight").data.fill_(math.nan)
        return train_step(t)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", poison)
        with pytest.raises(
            SlopeError, match=r"^the loss became non-finite at step 6: .*first in the output of transformer.ln_f"
        ):
            pretrain(tiny(data), run)
    found = store.latest(run)
    assert found is not None
    assert (found.manifest["step"], found.faults) == (4, [])
    pretrain(tiny(data), run)
    assert records(run) == records(finished)


# ----------------------------------------------------------------------------------------------- the adapters


def test_adapters_join_without_a_jump_with_fresh_state_and_leave_the_rest_alone(data: Path, tmp_path: Path) -> None:
    t = trainer(tiny(data), tmp_path, steps=6)
    before, loss = state(t), t.validate()
    changes = t.enter(t.phases.at(6))
    after = state(t)
    added = {name for name in after if name not in before}
    assert added == {f"model.{name}.adapter.lora_{side}" for name, _ in sparse_layers(t.model) for side in "AB"}
    count = sum(after[name].numel() for name in added)
    trained = sum(p.numel() for p in t.model.parameters())
    assert changes == {
        "name": "sparse, with adapters",
        "layers": "sparse",
        "linearized": False,
        "adapters": True,
        "trained_parameters": trained,
        "adapter_parameters": count,
    }
    assert_equal({name: after[name] for name in before}, before)
    assert t.validate() == loss
    assert all(not after[name].any() for name in added if name.endswith("B"))
    take(t, 1)
    assert t.optimizer.param_groups[-1]["lr"] == pytest.approx(2e-3 / 2)  # the first of two steps of their warm-up
    counts = {name: t.optimizer.state[p]["step"].item() for name, p in t.model.named_parameters()}
    assert {count for name, count in counts.items() if "adapter" in name} == {1}
    assert {count for name, count in counts.items() if "adapter" not in name} == {7}


def test_adapters_join_at_the_configured_step_of_a_run(data: Path, finished: Path, tmp_path: Path) -> None:
    kinds = [(record["kind"], record["step"]) for record in records(finished)]
    assert kinds.index(("phase", 7)) == kinds.index(("train", 7)) - 1
    pretrain(tiny(data, "adapters.rank=0"), tmp_path / "without")
    ours, theirs = ([r for r in records(run) if r["kind"] == "train"] for run in (finished, tmp_path / "without"))
    assert ours[:6] == theirs[:6]
    assert ours[6]["loss"] == theirs[6]["loss"]  # the very step they join: their output is still zero
    assert ours[7]["loss"] != theirs[7]["loss"]


def test_sparse_layers_and_adapters_that_begin_in_one_step_are_one_record(data: Path, tmp_path: Path) -> None:
    pretrain(tiny(data, "sparsity.start=0.5", "adapters.start=0.5", "log.plot=true"), tmp_path / "run")
    (record,) = [record for record in records(tmp_path / "run") if record["kind"] == "phase"]
    assert (record["step"], record["layers"], record["adapters"]) == (7, "sparse", True)
    assert record["adapter_parameters"] > 0
    svg = (tmp_path / "run" / "loss.svg").read_text()
    assert "adapters" in svg


# ------------------------------------------------------------------------------------------------- the folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_a_run_of_another_config_is_refused_by_the_keys_that_differ(data: Path, copy: Path) -> None:
    before = (copy / metrics.JSONL).read_bytes()
    with pytest.raises(UsageError, match=r"another config \(optim.lr: 0.005 -> 0.1; train.seq_len: 32 -> 16\)"):
        pretrain(tiny(data, "optim.lr=0.1", "train.seq_len=16"), copy)
    assert (copy / metrics.JSONL).read_bytes() == before


def test_before_the_first_step_the_config_may_still_change(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    longer = ("train.seq_len=65536", "train.tokens_per_step=131072", "model.overrides.n_positions=65536")
    with pytest.raises(UsageError, match="training tokens are fewer than one sequence"):
        pretrain(tiny(data, *longer), run)
    assert pretrain(tiny(data, "train.steps=1"), run)["step"] == 1
    assert run_folder.open_config(run).train.steps == 1


def test_a_failure_in_the_first_step_does_not_bar_another_config(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, say."""

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            pretrain(tiny(data), run)
    assert not run.exists()
    assert pretrain(tiny(data, "train.micro_batch=1", "train.steps=1"), run)["step"] == 1
    assert run_folder.open_config(run).train.micro_batch == 1


def test_a_first_step_bars_another_config_even_without_a_checkpoint(data: Path, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UsageError, match="another config"):
        pretrain(tiny(data, "optim.lr=0.1"), copy)


def test_free_keys_that_change_are_written_down(data: Path, copy: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "moved")
    config = tiny(tmp_path / "moved", "log.every=3", "train.device=auto")
    pretrain(config, copy)
    assert run_folder.open_config(copy) == config
    with pytest.raises(UsageError):
        pretrain(tiny(write_data(tmp_path / "other", seed=1)), copy)
    assert run_folder.open_config(copy) == config


def test_a_config_altered_behind_a_runs_back_is_refused(data: Path, copy: Path) -> None:
    config = tiny(data, "optim.lr=0.1")
    (copy / run_folder.CONFIG).write_text(configs.dump(config))
    with pytest.raises(SlopeError, match=r"config.yaml was altered after step 12 \(optim.lr: 0.005 -> 0.1\)"):
        pretrain(config, copy)


def test_new_refuses_an_existing_run(data: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a run already; choose another --out"):
        pretrain(tiny(data), copy, existing="refuse")
    assert pretrain(tiny(data, "train.steps=1"), tmp_path / "new", existing="refuse")["step"] == 1


def test_a_folder_with_something_else_is_refused_and_left_as_it_is(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"is not empty and holds no run \(it contains thesis.tex\)"):
        pretrain(tiny(data), tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["thesis.tex"]


def test_the_log_of_a_batch_system_may_lie_in_the_folder(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("slurm-1.out", "slurm-1.err", "job.log"):
        (run / name).touch()
    assert pretrain(tiny(data, "train.steps=1"), run)["step"] == 1


def test_a_folder_that_cannot_be_made_is_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for run in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/slope")):
        with pytest.raises(UsageError, match=f"^{run}: cannot be made or read: [^\n]+$"):
            pretrain(tiny(data), run)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_line(data: Path, copy: Path) -> None:
    copy.chmod(0o555)
    try:
        with pytest.raises(UsageError, match="cannot be written"):
            pretrain(tiny(data), copy)
    finally:
        copy.chmod(0o755)


def test_the_same_data_elsewhere_is_fine_and_other_data_is_refused(data: Path, copy: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "moved")
    assert pretrain(tiny(tmp_path / "moved"), copy)["step"] == 12
    other = write_data(tmp_path / "other", seed=1)
    before = {
        path: path.read_bytes()
        for path in copy.rglob("*")
        if path.is_file() and path.name not in ("environment.jsonl", "starts.jsonl")
    }
    with pytest.raises(UsageError, match="was trained on other data than"):
        pretrain(tiny(other), copy)
    assert {path: path.read_bytes() for path in before} == before


def test_what_a_kill_left_of_the_tokenizer_is_made_good(data: Path, copy: Path) -> None:
    whole = (copy / "tokenizer" / "tokenizer.json").read_bytes()
    (copy / "tokenizer" / "tokenizer.json").write_bytes(whole[:100])
    pretrain(tiny(data), copy)
    assert (copy / "tokenizer" / "tokenizer.json").read_bytes() == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("log.sample_prompt=''",), r"log.sample_prompt: must have at least 1 token .* not 0"),
        (("log.sample_prompt=" + "x" * 256,), r"log.sample_prompt: .* fewer than the model's 64 positions, not 256"),
        (("model.overrides.vocab_size=100",), "is above the model's vocabulary of 100"),
        (("train.device=cuda:99",), "train.device=cuda:99"),
        (("adapters.rank=33",), "adapters.rank=33: must be at most 32: .* has a side of only 32"),
        (("sparsity.exclude_modules=[nowhere]",), "sparsity: exclude_modules: 'nowhere' matches no linear layer"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    data: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        pretrain(tiny(data, *words), tmp_path / "run")
    assert not (tmp_path / "run" / metrics.JSONL).exists()


def test_a_vocabulary_that_does_not_fit_is_refused_before_masks_are_chosen_by_its_inputs(
    data: Path, tmp_path: Path
) -> None:
    small = "model.overrides.vocab_size=257"
    pretrain(tiny(data, "method=dense", "train.steps=1", small), tmp_path / "dense")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a b"}\n' * 300)
    vocab = tmp_path / "wordpiece"
    vocab.mkdir()
    (vocab / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(300)), "a", "b"]))
    prepare([str(text)], tmp_path / "data", tokenizer=str(vocab), val_fraction=0.1, workers=1, progress=False)
    config = tiny(tmp_path / "data", "method=wanda", f"model.init={tmp_path / 'dense'}", small)
    with pytest.raises(UsageError, match="is above the model's vocabulary of 257"):
        pretrain(config, tmp_path / "run")


def test_data_without_validation_text_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some words " * 100)
    prepare([str(text)], tmp_path / "data", val_fraction=0, workers=1, progress=False)
    with pytest.raises(UsageError, match="has no validation text, "):
        pretrain(tiny(tmp_path / "data"), tmp_path / "run")


def test_a_run_on_the_text_in_the_package(tmp_path: Path) -> None:
    summary = pretrain(tiny("embedded", "train.steps=2", "data.verify=false", "log.plot=true"), tmp_path / "run")
    assert summary["by_source"].keys() == {"austen"}
    assert 2 < summary["bigram_loss"] < 3
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    made = (tmp_path / "run" / "data" / MANIFEST).stat().st_mtime_ns
    assert pretrain(tiny("embedded", "train.steps=2"), tmp_path / "run")["loss"] == summary["loss"]
    assert (tmp_path / "run" / "data" / MANIFEST).stat().st_mtime_ns == made


def test_no_secret_of_the_environment_gets_into_the_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_0123456789abcdefSECRET"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    pretrain(tiny(data, "train.steps=2", "log.tensorboard=true"), tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    facts = json.loads((tmp_path / "run" / "environment.jsonl").read_text())
    assert facts["slurm_job"] == "4711"
    assert {"torch", "transformers", "python", "source", "device", "threads", "command"} <= facts.keys()


def test_the_start_says_what_it_trains_on_what(data: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(tiny(data, "train.steps=13"), copy)
    model = load_model(copy).model
    count = sum(p.numel() for p in model.parameters())
    expected = f"{copy}: on cpu in fp32, {count:,} trained parameters, 1,664 tokens in all"
    assert expected in capsys.readouterr().err.splitlines()


def test_the_commit_of_a_project_around_the_program_is_not_taken_for_its_own(tmp_path: Path) -> None:
    package = tmp_path / "env" / "slope_cli"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message=theirs"]):
        subprocess.run([*git, *words], check=True)
    assert git_commit(package) is None
    subprocess.run([*git, "add", "."], check=True)
    assert git_commit(package) is not None


def test_a_finished_run_opens_no_tensorboard_file(data: Path, copy: Path) -> None:
    pretrain(tiny(data, "log.tensorboard=true"), copy)
    assert not (copy / TENSORBOARD).exists()


def test_every_start_is_noted_with_what_it_ran_on(data: Path, copy: Path) -> None:
    pretrain(tiny(data), copy)
    starts = [json.loads(line) for line in (copy / "environment.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert starts[0]["source"]["sha256"]


def test_shapes_agree_with_the_config(data: Path, finished: Path) -> None:
    _, model, tokenizer, config, manifest, phase = load_model(finished)
    assert config == tiny(data)
    assert model.config.hidden_size == 32
    assert manifest is not None
    assert phase is not None
    assert (manifest["step"], phase.adapters) == (12, True)
    assert manifest["source"] == source_version()
    assert tokenizer.decode(tokenizer("two words").input_ids) == "two words"


# ------------------------------------------------------------------------------- faults that a test must not let pass


def test_validation_is_the_mean_over_targets_where_the_last_batch_is_smaller(data: Path, tmp_path: Path) -> None:
    """Five sequences in batches of four: a mean of the batches' means would count the last sequence four times."""
    words = ("log.val_tokens=80", "train.micro_batch=4", "train.seq_len=16", "train.tokens_per_step=64")
    trainer = Trainer(tiny(data, *words), tmp_path / "run", CPU)
    batches = list(trainer.batches.validation("text"))
    assert [len(batch["labels"]) for batch in batches] == [4, 1]
    trainer.model.eval()
    with torch.no_grad():
        losses = [loss_fn(forward(trainer.model, batch), batch) for batch in batches]
    trainer.batches.close()
    by_batch = [float(loss.token_loss) for loss in losses]
    assert [int(loss.targets) for loss in losses] == [64, 16]
    assert by_batch[0] != pytest.approx(by_batch[1], abs=1e-4)
    assert trainer.validate()["loss"] == pytest.approx((4 * by_batch[0] + by_batch[1]) / 5, abs=1e-6)


def test_each_epoch_of_a_run_has_an_order_of_its_own(data: Path, tmp_path: Path) -> None:
    config, trainer = tiny(data, "train.micro_batch=1").train, Trainer(tiny(data), tmp_path / "run", CPU)
    length = len(trainer.batches._blocks)
    trainer.batches.close()
    where = {"world": 1, "micro_batch": 1, "accumulation": 1, "seed": config.seed, "length": length}
    samples = [int(sample_indices(step, 0, 0, **where)[0]) for step in range(2 * length)]
    first, second = samples[:length], samples[length:]
    assert sorted(first) == sorted(second) == list(range(length))
    assert first != second
    assert first != sorted(first)


def test_masks_are_updated_from_the_weights_after_the_optimizers_step(data: Path, tmp_path: Path) -> None:
    """The masks of sr_ste are those of the weights that the step left, not of those that it found."""
    words = ("method=sr_ste", "sr_ste.mask_update_interval=1", "optim.lr=0.5", "optim.warmup=0")
    trainer = Trainer(tiny(data, *words), tmp_path / "run", CPU)
    before = {name: layer.mask.clone() for name, layer in masked_layers(trainer.model)}
    trainer.train_step()
    trainer.batches.close()
    changed = 0
    for name, layer in masked_layers(trainer.model):
        assert torch.equal(layer.mask, nm_mask(layer.weight.detach().abs(), layer.n, layer.m)), name
        changed += int((layer.mask != before[name]).sum())
    assert changed > 0


def test_the_moments_of_the_other_weights_outlive_the_adapters_entry(data: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny(data), tmp_path / "run", CPU)
    step = trainer.phases.adapter_step
    assert step
    for _ in range(step):
        trainer.train_step()
    moments = {name: t.clone() for name, t in store.state_tensors(trainer.model, trainer.optimizer).items()}
    trainer.enter(trainer.phases.at(step))
    after = store.state_tensors(trainer.model, trainer.optimizer)
    trainer.batches.close()
    kept = [name for name in moments if name.startswith("optim.") and name.endswith(("exp_avg", "exp_avg_sq"))]
    assert kept
    assert [name for name in kept if not torch.equal(moments[name], after[name])] == []
    assert all(after[name].abs().sum() > 0 for name in kept if name.endswith("exp_avg_sq") and "c_fc" in name)


def test_no_passage_of_the_validation_text_is_trained_on(tmp_path: Path) -> None:
    dataset = open_dataset(write_data(tmp_path, seed=3))
    (val,), (train,) = dataset.val.values(), dataset.train
    held_out, trained = (bytes(int(i) for i in file.tokens if i < 256) for file in (val, train))
    assert len(held_out) > 200
    passages = [held_out[at : at + 40] for at in range(0, len(held_out) - 40, 20)]
    assert [passage for passage in passages if passage in trained] == []
    assert len(held_out) + len(trained) == sum(
        len(json.loads(line)["text"]) for line in (tmp_path / "text.jsonl").read_text().splitlines()
    )


def test_lines_and_records_of_a_phase_say_what_changed_then_what_it_does(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(tiny(data, "log.every=100", "log.val_every=2"), tmp_path / "run")
    said = capsys.readouterr().err.splitlines()
    (first,) = [line for line in said if line.startswith("step 1/12")]
    assert re.fullmatch(r"step 1/12  loss \d\.\d{4} nats per token  lr 2.50e-03  grad \d\.\d\d", first)
    assert said[said.index(first) - 1].startswith(f"{tmp_path / 'run'}: on cpu in fp32")
    changed = next(number for number, line in enumerate(said) if line.startswith("step 7: from here on"))
    assert said[changed + 1].startswith("step 7/12  loss ")
    assert re.search(r"^step 2: validation loss \d\.\d{4} nats per token, perplexity", "\n".join(said), re.M)
    steps = [record for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert ["adapters_lr" in record for record in steps] == [False] * 6 + [True] * 6
    config = tiny(data)
    rate = phases_of(config).at(6).rates[ADAPTERS]
    assert [record["adapters_lr"] for record in steps[6:]] == [
        optim.learning_rate(rate, step, config.optim) for step in range(6, 12)
    ]
    assert steps[7]["adapters_lr"] != steps[7]["lr"]
