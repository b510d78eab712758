"""Muon's update against a written-out one, in float64, for dense, fused, masked and sparse weights."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import final_state, records, slope, tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slope_cli.checkpoint import run_folder, store
from slope_cli.config.schema import OptimConfig
from slope_cli.errors import UsageError
from slope_cli.methods import muon, optim, phases_of
from slope_cli.methods.apply import apply
from slope_cli.methods.phases import ADAPTERS, MATRICES, WEIGHTS
from slope_cli.models.build import build_model, run_model_config
from slope_cli.train.loop import pretrain
from sparse_kernels import MaskedLinear, SparseLinear, masks, sparse_layers

LR, DECAY, MOMENTUM = 0.05, 0.3, 0.9


class Blocks(nn.Module):
    """A model whose blocks are single layers, by name, with a head beside them."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({name: layer}) for name, layer in layers.items()])
        self.head = nn.Linear(4, 3)
        self.double()


def muon_of(model: nn.Module, *, decay: float = DECAY) -> torch.optim.Optimizer:
    return optim.make_optimizer(model, OptimConfig(name="muon", lr=LR, momentum=MOMENTUM, weight_decay=decay))


def step(optimizer: torch.optim.Optimizer, model: nn.Module, seed: int) -> None:
    """A step by gradients that are drawn from a seed, in the order of the parameters."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def polynomial(s: Tensor) -> Tensor:
    """What the iteration makes of singular values, a number at a time."""
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return s


def orthogonalized(X_OI: Tensor) -> Tensor:
    """By the singular value decomposition."""
    U, s, Vh = torch.linalg.svd(X_OI, full_matrices=False)
    return (U * polynomial(s / s.square().sum().sqrt())) @ Vh


def reference(weight: Tensor, grads: Sequence[Tensor], mask: Tensor | None = None, decay: float = DECAY) -> Tensor:
    """A dense weight after some steps; under a mask only what it keeps is updated."""
    mean, kept = torch.zeros_like(weight), torch.ones_like(weight) if mask is None else mask.to(weight.dtype)
    for grad in grads:
        grad = grad * kept
        mean = MOMENTUM * mean + (1 - MOMENTUM) * grad
        new = MOMENTUM * mean + (1 - MOMENTUM) * grad
        for _ in range(1 if mask is None else 2):
            new = orthogonalized(new)
            rms = new.square().mean().sqrt()
            new = new * kept
            new = new * rms / (new.square().sum() / kept.sum()).sqrt()  # of the kept entries, the same
        weight = weight * (1 - LR * decay) - LR * 0.2 * math.sqrt(max(weight.shape)) * new
    return weight


def gradients(model: nn.Module, weight: nn.Parameter, seeds: Sequence[int]) -> list[Tensor]:
    """The gradients that `step` gives a parameter."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        found.append({id(p): torch.randn_like(p) for p in model.parameters()}[id(weight)])
    return found


# ------------------------------------------------------------------------------------------------------- the iteration


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 9), st.integers(0, 99))
def test_the_iteration_is_a_polynomial_of_the_singular_values(count: int, rows: int, more: int, seed: int) -> None:
    torch.manual_seed(seed)
    X = torch.randn(count, rows, rows + more, dtype=torch.float64)
    X[0] *= 1e6  # the scale has no effect
    expected = torch.stack([orthogonalized(each) for each in X])
    assert torch.allclose(muon.orthogonal(X), expected, rtol=1e-7, atol=1e-9)


def test_the_result_is_about_orthogonal_and_zeros_stay_zeros() -> None:
    torch.manual_seed(0)
    s = torch.linalg.svdvals(muon.orthogonal(torch.randn(2, 32, 96)))
    assert s.min() > 0.65
    assert s.max() < 1.25
    assert not muon.orthogonal(torch.zeros(1, 4, 8)).any()
    low = torch.linalg.svdvals(muon.orthogonal(torch.randn(2, 32, 96).bfloat16()).float())
    assert 0.6 < low.min() < low.max() < 1.3


# ------------------------------------------------------------------------------------------------------ kinds of layers


