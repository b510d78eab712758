"""The custom ops without a GPU: the same numbers as the reference, sound registrations, no graph break."""

import copy
import gc
import weakref

import pytest
import torch

from sparse_kernels import (
    SparseLinear,
    add_adapters,
    cuda,
    dense_weights,
    layers,
    masks,
    ops,
    packed,
    reference,
    set_backend,
    set_fp8,
    share_packed,
    using_backend,
)
from sparse_kernels.formats import E4M3
from sparse_kernels.kernel_choice import Choice


def make(out: int, inp: int, *, bias: bool = True) -> SparseLinear:
    generator = torch.Generator().manual_seed(out * inp)
    weight = torch.randn(out, inp, generator=generator)
    bias_O = torch.randn(out, generator=generator) if bias else None
    return SparseLinear(weight, bias_O, masks.row_mask(weight, 2, 4), 2, 4)


def weight_of(layer: SparseLinear) -> packed.LayerWeight:
    return packed.LayerWeight(layer.values, layer.row_mask_bits, layer.backward_mask_bits, layer.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_ops_equal_the_reference(bias: bool) -> None:
    layer = make(32, 48, bias=bias)
    X, dY = torch.randn(2, 5, 48), torch.randn(2, 5, 32)
    results = []
    for run in (
        lambda X: ops.linear(X, layer.values, layer.bias, layer.row_mask_bits, layer.backward_mask_bits),
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
    ops.linear(X, values, layer.bias, layer.row_mask_bits, layer.backward_mask_bits).backward(dY)
    torch.testing.assert_close(X.grad, dY @ layer.weight.detach())


def test_registrations() -> None:
    layer = make(16, 32)
    X = torch.randn(5, 32, requires_grad=True)
    arguments = (X, layer.values, layer.bias, layer.row_mask_bits, layer.backward_mask_bits, "auto")
    torch.library.opcheck(ops.linear_op, arguments)
    dY = torch.randn(5, 16)
    for exact in (False, True):
        weight = layer.values.detach(), layer.row_mask_bits, layer.backward_mask_bits
        torch.library.opcheck(ops.input_grad_op, (dY, *weight, "auto", exact))
    torch.library.opcheck(ops.weight_grad_op, (dY, X.detach(), layer.values.detach(), layer.row_mask_bits, "auto"))


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


def test_a_backend_belongs_to_the_layers_of_a_model() -> None:
    model, other = torch.nn.Sequential(make(16, 16), make(16, 16)), make(16, 16)
    with pytest.raises(ValueError, match="backend must be"):
        set_backend(model, "cutlass")  # type: ignore[arg-type]
    set_backend(model, "dense")
    model[1].backend = "reference"
    with using_backend(model, "auto"):
        assert [layer.backend for layer in model] == ["auto", "reference"]
    assert [layer.backend for layer in (*model, other)] == ["dense", "reference", "auto"]


def test_packed_weights_live_as_long_as_their_layer_and_no_copy_of_it_has_them() -> None:
    layer = make(16, 16)
    held = weakref.ref(packed.packed_layer(layer.row_mask_bits, torch.bfloat16, "auto"))
    copied = copy.deepcopy(layer)
    assert packed.packed_layers(layer.row_mask_bits) == [held()]
    over_the_same_memory = layer.row_mask_bits.detach().view(-1)
    assert packed.packed_layers(over_the_same_memory) == [held()]
    assert packed.packed_layers(copied.row_mask_bits) == []
    assert packed.packed_layer(layer.row_mask_bits, torch.bfloat16, "dense") is not held()  # of another backend
    del layer
    gc.collect()
    assert held() is None


def test_training_frees_the_packed_weights_that_evaluation_alone_reads() -> None:
    """A layer in fp8 evaluates in 16 bits; one that is in fp8 no longer trains in 16 bits."""
    layer, other = make(32, 32), make(32, 32)
    model, every = torch.nn.Sequential(layer, other), (torch.bfloat16, torch.float16, E4M3.dtype)

    def formats(layer: SparseLinear) -> list[torch.dtype]:
        return [found.format.dtype for found in packed.packed_layers(layer.row_mask_bits)]

    def pack() -> list[weakref.ref[packed.PackedLayer]]:
        bits = [each.row_mask_bits for each in model]
        return [weakref.ref(packed.packed_layer(one, dtype, "auto")) for one in bits for dtype in every]

    set_fp8(model, ["0"])
    held = pack()
    model.eval()
    assert formats(layer) == formats(other) == [*every]
    model.train()
    assert (formats(layer), formats(other)) == ([E4M3.dtype], [*every[:2]])
    assert [one() is not None for one in held] == [False, False, True, True, True, False]
    pack()
    set_fp8(model, [])
    assert formats(layer) == [*every[:2]]
    pack()
    set_fp8(model, ["0"])
    assert formats(layer) == [E4M3.dtype]


def test_the_stamps_of_a_weight_change_when_any_of_it_is_written_or_replaced() -> None:
    layer = make(16, 16)

    def stamps() -> tuple[object, ...]:
        return tuple(weight_of(layer).stamps(product) for product in packed.PRODUCTS)

    packed.packed_layer(layer.row_mask_bits, torch.bfloat16, "auto")
    seen = [stamps(), stamps()]
    assert seen.pop() == seen[0]
    changes = (
        lambda: layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()}),
        lambda: setattr(layer, "values", torch.nn.Parameter(layer.values.detach().clone())),
        lambda: layer.update_backward_mask("random", 3),
        lambda: torch.nn.init.ones_(layer.bias),
        lambda: torch.optim.AdamW(layer.parameters(), fused=True).step(),
    )
    for change in changes:
        layer(torch.randn(2, 16)).sum().backward()  # a fused optimizer needs gradients
        change()
        seen.append(stamps())
    assert len(set(seen)) == 1 + len(changes)


