"""Whole layers on a GPU: every backend against float64, training, staleness, compile, CUDA graphs."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_kernels import SparseLinear, cuda, cusparselt, layers, masks, ops, packed

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The CUDA Graph is empty"
)  # Inductor's own

BACKENDS: list[packed.Backend] = ["auto", "cusparselt", "dense", "reference"]


def make(out: int, inp: int, *, bias: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32) -> SparseLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, generator=generator, dtype=torch.float64) / inp**0.5
    bias_O = torch.randn(out, generator=generator, dtype=torch.float64) if bias else None
    return SparseLinear(weight, bias_O, masks.row_mask(weight, 2, 4), 2, 4).to("cuda", dtype)


def using(model: Any, backend: packed.Backend) -> Any:
    """The model, its layers on this backend."""
    try:
        layers.set_backend(model, backend)
    except cusparselt.CuSparseLtError as error:
        pytest.skip(str(error))
    return model


def packed_of(layer: SparseLinear) -> Any:
    """The only packed weights of a layer."""
    (found,) = packed.packed_layers(layer.row_mask_bits)
    return found


def error(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None
    return float((got.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("out", "inp", "tokens", "half"),
    [
        (768, 512, (2, 256), torch.bfloat16),
        (528, 1040, (264,), torch.bfloat16),
        (512, 512, (40,), torch.bfloat16),  # too few tokens for a plan
        (768, 512, (512,), torch.float16),
        (32, 48, (512,), torch.float16),  # too small for a plan
    ],
)
def test_three_products(
    backend: packed.Backend, out: int, inp: int, tokens: tuple[int, ...], half: torch.dtype
) -> None:
    for dtype, bias in ((torch.float32, True), (half, True), (torch.float32, False)):
        layer = make(out, inp, bias=bias, dtype=dtype)
        using(layer, backend)
        X = torch.randn(*tokens, inp, device="cuda", dtype=half, requires_grad=True)
        dY = torch.randn(*tokens, out, device="cuda", dtype=half)
        Y = layer(X)
        Y.backward(dY)
        x, dy = X.detach().double().flatten(0, -2), dY.double().flatten(0, -2)
        expected = x @ layer.weight.detach().double().t()
        if layer.bias is not None:
            expected += layer.bias.detach().double()
            assert error(layer.bias.grad, dy.sum(0)) < 1e-2
        limit = 1e-2 if half is torch.bfloat16 else 2e-3
        assert Y.dtype == half
        assert error(Y.flatten(0, -2), expected) < limit
        assert X.grad is not None
        assert error(X.grad.flatten(0, -2), dy @ layer.weight_backward.detach().double()) < limit
        dense = dy.t() @ x
        assert layer.values.grad is not None
        assert layer.values.grad.dtype == dtype
        assert error(layer.values.grad, dense[layer.row_mask()].view(out, -1)) < limit


@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
def test_packed_weights_are_those_of_values_and_masks_after_many_steps(backend: packed.Backend) -> None:
    model: Any = nn.Sequential(make(512, 768), nn.GELU(), make(768, 512, seed=1))
    twin = copy.deepcopy(model)
    histories = []
    for current in (using(model, backend), using(twin, "reference")):
        optimizer = torch.optim.AdamW(current.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator("cuda").manual_seed(0)
        losses = []
        for step in range(30):
            X = torch.randn(256, 768, device="cuda", generator=generator)
            with torch.autocast("cuda", torch.bfloat16):
                loss = (current(X).float() - X.roll(1, -1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 9:
                for layer in (current[0], current[2]):
                    layer.update_backward_mask()
                    layer.validate()
            losses.append(loss.item())
        histories.append(losses)
    assert histories[0] == pytest.approx(histories[1], rel=2e-3)
    with torch.autocast("cuda", torch.bfloat16):
        model(X.requires_grad_()).sum().backward()
    for layer, row in zip((model[0], model[2]), layers.backends(model), strict=True):
        assert row.forward is not None
        assert row.input_grad is not None
        found = packed_of(layer)
        assert found.forward is not None
        assert found.backward is not None
        W = layer.weight.detach().bfloat16()
        WRC_t = layer.weight_backward.detach().bfloat16().t().contiguous()
        is_packed = backend == "cusparselt" and row.forward.sparse
        assert torch.equal(found.forward.target, layer.values.bfloat16() if is_packed else W)
        if row.input_grad.sparse:
            slots = cuda.slot_markers(layer.backward_mask_bits, torch.bfloat16).bool()
            assert torch.equal(found.backward.target, WRC_t[slots].view(layer.in_features, -1))
        else:
            assert torch.equal(found.backward.target, WRC_t)


@torch.no_grad()
def test_every_way_of_changing_a_layer_is_noticed() -> None:
    layer, other = make(512, 512), make(512, 512, seed=9)
    using(layer, "cusparselt")
    X = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)

    def check() -> None:
        expected = X.double() @ layer.weight.double().t()
        if layer.bias is not None:
            expected += layer.bias.double()
        assert error(layer(X), expected) < 1e-2

    check()
    layer.values.mul_(-1)
    check()
    assert layer.bias is not None
    layer.bias.add_(3)
    check()
    layer.load_state_dict(other.state_dict())
    check()
    layer.load_state_dict(make(512, 512, seed=3).state_dict(), assign=True)
    check()
    layer.values.data = torch.randn_like(layer.values)
    check()
    layer.backward_mask_bits = other.backward_mask_bits
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        layer(x).backward(X)
    layer.backward_mask_bits = make(512, 512, seed=3).backward_mask_bits
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        layer(x).backward(X)
    assert error(x.grad, X.double() @ layer.weight_backward.double()) < 1e-2


def test_one_launch_refreshes_a_model_of_many_shapes() -> None:
    model: Any = nn.Sequential(
        make(512, 768), make(528, 512, seed=1), make(1040, 528, seed=2, bias=False), make(16, 1040)
    )
    using(model, "cusparselt")
    with torch.autocast("cuda", torch.bfloat16):
        model(torch.randn(256, 768, device="cuda", requires_grad=True)).sum().backward()
    found = [packed_of(layer) for layer in model]
    assert sum(not side.packed for one in found for side in (one.forward, one.backward)) >= 2
    before = [[side.target.clone() for side in (one.forward, one.backward)] for one in found]
    for one in found:
        one.forward.target.fill_(torch.nan)
        one.backward.target.fill_(torch.nan)
    with torch.no_grad():
        model[0].bias.add_(1)
    layers.refresh(model)
    for one, targets in zip(found, before, strict=True):
        assert torch.equal(one.forward.target, targets[0])
        assert torch.equal(one.backward.target, targets[1])
    assert torch.equal(found[0]._bias, model[0].bias.bfloat16())


def test_one_of_two_is_a_case_of_two_of_four() -> None:
    weight = torch.randn(512, 512)
    layer = SparseLinear(weight, None, masks.row_mask(weight, 1, 2), 1, 2).cuda()
    X = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    Y = layer(X)
    Y.backward(torch.ones_like(Y))
    assert layers.backends(layer)
    assert error(Y, X.detach().double() @ layer.weight.detach().double().t()) < 1e-2
    assert error(X.grad, torch.ones_like(Y).double() @ layer.weight_backward.detach().double()) < 1e-2
    layer.update_backward_mask()
    layer.validate()


def test_packed_weights_are_freed_with_their_layer() -> None:
    layer = make(512, 512)
    using(layer, "dense")
    layer(torch.randn(256, 512, device="cuda", dtype=torch.bfloat16))
    held = packed_of(layer)
    assert held.forward is not None
    target = weakref.ref(held.forward.target)
    del layer, held
    gc.collect()
    assert target() is None


def test_a_cast_or_moved_layer_gets_packed_weights_of_its_own() -> None:
    layer: Any = make(512, 512)
    X = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    layer(X)
    moved = copy.deepcopy(layer).cpu().cuda()
    assert packed.packed_layers(moved.row_mask_bits) == []
    with torch.no_grad():
        moved.values.neg_()
        assert error(moved(X), X.double() @ moved.weight.double().t() + moved.bias.double()) < 1e-2
        assert error(layer(X), X.double() @ layer.weight.double().t() + layer.bias.double()) < 1e-2


@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
def test_layers_that_share_packed_weights_train_as_layers_that_do_not(backend: packed.Backend) -> None:
    """Two micro-batches a step, a part computed again in the backward pass, frozen layers, and masks that change."""
    blocks = [
        nn.Sequential(make(512, 768, seed=seed), nn.GELU(), make(768, 512, seed=seed, bias=seed % 2 == 0))
        for seed in range(4)
    ]
    model: Any = nn.Sequential(*blocks)
    for frozen in (model[1][0], model[2][0]):
        frozen.requires_grad_(False)
    twin = copy.deepcopy(using(model, backend))
    layers.share_packed(model)
    histories = []
    for current in (model, twin):
        optimizer = torch.optim.AdamW((p for p in current.parameters() if p.requires_grad), lr=1e-3, fused=True)
        generator = torch.Generator("cuda").manual_seed(0)
        gradients = []
        for step in range(6):
            for _ in range(2):
                X = torch.randn(256, 768, device="cuda", generator=generator, requires_grad=True)
                with torch.autocast("cuda", torch.bfloat16):
                    Y = current[1](current[0](X))
                    Y = current[3](checkpoint(current[2], Y, use_reentrant=False))
                (Y.float() - X.detach().roll(1, -1)).square().mean().backward()
                assert X.grad is not None
                gradients.append(X.grad)
            optimizer.step()
            optimizer.zero_grad()
            if step % 2:
                layers.update_backward_masks(current)
                layers.refresh(current)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            gradients.append(current(X))
        histories.append(gradients)
    for ours, theirs in zip(*histories, strict=True):
        assert error(ours, theirs.double()) < 1e-2
    held = {id(packed_of(layer)) for _, layer in layers.sparse_layers(model)}
    assert len(held) == len(layers.alike(model)) == 3
    assert all(row.forward is not None for row in layers.backends(model))


def test_layers_that_share_packed_weights_are_refused_in_a_capture() -> None:
    model = nn.Sequential(make(512, 512), make(512, 512, seed=1))
    layers.share_packed(model)
    X = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    model(X)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        X.add_(1)
        with pytest.raises(RuntimeError, match="share their packed weights"):
            model[1](X)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_frozen_layer_passes_the_exact_gradient_by_one_kept_matrix(compiled: bool) -> None:
    layer = make(512, 768)
    layer.requires_grad_(False)
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    X = torch.randn(256, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dY = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    kept = []
    for _ in range(2):
        X.grad = None
        run(X).backward(dY)
        assert error(X.grad, dY.double() @ layer.weight.double()) < 1e-2
        kept.append(packed_of(layer)._dense)
    assert kept[0] is kept[1]
    assert packed_of(layer).backward is None
    with torch.no_grad():
        layer.values.neg_()
    X.grad = None
    run(X).backward(dY)
    assert error(X.grad, dY.double() @ layer.weight.double()) < 1e-2


def test_dense_weights_decode_as_the_layer_does() -> None:
    layer = make(512, 768)
    X = torch.randn(3, 768, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected = layer(X)
        with layers.dense_weights(layer, torch.bfloat16):
            assert torch.equal(layer(X), expected)


def test_registrations() -> None:
    layer = make(512, 512)
    X = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    arguments = (X, layer.values, layer.bias, layer.row_mask_bits, layer.backward_mask_bits, "auto")
    torch.library.opcheck(ops.linear_op, arguments)


@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(backend: packed.Backend, mode: str) -> None:
    model = using(nn.Sequential(make(512, 768), nn.GELU(), make(768, 512, seed=1)), backend)
    twin = copy.deepcopy(model)
    layers.prepare(model, 256)  # of the second backend's model, Inductor captures the very first run
    assert all(row.forward and row.input_grad for row in layers.backends(model))
    compiled: Any = torch.compile(model, fullgraph=True, mode=mode)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for m in (model, twin)]
    for _ in range(6):
        X = torch.randn(256, 768, device="cuda")
        losses = []
        for run, optimizer in zip((compiled, twin), optimizers, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast("cuda", torch.bfloat16):
                loss = (run(X).float() - X).square().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        layers.refresh(model)
        assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_first_step_inside_a_capture_is_refused() -> None:
    layer = make(512, 512)
    X = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        X.add_(1)
        with pytest.raises(RuntimeError, match="run one step before capturing"):
            layer(X)


@pytest.mark.parametrize("whole", [False, True])
def test_cuda_graph_with_weights_refreshed_in_place(whole: bool) -> None:
    """Forward and backward replayed from a graph, with or without the step and its refresh in it, and an eager twin."""
    model = using(nn.Sequential(make(512, 768), nn.GELU(), make(768, 512, seed=1)), "cusparselt")
    twin = copy.deepcopy(model)
    batches = torch.randn(10, 256, 768, device="cuda", dtype=torch.bfloat16)
    X = batches[0].clone()

    def backward(current: Any) -> Tensor:
        loss: Tensor = (current(X).float() - X.float()).square().mean()
        torch.autograd.backward(loss)
        return loss

    def update(current: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        layers.refresh(current)

    optimizer, twin_optimizer = (
        torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True, capturable=True) for m in (model, twin)
    )
    expected = []
    for batch in batches:
        X.copy_(batch)
        expected.append(backward(twin).item())
        update(twin, twin_optimizer)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for batch in batches[:2]:
            X.copy_(batch)
            backward(model)
            update(model, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = backward(model)
        if whole:
            update(model, optimizer)
    losses = []
    for batch in batches[2:]:
        X.copy_(batch)
        graph.replay()
        losses.append(loss.item())
        if not whole:
            update(model, optimizer)
    assert losses == pytest.approx(expected[2:], rel=1e-3)
    for layer, row in zip((model[0], model[2]), layers.backends(model), strict=True):
        assert row.forward is not None
        target = packed_of(layer).forward.target
        assert torch.equal(target, (layer.values if row.forward.sparse else layer.weight).bfloat16())
