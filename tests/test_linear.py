"""SparseLinear against the paper's equations written down independently, in float64."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_kernels import SparseLinear, masks
from sparse_kernels.lora import LowRankAdapter

PATTERNS = [(2, 4), (1, 2), (2, 8)]


def make(out: int, inp: int, n: int, m: int, *, bias: bool = True, rank: int = 0, seed: int = 0) -> SparseLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, dtype=torch.float64, generator=generator)
    bias_O = torch.randn(out, dtype=torch.float64, generator=generator) if bias else None
    layer = SparseLinear(weight, bias_O, masks.row_mask(weight, n, m), n, m)
    if rank:
        layer.adapter = LowRankAdapter(inp, out, rank, alpha=3.0, generator=generator, dtype=torch.float64)
        torch.nn.init.normal_(layer.adapter.lora_B, generator=generator)
    return layer


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.integers(1, 3), min_size=0, max_size=3),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 2**31),
)
def test_products_equal_the_equations(
    pattern: tuple[int, int], go: int, gi: int, lead: list[int], bias: bool, rank: int, seed: int
) -> None:
    n, m = pattern
    out, inp = go * m, gi * m
    layer = make(out, inp, n, m, bias=bias, rank=min(rank, out, inp), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    X = torch.randn(*lead, inp, dtype=torch.float64, generator=generator, requires_grad=True)
    dY = torch.randn(*lead, out, dtype=torch.float64, generator=generator)
    Y = layer(X)
    Y.backward(dY)

    # The independent formulation: loops over groups, masks as matrices, no packed bits.
    R = torch.zeros(out, inp, dtype=torch.float64)
    W = torch.zeros(out, inp, dtype=torch.float64)
    rows = layer.row_mask()
    for o in range(out):
        for place, i in enumerate(rows[o].nonzero().flatten().tolist()):
            R[o, i], W[o, i] = 1, layer.values.detach()[o, place]
    C = R.clone()
    for i in range(inp):
        for g in range(0, out, m):
            column = [(abs(W[o, i].item()), o) for o in range(g, g + m) if R[o, i]]
            for _, o in sorted(column, key=lambda pair: (-pair[0], pair[1]))[n:]:
                C[o, i] = 0
    x, dy = X.detach().reshape(-1, inp), dY.reshape(-1, out)
    expected_Y, expected_dX = x @ W.T, dy @ (W * C)
    if layer.bias is not None:
        expected_Y = expected_Y + layer.bias.detach()
        assert layer.bias.grad is not None
        torch.testing.assert_close(layer.bias.grad, dy.sum(0))
    if layer.adapter is not None:
        A, B = layer.adapter.lora_A.detach(), layer.adapter.lora_B.detach()
        scale = 3.0 / layer.adapter.rank
        expected_Y = expected_Y + scale * (x @ A.T @ B.T)
        expected_dX = expected_dX + scale * (dy @ B @ A)
        torch.testing.assert_close(layer.adapter.lora_A.grad, scale * (dy @ B).T @ x)
        torch.testing.assert_close(layer.adapter.lora_B.grad, scale * dy.T @ (x @ A.T))
    torch.testing.assert_close(Y.detach().reshape(-1, out), expected_Y)
    assert X.grad is not None
    torch.testing.assert_close(X.grad.reshape(-1, inp), expected_dX)
    torch.testing.assert_close(layer.values.grad, (dy.T @ x)[R.bool()].view(out, -1))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("rank", [0, 2])
def test_gradcheck(n: int, m: int, rank: int) -> None:
    layer = make(2 * m, 3 * m, n, m, rank=rank)
    parameters = dict(layer.named_parameters())
    X = torch.randn(5, 3 * m, dtype=torch.float64)

    def run(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, tensors, strict=True)), (X,))

    assert torch.autograd.gradcheck(run, tuple(p.detach().requires_grad_() for p in parameters.values()))
    # With nothing pruned a second time the input gradient is the derivative of the forward product as well.
    layer.backward_mask_bits.copy_(masks.pack_bits(layer.row_mask().t()))
    assert torch.autograd.gradcheck(layer, X.clone().requires_grad_())


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_fifty_steps_with_mask_updates_equal_masked_dense_training(n: int, m: int) -> None:
    """Same data, same AdamW: a dense weight with masks as matrices must take the same path."""
    layer = make(4 * m, 2 * m, n, m, seed=5)
    R = layer.row_mask().double()
    W = layer.weight.detach().clone()
    b = layer.bias.detach().clone()  # type: ignore[union-attr]
    C = layer.backward_mask().double()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
    W.requires_grad_()
    b.requires_grad_()
    dense_optimizer = torch.optim.AdamW([W, b], lr=0.05, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(50):
        X = torch.randn(7, 2 * m, dtype=torch.float64, generator=generator)
        target = torch.randn(7, 4 * m, dtype=torch.float64, generator=generator)
        x1, x2 = X.clone().requires_grad_(), X.clone()
        F.mse_loss(layer(x1), target).backward()
        error = x2 @ (W * R).T + b - target
        error.square().mean().backward()
        torch.testing.assert_close(x1.grad, (2 * error / error.numel()).detach() @ (W.detach() * R * C))
        W.grad.mul_(R)  # type: ignore[union-attr]
        for o in (optimizer, dense_optimizer):
            o.step()
            o.zero_grad()
        if step % 10 == 9:
            layer.update_backward_mask()
            C = masks.double_prune(W.detach() * R, R.bool(), n, m).double()
        layer.validate()
        assert torch.equal(layer.row_mask(), R.bool())
        torch.testing.assert_close(layer.weight, W.detach() * R)
        torch.testing.assert_close(layer.weight_backward, W.detach() * R * C)
    assert (layer.weight == 0).sum() == (R == 0).sum()


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_frozen_values_pass_the_gradient_through_the_row_masked_weight(n: int, m: int, rescale: bool) -> None:
    layer = make(6 * m, 5 * m, n, m, rank=2)
    layer.backward_rescale = rescale
    layer.values.requires_grad_(False)
    assert layer.adapter is not None
    X = torch.randn(5, 5 * m, dtype=torch.float64, requires_grad=True)
    dY = torch.randn(5, 6 * m, dtype=torch.float64)
    layer(X).backward(dY)
    assert not torch.equal(layer.weight, layer.weight_backward)
    torch.testing.assert_close(X.grad, dY @ (layer.weight + layer.adapter.delta()))
    assert layer.values.grad is None
    assert layer.adapter.lora_A.grad is not None


def test_the_layout_follows_the_row_mask_however_it_is_changed() -> None:
    a, b = make(8, 8, 2, 4, seed=1), make(8, 8, 2, 4, seed=2)
    X = torch.randn(3, 8, dtype=torch.float64)
    a(X), b(X)  # both have derived their layouts by now
    expected = b(X)
    c = copy.deepcopy(a)
    a.load_state_dict(b.state_dict())
    assert torch.equal(a(X), expected)
    c.load_state_dict(b.state_dict(), assign=True)
    assert torch.equal(c(X), expected)
    d = make(8, 8, 2, 4, seed=1)
    d(X)
    with torch.no_grad():  # as a checkpoint reader does: straight into the storage
        for target, source in zip((*d.parameters(), *d.buffers()), (*b.parameters(), *b.buffers()), strict=True):
            target.copy_(source)
    assert torch.equal(d(X), expected)


def test_autocast_and_low_precision() -> None:
    layer = make(16, 16, 2, 4).float()
    X = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Y = layer(X)
        assert Y.dtype == torch.bfloat16
    Y.float().sum().backward()
    assert layer.values.grad is not None
    assert X.grad is not None
    assert (layer.values.grad.dtype, X.grad.dtype) == (torch.float32, torch.float32)
    half = copy.deepcopy(layer).bfloat16()
    assert half(X.detach().bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(X.detach().bfloat16()).float(), layer(X.detach()), atol=0.1, rtol=0.05)


def test_state_is_a_little_over_half_of_the_dense_weight() -> None:
    layer = make(256, 512, 2, 4, bias=False).float()
    size = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert size == 256 * 512 * 4 // 2 + 256 * 512 // 4  # values, and a quarter of a byte of masks a weight


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_backward_rescale_gives_the_input_gradient_the_scale_of_the_row_masked_weight(n: int, m: int) -> None:
    layer = make(4 * m, 2 * m, n, m, rank=2)
    plain = copy.deepcopy(layer)
    assert not layer.backward_rescale
    assert "backward_scale" not in layer.state_dict()
    layer.backward_rescale = True
    assert layer.state_dict()["backward_scale"].shape == ()
    assert "backward_scale" not in dict(layer.named_parameters())
    dY = torch.randn(3, 4 * m, dtype=torch.float64)
    for updated in (False, True):
        if updated:
            for each in (layer, plain):
                with torch.no_grad():
                    each.values.copy_(torch.randn(each.values.shape, generator=torch.Generator().manual_seed(1)))
                each.update_backward_mask()
        factor = layer.weight.norm() / layer.weight_backward.norm()
        assert factor > 1
        x1, x2 = (torch.ones(3, 2 * m, dtype=torch.float64, requires_grad=True) for _ in range(2))
        Y = layer(x1)
        assert torch.equal(Y, plain(x2))
        Y.backward(dY)
        plain(x2).backward(dY)
        by_adapter = layer.adapter.scaling * dY @ layer.adapter.lora_B @ layer.adapter.lora_A  # type: ignore[union-attr]
        torch.testing.assert_close(
            x1.grad, (dY @ layer.weight_backward * factor + by_adapter).detach(), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(x2.grad, (dY @ layer.weight_backward + by_adapter).detach())
        torch.testing.assert_close(layer.values.grad, plain.values.grad)
        layer.zero_grad()
        plain.zero_grad()
    layer.backward_rescale = False
    assert layer.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracing does
def test_backward_rescale_keeps_the_dtype_and_compiles() -> None:
    layer = make(16, 16, 2, 4).float()
    layer.backward_rescale = True
    assert layer.backward_scale is not None
    before = layer.backward_scale
    layer.update_backward_mask("random", 3)
    assert layer.backward_scale is before  # in place: a captured graph reads it
    eager = copy.deepcopy(layer)
    layer.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    x1, x2 = (torch.ones(4, 16, requires_grad=True) for _ in range(2))
    for each, X in ((layer, x1), (eager, x2)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            each(X).float().square().sum().backward()
    assert x1.grad is not None
    assert x1.grad.dtype == torch.float32
    torch.testing.assert_close(x1.grad, x2.grad, rtol=0.02, atol=0.02)


def test_an_empty_layer_is_not_rescaled() -> None:
    layer = make(8, 8, 2, 4)
    with torch.no_grad():
        layer.values.zero_()
    layer.backward_rescale = True
    assert layer.backward_scale is not None
    assert layer.backward_scale.item() == 1


def test_random_backward_masks_are_drawn_by_their_seed_and_valid() -> None:
    layer, values = make(16, 16, 2, 4), None
    drawn = []
    for seed in (1, 2, 1):
        values = layer.values.detach().clone()
        layer.update_backward_mask("random", seed)
        layer.validate()
        assert torch.equal(layer.values, values)
        drawn.append(layer.backward_mask_bits.clone())
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    with pytest.raises(ValueError, match="mask kind must be"):
        layer.update_backward_mask("largest")


@given(st.sampled_from(PATTERNS), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_kept_gathers_what_belongs_to_the_values(pattern: tuple[int, int], go: int, gi: int, seed: int) -> None:
    n, m = pattern
    layer = make(go * m, gi * m, n, m, seed=seed)
    assert torch.equal(layer.kept(layer.weight), layer.values)
    moments = torch.rand(go * m, gi * m)
    kept = layer.kept(moments)
    assert kept.shape == layer.values.shape
    assert torch.equal(kept, moments.gather(1, layer.layout()[0]))
    assert torch.equal(layer.kept(moments.t().contiguous(), transposed=True), kept)
    with pytest.raises(ValueError, match="expected a tensor of"):
        layer.kept(torch.zeros(go * m, gi * m + 1))


def test_gaussian_adapters_are_the_papers() -> None:
    adapter = LowRankAdapter(512, 256, 8, init="gaussian", generator=torch.Generator().manual_seed(0))
    assert adapter.scaling == 1 / 8
    assert not adapter.lora_B.any()
    assert adapter.lora_A.mean().item() == pytest.approx(0, abs=0.06)
    assert adapter.lora_A.std().item() == pytest.approx(1, abs=0.05)
    assert LowRankAdapter(512, 256, 8, init="gaussian", alpha=16).scaling == 2
    with pytest.raises(ValueError, match="'lora' or 'gaussian'"):
        LowRankAdapter(8, 8, 2, init="normal")


def test_validate_names_the_broken_rule() -> None:
    layer = make(8, 8, 2, 4)
    layer.validate()
    broken = copy.deepcopy(layer)
    broken.row_mask_bits[0, 0] ^= 1
    with pytest.raises(ValueError, match="not exactly 2:4"):
        broken.validate()
    broken = copy.deepcopy(layer)
    broken.backward_mask_bits.fill_(255)
    with pytest.raises(ValueError, match="keeps an entry that the row mask prunes"):
        broken.validate()
    broken = copy.deepcopy(layer)
    left = torch.zeros(8, 8, dtype=torch.bool)
    left[:, :2] = True
    broken.row_mask_bits.copy_(masks.pack_bits(left | left.roll(4, 1)))
    broken.backward_mask_bits.copy_(masks.pack_bits((left | left.roll(4, 1)).t()))
    with pytest.raises(ValueError, match="more than 2 of 4"):
        broken.validate()


def test_bad_construction() -> None:
    weight = torch.randn(8, 8)
    with pytest.raises(ValueError, match="not exactly 2:4"):
        SparseLinear(weight, None, torch.ones(8, 8, dtype=torch.bool), 2, 4)
    with pytest.raises(ValueError, match="not multiples of m=4"):
        SparseLinear(torch.randn(6, 8), None, masks.row_mask(torch.randn(6, 8), 2, 4), 2, 4)
    with pytest.raises(ValueError, match="rank must be between"):
        LowRankAdapter(8, 4, 5)


@pytest.mark.parametrize(("rows", "columns"), [(3, 8), (5, 24), (4, 20), (1, 3)])
def test_bits_are_in_numpy_s_little_order(rows: int, columns: int) -> None:
    """Kernels and checkpoints read them: the lowest bit first, each row padded with zeros to whole bytes."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    assert torch.equal(masks.pack_bits(mask), bits)
    assert torch.equal(masks.unpack_bits(bits, columns), mask)
    assert masks.pack_bits(torch.tensor([[True, False, False, False]])).item() == 1