def sparse_layer(out: int, inner: int, n: int = 2, m: int = 4) -> SparseLinear:
    W_OI = torch.randn(out, inner, dtype=torch.float64)
    return SparseLinear(W_OI, None, masks.row_mask(W_OI, n, m, kind="random"), n, m)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([(2, 4), (1, 4), (2, 8), (1, 2)]), st.sampled_from([1, 4]))
def test_sparse_values_are_orthogonalized_where_they_sit(o: int, i: int, nm: tuple[int, int], steps: int) -> None:
    torch.manual_seed(o + 10 * i)
    layer = sparse_layer(8 * o, 8 * i, *nm)
    model, mask, seeds = Blocks(fc=layer), layer.row_mask(), range(steps)
    began = layer.weight.detach().clone()
    grads = [masks.scatter(grad, mask) for grad in gradients(model, layer.values, seeds)]
    optimizer = muon_of(model)
    for seed in seeds:
        step(optimizer, model, seed)
    assert torch.allclose(layer.weight, reference(began, grads, mask), rtol=1e-6, atol=1e-9)
    assert torch.equal(layer.row_mask(), mask)


def test_what_is_left_of_an_update_has_the_scale_of_all_of_it() -> None:
    torch.manual_seed(0)
    layer, dense = sparse_layer(64, 128), nn.Linear(128, 64, bias=False)
    values, weight = muon.updates([muon.Matrix(layer, 1), muon.Matrix(dense, 1)], [layer.values, dense.weight])
    for update in (values, weight):  # a little below 0.2, for what the iteration makes of singular values
        assert 0.16 < update.square().mean().sqrt() < 0.2
    (split,) = muon.updates([muon.Matrix(layer, 2)], [layer.values])
    assert [half.square().mean().sqrt().item() for half in split.chunk(2)] == pytest.approx([0.17] * 2, rel=0.1)


@pytest.mark.parametrize("straight_through", [True, False])
def test_a_masked_weight_is_updated_where_it_has_a_gradient(straight_through: bool) -> None:
    torch.manual_seed(0)
    layer = MaskedLinear(torch.randn(8, 16, dtype=torch.float64), None, 2, 4, straight_through=straight_through)
    model, seeds = Blocks(fc=layer), range(3)
    began, mask = layer.weight.detach().clone(), None if straight_through else layer.mask
    optimizer = muon_of(model, decay=0.0)
    for seed in seeds:
        step(optimizer, model, seed)  # what is on pruned entries counts as little as a momentum of dense steps before
    expected = reference(began, gradients(model, layer.weight, seeds), mask, decay=0.0)
    assert torch.allclose(layer.weight, expected, rtol=1e-6, atol=1e-9)
    assert mask is None or torch.equal(layer.weight[~mask], began[~mask])


def test_a_fused_weight_is_orthogonalized_in_its_parts() -> None:
    """Those of query, key and value, side by side in GPT-2's c_attn; a transposed weight is as good as another."""
    torch.manual_seed(0)
    fused, sparse, seeds = Conv1D(24, 8), sparse_layer(24, 8), range(2)
    model = Blocks(c_attn=fused, proj=Conv1D(12, 8))
    others = Blocks(c_attn=sparse)
    proj = model.blocks[1]["proj"]  # type: ignore[index]
    began = [fused.weight.detach().clone(), proj.weight.detach().clone(), sparse.weight.detach().clone()]
    for each in (model, others):
        optimizer = muon_of(each)
        for seed in seeds:
            step(optimizer, each, seed)
    grads = [g.t() for g in gradients(model, fused.weight, seeds)]
    parts = [reference(w, [g.chunk(3)[k] for g in grads]) for k, w in enumerate(began[0].t().chunk(3))]
    assert torch.allclose(fused.weight, torch.cat(parts).t(), rtol=1e-6, atol=1e-9)
    assert torch.allclose(proj.weight, reference(began[1], gradients(model, proj.weight, seeds)), rtol=1e-6, atol=1e-9)
    mask = sparse.row_mask()
    grads = [masks.scatter(g, mask) for g in gradients(others, sparse.values, seeds)]
    parts = [reference(w, [g.chunk(3)[k] for g in grads], mask.chunk(3)[k]) for k, w in enumerate(began[2].chunk(3))]
    assert torch.allclose(sparse.weight, torch.cat(parts), rtol=1e-6, atol=1e-9)


