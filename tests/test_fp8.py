"""Products with fp8 operands against float64 on the rounded operands, and runs that train with them."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.marks import slow
from support.models import linear_layers as layers
from support.runs import records, tiny
from torch import Tensor, nn

from slope_cli.config import configs
from slope_cli.errors import UsageError
from slope_cli.methods import phases_of
from slope_cli.methods.apply import apply
from slope_cli.models.build import build_model, run_model_config
from slope_cli.train.loop import pretrain
from sparse_kernels import (
    MaskedLinear,
    SparseLinear,
    fp8_layers,
    fp8_underflow,
    mask_layers,
    set_fp8,
    sparsify,
)
from sparse_kernels.operands import FP8, LARGEST, operand

# ------------------------------------------------------------------------------------------------------- the operands


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=0, max_size=3),
    st.floats(-30, 30),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_rounding_keeps_the_largest_and_three_bits_of_the_others(
    sides: list[int], exponent: float, dtype: torch.dtype, seed: int
) -> None:
    X = (torch.randn(sides, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent).to(dtype)
    data, scale, *_ = operand(X, fp8=True)
    assert data.dtype == FP8
    assert data.shape == X.shape
    assert scale is not None
    back, exact = data.double() * scale.double(), X.double()
    assert LARGEST / 2 <= data.float().abs().max() <= LARGEST
    assert math.log2(scale.item()).is_integer()
    # Half of the last of 4 significant bits; below the smallest normal number, 2^-6, half of its last bit, 2^-9.
    error = torch.maximum(exact.abs() * 2**-4, scale.double() * 2**-10) * (1 + 1e-6)
    assert bool(((back - exact).abs() <= error).all())


def test_zeros_and_nothing_have_a_scale_and_what_is_not_finite_shows() -> None:
    for X in (torch.zeros(3, 4), torch.zeros(0, 4), torch.full((2,), 1e-45)):
        data, scale, *_ = operand(X, fp8=True)
        assert scale is not None
        assert math.isfinite(scale.item())
        assert bool(data.float().isfinite().all())
    for bad in (math.nan, math.inf, -math.inf):
        data, scale, *_ = operand(torch.tensor([1.0, bad, 2.0]), fp8=True)
        assert scale is not None
        assert not bool((data.float() * scale).isfinite().any())


# ------------------------------------------------------------------------------------------------------- the products


def rounded(X: Tensor, of: Tensor | None = None) -> Tensor:
    """X as fp8 has it, in float64, with the scale that `of`, by default X itself, has."""
    whole = X if of is None else of
    scale = 2.0 ** math.ceil(math.log2(float(whole.abs().max()) / 448))
    return (X / scale).to(torch.float8_e4m3fn).double() * scale


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["linear", "conv1d", "masked", "sparse", "1:4"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.integers(1, 6), min_size=1, max_size=2),
    st.integers(0, 2**31),
)
def test_all_three_products_are_those_of_rounded_operands(
    kind: str, go: int, gi: int, lead: list[int], seed: int
) -> None:
    out, inp = 16 * go, 16 * gi
    model = nn.Sequential(layers(out, inp, seed)[kind]())
    set_fp8(model, ["0"])
    assert fp8_layers(model) == ["0"]
    layer = model[0]
    generator = torch.Generator().manual_seed(seed + 1)
    X = torch.randn(*lead, inp, generator=generator, requires_grad=True)
    dY = torch.randn(*lead, out, generator=generator)
    Y = model(X)
    Y.backward(dY)

    if isinstance(layer, SparseLinear):
        W, C, grad = layer.weight.detach(), layer.weight_backward.detach(), layer.values.grad
    else:
        W = layer.masked_weight.detach() if isinstance(layer, MaskedLinear) else layer.weight.detach()
        W = W.t() if kind == "conv1d" else W
        C, grad = W, layer.weight.grad
    x, dy = rounded(X.detach().reshape(-1, inp)), rounded(dY.reshape(-1, out))
    bias = 0 if layer.bias is None else layer.bias.detach()
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(Y.detach().reshape(-1, out).double(), x @ rounded(W).T + bias, **close)
    assert X.grad is not None
    torch.testing.assert_close(X.grad.reshape(-1, inp).double(), dy @ rounded(C, of=W), **close)
    dW = dy.T @ x
    assert grad is not None
    expected = layer.kept(dW) if isinstance(layer, SparseLinear) else dW.T if kind == "conv1d" else dW
    torch.testing.assert_close(grad.double(), expected, **close)
    if layer.bias is not None:  # a sum, and no product
        assert layer.bias.grad is not None
        torch.testing.assert_close(layer.bias.grad, dY.reshape(-1, out).sum(0))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "masked", "sparse"])
def test_fp8_is_for_training_and_can_be_taken_back(kind: str) -> None:
    model, X = nn.Sequential(layers(32, 16, 0)[kind]()), torch.randn(5, 16)
    plain, names, own = model(X), list(model.state_dict()), type(model[0])
    set_fp8(model, ["0"])
    assert list(model.state_dict()) == names
    assert not torch.equal(model(X), plain)
    model.eval()
    assert torch.equal(model(X), plain)
    model.train()
    set_fp8(model, [])
    assert type(model[0]) is own
    assert fp8_layers(model) == []
    assert torch.equal(model(X), plain)


@pytest.mark.parametrize("kind", ["linear", "masked", "sparse"])
def test_entries_that_become_zero_are_counted(kind: str) -> None:
    model = nn.Sequential(layers(32, 16, 0)[kind]())
    set_fp8(model, ["0"])
    assert fp8_underflow(model) == {}
    X, dY = torch.randn(6, 16), torch.randn(6, 32)
    X[0, :4], dY[1, :8] = 1e-6, 0
    dY[2, :2] = -1e-7
    for _ in range(2):  # a second micro-batch
        model(X).backward(dY)
    found = fp8_underflow(model)
    assert found == {"X": 4 / X.numel(), "W": pytest.approx(0, abs=0.02), "dY": 2 / (dY.numel() - 8)}
    assert fp8_underflow(model) == {}
    model.eval()(X)
    assert fp8_underflow(model) == {}
    assert not any("counts" in name for name in model.state_dict())


@pytest.mark.parametrize("kind", ["linear", "masked", "sparse"])
def test_no_tokens_give_no_gradient(kind: str) -> None:
    model, X = nn.Sequential(layers(32, 16, 0)[kind]()), torch.zeros(0, 16, requires_grad=True)
    set_fp8(model, ["0"])
    Y = model(X)
    assert Y.shape == (0, 32)
    Y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**31))
def test_a_transpose_and_sums_are_those_of_the_matrix(rows: int, columns: int, seed: int) -> None:
    X = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    plain, whole = operand(X, fp8=True), operand(X, fp8=True, columns=True, sums=True)
    alone = operand(X, fp8=True, rows=False, columns=True)
    assert whole.transposed is not None
    assert alone.transposed is not None
    assert whole.sums is not None
    assert torch.equal(whole.data.float(), plain.data.float())
    assert whole.transposed.shape == (columns, -(-rows // 16) * 16)
    assert torch.equal(whole.transposed[:, :rows].float(), plain.data.float().t())
    assert not whole.transposed[:, rows:].float().any()
    assert torch.equal(alone.transposed.float(), whole.transposed.float())
    assert not alone.data.numel()
    torch.testing.assert_close(whole.sums.sum(0), X.sum(0), rtol=1e-4, atol=1e-4)


def test_layers_that_are_none_are_refused_before_any_changes() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    for name in ("1", "2"):
        with pytest.raises(ValueError, match=f"no linear layer '{name}'"):
            set_fp8(model, ["0", name])
    assert fp8_layers(model) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler's own
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "masked", "sparse"])
def test_compiled_layers_compute_the_same(kind: str, autocast: bool) -> None:
    """Under autocast but for a step of e4m3: torch's compiler does not round to 16 bits in between."""
    torch.manual_seed(0)
    model, X = nn.Sequential(layers(64, 32, 0)[kind]()), torch.randn(7, 32, requires_grad=True)
    dY = torch.randn(7, 64)
    set_fp8(model, ["0"])
    results = []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        X.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            Y = run(X)
        Y.backward(dY.to(Y))
        results.append([Y.detach(), *(p.grad for p in (X, *model.parameters())), fp8_underflow(model)])
    *tensors, counted = zip(*results, strict=True)
    for eager, compiled in tensors:
        close = {"rtol": 0, "atol": 0.05 * float(eager.abs().max())} if autocast else {}
        torch.testing.assert_close(compiled, eager, **close)
    assert counted[0].keys() == {"X", "W", "dY"}
    assert counted[0] == counted[1]


