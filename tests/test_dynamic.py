"""MaskedLinear against the formulas of SR-STE, FST, S-STE and Wanda with masks as matrices, in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.marks import slow
from torch import Tensor, nn

from sparse_kernels import (
    MaskedLinear,
    decay_pruned,
    mask_layers,
    masked_layers,
    masks,
    remove_masks,
    sparsify,
    update_masks,
)

PATTERNS = [(2, 4), (1, 2), (2, 8)]
# torch warns of itself: to trace an autograd.Function it makes an instance, and inductor still imports torch.jit.
TRACED = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:.*torch.jit:DeprecationWarning"
)


def make(
    out: int, inp: int, n: int = 2, m: int = 4, *, bias: bool = True, seed: int = 0, **options: bool
) -> MaskedLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, dtype=torch.float64, generator=generator)
    bias_O = torch.randn(out, dtype=torch.float64, generator=generator) if bias else None
    return MaskedLinear(weight, bias_O, n, m, **options)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.integers(1, 3), min_size=0, max_size=3),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_products_equal_the_formulas(
    pattern: tuple[int, int], go: int, gi: int, lead: list[int], bias: bool, seed: int
) -> None:
    n, m = pattern
    layer = make(go * m, gi * m, n, m, bias=bias, seed=seed)
    X, dY = normal(*lead, gi * m).requires_grad_(), normal(*lead, go * m, seed=2)
    Y = layer(X)
    Y.backward(dY)
    W = layer.weight.detach() * layer.mask
    assert (W.unflatten(1, (-1, m)) != 0).sum(-1).unique().tolist() == [n]
    x, dy = X.detach().reshape(-1, gi * m), dY.reshape(-1, go * m)
    expected = x @ W.T
    if layer.bias is not None:
        expected = expected + layer.bias.detach()
        torch.testing.assert_close(layer.bias.grad, dy.sum(0))
    assert Y.shape == dY.shape
    torch.testing.assert_close(Y.detach().reshape(-1, go * m), expected)
    torch.testing.assert_close(X.grad.reshape(-1, gi * m), dy @ W)  # type: ignore[union-attr]
    torch.testing.assert_close(layer.weight.grad, dy.T @ x)  # straight through: pruned entries have a gradient too


def softened(W: Tensor, n: int, m: int) -> Tensor:
    """Every entry less the (n + 1)-th largest magnitude of its group, towards zero; written out."""
    rows = W.view(-1, m).tolist()
    thresholds = [sorted(map(abs, row), reverse=True)[n] for row in rows]
    soft = [[math.copysign(max(abs(w) - t, 0.0), w) for w in row] for row, t in zip(rows, thresholds, strict=True)]
    return torch.tensor(soft, dtype=W.dtype).view(W.shape)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PATTERNS), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 2**31))
def test_soft_thresholding_equals_its_formula_and_passes_the_gradient_straight_through(
    pattern: tuple[int, int], go: int, gi: int, bias: bool, seed: int
) -> None:
    n, m = pattern
    layer = make(go * m, gi * m, n, m, bias=bias, seed=seed, soft_threshold=True)
    W = layer.weight.detach().clone()
    soft = softened(W, n, m)
    beta = (W * soft).sum() / (soft * soft).sum()
    torch.testing.assert_close(layer.scale, beta.float())  # type: ignore[arg-type]
    for nearby in (0.999, 1.001):  # the least squared error
        assert (W - beta * soft).norm() <= (W - nearby * beta * soft).norm()
    with torch.no_grad():  # later weights have the first one's scale
        layer.weight.add_(normal(*W.shape, seed=seed + 1))
    layer.update_mask()
    P = float(layer.scale) * softened(layer.weight.detach(), n, m)  # type: ignore[arg-type]
    assert not P[~layer.mask].any()
    assert (P.unflatten(1, (-1, m)) != 0).sum(-1).max() <= n
    X, dY = normal(5, gi * m, seed=2).requires_grad_(), normal(5, go * m, seed=3)
    Y = layer(X)
    Y.backward(dY)
    expected = X.detach() @ P.T + (layer.bias.detach() if layer.bias is not None else 0)
    torch.testing.assert_close(Y.detach(), expected)
    torch.testing.assert_close(X.grad, dY @ P)
    torch.testing.assert_close(layer.weight.grad, dY.T @ X.detach())  # neither the scale nor a mask is in it


def test_soft_thresholding_is_continuous_and_a_mask_is_not() -> None:
    """Where the second and the third of a group change places a mask's product jumps."""
    jumps = {}
    for soft in (True, False):
        layer = make(4, 4, soft_threshold=soft)
        ends = []
        for w in (1 - 1e-9, 1 + 1e-9):
            with torch.no_grad():
                layer.weight.copy_(torch.tensor([2.0, w, 1.0, 0.1], dtype=torch.float64).expand(4, 4))
            layer.update_mask()
            ends.append(layer.masked_weight.detach())
        jumps[soft] = float((ends[0] - ends[1]).abs().max())
    assert jumps[True] < 1e-8
    assert jumps[False] == pytest.approx(1)