def test_a_product_is_not_stale_for_what_it_does_not_read() -> None:
    layer = make(16, 16)
    before = {product: weight_of(layer).stamps(product) for product in packed.PRODUCTS}
    layer.update_backward_mask("random", 3)
    assert weight_of(layer).stamps("linear") == before["linear"]
    assert weight_of(layer).stamps("input_grad") != before["input_grad"]
    torch.nn.init.ones_(layer.bias)
    assert weight_of(layer)._replace(bias=None).stamps("input_grad") == weight_of(layer).stamps("input_grad")
    assert weight_of(layer).stamps("linear") != before["linear"]


# -------------------------------------------------------------------------------------------------- shared by layers


def test_layers_of_the_same_sides_share_packed_weights() -> None:
    model = torch.nn.Sequential(make(32, 16), make(16, 32), make(32, 16), make(16, 32, bias=False), make(16, 32))
    alone = packed.packed_layer(model[0].row_mask_bits, torch.bfloat16, "auto")
    share_packed(model)
    first, second, third, fourth, fifth = (
        packed.packed_layer(layer.row_mask_bits, torch.bfloat16, "auto") for layer in model
    )
    assert (first, second) == (third, fifth)
    assert len({alone, first, second, fourth}) == 4
    assert (alone.shared, first.shared, fourth.shared) == (False, True, True)
    assert packed.packed_layers(copy.deepcopy(model)[0].row_mask_bits) == []
    held = weakref.ref(first)
    del model, first, second, third, fourth, fifth
    gc.collect()
    assert held() is None


def dense_pair(shared: packed.PackedLayer, layer: SparseLinear) -> packed.PackedLayer:
    """Packed weights of both products, dense ones: no library is needed to write them."""
    rows, columns = layer.out_features, layer.in_features
    choice = Choice(False, "a test")
    shared.forward = packed.PackedWeight(layer.row_mask_bits, columns, shared.format, choice)
    shared.backward = packed.PackedWeight(layer.backward_mask_bits, rows, shared.format, choice)
    return shared


def written(launches: list[cuda.KernelLaunch], by: packed.PackedLayer, values: torch.Tensor) -> list[str]:
    """Which of its matrices are to be written from these values."""
    assert by.forward is not None
    assert by.backward is not None
    names = {by.forward.target.data_ptr(): "W^R", by.backward.target.data_ptr(): "W^{R,C}"}
    assert all(one.args[0] == values.data_ptr() for one in launches)
    return [names[address] for one in launches for address in one.args[4:6] if address]


