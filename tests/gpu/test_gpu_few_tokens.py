"""Products and attention of few tokens on a GPU, against plain torch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparse_kernels import SparseLinear, driver, few_tokens, kernel_choice, masks, packed_product, tile_metadata
from sparse_kernels.attention import attend_new_tokens, attention_space, remember_prompts
from sparse_kernels.cuda import expand, norm, silu_mul
from sparse_kernels.lora import LowRankAdapter
from sparse_kernels.matmul_plan import MatmulShape
from sparse_kernels.packed_linear import PackedLinear

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def layer(out: int, inputs: int, *, bias: bool = True, rank: int = 0, seed: int = 0) -> SparseLinear:
    generator = torch.Generator(CUDA).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=CUDA, generator=generator)

    weight = normal(out, inputs)
    made = SparseLinear(weight, normal(out) if bias else None, masks.nm_mask(weight.abs(), 2, 4), 2, 4)
    if rank:
        made.adapter = LowRankAdapter(inputs, out, rank, device=CUDA)
        made.adapter.lora_B.data.copy_(normal(out, rank))
        made.adapter.lora_A.data.copy_(normal(rank, inputs) / inputs**0.5)
    return made


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.float() - expected).abs().max() < 0.05 * expected.std()  # sums of more tokens are rounded twice


def packed(layers: list[SparseLinear], dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
    """Rounded first, so that both sides multiply the same weights."""
    for each in layers:
        for parameter in each.parameters():
            parameter.data = parameter.data.to(dtype).float()
    return PackedLinear.fuse(layers, dtype)


@pytest.mark.parametrize("tokens", [*range(1, 65), 65, 100, 300, 1000])
def test_every_token_count(tokens: int) -> None:
    sparse = layer(512, 1024, rank=16)
    made = packed([sparse])
    X = torch.randn(tokens, 1024, device=CUDA).bfloat16()
    residual = torch.randn(tokens, 512, device=CUDA).bfloat16()
    weight, adapter = sparse.weight, sparse.adapter
    assert adapter is not None
    expected = F.linear(X.float(), weight, sparse.bias) + adapter(X.float())
    close(made(X), expected)
    close(made(X, residual), expected + residual.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("out", "inputs", "tokens"),
    [
        (16, 16, 1),
        (48, 80, 3),
        (80, 48, 8),
        (208, 144, 16),
        (1040, 272, 32),
        (112, 2064, 64),
        (4096, 1008, 1),
        (16, 4112, 17),
    ],
)
def test_odd_sides(dtype: torch.dtype, out: int, inputs: int, tokens: int) -> None:
    sparse = layer(out, inputs, bias=False)
    made = packed([sparse], dtype)
    X = torch.randn(tokens, inputs, device=CUDA).to(dtype)
    close(made(X), F.linear(X.float(), sparse.weight))
    assert torch.equal(expand(made.values, made.metadata, inputs), made.dense())


@pytest.mark.parametrize("tokens", [1, 2, 16, 40, 70])
@pytest.mark.parametrize("ranks", [(64, 64, 64), (4, 0, 20), (0, 0, 0), (7, 7, 7), (80, 100, 65)])
def test_fused_layers_with_adapters_of_any_rank(tokens: int, ranks: tuple[int, ...]) -> None:
    layers = [layer(rows, 256, rank=rank, seed=rank + rows) for rows, rank in zip((512, 128, 128), ranks, strict=True)]
    made = packed(layers)
    X = torch.randn(tokens, 256, device=CUDA).bfloat16()
    expected = [
        F.linear(X.float(), each.weight, each.bias) + (0 if each.adapter is None else each.adapter(X.float()))
        for each in layers
    ]
    close(made(X), torch.cat(expected, 1))


@pytest.mark.parametrize("tokens", [1, 8, 16, 31, 64])
@pytest.mark.parametrize(("parts", "rank"), [((320,), 144), ((208, 48, 64), 48)])  # blocks with rows of three segments
def test_every_candidate_is_right(tokens: int, parts: tuple[int, ...], rank: int) -> None:
    """Also those that another GPU would choose; adapters in the kernel and beside it, and without any."""
    layers = [layer(rows, 1536, rank=rank, seed=rows) for rows in parts]
    made = packed(layers)
    operands = made.prepare()
    assert operands is not None
    assert operands.lora_A is not None
    assert operands.lora_B is not None
    adapters = few_tokens.Adapters(operands.lora_A, operands.lora_B, parts)
    X, residual = (torch.randn(tokens, width, device=CUDA).bfloat16() for width in (1536, sum(parts)))
    alone = torch.cat([F.linear(X.float(), each.weight, each.bias) for each in layers], 1) + residual.float()
    added = torch.cat([each.adapter(X.float()) for each in layers if each.adapter is not None], 1)
    kinds = {False, torch.cuda.get_device_capability() == (9, 0)}
    works = {w for kind in kinds for w in few_tokens.candidates(320, 1536, tokens, 0, warpgroups=kind)}
    assert len(works) >= 5
    few_tokens.compile_all(works, True, torch.bfloat16, 0)
    few_tokens.compile_all(works, False, torch.bfloat16, 0)
    for work in works:
        operand = work, made.values, made.metadata, X, made.bias, residual
        close(few_tokens.matmul(*operand), alone)
        close(few_tokens.matmul(*operand, adapters), alone + added)
        close(few_tokens.matmul(work._replace(beside=1), *operand[1:], adapters), alone + added)


@pytest.mark.parametrize("tokens", [3, 24, 64])
def test_blocks_that_await_each_other_leave_no_trace(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that follow each other at once, in a graph and on two streams, are equal bit for bit, and counters 0."""
    hopper = torch.cuda.get_device_capability() == (9, 0)

    def adapted(rows: int, columns: int, tokens: int, *_: object) -> few_tokens.Work:  # never beside the kernel
        most = 1 << (tokens - 1).bit_length()  # kernels are compiled for powers of two
        works = [*few_tokens.candidates(rows, columns, most, 0, warpgroups=hopper)]
        return works[len(works) // 2]

    monkeypatch.setattr(few_tokens, "work_for", adapted)
    layers = [packed([layer(rows, 1536, rank=48, seed=rows)]) for rows in (64, 320, 1024)]
    X = torch.randn(tokens, 1536, device=CUDA).bfloat16()
    expected = [each(X) for each in layers]
    found = list[torch.Tensor]()
    graph = driver.captured(lambda: found.extend(each(X) for each in layers * 12))
    del found[: -12 * len(layers)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(30):
        graph.replay()
        torch.cuda.synchronize()
        for k, Y in enumerate(found):
            assert torch.equal(Y, expected[k % len(layers)])
            Y.zero_()
        torch.cuda.synchronize()
        side_by_side = list[torch.Tensor]()
        for stream in streams * 4:
            with torch.cuda.stream(stream):
                side_by_side += [each(X) for each in layers]
        torch.cuda.synchronize()
        assert all(torch.equal(Y, expected[k % len(layers)]) for k, Y in enumerate(side_by_side))
    counters = [few_tokens._counters(0) for _ in range(few_tokens._COUNTERS)]
    assert not torch.stack(counters).any()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("tokens", [300, 512])
def test_many_tokens_and_adapters_in_either_order(tokens: int, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever was measured to be faster here."""
    monkeypatch.setattr(packed_product, "_adapters_first", lambda *shape: first)
    layers = [layer(rows, 1024, rank=rank, seed=rank) for rows, rank in ((512, 64), (128, 0), (128, 20))]
    made, X = packed(layers), torch.randn(tokens, 1024, device=CUDA).bfloat16()
    expected = [
        F.linear(X.float(), each.weight, each.bias) + (0 if each.adapter is None else each.adapter(X.float()))
        for each in layers
    ]
    close(made(X), torch.cat(expected, 1))


def test_the_order_of_a_product_and_its_adapters_is_kept_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOPE_CACHE_DIR", str(tmp_path))
    shape = MatmulShape(512, 1024, 256, torch.bfloat16, False)
    packed_product._adapters_first.cache_clear()
    chosen = packed_product._adapters_first(shape, 0, (16, 256, 256))
    (choice,) = (choice for key, choice in kernel_choice.saved_choices().items() if "adapters 16x256x256" in key)
    assert choice.algorithm == {"adapters_first": int(chosen)}
    packed_product._adapters_first.cache_clear()
    monkeypatch.setattr(kernel_choice, "graph_ms", None)  # a second measurement would call it
    assert packed_product._adapters_first(shape, 0, (16, 256, 256)) == chosen


def test_the_choice_is_kept_on_disk_and_needs_no_capture(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOPE_CACHE_DIR", str(tmp_path))
    few_tokens.forget()
    shapes: tuple[tuple[int, ...], ...] = (), (16, 256), (48, 128, 64, 64)
    works = [few_tokens.work_for(256, 512, 5, torch.bfloat16, 0, lora) for lora in shapes]
    assert not works[0].beside
    few_tokens.forget()
    monkeypatch.setattr(few_tokens, "_measure", None)  # a second measurement would call it
    assert [few_tokens.work_for(256, 512, 6, torch.bfloat16, 0, lora) for lora in shapes] == works


def test_a_graph_and_a_compiler_see_one_node() -> None:
    made = packed([layer(256, 256, rank=8)])
    X = torch.randn(4, 256, device=CUDA).bfloat16()
    expected = made(X)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        Y = made(X)
    X.mul_(2)
    graph.replay()
    close(Y, made(X).float())


def test_a_moved_or_reloaded_layer_is_packed_again() -> None:
    made = packed([layer(256, 256, rank=8)])
    X = torch.randn(4, 256, device=CUDA).bfloat16()
    before = made(X)
    other = packed([layer(256, 256, rank=8, seed=1)])
    assert torch.equal(made.cpu().cuda()(X), before)
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(X), other(X))
    assert tile_metadata.is_sound(made.metadata)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(8, 8, 64), (8, 2, 128), (4, 4, 80), (16, 2, 128), (6, 2, 32), (4, 1, 256)]
)
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("rotary", [False, True])
def test_attention_of_new_tokens(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int, rotary: bool
) -> None:
    torch.manual_seed(heads + dim)
    rows, places = 5, 400
    keys, values = torch.randn(2, rows, kv_heads, places, dim, device=CUDA).to(dtype)
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim, device=CUDA).to(dtype)
    angles = torch.rand(rows, dim // 2, device=CUDA).repeat(1, 2) * 6
    signs = torch.ones(dim, device=CUDA)
    signs[: dim // 2] = -1
    turned = torch.stack([angles.cos(), angles.sin() * signs]).to(dtype) if rotary else None
    at = torch.tensor([0, 1, 49, 200, 399], dtype=torch.int32, device=CUDA)
    reference = [tensor.float().cpu() for tensor in (keys, values)]
    expected = attend_new_tokens(
        qkv.float().cpu(), None if turned is None else turned.float().cpu(), *reference, at.cpu(), dim**-0.5, window
    )
    space = attention_space(keys, heads)
    for _ in range(2):  # the counters are zero again
        found = attend_new_tokens(qkv, turned, keys, values, at, dim**-0.5, window, space)
        assert (found.float().cpu() - expected).abs().max() < 0.02
        for cache, other in zip((keys, values), reference, strict=True):
            assert (cache.float().cpu() - other).abs().max() < 0.03  # the new ones are stored, the others stay


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (4, 4, 80), (3, 1, 16)])
@pytest.mark.parametrize("turned", [False, True])
def test_prompts_are_remembered(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, turned: bool) -> None:
    torch.manual_seed(dim)
    qkv = torch.randn(3, 37, heads + 2 * kv_heads, dim, device=CUDA).to(dtype)
    caches = torch.randn(2, 7, kv_heads, 50, dim, device=CUDA).to(dtype)
    rotary = torch.randn(2, 3, 37, dim, device=CUDA).to(dtype) if turned else None
    slots = torch.tensor([5, 0, 6], device=CUDA)
    exact = caches.double()
    expected = remember_prompts(qkv.double(), None if rotary is None else rotary.double(), *exact, slots)
    found = remember_prompts(qkv, rotary, *caches, slots)
    for ours, theirs in zip((*found, caches), (*expected, exact), strict=True):
        assert torch.allclose(ours.double(), theirs, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("rows", [1, 7])
def test_silu_mul(rows: int) -> None:
    X = torch.randn(rows, 2 * 352, device=CUDA).bfloat16()
    gate, up = X.float().chunk(2, dim=1)
    assert torch.allclose(silu_mul(X).float(), F.silu(gate) * up, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("columns", [64, 768, 4096, 12288])
@pytest.mark.parametrize("layer", [False, True])
def test_norm(columns: int, layer: bool) -> None:
    X, weight, bias = (torch.randn(*shape, device=CUDA).bfloat16() for shape in ((5, columns), (columns,), (columns,)))
    X += 1
    if layer:
        found, _ = norm(X, weight, bias, 1e-5, layer=True)
        expected = F.layer_norm(X.float(), (columns,), weight.float(), bias.float(), 1e-5)
    else:
        found, _ = norm(X, weight, None, 1e-6, layer=False)
        expected = F.rms_norm(X.float(), (columns,), weight.float(), 1e-6)
    assert torch.allclose(found.float(), expected, atol=0.03, rtol=0.01)
    A = torch.randn(48, columns, device=CUDA).bfloat16()
    again, Z = norm(X, weight, bias if layer else None, 1e-5 if layer else 1e-6, layer=layer, A_LW=A)
    assert torch.equal(again, found)
    assert Z is not None
    close(Z, F.linear(found.float(), A.float()))


@pytest.mark.parametrize("ranks", [(16,), (8, 0, 24)])
def test_adapters_first_product_may_be_there_already(ranks: tuple[int, ...]) -> None:
    made = packed([layer(128, 512, rank=rank, seed=rank) for rank in ranks])
    operands, X = made.prepare(), torch.randn(3, 512, device=CUDA).bfloat16()
    assert operands is not None
    assert operands.lora_A is not None
    close(made(X, None, F.linear(X, operands.lora_A)), made(X).float())
