"""fp8 products by the tensor cores: against the CPU's, compiled, and in runs."""

import copy
from pathlib import Path

import pytest
import torch
from support import inductor
from support.models import linear_layers as layers
from support.runs import records, tiny
from torch import nn

from slope_cli.train.loop import pretrain
from sparse_kernels import (
    SparseLinear,
    cuda,
    driver,
    fp8_obstacle,
    kernel_choice,
    masks,
    set_backend,
    set_fp8,
    update_backward_masks,
)
from sparse_kernels.formats import E4M3
from sparse_kernels.matmul_plan import (
    MatmulShape,
    compress,
    metadata_order,
    order_table,
    random_mask,
    writes_metadata,
)
from sparse_kernels.operands import FP8, operand
from sparse_kernels.packed import Backend

pytestmark = inductor.QUIET


@pytest.fixture(autouse=True)
def able() -> None:
    if reason := fp8_obstacle(torch.device("cuda")):
        pytest.skip(reason)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "masked", "sparse", "1:4"])
@pytest.mark.parametrize("tokens", [1, 24, 256])
def test_products_are_those_of_a_cpu(tokens: int, kind: str, compiled: bool) -> None:
    # In 16 bits from the start: a compiler may leave out autocast's rounding of what is rounded to fp8 next.
    model = nn.Sequential(layers(96, 64, 0)[kind]()).bfloat16().float()
    set_fp8(model, ["0"])
    X, dY = torch.randn(tokens, 64).bfloat16().float(), torch.randn(tokens, 96).bfloat16()
    results = []
    for device in ("cpu", "cuda"):
        own, x = copy.deepcopy(model).to(device), X.clone().to(device).requires_grad_()
        run = torch.compile(own) if compiled and device == "cuda" else own
        with torch.autocast(device, torch.bfloat16):
            Y = run(x)
        Y.backward(dY.to(Y))
        results.append([Y.detach(), *(p.grad for p in (x, *own.parameters()))])
    for ours, theirs in zip(*results, strict=True):  # 16-bit results of sums in another order
        torch.testing.assert_close(theirs.cpu().float(), ours.float(), rtol=1e-2, atol=1e-2 * float(ours.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns"), [(300, 70), (16, 16), (1, 32), (37, 144), (128, 128), (272, 400), (1000, 2064)]
)
def test_rounding_is_that_of_a_cpu(rows: int, columns: int, dtype: torch.dtype) -> None:
    for scale in (1e-20, 1.0, 1e20):
        X = (torch.randn(rows, columns) * scale).to(dtype)
        X[0, :7] = torch.tensor([0.0, scale * 1e-6, -scale * 1e-6, scale * 1e-9, -0.0, 3 * scale, -4 * scale])
        assert_rounded_alike(X, X.cuda())
        assert_rounded_alike(X.t().contiguous().t(), X.cuda().t().contiguous().t())  # as the weight of a Conv1D lies
    assert_rounded_alike(
        torch.zeros(rows, columns, dtype=dtype), torch.zeros(rows, columns, dtype=dtype, device="cuda")
    )


def assert_rounded_alike(X: torch.Tensor, on_gpu: torch.Tensor) -> None:
    for rows, columns, sums in ((True, False, False), (False, True, False), (True, True, True)):
        asked = {"rows": rows, "columns": columns, "sums": sums}
        counts = [torch.full((2,), 3, device=device) for device in ("cpu", "cuda")]
        ours = operand(X, fp8=True, **asked, counts=counts[0])
        theirs = operand(on_gpu, fp8=True, **asked, counts=counts[1])
        assert counts[1].tolist() == counts[0].tolist()
        assert theirs.scale is not None
        assert theirs.scale.item() == ours.scale.item()
        for one, other in ((ours.data, theirs.data), (ours.transposed, theirs.transposed)):
            if one is not None:
                assert other is not None
                assert torch.equal(other.cpu().view(torch.uint8), one.view(torch.uint8))
        if ours.sums is not None:
            assert theirs.sums is not None
            limit = 1e-4 * float(X.float().abs().sum(0).max())
            torch.testing.assert_close(theirs.sums.sum(0).cpu(), ours.sums.sum(0), rtol=1e-4, atol=limit)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    X = torch.ones(64, 32, device="cuda")
    X[3, 5] = bad
    rounded = operand(X, fp8=True, columns=True)
    assert rounded.scale is not None
    assert rounded.transposed is not None
    for data in (rounded.data, rounded.transposed):
        assert not bool((data.float() * rounded.scale).isfinite().any())


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(512, 1024, 256), (1536, 768, 512), (544, 1056, 272)])
def test_the_library_multiplies_packed_e4m3(rows: int, columns: int, tokens: int) -> None:
    """A plan is given out only if its product agrees with the dense one."""
    shape = MatmulShape(rows, columns, tokens, FP8, bias=False)
    assert kernel_choice.plan_for(shape, 0) is not None, kernel_choice.choose(shape, 0)