def test_a_fixed_mask_keeps_the_function_and_makes_the_gradient_exact() -> None:
    layer, X = make(16, 32, soft_threshold=True, mvue=True), normal(8, 32, seed=3)
    P, Y = layer.masked_weight.detach(), layer(X).detach()
    layer.fix_mask()
    assert torch.equal(layer.weight.detach(), P)
    assert torch.equal(layer.weight.detach() * layer.mask, P)
    torch.testing.assert_close(layer(X).detach(), Y)
    layer(X).backward(Y)
    torch.testing.assert_close(layer.weight.grad, layer.mask * (Y.T @ X))
    assert set(layer.state_dict()) == {"weight", "bias", "mask"}


def test_a_sparse_layer_takes_over_what_soft_thresholding_made() -> None:
    model = nn.Sequential(make(16, 16), make(16, 16, seed=1, soft_threshold=True), make(16, 16, seed=2))
    P = model[1].masked_weight.detach()
    sparsify(model, mask="present")
    assert torch.equal(model[1].weight.detach(), P)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_thirty_steps_of_sr_ste_equal_the_dense_formula(n: int, m: int) -> None:
    """grad + decay · (1 - mask) ⊙ W into Adam, the mask of present magnitudes in every step."""
    decay = 0.3
    model = nn.Sequential(make(4 * m, 2 * m, n, m))
    layer = model[0]
    W, b = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    optimizers = [torch.optim.AdamW(p, lr=0.05, weight_decay=0.1) for p in (model.parameters(), [W, b])]
    changed = 0
    for step in range(30):
        X, target = normal(7, 2 * m, seed=step), normal(7, 4 * m, seed=100 + step)
        F.mse_loss(model(X), target).backward()
        decay_pruned(model, decay)
        M = torch.zeros_like(W)
        order = W.detach().abs().view(4 * m, 2, m).argsort(dim=-1, descending=True, stable=True)
        M.view(4 * m, 2, m).scatter_(-1, order[..., :n], 1)
        error = X @ (W.detach() * M).T + b.detach() - target
        dY = 2 * error / error.numel()
        W.grad, b.grad = dY.T @ X + decay * (1 - M) * W.detach(), dY.sum(0)
        torch.testing.assert_close(layer.weight.grad, W.grad)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        before = layer.mask.clone()
        update_masks(model)
        changed += int((before != layer.mask).sum())
        torch.testing.assert_close(layer.weight, W)
    assert changed > 0


def test_without_straight_through_pruned_entries_have_no_gradient() -> None:
    layer, X = make(16, 32), normal(8, 32, seed=3)
    layer(X).square().sum().backward()
    whole = layer.weight.grad
    layer.weight.grad, layer.straight_through = None, False
    layer(X).square().sum().backward()
    assert whole is not None
    assert layer.weight.grad is not None
    assert whole[~layer.mask].any()
    assert torch.equal(layer.weight.grad, whole * layer.mask)


def test_decay_touches_pruned_entries_alone() -> None:
    model = nn.Sequential(make(8, 8), make(8, 8, seed=1))
    decay_pruned(model, 1.0)  # without gradients there is nothing to do
    assert model[0].weight.grad is None
    model[0].weight.grad = torch.ones(8, 8, dtype=torch.float64)
    address = model[0].weight.grad.data_ptr()
    decay_pruned(model, 0.5)
    grad, weight, mask = model[0].weight.grad, model[0].weight.detach(), model[0].mask
    assert grad.data_ptr() == address
    assert (grad[mask] == 1).all()
    torch.testing.assert_close(grad[~mask], 1 + 0.5 * weight[~mask])


def test_transposable_masks_serve_both_products() -> None:
    layer = make(16, 24, transposable=True)
    for _ in range(2):
        assert masks.is_nm(layer.mask, 2, 4)
        assert masks.is_nm(layer.mask.t(), 2, 4)
        assert torch.equal(layer.mask, masks.transposable_mask(layer.weight.detach().abs(), 2, 4))
        with torch.no_grad():
            layer.weight.copy_(normal(16, 24, seed=9))
        layer.update_mask()


def test_mvue_gradient_is_that_of_the_pruned_output_gradient() -> None:
    layer, exact = make(8, 8, mvue=True), make(8, 8)
    X, dY = normal(10, 8).requires_grad_(), normal(10, 8, seed=2)  # 10 tokens: two groups, and two tokens left
    torch.manual_seed(3)
    layer(X).backward(dY)
    torch.manual_seed(3)
    sparse = masks.mvue(dY, 2, 4, 0)
    assert (sparse[:8].view(2, 4, 8) != 0).sum(1).unique().tolist() == [2]
    torch.testing.assert_close(layer.weight.grad, sparse.T @ X.detach())
    x = X.detach().clone().requires_grad_()
    exact(x).backward(dY)
    assert torch.equal(X.grad, x.grad)  # type: ignore[arg-type]
    assert torch.equal(layer.bias.grad, exact.bias.grad)  # type: ignore[union-attr, arg-type]
    draws = []
    for _ in range(3000):
        layer.weight.grad = None
        layer(X.detach()).backward(dY)
        draws.append(layer.weight.grad)
    grads = torch.stack(draws)  # type: ignore[arg-type]
    spread = grads.std(0) / len(draws) ** 0.5
    assert ((grads.mean(0) - exact.weight.grad).abs() < 4.5 * spread + 1e-9).all()  # type: ignore[operator]


