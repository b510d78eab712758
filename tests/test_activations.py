"""Activation checkpointing: the same gradients bit for bit, less memory between the passes, and names as they were."""

import copy
import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.data import prepared
from support.marks import slow
from support.models import SHAPES, linearized
from support.runs import RECIPE, assert_same_run, slope, small, trained
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from slope_cli.checkpoint import run_folder
from slope_cli.config import configs
from slope_cli.methods.accounting import activation_bytes
from slope_cli.models.build import build_model, model_config
from slope_cli.models.loss import forward, loss_fn
from slope_cli.train.activations import checkpoint_activations, saved, transformer_blocks
from slope_cli.train.step import Step
from sparse_kernels import add_adapters, mask_layers, set_fp8, sparsify
from sparse_kernels.ops import linear_op

FAMILIES = ("gpt2-nano", "opt-125m", "bert-base", "llama3-8b")
MODES = ("block", "selective")
LENGTH = 32


def sparse(name: str, *, dropout: float | None = 0.2, adapters: bool = True, **more: Any) -> Any:
    overrides = {**SHAPES[name], **more}
    model = build_model(model_config(name, overrides=overrides, dropout=dropout), seed=1)
    sparsify(model)
    if adapters:
        randomize(add_adapters(model, 0.25))
    return model.train()


def randomize(adapters: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(5)
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_B, std=0.3, generator=generator)


def batch(name: str, rows: int = 3) -> dict[str, Tensor]:
    tokens = torch.randint(5, 90, (rows, LENGTH), generator=torch.Generator().manual_seed(2))
    if not name.startswith("bert"):
        return {"input_ids": tokens, "labels": tokens}
    padding = {"attention_mask": (torch.arange(LENGTH) < LENGTH - 4).long().expand_as(tokens).contiguous()}
    return {"input_ids": tokens, "labels": torch.where(tokens % 3 == 0, tokens, -100), **padding}


