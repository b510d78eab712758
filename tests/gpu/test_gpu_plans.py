"""Plans of the real library: the packed layout, odd shapes, bias, streams, the choice and its file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels import cuda, cusparselt, kernel_choice, masks
from sparse_kernels.formats import FORMATS
from sparse_kernels.matmul_plan import MatmulPlan, MatmulShape, compress, writes_metadata

try:
    cusparselt.library()
except cusparselt.CuSparseLtError as error:
    pytest.skip(str(error), allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float16]
ODD = [(512, 512, 256), (528, 1040, 264), (1040, 528, 1000), (768, 2064, 512)]


def row_bits_of(rows: int, columns: int) -> Tensor:
    return masks.pack_bits(masks.row_mask(torch.empty(rows, columns), 2, 4, kind="random", seed=rows)).cuda()


def masked(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and row_bits (columns, rows), and backward_bits (rows, columns), with fillers."""
    values = torch.randn(columns, rows // 2, device="cuda")
    row_bits = row_bits_of(columns, rows)
    backward_bits = torch.empty(rows, columns // 8, dtype=torch.uint8, device="cuda")
    cuda.launch(cuda.refresh(values, row_bits, backward_bits, update_mask=True))
    return values, row_bits, backward_bits


def operands(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """W^{R,C}-like A with fillers: packed by slot markers and refreshed, dense, and X."""
    values, row_bits, backward_bits = masked(rows, columns)
    packed = compress(cuda.slot_markers(backward_bits, dtype))
    dense = torch.empty(rows, columns, dtype=dtype, device="cuda")
    target = FORMATS[dtype].values(packed, rows, columns)
    cuda.launch(cuda.refresh(values, row_bits, backward_bits, w_t=target))
    cuda.launch(cuda.refresh(values, row_bits, backward_bits, w_t=dense))
    return packed, dense, torch.randn(tokens, columns, dtype=dtype, device="cuda")


def close(got: Tensor, expected: Tensor) -> bool:
    scale = expected.float().square().mean().sqrt()
    return bool((got - expected).abs().max() < 0.1 * scale) and not got.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (48, 80), (528, 1040), (1024, 512)])
def test_values_come_first_and_metadata_depends_on_the_slots_alone(rows: int, columns: int, dtype: torch.dtype) -> None:
    row_bits = row_bits_of(rows, columns)
    mask = masks.unpack_bits(row_bits, columns)
    numbers = (torch.arange(1, rows * columns // 2 + 1, device="cuda") % 255 + 1).to(dtype).view(rows, -1)
    dense = torch.zeros(rows, columns, dtype=dtype, device="cuda").masked_scatter_(mask, numbers)
    packed = compress(dense)
    assert torch.equal(FORMATS[dtype].values(packed, rows, columns), numbers)
    marked = compress(cuda.slot_markers(row_bits, dtype))
    start = rows * columns
    size = start + rows * columns // 8
    assert torch.equal(marked[start:size], packed[start:size])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (512, 512), (1024, 4096), (3072, 768)])
def test_metadata_is_written_as_the_library_writes_it(rows: int, columns: int, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the order is that of compute capability 9.0")
    assert writes_metadata(rows, columns, dtype, 0)
    assert not writes_metadata(rows + 16, columns, dtype, 0)
    _, _, backward_bits = masked(rows, columns)
    expected = FORMATS[dtype].metadata(compress(cuda.slot_markers(backward_bits, dtype)), rows, columns)
    found = torch.empty_like(expected)
    cuda.launch(cuda.metadata(backward_bits, found))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "tokens"), ODD)
@pytest.mark.parametrize("search", [False, True])
def test_product(rows: int, columns: int, tokens: int, dtype: torch.dtype, search: bool) -> None:
    packed, dense, X = operands(rows, columns, tokens, dtype)
    metadata = packed[rows * columns :].clone()
    biases = [None, *torch.randn(2, rows, dtype=dtype, device="cuda")]
    for with_bias in (False, True):
        plan = MatmulPlan(MatmulShape(rows, columns, tokens, dtype, with_bias), 0)
        if search:
            found = plan.search(packed, X, biases[1] if with_bias else None)
            assert 0 <= found["config_id"] <= found["config_max_id"]
        for bias in biases[1:] if with_bias else biases[:1]:
            assert close(plan.matmul(packed, X, bias), F.linear(X, dense, bias))
    assert torch.equal(metadata, packed[rows * columns :])


@pytest.mark.parametrize("side", [768, 4096])
def test_float16_is_tried_in_another_process_first(side: int) -> None:
    """Its search kills the process on some shapes; here it must at most come out as dense."""
    choice, plan = kernel_choice.choose(MatmulShape(side, side, side, torch.float16, False), 0)
    print(side, choice)  # for the log: which of them the library can do depends on its version
    torch.cuda.synchronize()
    if plan is not None:
        packed, dense, X = operands(side, side, side, torch.float16)
        assert close(plan.matmul(packed, X), F.linear(X, dense))


def test_runs_on_torch_s_current_stream_and_in_graphs() -> None:
    packed, dense, X = operands(1024, 1024, 512, torch.bfloat16)
    plan = MatmulPlan(MatmulShape(1024, 1024, 512, torch.bfloat16, False), 0)
    plan.search(packed, X)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        X.mul_(3)
        Y = plan.matmul(packed, X)
    stream.synchronize()
    assert close(Y, F.linear(X, dense))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        Y = plan.matmul(packed, X)
    X.copy_(torch.randn_like(X))
    graph.replay()
    assert close(Y, F.linear(X, dense))


def test_refused_shape_is_one_line() -> None:
    with pytest.raises(cusparselt.CuSparseLtError, match="failed with status") as caught:
        MatmulPlan(MatmulShape(20, 20, 20, torch.bfloat16, False), 0)
    assert "\n" not in str(caught.value)