def test_dense_weights_are_updated_as_by_torch() -> None:
    """Which iterates in 16 bits."""
    torch.manual_seed(0)
    layers = {"wide": nn.Linear(64, 32, bias=False), "tall": nn.Linear(32, 64, bias=False)}
    model = Blocks(**layers).float()
    twins = [nn.Parameter(layer.weight.detach().clone()) for layer in layers.values()]
    how = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
    theirs, ours = torch.optim.Muon(twins, **how), muon_of(model)
    began = [twin.detach().clone() for twin in twins]
    for seed in range(4):
        step(ours, model, seed)
        for twin, layer in zip(twins, layers.values(), strict=True):
            twin.grad = layer.weight.grad
        theirs.step()
    for twin, layer, first in zip(twins, layers.values(), began, strict=True):
        assert (layer.weight - twin).norm() < 0.02 * (twin - first).norm()


def test_all_else_is_updated_as_by_adamw() -> None:
    model = Blocks(fc=nn.Linear(4, 4))
    rest = [model.head.weight, model.head.bias, model.blocks[0]["fc"].bias]  # type: ignore[index]
    twins = [nn.Parameter(p.detach().clone()) for p in rest]
    groups = [{"params": twins[:1], "weight_decay": DECAY}, {"params": twins[1:], "weight_decay": 0.0}]
    theirs, ours = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True), muon_of(model)
    for seed in range(3):
        step(ours, model, seed)
        for twin, p in zip(twins, rest, strict=True):
            twin.grad = p.grad
        theirs.step()
    assert all(torch.equal(p, twin) for p, twin in zip(rest, twins, strict=True))


# --------------------------------------------------------------------------------------------------- in a model and run


@pytest.mark.parametrize(("model", "count"), [("gpt2-nano", 4), ("opt-125m", 6), ("llama3-8b", 7), ("bert-base", 6)])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(model: str, count: int) -> None:
    config = tiny("unused", "optim.name=muon", "optim.muon_lr=0.25", "optim.warmup=0", "adapters.start=0", model=model)
    built = build_model(run_model_config(config))
    apply(built, config, phases_of(config).at(0))
    optimizer = optim.build_optimizer(built, config, phases_of(config))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(built.parameters()))
    names = [name for name, p in built.named_parameters() if groups[id(p)]["group"] == MATRICES]
    assert len(names) == 2 * count
    assert all(name.endswith((".weight", ".values")) and "norm" not in name and "ln_" not in name for name in names)
    assert {g["group"] for g in groups.values()} == {MATRICES, WEIGHTS, ADAPTERS}
    assert {g["weight_decay"] for g in optimizer.param_groups if g["group"] == MATRICES} == {0.1}
    optim.set_learning_rates(optimizer, phases_of(config).at(0), 0, config.optim)
    rates = {group["group"]: group["lr"] for group in optimizer.param_groups}
    assert (rates[MATRICES], rates[WEIGHTS]) == (0.25, config.optim.lr)


def same_update(model: Callable[[], nn.Module], change: Callable[[], object]) -> bool:
    """Whether a model is the same after two steps with and without a change that comes after it is built."""
    found = []
    for late in (lambda: None, change):
        torch.manual_seed(0)
        own = model()
        late()
        optimizer = muon_of(own)
        for seed in range(2):
            step(optimizer, own, seed)
        found.append([p.detach().clone() for p in own.parameters()])
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))


def test_matrices_of_the_same_sides_are_orthogonalized_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> nn.Module:
        return Blocks(
            a=sparse_layer(8, 16), b=nn.Linear(8, 16), c=Conv1D(16, 8), c_attn=nn.Linear(16, 24), d=nn.Linear(4, 4)
        )

    def sides() -> list[list[tuple[int, int]]]:
        matrices = muon.hidden_matrices(model())
        return [[matrices[p].shape for p in batch] for batch in muon.batches(matrices)]

    assert sides() == [[(4, 4)], [(8, 16), (16, 8), (16, 8), (8, 16)]]
    assert same_update(model, lambda: monkeypatch.setattr(muon, "ENTRIES", 2 * 8 * 16))
    assert sides() == [[(4, 4)], [(8, 16), (16, 8)], [(16, 8)], [(8, 16)]]