def gradients(model: Any, mode: str, batches: list[dict[str, Tensor]], dtype: torch.dtype | None = None) -> Any:
    """Losses, gradients, and the random state after two micro-batches."""
    checkpoint_activations(model, mode)
    step = Step(model, torch.optim.SGD(model.parameters(), lr=1.0), dtype=dtype, clip=0.0)
    torch.manual_seed(7)
    losses = [step.backward(each, len(batches), step.targets(batches)) for each in batches]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {**found, "losses": torch.stack(losses), "random state": torch.get_rng_state()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_without_checkpointing_bit_for_bit(name: str, mode: str, dtype: torch.dtype | None) -> None:
    model, batches = sparse(name), [batch(name), batch(name)]
    expected = gradients(model, "none", batches, dtype)
    assert_equal(gradients(model, mode, batches, dtype), expected)
    assert_equal(gradients(model, "none", batches, dtype), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("convert", [lambda model: None, mask_layers, lambda model: sparsify(model, n=1, m=4)])
def test_every_kind_of_layer_goes_through_the_backward_pass_again(
    mode: str, convert: Callable[[nn.Module], object]
) -> None:
    model = build_model(model_config("gpt2-nano", overrides=SHAPES["gpt2-nano"], dropout=0.1), seed=1).train()
    convert(model)
    batches = [batch("gpt2-nano")]
    assert_equal(gradients(model, mode, batches), gradients(model, "none", batches))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("convert", [lambda model: None, mask_layers, sparsify])
def test_products_in_fp8_go_through_the_backward_pass_again(mode: str, convert: Callable[[nn.Module], object]) -> None:
    model = build_model(model_config("gpt2-nano", overrides=SHAPES["gpt2-nano"], dropout=0.1), seed=1).train()
    convert(model)
    set_fp8(model, [f"transformer.h.1.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")])
    batches = [batch("gpt2-nano")]
    assert_equal(gradients(model, mode, batches), gradients(model, "none", batches))


@pytest.mark.parametrize("mode", MODES)
def test_adapters_that_join_later_are_checkpointed_with_their_block(mode: str) -> None:
    model, batches = sparse("gpt2-nano", adapters=False), [batch("gpt2-nano")]
    gradients(model, mode, batches)
    randomize(add_adapters(model, 0.25))
    joined = gradients(model, mode, batches)
    assert any("lora_A" in name for name in joined)
    assert_equal(joined, gradients(model, "none", batches))


@pytest.mark.parametrize("mode", MODES)
def test_a_linearized_model_with_a_window_that_is_dropped_has_the_same_gradients(mode: str) -> None:
    model, batches = linearized("llama3-8b", window=5, window_dropout=0.5).train(), [batch("llama3-8b")]
    assert_equal(gradients(model, mode, batches), gradients(model, "none", batches))


@pytest.mark.parametrize("mode", MODES)
def test_names_modules_and_copies_stay_as_they_are(mode: str) -> None:
    model = sparse("opt-125m")
    names, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    checkpoint_activations(model, mode)
    assert (list(model.state_dict()), [name for name, _ in model.named_modules()]) == (names, modules)
    twin, batches = copy.deepcopy(model), [batch("opt-125m")]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_equal(gradients(twin, mode, batches), gradients(sparse("opt-125m"), "none", batches))


def test_the_policy_saves_what_takes_long_to_compute_for_its_size() -> None:
    aten, meta = torch.ops.aten, {"device": "meta"}
    X_BI, W_IO, A_IR, B_RO = (torch.empty(*sides, **meta) for sides in ((64, 32), (32, 128), (32, 2), (2, 128)))
    Q, wide, narrow = torch.empty(1, 2, 64, 16, **meta), torch.empty(128, **meta), torch.empty(64, 2, **meta)
    flash = aten._scaled_dot_product_flash_attention.default
    efficient = aten._scaled_dot_product_efficient_attention.default
    kept: list[tuple[Any, ...]] = [
        (linear_op._opoverload, X_BI),
        (aten.mm.default, X_BI, W_IO),
        (aten.addmm.default, wide, X_BI, W_IO),
        (aten.mm.default, X_BI, A_IR),
        (flash, Q, Q, Q, 0.0, True),
        (flash, Q, Q, Q),
        (efficient, Q, Q, Q, None, True),
    ]
    again: list[tuple[Any, ...]] = [
        (aten.mm.default, narrow, B_RO),  # an adapter's
        (flash, Q, Q, Q, 0.1, True),
        (efficient, Q, Q, Q, None, True, 0.1),
        (aten.gelu.default, X_BI),
    ]
    assert {saved(None, *call) for call in kept} == {CheckpointPolicy.MUST_SAVE}
    assert {saved(None, *call) for call in again} == {CheckpointPolicy.PREFER_RECOMPUTE}


class _Storages(TorchDispatchMode):
    """Notes every storage that an op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return found


def held(model: Any, mode: str) -> int:
    """Bytes that are held for the backward pass when the forward pass is over."""
    checkpoint_activations(model, mode)
    inputs = batch("gpt2-nano")
    with torch.random.fork_rng(), _Storages() as storages:
        loss = loss_fn(forward(model, inputs), inputs).token_loss
    gc.collect()
    alive = sum(size for storage, size in storages.made.values() if not storage.expired())
    loss.backward()
    model.zero_grad(set_to_none=True)
    return alive


@pytest.mark.slow
def test_what_is_held_for_the_backward_pass_is_what_is_counted() -> None:
    words = ["train.micro_batch=3", f"train.seq_len={LENGTH}", f"train.tokens_per_step={3 * LENGTH}"]
    bytes_of: dict[str, list[int]] = {mode: [] for mode in ("none", *MODES)}
    counted: dict[str, list[int]] = {mode: [] for mode in bytes_of}
    for layers in (6, 10):
        model = sparse("gpt2-nano", dropout=0.0, adapters=False, n_layer=layers, n_embd=64)
        held(model, "none")  # the layers make their indices
        sizes = activation_bytes(model, configs.load("gpt2-nano", words))
        for mode in bytes_of:
            bytes_of[mode].append(held(model, mode))
            counted[mode].append(sizes[mode])
    of_block = {mode: (deep - shallow) / 4 for mode, (shallow, deep) in bytes_of.items()}
    expected = {mode: 2 * (deep - shallow) / 4 for mode, (shallow, deep) in counted.items()}  # float32, not 16 bits
    assert of_block["block"] == expected["block"] == 4 * 3 * LENGTH * 64
    assert of_block["selective"] == pytest.approx(expected["selective"], rel=0.05)
    assert of_block["none"] > 0.9 * expected["none"]
    assert of_block["block"] < 0.1 * of_block["none"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad")
@pytest.mark.parametrize("name", ["gpt2-nano", *(slow(name) for name in FAMILIES[1:])])
def test_a_compiled_block_is_one_graph_with_the_same_gradients(name: str) -> None:
    model, batches, found = sparse(name), [batch(name)], {}
    for mode in ("none", *MODES):
        torch.compiler.reset()
        checkpoint_activations(model, mode)
        for block in transformer_blocks(model):
            block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        found[mode] = gradients(model, mode, batches)
    for mode in MODES:
        assert_equal(found[mode], found["none"])


@pytest.mark.parametrize("mode", MODES)
def test_a_run_with_dropout_and_adapters_that_join_is_the_same_bit_for_bit(mode: str) -> None:
    plain = trained("gpt2-nano", "model.dropout=0.2")
    run = trained("gpt2-nano", "model.dropout=0.2", f"train.activation_checkpointing={mode}")
    assert_same_run(run_folder.open_config(run), run, plain)


def test_a_run_may_resume_with_other_checkpointing_of_activations(tmp_path: Path) -> None:
    plain, run = trained("gpt2-nano", "model.dropout=0.2"), tmp_path / "run"
    words = ["pretrain", RECIPE, *small("gpt2-nano"), f"data.path={prepared('bytes')}", "model.dropout=0.2"]
    half = [*words, "log.save_every=3", "--out", run]
    assert slope(*half, "train.activation_checkpointing=block").code == 0
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    again = slope(*half, "train.activation_checkpointing=selective")
    assert again.code == 0, again.err
    assert "resuming from" in again.err
    assert_same_run(run_folder.open_config(run), run, plain)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_linearized_run_is_the_same_bit_for_bit(mode: str, tmp_path: Path) -> None:
    words = ["train.steps=4", "linearize.window=4", "distill.share=0.5", "linearize.window_dropout=0.3"]
    runs = {name: tmp_path / name for name in ("none", mode)}
    for name, run in runs.items():
        more = ["adapters.rank=4", f"train.activation_checkpointing={name}", "log.tensorboard=false"]
        result = slope("linearize", trained("gpt2-nano"), *words, *more, "--out", run)
        assert result.code == 0, result.err
    assert_same_run(run_folder.open_config(runs[mode]), runs[mode], runs["none"])


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("mode", MODES)
def test_blocks_whose_weights_are_gathered_have_the_same_gradients(mode: str) -> None:
    expected, model = gradients(sparse("gpt2-nano"), "none", [batch("gpt2-nano")]), sparse("gpt2-nano")
    checkpoint_activations(model, mode)
    for module in (*transformer_blocks(model), model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    torch.manual_seed(7)
    Step(model, torch.optim.SGD(model.parameters(), lr=1.0), dtype=None, clip=0.0).backward(batch("gpt2-nano"), 1, None)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad.full_tensor(), expected[name]), name