def test_layers_take_turns_and_each_product_writes_what_it_reads() -> None:
    model = torch.nn.Sequential(*(make(32, 32) for _ in range(2))).to(torch.bfloat16)
    share_packed(model)
    ours = dense_pair(packed.packed_layer(model[0].row_mask_bits, torch.bfloat16, "auto"), model[0])
    # As with FSDP2, the values of one block lie where those of the other lay before, and count no versions.
    gathered = torch.empty_like(model[0].values)
    first, second = (weight_of(layer)._replace(values=gathered) for layer in model)

    def turn(weight: packed.LayerWeight, product: packed.Product) -> list[str]:
        known = weight if product == "linear" else weight._replace(bias=None)
        return written(ours.refresh_if_stale(known, product), ours, gathered)

    forward = [(first, "linear"), (second, "linear")]
    assert [turn(*each) for each in forward] == [["W^R"], ["W^R"]]
    assert [turn(second, "input_grad"), turn(first, "input_grad")] == [["W^{R,C}"], ["W^{R,C}"]]
    # The second micro-batch with blocks computed again: what the same layer read last is still there.
    again = [*forward, (second, "linear"), (second, "input_grad"), (first, "linear"), (first, "input_grad")]
    assert [turn(*each) for each in again] == [["W^R"], ["W^R"], [], ["W^{R,C}"], ["W^R"], ["W^{R,C}"]]
    assert [turn(first, product) for product in packed.PRODUCTS] == [[], []]
    model[0].update_backward_mask("random", 3)
    assert [turn(first, product) for product in packed.PRODUCTS] == [[], ["W^{R,C}"]]
    torch.optim.SGD(model.parameters()).step()
    assert [turn(first, product) for product in packed.PRODUCTS] == [["W^R"], ["W^{R,C}"]]


def test_one_layer_has_both_matrices_from_one_reading() -> None:
    layer = make(32, 32).to(torch.bfloat16)
    ours = dense_pair(packed.packed_layer(layer.row_mask_bits, torch.bfloat16, "auto"), layer)
    weight = weight_of(layer)
    for change in (lambda: None, torch.optim.SGD(layer.parameters()).step):
        change()
        assert written(ours.refresh_if_stale(weight, "linear"), ours, layer.values) == ["W^R", "W^{R,C}"]
        assert [ours.refresh_if_stale(weight, product) for product in packed.PRODUCTS] == [[], []]


@pytest.mark.parametrize("adapter", [False, True])
def test_dense_weights_give_the_same_output_and_are_gone_after(adapter: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(make(32, 16), torch.nn.Tanh(), make(16, 32, bias=False))
    if adapter:
        for added in add_adapters(model, 4).values():
            torch.nn.init.normal_(added.lora_B)
    X = torch.randn(3, 16, requires_grad=True)
    expected = model(X)
    with dense_weights(model):
        with torch.no_grad():
            torch.testing.assert_close(model(X), expected)
        model(X).sum().backward()  # with gradients the layers stay sparse
    assert model[0].values.grad is not None
    with dense_weights(model, torch.bfloat16), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == torch.bfloat16
        torch.testing.assert_close(model(X).float(), expected, atol=0.05, rtol=0.05)
    assert all(layer.dense_weight is None for _, layer in layers.sparse_layers(model))
    assert not any("dense" in name for name in model.state_dict())


def test_a_layer_on_the_meta_device_has_the_shapes_of_a_real_one() -> None:
    real = make(32, 48)
    weight, bias = torch.empty(32, 48, device="meta"), torch.empty(32, device="meta")
    meta = SparseLinear(weight, bias, masks.row_mask(weight, 2, 4), 2, 4)
    shapes = [{name: tuple(t.shape) for name, t in layer.state_dict().items()} for layer in (real, meta)]
    assert shapes[0] == shapes[1]
    assert all(tensor.is_meta for tensor in meta.state_dict().values())


def test_nothing_to_refresh_or_report_without_a_gpu() -> None:
    model = torch.nn.Sequential(make(16, 16))
    model(torch.randn(2, 16))
    layers.refresh(model)
    assert layers.backends(model) == []