def test_a_rate_in_device_memory_gives_the_same_update() -> None:
    """As a captured step needs it."""
    found = []
    for capturable in (False, True):
        torch.manual_seed(0)
        model = Blocks(fc=sparse_layer(8, 16), proj=nn.Linear(16, 8))
        optimizer = muon_of(model)
        if capturable:
            assert optim.make_capturable(optimizer)
            assert all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
        step(optimizer, model, 1)
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_keeps_one_moment_of_each_matrix(data: Path, tmp_path: Path) -> None:
    more = ("optim.name=muon", "sparsity.start=0.3", "log.save_every=3", "log.keep=9", "log.val_every=0")
    config, runs = tiny(data, *more), [tmp_path / "whole", tmp_path / "cut"]
    pretrain(config, runs[0])
    shutil.copytree(*runs)
    for folder in store.folders(runs[1])[:-1]:  # back to step 3, before the layers become sparse
        store.remove(folder)
    pretrain(config, runs[1])
    assert records(runs[0]) == records(runs[1])
    states = [final_state(config, run) for run in runs]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    moments = {name for name in states[0] if "h.1.mlp.c_fc" in name and name.startswith("optim.")}
    ends = {name.partition("c_fc.")[2] for name in moments}
    both = {f"{name}.{key}" for name in ("bias", "adapter.lora_A", "adapter.lora_B") for key in optim.MOMENTS}
    assert ends == {"values.exp_avg", *both}


def test_the_momentum_of_what_is_kept_outlives_the_hand_over_to_sparse_layers() -> None:
    config = tiny("unused", "optim.name=muon", "sparsity.start=0.5", "adapters.rank=0")
    phases, model = phases_of(config), build_model(run_model_config(config))
    optimizer = optim.build_optimizer(model, config, phases)
    step(optimizer, model, 1)
    old = {name: module.weight for name, module in model.named_modules() if isinstance(module, Conv1D)}
    before = {name: optimizer.state[weight]["exp_avg"] for name, weight in old.items()}
    apply(model, config, phases.end, was=phases.at(0), optimizer=optimizer)
    for name, layer in sparse_layers(model):
        state = optimizer.state[layer.values]
        assert list(state) == ["exp_avg"]
        assert torch.equal(state["exp_avg"], layer.kept(before[name], transposed=True))
    assert not any(weight in optimizer.state for name, weight in old.items() if name in dict(sparse_layers(model)))
    step(optimizer, model, 2)


def test_a_branch_decays_from_the_stable_part_of_a_run(data: Path, tmp_path: Path) -> None:
    words = ("optim.name=muon", "optim.schedule=wsd", "optim.warmup=0", "optim.min_lr=0", "adapters.rank=0")
    pretrain(tiny(data, *words, "optim.decay=2", "train.steps=6", "log.save_every=2", "log.keep=3"), tmp_path / "run")
    branch = ("--from", f"{tmp_path / 'run'}@4", "--with-optimizer", "optim.decay=4", "train.steps=4")
    assert slope("pretrain", *branch, "optim.lr=0.01", "--out", tmp_path / "branch").code == 0
    rates = [[r["lr"] for r in records(tmp_path / name) if r["kind"] == "train"] for name in ("run", "branch")]
    assert rates == [pytest.approx([5e-3] * 4 + [2.5e-3, 0]), pytest.approx([7.5e-3, 5e-3, 2.5e-3, 0])]
    assert run_folder.open_config(tmp_path / "branch").optim.muon_lr == 0.01  # as it followed optim.lr


def test_muon_is_refused_where_adamw_trains_all() -> None:
    with pytest.raises(UsageError, match=r"^optim.name=muon: is not for method=linearize; choose adamw"):
        tiny("unused", "method=linearize", "linearize.window=8", "optim.name=muon")
