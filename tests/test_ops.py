"""The custom ops without a GPU: the same numbers as the reference, sound registrations, no graph break."""

import copy

import pytest
import torch

from sparse_kernels import SparseLinear, layers, masks, ops, packed, reference


def make(out: int, inp: int, *, bias: bool = True) -> SparseLinear:
    generator = torch.Generator().manual_seed(out * inp)
    weight = torch.randn(out, inp, generator=generator)
    bias_O = torch.randn(out, generator=generator) if bias else None
    return SparseLinear(weight, bias_O, masks.row_mask(weight, 2, 4), 2, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_ops_equal_the_reference(bias: bool) -> None:
    layer = make(32, 48, bias=bias)
    X, dY = torch.randn(2, 5, 48), torch.randn(2, 5, 32)
    results = []
    for run in (
        lambda X: ops.linear(X, layer.values, layer.bias, layer.positions, layer.positions_t),
        lambda X: reference.sparse_linear(X, layer.values, layer.bias, *layer.layout()),
    ):
        layer.zero_grad()
        x = X.clone().requires_grad_()
        Y = run(x)
        Y.backward(dY)
        results.append([Y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_frozen_values_have_the_exact_input_gradient() -> None:
    layer = make(32, 48)
    X, dY = torch.randn(5, 48, requires_grad=True), torch.randn(5, 32)
    values = layer.values.detach()
    ops.linear(X, values, layer.bias, layer.positions, layer.positions_t).backward(dY)
    torch.testing.assert_close(X.grad, dY @ layer.weight.detach())


def test_registrations() -> None:
    layer = make(16, 32)
    X = torch.randn(5, 32, requires_grad=True)
    arguments = (X, layer.values, layer.bias, layer.positions, layer.positions_t)
    torch.library.opcheck(ops.linear_op, arguments)
    dY = torch.randn(5, 16)
    torch.library.opcheck(ops.input_grad_op, (dY, layer.values.detach(), layer.positions, layer.positions_t))
    torch.library.opcheck(ops.weight_grad_op, (dY, X.detach(), layer.values.detach(), layer.positions))


def test_compiled_layer_has_no_graph_break_and_equals_eager() -> None:
    layer = make(32, 32)
    model = torch.nn.Sequential(layer, torch.nn.GELU(), copy.deepcopy(layer))
    X = torch.randn(3, 32)
    expected = model(X)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(X)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_backend_names() -> None:
    with pytest.raises(ValueError, match="backend must be"):
        packed.set_backend("cutlass")  # type: ignore[arg-type]
    packed.set_backend("reference")
    packed.set_backend("auto")


def test_nothing_to_refresh_or_report_without_a_gpu() -> None:
    model = torch.nn.Sequential(make(16, 16))
    model(torch.randn(2, 16))
    layers.refresh(model)
    assert layers.backends(model) == []
