"""A layer that is replaced loses nothing that the model had: each kind of it is carried over, or the layer stays dense.

Kinds: uses at several places, frozen parameters, hooks, modes, tags, ties, and whatever else computes a weight.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers.pytorch_utils import Conv1D

from sparse_kernels import (
    AdaptedLinear,
    SparseLinear,
    add_adapters,
    mask_layers,
    select_layers,
    sparse_layers,
    sparsify,
    to_dense,
    update_masks,
)

CONVERT = pytest.mark.parametrize("convert", [sparsify, mask_layers])
EVERY_CHANGE = pytest.mark.parametrize("change", [sparsify, mask_layers, lambda model: add_adapters(model, 4, ["2"])])
X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


def mlp(layer: nn.Module | None = None) -> nn.Sequential:
    """Three linear layers, of which the second, "2", can be swapped."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), layer or nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))


# ---------------------------------------------------------------------------------------------------------------------
# Carried over


@EVERY_CHANGE
def test_a_module_at_several_places_stays_one(change: Callable[[nn.Module], Any]) -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), layer, nn.GELU(), layer, nn.ModuleDict({"again": layer}))[:-1]
    dense, before = copy.deepcopy(model), model(X)
    changed = change(model)
    assert model[2] is model[4]
    assert type(model[2]) is not nn.Linear
    if change in (sparsify, mask_layers):
        assert [row.name for row in changed.layers] == ["0", "2"]
        to_dense(model)
        assert not torch.allclose(model(X), before)
    else:
        assert set(changed) == {"2"}
        assert torch.equal(model(X), before)
        to_dense(model, adapters="merge")
    assert model[2] is model[4]
    assert type(model[2]) is nn.Linear
    assert model.state_dict().keys() == dense.state_dict().keys()


def test_any_name_of_a_shared_module_decides() -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64), layer, nn.GELU(), layer)
    assert [row.name for row in select_layers(model, exclude_modules=["^4$"]).swapped] == ["1"]
    assert [row.name for row in select_layers(model, target_modules=["^4$"]).swapped] == ["2"]
    blocks = nn.ModuleList([nn.Linear(64, 64), layer, layer])
    assert [(x.name, x.n, x.m) for x in select_layers(blocks, pattern_overrides=[(1, 2, 1, 4)]).swapped] == [
        ("1", 1, 4)
    ]
    with pytest.raises(ValueError, match="1 and 2 are one layer, and have two patterns"):
        select_layers(blocks, pattern_overrides=[(2, 2, 1, 4)])


def test_a_layer_that_is_asked_for_by_two_names_gets_one_adapter() -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.GELU(), layer)
    adapters = add_adapters(model, 4, ["0", "2"])
    assert adapters.keys() == {"0"}
    assert model[0] is model[2]
    assert model[0].adapter.rank == 4
    with pytest.raises(ValueError, match="whole model"):
        to_dense(model[0], adapters="drop")


@CONVERT
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_frozen_stays_frozen_and_what_is_trained_stays_trained(
    convert: Callable[[nn.Module], Any], weight: bool, bias: bool
) -> None:
    model = mlp()
    model[2].weight.requires_grad_(weight)
    model[2].bias.requires_grad_(bias)

    def trained() -> list[bool]:
        return [p.requires_grad for p in model[2].parameters() if p.dim() < 3][:2]

    convert(model)
    assert trained() == [weight, bias]
    before = [p.detach().clone() for p in model[2].parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, model[2].parameters(), strict=True)]
    assert moved == [weight, bias]
    if convert is sparsify:
        add_adapters(model, 4)
        assert trained() == [weight, bias]
        assert all(p.requires_grad for p in model[2].adapter.parameters())
        to_dense(model, adapters="merge")
    else:
        sparsify(model, mask="present")
        assert trained() == [weight, bias]
        to_dense(model)
    assert trained() == [weight, bias]
    assert all(p.requires_grad for p in model[0].parameters())