def test_an_unmasked_layer_is_an_ordinary_one() -> None:
    model = nn.Sequential(make(8, 8, mvue=True, transposable=True))
    mask = model[0].mask
    remove_masks(model)
    update_masks(model)  # changes nothing
    layer = next(layer for _, layer in masked_layers(model))
    assert layer.mask is mask
    assert mask.all()
    assert not layer.mvue
    linear = nn.Linear(8, 8, dtype=torch.float64)
    linear.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})  # type: ignore[union-attr]
    X, dY = normal(5, 8), normal(5, 8, seed=2)
    x1, x2 = X.clone().requires_grad_(), X.clone().requires_grad_()
    model(x1).backward(dY)
    linear(x2).backward(dY)
    torch.testing.assert_close(x1.grad, x2.grad)
    torch.testing.assert_close(layer.weight.grad, linear.weight.grad)
    model[0].weight.grad = torch.zeros(8, 8, dtype=torch.float64)
    decay_pruned(model, 1.0)
    assert not model[0].weight.grad.any()


def test_state_holds_the_mask_and_loads_in_place() -> None:
    for soft, more in ((False, set()), (True, {"scale"})):
        a, b = make(8, 8, seed=1, soft_threshold=soft), make(8, 8, seed=2, soft_threshold=soft)
        assert set(a.state_dict()) == {"weight", "bias", "mask"} | more
        assert a.mask.dtype == torch.bool
        a.load_state_dict(b.state_dict())
        assert torch.equal(a(normal(3, 8)), b(normal(3, 8)))


def test_a_pruned_weight_that_is_not_finite_does_nothing() -> None:
    layer = make(8, 8)
    X = normal(3, 8)
    expected = layer(X)
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.mask, torch.inf)
    assert torch.equal(layer(X), expected)


def test_autocast_is_that_of_a_linear_layer() -> None:
    layer = make(16, 16).float()
    X = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Y = layer(X)
        expected = F.linear(X, layer.masked_weight, layer.bias)
    assert Y.dtype == torch.bfloat16
    torch.testing.assert_close(Y, expected)
    Y.float().sum().backward()
    assert layer.weight.grad is not None
    assert X.grad is not None
    assert (layer.weight.grad.dtype, X.grad.dtype) == (torch.float32, torch.float32)


@TRACED
@pytest.mark.parametrize("soft", [False, True])
def test_compiles_without_a_break_and_sees_new_masks(soft: bool) -> None:
    torch._dynamo.reset()
    layer = make(16, 8, soft_threshold=soft).float()
    eager = copy.deepcopy(layer)
    layer.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    dY = torch.randn(2, 8, 16)
    for seed in range(2):
        weight = normal(16, 8, seed=seed).float()
        for each in (layer, eager):
            with torch.no_grad():
                each.weight.copy_(weight)
            each.update_mask()
            each.zero_grad()
        x1, x2 = (normal(2, 8, 8, seed=seed).float().requires_grad_() for _ in range(2))
        for each, X in ((layer, x1), (eager, x2)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                Y = each(X)
            Y.float().backward(dY)
        torch.testing.assert_close(x1.grad, x2.grad)
        torch.testing.assert_close(layer.weight.grad, eager.weight.grad)
        torch.testing.assert_close(layer.bias.grad, eager.bias.grad)  # type: ignore[union-attr]


@TRACED
@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor")])
def test_compiled_mvue_is_drawn_again_in_each_backward_pass(backend: str) -> None:
    torch._dynamo.reset()
    layer = make(8, 8, mvue=True)
    layer.compile(fullgraph=True, backend=backend, dynamic=False)
    # One-hot inputs: the weight's gradient is the pruned output gradient itself, a token in each column.
    X, dY = torch.eye(8, dtype=torch.float64), normal(8, 8, seed=2)
    seen = []
    for _ in range(2):
        layer.weight.grad = None
        layer(X).backward(dY)
        grad = layer.weight.grad
        assert (grad.view(8, 2, 4) != 0).sum(-1).unique().tolist() == [2]  # type: ignore[attr-defined]
        seen.append(grad)
    assert not torch.equal(*seen)  # type: ignore[arg-type]


def test_bad_construction() -> None:
    with pytest.raises(ValueError, match="not multiples of m=4"):
        make(6, 8)
    with pytest.raises(ValueError, match="0 < n < m"):
        make(8, 8, 4, 4)
    with pytest.raises(ValueError, match="up to m=4"):
        make(8, 8, 2, 8, transposable=True)
    for how in ({"mask": "random"}, {"transposable": True}):
        with pytest.raises(ValueError, match="soft thresholding keeps the largest magnitudes"):
            mask_layers(nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), soft_threshold=True, **how)  # type: ignore[arg-type]