def test_choice_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOPE_CACHE_DIR", str(tmp_path))
    shape = MatmulShape(4096, 4096, 4096, torch.bfloat16, True)
    kernel_choice.forget()
    choice, plan = kernel_choice.choose(shape, 0)
    assert plan is not None, choice.reason
    assert choice.sparse_ms is not None
    assert choice.dense_ms is not None
    assert choice.sparse == (choice.sparse_ms < choice.dense_ms)
    (key, entry), *others = json.loads(kernel_choice.cache_file().read_text())["plans"].items()
    assert not others
    assert torch.cuda.get_device_name(0) in key
    assert "cuSPARSELt " in key
    assert "4096x4096x4096" in key
    assert "bfloat16" in key
    # A dense winner is read without a search; a plan is made when one is wanted all the same.
    file = kernel_choice.cache_file()
    file.write_text(file.read_text().replace('"sparse": true', '"sparse": false'))
    kernel_choice.forget()
    again, plan = kernel_choice.choose(shape, 0)
    assert not again.sparse
    assert plan is None
    assert kernel_choice.plan_for(shape, 0) is not None
    file.write_text(file.read_text().replace('"sparse": false', '"sparse": true'))
    kernel_choice.forget()
    again, plan = kernel_choice.choose(shape, 0)
    assert plan is not None
    assert (again.sparse, again.sparse_ms, again.dense_ms) == (True, choice.sparse_ms, choice.dense_ms)
    # Another card's entry is not ours.
    content = json.loads(file.read_text())
    content["plans"] = {key.replace(torch.cuda.get_device_name(0), "NVIDIA Other"): {**entry, "sparse_ms": 1e-9}}
    file.write_text(json.dumps(content))
    kernel_choice.forget()
    assert kernel_choice.choose(shape, 0)[0].sparse_ms != 1e-9
    assert len(json.loads(file.read_text())["plans"]) == 2
    kernel_choice.forget()


def test_a_process_that_is_given_choices_decides_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it measured, or would measure, or has in its file; the other way round for a product chosen before."""
    monkeypatch.setenv("SLOPE_CACHE_DIR", str(tmp_path))
    shape, other = (MatmulShape(2048, 2048, tokens, torch.bfloat16, False) for tokens in (2048, 4096))
    kernel_choice.forget()
    try:
        measured = {each: kernel_choice.choose(each, 0)[0] for each in (shape, other)}
        found = kernel_choice.kernel_choices()
        assert len(found) == 2
        kernel_choice.use_choices(found)
        assert all(kernel_choice.choose(each, 0)[0] is choice for each, choice in measured.items())
        key = next(key for key in found if "2048x2048x2048" in key)
        before = kernel_choice.cache_file().read_text()
        for sparse in (not measured[shape].sparse, measured[shape].sparse):
            kernel_choice.use_choices(
                {key: found[key] | {"sparse": sparse}, key.replace("NVIDIA", "Other"): found[key]}
            )
            choice, plan = kernel_choice.choose(shape, 0)
            assert (choice.sparse, plan is not None) == (sparse, sparse)
            assert kernel_choice.plan_for(shape, 0) is not None
            assert kernel_choice.choose(other, 0)[0] is measured[other]
            assert kernel_choice.kernel_choices()[key]["sparse"] == sparse
        assert kernel_choice.cache_file().read_text() == before
    finally:
        kernel_choice.forget()


def test_given_choices_do_not_count_as_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that searches no more token counts of a matrix still takes over what another one has found."""
    monkeypatch.setenv("SLOPE_CACHE_DIR", str(tmp_path))
    shapes = [MatmulShape(1024, 1024, 256 + 8 * at, torch.bfloat16, False) for at in range(10)]
    kernel_choice.forget()
    try:
        reasons = [kernel_choice.choose(shape, 0)[0].reason for shape in shapes]
        assert ["too many" in reason for reason in reasons] == [False] * 8 + [True] * 2
        found = kernel_choice.kernel_choices()
        assert len(found) == 10
        kernel_choice.forget()
        kernel_choice.use_choices(found)
        again = [kernel_choice.choose(shape, 0)[0] for shape in reversed(shapes)]
        assert [choice.reason for choice in reversed(again)] == reasons
    finally:
        kernel_choice.forget()


def test_the_run_s_random_numbers_are_not_drawn_on() -> None:
    kernel_choice.forget()
    before = torch.cuda.get_rng_state()
    kernel_choice.choose(MatmulShape(512, 512, 256, torch.bfloat16, False), 0)
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_a_new_shape_inside_a_capture_is_refused() -> None:
    shape = MatmulShape(512, 640, 256, torch.bfloat16, False)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
        with pytest.raises(RuntimeError, match="run one step before capturing"):
            kernel_choice.choose(shape, 0)


def test_missing_library_falls_back_to_dense_with_one_line(tmp_path: Path) -> None:
    program = """
import torch, warnings
from sparse_kernels import SparseLinear, layers, masks
w = torch.randn(512, 512, device="cuda")
layer = SparseLinear(w, None, masks.row_mask(w, 2, 4), 2, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    Y = layer(torch.randn(256, 512, device="cuda", dtype=torch.bfloat16))
    Y.sum().backward()
print([str(x.message) for x in caught if "cuSPARSELt" in str(x.message)])
print(layers.backends(torch.nn.Sequential(layer))[0].forward.sparse)
"""
    environment = {"SLOPE_CUSPARSELT_LIB": str(tmp_path / "absent.so"), "SLOPE_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    messages, sparse = result.stdout.splitlines()
    assert messages.count("cuSPARSELt cannot be loaded from") == 1
    assert sparse == "False"
