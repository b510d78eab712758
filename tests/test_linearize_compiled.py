"""Linearized attention compiled: what the eager form computes, from one compilation for all layers.

Shape suffixes: B sequences, T positions.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import left_padded, linearized, tokens
from torch import Tensor

from slope_cli.linearize.swap import linear_windows, projections, using
from slope_cli.linearize.transfer import transfer_losses
from slope_cli.train.linearize_steps import TransferStep
from slope_cli.train.step import Step, eager
from sparse_kernels import add_adapters

# What torch's compiler warns of is its own business.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore:The .grad")]


@pytest.fixture(params=["additive", "gated", "delta"])
def model(request: pytest.FixtureRequest) -> Any:
    """Grouped heads, two layers."""
    torch._dynamo.reset()
    return linearized("llama3-8b", window=5, state=request.param)


@pytest.fixture
def without_kernels() -> Iterator[None]:
    """What is compiled runs as torch's own operators: what a step's graphs hold is tested, not what Inductor makes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        yield


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def decoded(model: Any, ids_BT: Tensor, prompt: int) -> Tensor:
    """Logits of a prompt in one piece and of each later token by itself."""
    with torch.no_grad():
        output = model(ids_BT[:, :prompt], use_cache=True)
        found = [output.logits]
        for place in range(prompt, ids_BT.shape[1]):
            output = model(ids_BT[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
            found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.slow
def test_compiled_steps_decode_the_same_logits_at_any_batch(model: Any) -> None:
    expected = [decoded(model, tokens(30, rows), 12) for rows in (2, 3)]
    before = graphs()
    with using(model, compiled=True):
        for rows, logits_BTV in zip((2, 3), expected, strict=True):
            torch.testing.assert_close(decoded(model, tokens(30, rows), 12), logits_BTV, rtol=0, atol=1e-5)
    assert graphs() == before + 1


@pytest.mark.slow
def test_compiled_transfer_has_the_same_losses_and_gradients(model: Any) -> None:
    inputs = dict(zip(("input_ids", "attention_mask"), left_padded(tokens(150), [3, 20]), strict=True))
    expected = transfer_losses(model, inputs)
    weights = [parameter for window in linear_windows(model).values() for parameter in window.parameters()]
    gradients = [parameter.grad.clone() for parameter in weights]
    model.zero_grad()
    before = graphs()
    found = transfer_losses(model, inputs, compiled=True)
    assert graphs() == before + 1
    for name, loss in expected.items():
        torch.testing.assert_close(found[name].total, loss.total, rtol=1e-5, atol=0)
    for parameter, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)


@pytest.mark.slow
def test_compiled_steps_of_transfer(without_kernels: None) -> None:
    """All layers share what is compiled, before the loss, of it and after it; a second step adds nothing to that."""
    batches, found = [{"input_ids": tokens(80)}, {"input_ids": tokens(80).flip(1)}], []
    how: dict[str, Any] = {"dtype": None, "clip": 1.0, "mse_weight": 1000.0, "entropy_weight": 0.0}
    for compiled in (False, True):
        model = linearized("gpt2-nano", window=5).train().requires_grad_(False)
        for window in linear_windows(model).values():
            window.requires_grad_(True)
        step = TransferStep(model, optimizer_of(model), **how, compiled=compiled)
        found.append([step(batches)])
        before = graphs()
        found[-1].append(step(batches))
        assert graphs() == before
        with torch.no_grad(), eager():  # validation in between sees the model that is trained
            assert model(tokens(30), use_cache=False).logits.isfinite().all()
        assert graphs() == before
    assert before > 2
    for eagerly, compiledly in zip(*found, strict=True):
        assert compiledly[:3] == pytest.approx(eagerly[:3], rel=1e-4)
        assert compiledly.layers == pytest.approx(eagerly.layers, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["additive", "gated", "delta"])
def test_compiled_steps_of_adapters(without_kernels: None, state: str) -> None:
    batch, found = {"input_ids": tokens(80), "labels": tokens(80).roll(-1, 1)}, []
    for compiled in (False, True):
        model = linearized("llama3-8b", window=5, state=state).train().requires_grad_(False)
        for window in linear_windows(model).values():
            if window.gate is not None:
                window.gate.requires_grad_(True)
        adapters = add_adapters(model, 2, projections(model, "qkvo"), seed=1)
        step = Step(model, optimizer_of(model), dtype=None, clip=1.0, compiled=compiled)
        found.append([step([batch]), step([batch])])
        assert all(adapter.lora_B.any() for adapter in adapters.values())
    assert graphs() > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert found[1][0][:3] == pytest.approx(found[0][0][:3], rel=1e-4)
    assert found[1][1][:3] == pytest.approx(found[0][1][:3], rel=1e-4)
