"""The learning rate of each step, AdamW's groups, and the adapters' own."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import linearized, tiny_model
from support.runs import tiny
from torch import nn

from slope_cli.checkpoint import load
from slope_cli.config.methods import LinearizeConfig
from slope_cli.config.schema import Config, OptimConfig
from slope_cli.linearize.swap import linear_windows, linearize_attention
from slope_cli.methods import optim, phases_of
from slope_cli.methods.phases import ADAPTERS, MAPS, WEIGHTS, Rate


def rates(steps: int, warmup: float, *, first: int = 0, **settings: float | str) -> list[float]:
    config, rate = OptimConfig(**settings), Rate(first, first + steps, 1.0, warmup)  # type: ignore[arg-type]
    return [optim.learning_rate(rate, step, config) for step in range(first, first + steps)]


def optimizer_of(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    return optim.build_optimizer(model, config, phases_of(config))


def with_adapter(config: Config) -> torch.optim.Optimizer:
    """The optimizer of a layer that an adapter has joined."""
    model = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    optimizer = optimizer_of(model, config)
    model["layer"].adapter = nn.Linear(2, 2, bias=False)
    optim.join(optimizer, model, config)
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, step: int, config: Config) -> float:
    return optim.set_learning_rates(optimizer, phases_of(config).at(step), step, config.optim)


def test_each_schedule_against_hand_computed_values() -> None:
    assert rates(6, 2, schedule="linear", min_lr=0.1) == pytest.approx([0.5, 1, 1, 0.7, 0.4, 0.1])
    assert rates(6, 2, schedule="constant") == pytest.approx([0.5, 1, 1, 1, 1, 1])
    half = [1, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.25, 0.1]  # cos(60°) and cos(120°) are ±1/2
    assert rates(6, 2, schedule="cosine", min_lr=0.1) == pytest.approx([0.5, 1, *half])
    roots = [1, math.sqrt(2 / 3), math.sqrt(1 / 3), 0]
    assert rates(6, 2, schedule="polynomial", power=0.5, min_lr=0) == pytest.approx([0.5, 1, *roots])


def test_warm_up_is_a_share_below_one_and_a_number_of_steps_from_one_on() -> None:
    assert rates(8, 0.5, schedule="constant") == rates(8, 4, schedule="constant")
    assert rates(8, 4, schedule="constant")[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates(3, 0, schedule="linear", min_lr=0) == pytest.approx([1, 0.5, 0])
    assert rates(4, 100, schedule="cosine") == pytest.approx([0.01, 0.02, 0.03, 0.04])


def test_with_wsd_the_rate_stays_at_its_peak_until_the_decay() -> None:
    wsd: dict[str, Any] = {"schedule": "wsd", "min_lr": 0.2}
    expected = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert rates(10, 2, decay=4, **wsd) == pytest.approx(expected)
    assert rates(10, 2, decay=0.4, **wsd) == pytest.approx(expected)
    roots = [1 - 0.8 * math.sqrt(done / 4) for done in (1, 2, 3, 4)]
    assert rates(10, 2, decay=4, decay_shape="sqrt", **wsd) == pytest.approx([*expected[:6], *roots])
    assert rates(6, 2, decay=0, **wsd) == rates(6, 2, schedule="constant")
    assert rates(6, 2, decay=9, **wsd) == pytest.approx([0.5, 1, 0.8, 0.6, 0.4, 0.2])
    assert rates(4, 0, decay=4, **wsd) == pytest.approx([0.8, 0.6, 0.4, 0.2])  # the decay alone


@given(
    st.integers(1, 50),
    st.one_of(st.floats(0, 0.99), st.integers(1, 60)),
    st.sampled_from(["cosine", "linear", "polynomial", "constant", "wsd"]),
    st.floats(0, 1),
)
def test_any_schedule_rises_once_and_then_never_again(steps: int, warmup: float, schedule: str, min_lr: float) -> None:
    values = rates(steps, warmup, schedule=schedule, min_lr=min_lr)
    assert rates(steps, warmup, first=7, schedule=schedule, min_lr=min_lr) == values  # counted from the first step
    top = values.index(max(values))
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    assert values[: top + 1] == sorted(values[: top + 1])
    assert all(late <= early + 1e-12 for early, late in zip(values[top:], values[top + 1 :], strict=False))


def test_weight_decay_is_on_matrices_only_and_every_parameter_is_in_one_group() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = optimizer_of(model, tiny("unused", "optim.weight_decay=0.3"))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decays) == 5
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.3,
        "1.weight": 0.3,
        "1.bias": 0.0,
        "2.weight": 0.0,
        "2.bias": 0.0,
    }


@pytest.mark.parametrize("form", [{"state": "delta"}, {"feature_map": "t2r"}, {"state": "gated"}], ids=str)
def test_lamb_has_no_trust_ratio_for_what_starts_at_zero(form: dict[str, str]) -> None:
    """The ratio, |W| / |update|, would keep it there."""
    model = tiny_model("llama3-8b")
    linearize_attention(model, LinearizeConfig(window=5, **form))  # type: ignore[arg-type]
    groups = optim.make_optimizer(model, OptimConfig(name="lamb")).param_groups
    with_ratio = {id(p) for group in groups if not group["adam"] for p in group["params"]}
    added = [(name, p) for name, p in model.named_parameters() if ".linear." in name]
    assert {bool(p.any()) for _, p in added if id(p) in with_ratio} == {True}
    assert [name for name, p in added if p.dim() < 2 and id(p) in with_ratio] == []


def test_feature_maps_do_not_decay_towards_zero() -> None:
    model = linearized("gpt2-nano", window=5)
    optimizer = optimizer_of(model, tiny("unused", "optim.weight_decay=0.3"))
    maps = {id(p) for window in linear_windows(model).values() for p in window.parameters()}
    groups = [(group["group"], group["weight_decay"]) for group in optimizer.param_groups for _ in group["params"]]
    assert len(maps) == sum(name == MAPS for name, _ in groups) > 0
    assert {decay for name, decay in groups if name == MAPS} == {0.0}


@pytest.mark.parametrize("state", ["gated", "delta"])
def test_gates_are_in_the_group_of_adapters(state: str) -> None:
    model = linearized("gpt2-nano", window=5, state=state)
    optimizer = optimizer_of(model, tiny("unused", "adapters.weight_decay=0.2"))
    gates = [p for window in linear_windows(model).values() if window.gate for p in window.gate.parameters()]
    (group,) = [group for group in optimizer.param_groups if group["group"] == ADAPTERS]
    assert [id(p) for p in group["params"]] == [id(p) for p in gates]
    assert group["weight_decay"] == 0.2


def test_adapters_have_their_own_rate_warm_up_and_decay() -> None:
    words = ("optim.schedule=linear", "optim.warmup=0", "optim.min_lr=0", "optim.lr=1", "adapters.lr=10")
    config = tiny("unused", *words, "adapters.warmup=2", "adapters.weight_decay=0.5", "train.steps=13")
    assert phases_of(config).adapter_step == 6
    optimizer = with_adapter(config)
    seen = []
    for step in range(6, 13):
        run = set_rates(optimizer, step, config)
        first, second, own = (group["lr"] for group in optimizer.param_groups)
        assert run == first == second == pytest.approx(1 - step / 12)
        seen.append(own)
    assert seen == pytest.approx([5, 10, 10, 7.5, 5, 2.5, 0])
    assert optimizer.param_groups[-1]["weight_decay"] == 0.5


def test_without_a_rate_of_their_own_adapters_take_that_of_the_run(tmp_path: Path) -> None:
    config = tiny(tmp_path, "adapters.lr=null", "adapters.warmup=0", "optim.schedule=constant")
    optimizer = with_adapter(config)
    set_rates(optimizer, 7, config)
    assert optimizer.param_groups[-1]["lr"] == config.optim.lr


def test_with_the_schedule_of_the_run_adapters_have_its_rate_times_their_own() -> None:
    config = tiny("unused", "optim.lr=0.1", "adapters.lr=0.3", "adapters.schedule=run", "adapters.warmup=5")
    optimizer = with_adapter(config)
    for step in range(6, 12):
        run = set_rates(optimizer, step, config)
        assert optimizer.param_groups[-1]["lr"] == pytest.approx(3 * run)


def test_adapters_whose_warm_up_rounds_to_nothing_leave_the_steps_before_them_alone() -> None:
    config = tiny("unused", "train.steps=10", "adapters.start=0.99", "adapters.warmup=0.1", "adapters.rank=2")
    optimizer = optimizer_of(nn.Linear(4, 4), config)
    assert set_rates(optimizer, 0, config) > 0


def test_a_rate_that_lies_in_device_memory_is_filled() -> None:
    """As a captured step needs it."""
    config = tiny("unused")
    optimizer = optimizer_of(nn.Linear(2, 2), config)
    assert optim.make_capturable(optimizer)
    held = [group["lr"] for group in optimizer.param_groups]
    rate = set_rates(optimizer, 0, config)
    assert all(isinstance(lr, torch.Tensor) and lr.item() == pytest.approx(rate) for lr in held)
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, held, strict=True))


# ------------------------------------------------------------------------------------------------------- LAMB


def test_a_step_of_lamb_by_hand() -> None:
    """You et al. 2020, algorithm 2, without bias correction; biases as in Adam."""
    torch.manual_seed(0)
    model = nn.Linear(8, 16)
    with torch.no_grad():
        model.weight.mul_(1000)  # a norm far above 10, where some implementations stop
    config = tiny("unused", "optim.name=lamb", "optim.weight_decay=0.3", "optim.betas=[0.9,0.99]", "optim.eps=1e-6")
    optimizer = optimizer_of(model, config)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    moments = [torch.zeros_like(p) for p in (weight, weight, bias, bias)]
    for seed in (1, 2):
        torch.manual_seed(seed)
        model.weight.grad, model.bias.grad = torch.randn_like(weight), torch.randn_like(bias)
        for m, v, grad in ((*moments[:2], model.weight.grad), (*moments[2:], model.bias.grad)):
            m.mul_(0.9).add_(0.1 * grad)
            v.mul_(0.99).add_(0.01 * grad**2)
        update = moments[0] / (moments[1].sqrt() + 1e-6) + 0.3 * weight
        weight -= 0.01 * weight.norm() / update.norm() * update
        bias -= 0.01 * moments[2] / (moments[3].sqrt() + 1e-6)
        optimizer.step()
    assert torch.allclose(model.weight, weight, rtol=1e-4)
    assert torch.allclose(model.bias, bias, atol=1e-6)


def test_adapters_of_the_first_step_have_their_own_group(data: Path, tmp_path: Path) -> None:
    config = tiny(data, "adapters.start=0", "adapters.weight_decay=0.2")
    phases = phases_of(config)
    model = load.build(config, tmp_path, "cpu", phases.at(0))
    optimizer = optimizer_of(model, config)
    groups = {id(p): group["group"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: groups[id(p)] for name, p in model.named_parameters()} == {
        name: ADAPTERS if ".adapter." in name else WEIGHTS for name, _ in model.named_parameters()
    }
    decays = {group["group"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays[ADAPTERS] == 0.2
    set_rates(optimizer, 1, config)
    rates = {group["group"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({WEIGHTS: 5e-3, ADAPTERS: 2e-3})


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_replaced_parameter_keeps_its_moments_and_its_number_of_steps(name: str) -> None:
    """At a hand-over from a dense layer to a sparse one, say: the moments of what is kept, in its shape."""
    model = nn.Linear(4, 3)
    optimizer = optim.make_optimizer(model, OptimConfig(name=name))
    for _ in range(2):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    old, new = model.weight, nn.Parameter(model.weight[:, :2].detach().clone())
    before = {
        key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in optimizer.state[old].items()
    }
    steps = [group.get("step") for group in optimizer.param_groups]
    optim.replace_parameter(optimizer, old, new, lambda state: state[:, :2])
    after = optimizer.state[new]
    assert old not in optimizer.state
    assert any(p is new for group in optimizer.param_groups for p in group["params"])
    assert after.keys() == before.keys()
    for key in optim.MOMENTS:
        assert before[key].any()
        assert torch.equal(after[key], before[key][:, :2])
    assert all(after[key] == before[key] for key in before.keys() - set(optim.MOMENTS))
    assert [group.get("step") for group in optimizer.param_groups] == steps