def test_a_frozen_layer_with_an_adapter_stays_frozen() -> None:
    model = mlp()
    model.requires_grad_(False)
    add_adapters(model, 4, ["2"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "2.adapter.lora_A",
        "2.adapter.lora_B",
    }
    to_dense(model, adapters="merge")
    assert not any(p.requires_grad for p in model.parameters())


HOOKS: dict[str, Callable[[nn.Module, list[str]], Any]] = {
    "forward": lambda m, calls: m.register_forward_hook(lambda *a: calls.append("called")),
    "forward, always, keywords": lambda m, calls: m.register_forward_hook(
        lambda module, inputs, keywords, output: calls.append("called"), with_kwargs=True, always_call=True
    ),
    "before": lambda m, calls: m.register_forward_pre_hook(lambda *a: calls.append("called")),
    "before, keywords": lambda m, calls: m.register_forward_pre_hook(
        lambda module, inputs, keywords: calls.append("called"), with_kwargs=True
    ),
    "backward": lambda m, calls: m.register_full_backward_hook(lambda *a: calls.append("called")),
    "before backward": lambda m, calls: m.register_full_backward_pre_hook(lambda *a: calls.append("called")),
}


@EVERY_CHANGE
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_go_on_and_their_handles_stay_good(change: Callable[[nn.Module], Any], hook: str) -> None:
    model, calls = mlp(), list[str]()
    handle = HOOKS[hook](model[2], calls)
    change(model)
    assert type(model[2]) is not nn.Linear
    model(X).sum().backward()
    assert calls == ["called"]
    to_dense(model, adapters="drop")
    model(X).sum().backward()
    assert calls == ["called"] * 2
    handle.remove()
    model(X).sum().backward()
    assert calls == ["called"] * 2


@EVERY_CHANGE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mode_dtype_and_tags_of_parameters_are_carried_over(
    change: Callable[[nn.Module], Any], dtype: torch.dtype
) -> None:
    model = mlp().to(dtype).eval()
    model[2].weight.no_decay = True
    model[0].train()
    change(model)
    for _ in range(2):
        assert [module.training for module in model] == [True, False, False, False, False]
        assert not any(module.training for module in model[2].modules())
        assert all(p.dtype == dtype for p in model.parameters())
        (tagged,) = [p for p in model.parameters() if hasattr(p, "no_decay")]
        assert any(tagged is p for p in model[2].parameters())
        to_dense(model, adapters="merge")


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dense_again_draws_no_random_numbers(kind: str) -> None:
    model = mlp(Conv1D(64, 64) if kind == "conv1d" else None)
    sparsify(model)
    before = torch.get_rng_state()
    to_dense(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.is_meta for p in model.parameters())


def test_a_tied_weight_stays_tied_under_an_adapter() -> None:
    model = nn.Sequential(nn.Embedding(48, 32), nn.Linear(32, 48, bias=False))
    model[1].weight = model[0].weight
    add_adapters(model, 4, ["1"])
    assert model[1].weight is model[0].weight
    to_dense(model, adapters="drop")
    assert model[1].weight is model[0].weight


# ---------------------------------------------------------------------------------------------------------------------
# Left dense, with a reason


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def own_forward(layer: nn.Linear) -> None:
    layer.forward = lambda X: X  # type: ignore[method-assign]


def tie_bias(model: nn.Module) -> None:
    model[0].bias = model[2].bias  # type: ignore[index]


KEPT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weight_norm": (lambda model: weight_norm(model[2]), "weight is made of other tensors"),
    "spectral_norm": (lambda model: nn.utils.spectral_norm(model[2]), "weight is made of other tensors"),
    "prune": (lambda model: prune.l1_unstructured(model[2], "weight", 0.9), "weight is made of other tensors"),
    "prune bias": (lambda model: prune.random_unstructured(model[2], "bias", 0.5), "bias is made of other tensors"),
    "parametrized weight_norm": (lambda model: parametrizations.weight_norm(model[2]), "has a parametrization"),
    "parametrized orthogonal": (lambda model: parametrizations.orthogonal(model[2]), "has a parametrization"),
    "subclass": (lambda model: model.__setitem__(2, Doubling(64, 64)), "is a Doubling, a subclass"),
    "forward": (lambda model: own_forward(model[2]), "has a forward of its own"),
    "parameter": (lambda model: model[2].register_parameter("gain", nn.Parameter(torch.ones(1))), "has a 'gain'"),
    "buffer": (lambda model: model[2].register_buffer("scale", torch.ones(1)), "has a 'scale'"),
    "module": (lambda model: model[2].add_module("lora", nn.Linear(2, 2)), "has a 'lora'"),
    "gradient hook": (lambda model: model[2].weight.register_hook(lambda g: g * 0), "weight has hooks of its gradient"),
    "accumulated hook": (
        lambda model: model[2].bias.register_post_accumulate_grad_hook(lambda p: None),
        "bias has hooks of its gradient",
    ),
    "state_dict hook": (
        lambda model: model[2].register_state_dict_post_hook(lambda *a: None),
        "has hooks of its state_dict",
    ),
    "tied bias": (tie_bias, "bias is shared with another layer"),
    "tied memory": (
        lambda model: model.append(nn.Linear(64, 64)).__getitem__(5).weight.__setattr__("data", model[2].weight.data),
        "weight is shared with another layer",
    ),
    "complex": (lambda model: model.__setitem__(2, nn.Linear(64, 64, dtype=torch.complex64)), "weight is in complex64"),
    "compiled": (lambda model: model[2].compile(backend="eager"), "is compiled on its own"),
    "compiled wrapper": (
        lambda model: model.__setitem__(2, torch.compile(model[2], backend="eager")),
        "is compiled on its own",
    ),
}