# ------------------------------------------------------------------------------------------------------------ the runs


@pytest.mark.parametrize("method", ["dense", "slope", "sr_ste", "fst"])
def test_the_same_layers_of_every_method_are_in_fp8(method: str) -> None:
    config = configs.load("gpt2-nano", [f"method={method}", "train.precision=fp8"])
    model = build_model(run_model_config(config), device="meta")
    apply(model, config, phases_of(config).end)
    middle = {f"h.1.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    if method == "fst":
        middle = {name for name in middle if "mlp" in name}
    names = {name.removeprefix("transformer.") for name in fp8_layers(model)}
    assert middle <= names
    assert not {name for name in names if "wte" in name or "head" in name or name == "h.0.attn.c_attn"}
    apply(model, config, phases_of(configs.load("gpt2-nano", [f"method={method}"])).end, was=phases_of(config).end)
    assert fp8_layers(model) == []


@pytest.mark.parametrize("method", ["slope", slow("dense")])
def test_a_run_learns_in_fp8_nearly_as_in_bf16(method: str, data: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("bf16", "fp8"):
        words = (f"method={method}", "model.dropout=0", f"train.precision={precision}")
        losses[precision] = pretrain(tiny(data, *words), tmp_path / precision)["loss"]
    first, *later = (r for r in records(tmp_path / "fp8") if r["kind"] == "train")
    (logged,) = (r for r in later if "fp8_underflow_X" in r)  # every log.every steps
    assert all(0 <= logged[f"fp8_underflow_{name}"] < 0.5 for name in ("X", "W", "dY"))
    assert losses["fp8"] != losses["bf16"]
    assert abs(losses["fp8"] - losses["bf16"]) < 0.1 * (first["loss"] - losses["bf16"])


def test_precision_may_change_between_starts(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for precision, steps in (("fp8", 6), ("bf16", 8), ("fp8", 10)):
        pretrain(tiny(data, f"train.precision={precision}", f"train.steps={steps}"), run)
    assert [r["step"] for r in records(run) if r["kind"] == "train"] == list(range(1, 11))


def test_what_cannot_be_in_fp8_is_refused() -> None:
    for words in (["method=linearize", "train.precision=fp8"], ["train.bf16_finish=1.5"]):
        with pytest.raises(UsageError, match=r"train\.(precision|bf16_finish)"):
            configs.load("gpt2-nano", words)


def test_sparse_and_masked_layers_of_a_model_change_kind_in_fp8() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 16))
    mask_layers(model, exclude_modules=["^[02]$"])
    set_fp8(model, ["1"])
    sparsify(model, mask="present", exclude_modules=["^[02]$"])
    assert fp8_layers(model) == []
