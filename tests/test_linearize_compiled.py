"""Linearized attention compiled: what the eager form computes, from one compilation for all layers.

Shape suffixes: B sequences, T positions.
"""

from typing import Any

import pytest
import torch
from linearized import linearized, tokens
from torch import Tensor

from slope_cli.linearize.swap import linear_windows
from slope_cli.linearize.transfer import transfer_losses

# What torch's compiler warns of is its own business.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore:The .grad")]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture
def model() -> Any:
    """Grouped heads, two layers."""
    torch._dynamo.reset()
    return linearized("llama3-8b", window=5)


def compile_windows(model: Any) -> None:
    for window in linear_windows(model).values():
        window.compiled = True


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


def test_compiled_steps_decode_the_same_logits_at_any_batch(model: Any) -> None:
    expected = [decoded(model, tokens(30, rows), 12) for rows in (2, 3)]
    compile_windows(model)
    before = graphs()
    for rows, logits_BTV in zip((2, 3), expected, strict=True):
        torch.testing.assert_close(decoded(model, tokens(30, rows), 12), logits_BTV, rtol=0, atol=1e-5)
    assert graphs() == before + 1


def test_compiled_transfer_has_the_same_losses_and_gradients(model: Any) -> None:
    ids_BT = tokens(150)
    expected = transfer_losses(model, {"input_ids": ids_BT})
    weights = [parameter for window in linear_windows(model).values() for parameter in window.parameters()]
    gradients = [parameter.grad.clone() for parameter in weights]
    model.zero_grad()
    compile_windows(model)
    before = graphs()
    found = transfer_losses(model, {"input_ids": ids_BT})
    assert graphs() == before + 1
    for name, loss in expected.items():
        torch.testing.assert_close(found[name].total, loss.total, rtol=1e-5, atol=0)
    for parameter, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-5)
