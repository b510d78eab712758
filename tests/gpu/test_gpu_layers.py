"""Whole layers on a GPU: every backend against float64, training, staleness, compile, CUDA graphs."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sparse_kernels import SparseLinear, cuda, cusparselt, layers, masks, ops, packed

BACKENDS: list[packed.Backend] = ["auto", "cusparselt", "dense", "reference"]


def make(out: int, inp: int, *, bias: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32) -> SparseLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, generator=generator, dtype=torch.float64) / inp**0.5
    bias_O = torch.randn(out, generator=generator, dtype=torch.float64) if bias else None
    return SparseLinear(weight, bias_O, masks.row_mask(weight, 2, 4), 2, 4).to("cuda", dtype)


def use(backend: packed.Backend) -> None:
    try:
        packed.set_backend(backend)
    except cusparselt.CuSparseLtError as error:
        pytest.skip(str(error))


def error(got: Tensor, expected: Tensor) -> float:
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
    use(backend)
    for dtype, bias in ((torch.float32, True), (half, True), (torch.float32, False)):
        layer = make(out, inp, bias=bias, dtype=dtype)
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
        assert error(X.grad.flatten(0, -2), dy @ layer.weight_backward.detach().double()) < limit
        dense = dy.t() @ x
        assert layer.values.grad.dtype == dtype
        assert error(layer.values.grad, dense[layer.row_mask()].view(out, -1)) < limit


@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
def test_packed_copies_say_what_values_and_positions_say_after_many_steps(backend: packed.Backend) -> None:
    use(backend)
    model = nn.Sequential(make(512, 768), nn.GELU(), make(768, 512, seed=1))
    twin = copy.deepcopy(model)
    histories = []
    for current, name in ((model, backend), (twin, "reference")):
        use(name)
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
                    layer.renew_column_mask()
                    layer.validate()
            losses.append(loss.item())
        histories.append(losses)
    assert histories[0] == pytest.approx(histories[1], rel=2e-3)
    use(backend)
    with torch.autocast("cuda", torch.bfloat16):
        model(X.requires_grad_()).sum().backward()
    for layer, row in zip((model[0], model[2]), layers.backends(model), strict=True):
        assert row.forward is not None
        assert row.input_grad is not None
        found = packed.copies_of(layer.positions, torch.bfloat16)
        assert found.forward is not None
        assert found.backward is not None
        W = layer.weight.detach().bfloat16()
        WRC_t = layer.weight_backward.detach().bfloat16().t().contiguous()
        is_packed = backend == "cusparselt" and row.forward.sparse
        assert torch.equal(found.forward.target, layer.values.bfloat16() if is_packed else W)
        if row.input_grad.sparse:
            slots = cuda.mark(layer.positions_t, torch.bfloat16).bool()
            assert torch.equal(found.backward.target, WRC_t[slots].view(layer.in_features, -1))
        else:
            assert torch.equal(found.backward.target, WRC_t)


@torch.no_grad()
def test_every_way_of_changing_a_layer_is_noticed() -> None:
    use("cusparselt")
    layer, other = make(512, 512), make(512, 512, seed=9)
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
    layer.positions_t = other.positions_t
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        layer(x).backward(X)
    layer.positions_t = make(512, 512, seed=3).positions_t
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        layer(x).backward(X)
    assert error(x.grad, X.double() @ layer.weight_backward.double()) < 1e-2


def test_one_launch_refreshes_a_model_of_many_shapes() -> None:
    use("cusparselt")
    model = nn.Sequential(make(512, 768), make(528, 512, seed=1), make(1040, 528, seed=2, bias=False), make(16, 1040))
    with torch.autocast("cuda", torch.bfloat16):
        model(torch.randn(256, 768, device="cuda", requires_grad=True)).sum().backward()
    found = [packed.copies_of(layer.positions, torch.bfloat16) for layer in model]
    assert sum(side.packed is None for one in found for side in (one.forward, one.backward)) >= 2
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
    assert torch.equal(found[0].bias, model[0].bias.bfloat16())


def test_one_of_two_is_a_case_of_two_of_four() -> None:
    weight = torch.randn(512, 512)
    layer = SparseLinear(weight, None, masks.row_mask(weight, 1, 2), 1, 2).cuda()
    X = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    Y = layer(X)
    Y.backward(torch.ones_like(Y))
    assert layers.backends(layer)
    assert error(Y, X.detach().double() @ layer.weight.detach().double().t()) < 1e-2
    assert error(X.grad, torch.ones_like(Y).double() @ layer.weight_backward.detach().double()) < 1e-2
    layer.renew_column_mask()
    layer.validate()


def test_copies_go_with_their_layer() -> None:
    use("dense")
    layer = make(512, 512)
    layer(torch.randn(256, 512, device="cuda", dtype=torch.bfloat16))
    assert len(packed._COPIES) == 1
    del layer
    packed.release()
    assert not packed._COPIES


def test_registrations() -> None:
    layer = make(512, 512)
    X = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    arguments = (X, layer.values, layer.bias, layer.positions, layer.positions_t)
    torch.library.opcheck(ops.linear_op, arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The CUDA Graph is empty")  # Inductor's own
@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(backend: packed.Backend, mode: str) -> None:
    use(backend)
    model = nn.Sequential(make(512, 768), nn.GELU(), make(768, 512, seed=1))
    twin = copy.deepcopy(model)
    layers.prepare(model, 256)  # of the second backend's model, Inductor captures the very first run
    assert all(row.forward and row.input_grad for row in layers.backends(model))
    compiled = torch.compile(model, fullgraph=True, mode=mode)
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
    use("cusparselt")
    model = nn.Sequential(make(512, 768), nn.GELU(), make(768, 512, seed=1))
    twin = copy.deepcopy(model)
    batches = torch.randn(10, 256, 768, device="cuda", dtype=torch.bfloat16)
    X = batches[0].clone()

    def backward(current: nn.Module) -> Tensor:
        loss = (current(X).float() - X.float()).square().mean()
        loss.backward()
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
        target = packed.copies_of(layer.positions, torch.bfloat16).forward.target
        assert torch.equal(target, (layer.values if row.forward.sparse else layer.weight).bfloat16())