@CONVERT
@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_what_cannot_be_carried_over_leaves_the_layer_dense_with_its_reason(
    convert: Callable[[nn.Module], Any], kind: str
) -> None:
    model = mlp()
    model.insert(3, nn.Linear(64, 64))
    change, reason = KEPT[kind]
    change(model)
    kept = model[2]
    keys, tensors = kept.state_dict().keys(), [id(p) for p in kept.parameters()]
    report = convert(model)
    (row,) = [row for row in report.skipped if row.name in ("2", "2._orig_mod")]
    assert reason in row.reason
    assert f"{row.name} (64 x 64): " in str(report)
    assert model[2] is kept
    assert kept.state_dict().keys() == keys
    assert [id(p) for p in kept.parameters()] == tensors
    assert "3" in [row.name for row in report.swapped]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_an_adapter_is_refused_where_something_would_be_lost() -> None:
    for kind in ("weight_norm", "prune", "forward", "buffer"):
        model = mlp()
        KEPT[kind][0](model)
        with pytest.raises(ValueError, match=r"^2 cannot have an adapter: "):
            add_adapters(model, 4, ["2"])
        assert not isinstance(model[2], AdaptedLinear)


def test_layers_that_their_parent_uses_by_its_weight_alone_stay() -> None:
    """nn.MultiheadAttention never calls its out_proj, a subclass of Linear, but reads its weight."""
    model = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True)
    report = sparsify(model, exclude_modules=["linear2"])
    assert {row.name: bool(row.reason) for row in report.layers} == {
        "self_attn.out_proj": True,
        "linear1": False,
        "linear2": True,
    }
    model(torch.randn(2, 5, 64)).sum().backward()
    assert model.self_attn.out_proj.weight.grad is not None


def test_shared_blocks_of_a_transformer_stay_shared() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=48, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    sparsify(model)
    assert model.transformer.h[1].mlp.c_fc is model.transformer.h[0].mlp.c_fc
    assert isinstance(model.transformer.h[1].mlp.c_fc, SparseLinear)


# ---------------------------------------------------------------------------------------------------------------------
# Inference mode


@pytest.mark.parametrize("change", ["before", "within"])
@pytest.mark.parametrize("kind", ["sparse", "rescaled", "masked", "transposable", "adapted", "dense again"])
def test_inference_mode_before_a_training_step_breaks_nothing(kind: str, change: str) -> None:
    """Whatever is made or kept in a validation under torch.inference_mode serves the training step after it."""

    def convert(model: nn.Module) -> None:
        if kind in ("masked", "transposable"):
            mask_layers(model, transposable=kind == "transposable")
        else:
            sparsify(model, backward_rescale=kind == "rescaled")
        if kind in ("adapted", "dense again"):
            add_adapters(model, 4)
            add_adapters(model, 4, ["4"])
        if kind == "dense again":
            to_dense(model, adapters="merge")

    def step() -> Tensor:
        model(X).square().sum().backward()
        update_masks(model)
        return model[0].weight.grad.clone()

    model = mlp()
    if change == "before":
        convert(model)
    with torch.inference_mode():
        if change == "within":
            convert(model)
        for _, layer in sparse_layers(model):
            layer.backward_rescale = kind == "rescaled"
        model(X)
        update_masks(model)
        model(X)
    first = step()
    assert all(p.grad is not None for p in model.parameters())
    with torch.inference_mode():
        model(X)
    model.zero_grad()
    torch.testing.assert_close(step(), first)
    for _, layer in sparse_layers(model):
        layer.validate()