@pytest.mark.parametrize(("rows", "columns"), [(512, 1024), (1536, 768), (2560, 10240)])
def test_metadata_are_those_of_the_library(rows: int, columns: int) -> None:
    order = metadata_order(FP8, 0)
    if order is None:
        pytest.skip("this library's order of fp8's metadata is of another kind: new masks are packed by the library")
    assert writes_metadata(rows, columns, FP8, 0)
    assert not writes_metadata(rows + 32, columns, FP8, 0) or order.tile[0] <= 32
    bits = [random_mask(rows, columns, torch.Generator("cuda").manual_seed(seed)) for seed in range(2)]
    written = [torch.empty(rows * columns // 8, dtype=torch.uint8, device="cuda") for _ in bits]
    table = order_table(FP8, 0)
    cuda.launch_all(cuda.metadata(one, target, table) for one, target in zip(bits, written, strict=True))
    for one, target in zip(bits, written, strict=True):
        theirs = E4M3.metadata(compress(cuda.slot_markers(one, FP8)), rows, columns)
        assert torch.equal(target, theirs)
        assert torch.equal(order.encode(one), theirs)


def test_a_mask_update_leaves_what_packing_anew_would() -> None:
    """With fillers, of layers together, at once and from a graph."""
    torch.manual_seed(0)
    weights = [torch.randn(1024, 512), torch.randn(512, 1024)]

    def made() -> nn.Sequential:
        model = nn.Sequential(*(SparseLinear(W, None, masks.row_mask(W, 2, 4), 2, 4) for W in weights)).cuda()
        set_fp8(model, ["0", "1"])
        set_backend(model, "cusparselt")
        return model

    model = made()
    X = torch.randn(512, 512, device="cuda", requires_grad=True)

    def products(model: nn.Module = model) -> torch.Tensor:
        X.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            model(X).float().square().mean().backward()
        assert X.grad is not None
        return X.grad

    products()
    graph = None
    for change in range(3):
        with torch.no_grad():
            for layer in model:
                layer.values.mul_(torch.randn_like(layer.values))
        if graph is None:
            update_backward_masks(model)
            if change:
                graph = driver.captured(lambda: update_backward_masks(model))
        else:
            graph.replay()
            torch.autograd.graph.increment_version([layer.backward_mask_bits for layer in model])
        ours, anew = products(), made()
        anew.load_state_dict(model.state_dict())
        assert torch.equal(products(anew), ours)
        set_backend(model, "reference")
        theirs = products()
        set_backend(model, "cusparselt")
        # Entries may be rounded to e4m3's other neighbour, after a product whose sums had another order.
        assert float((ours - theirs).norm() / theirs.norm()) < 5e-2


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", ["cusparselt", "dense", "auto"])
@pytest.mark.parametrize("tokens", [40, 512])
def test_packed_products_are_those_of_plain_torch(tokens: int, backend: Backend, biased: bool) -> None:
    torch.manual_seed(0)
    W_OI, bias = torch.randn(1024, 512), torch.randn(1024) if biased else None
    model = nn.Sequential(SparseLinear(W_OI, bias, masks.row_mask(W_OI, 2, 4), 2, 4)).cuda()
    set_fp8(model, ["0"])
    X, dY = torch.randn(tokens, 512, device="cuda"), torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)

    def products(backend: Backend) -> list[torch.Tensor]:
        set_backend(model, backend)
        model.zero_grad()
        x = X.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            Y = model(x)
        Y.backward(dY)
        return [Y.detach(), *(p.grad for p in (x, *model.parameters()) if p.grad is not None)]

    for change in range(3):
        for ours, theirs in zip(products(backend), products("reference"), strict=True):
            limit = 1e-2 * float(theirs.abs().max())
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=limit)
        with torch.no_grad():
            model[0].values.mul_(torch.rand_like(model[0].values) * 4)
        if change:  # before, what is packed finds out by itself
            update_backward_masks(model)


@pytest.mark.parametrize("method", ["slope", "dense", "sr_ste"])
def test_a_run_with_graphs_learns_as_one_without(method: str, data: Path, tmp_path: Path) -> None:
    words = (f"method={method}", "train.precision=fp8", "train.device=cuda", "model.dropout=0", "train.bf16_finish=0.3")
    for name, more in (("fast", ()), ("eager", ("train.compile=false", "train.cuda_graph=false"))):
        pretrain(tiny(data, *words, *more), tmp_path / name)
    losses = [[r["loss"] for r in records(tmp_path / name) if r["kind"] == "train"] for name in ("fast", "eager")]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=0.02)
