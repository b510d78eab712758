"""One token of linearized attention in one launch on a GPU: what its definition says in float64, step after step.

Between two launches over one memory there is always another kernel, as in the engine: the second reads the memory
before the kernel in front of it has ended.
"""

from typing import Any

import pytest
import torch
from support import inductor
from support.linear_step import of, random_heads, random_memory, random_rotary, step_as_defined
from support.models import VOCABULARY, linearized
from torch import Tensor

from slope_cli.inference.cache import HeadsCache, LinearCache
from slope_cli.inference.engine import Engine
from slope_cli.inference.sampling import Sampling
from sparse_kernels import driver
from sparse_kernels.linear_attention import Heads, Memory, attend_new_tokens, takes

pytestmark = inductor.QUIET
CUDA = "cuda"
# Of a result of size 1: what is left of its last bits after rounding, or after sums in another order.
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def arrived() -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=CUDA)


def compare(
    dtype: torch.dtype,
    heads: Heads,
    rows: int,
    window: int,
    *,
    rotary: bool,
    kept: float = 0.7,
    steps: int = 4,
    scale: float = 0.0,
) -> None:
    """Steps in a row, each from the same 16-bit keys."""
    (H, D, _), G = heads.map_q.shape, len(heads.map_k)
    scale = scale or D**-0.5
    memory = Memory(*of(CUDA, *random_memory(rows, heads, window, dtype, kept)))  # type: ignore[arg-type]
    exact = Memory(*of(torch.float64, *memory))  # type: ignore[arg-type]
    on_gpu, doubles = Heads(*of(CUDA, *heads)), Heads(*of(torch.float64, *of(CUDA, *heads)))  # type: ignore[arg-type]
    counter = arrived()
    for _ in range(steps):
        qkv = torch.randn(rows, H + 2 * G, D).to(CUDA, dtype)
        turned = random_rotary(rows, D, dtype).to(CUDA) if rotary else None
        assert takes(qkv, memory, on_gpu)
        found = attend_new_tokens(qkv, turned, memory, on_gpu, scale, counter)
        expected = step_as_defined(qkv.double(), None if turned is None else turned.double(), exact, doubles, scale)
        # A query's and a key's rounding, where they are turned, is that of the scores too.
        bound = (
            BOUND[dtype] * (4 if rotary and dtype != torch.float32 else 1) * float(expected.abs().max().clamp(min=1))
        )
        assert (found.double() - expected).abs().max() <= bound
        assert (memory.state.double() - exact.state).abs().max() <= 2e-5 * exact.state.abs().max()
        for ours, theirs in zip(memory[:2], exact[:2], strict=True):
            assert (ours.double() - theirs).abs().max() <= 8 * BOUND[dtype]
            theirs.copy_(ours)
        assert torch.equal(memory.keep, exact.keep)
        assert torch.equal(memory.oldest, exact.oldest)
        assert not counter.any()


# By the blocks of a cluster: 8, 4, 2, 1 for few rows, as the columns say; 1 for many rows, whatever they are.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim", "columns", "relu"),
    [
        (1, 12, 12, 64, 32, False),
        (1, 32, 8, 128, 64, False),
        (2, 8, 1, 128, 128, False),
        (1, 4, 2, 64, 64, True),
        (1, 8, 1, 128, 256, True),
        (3, 6, 2, 80, 22, False),
        (2, 10, 2, 80, 30, True),
        (4, 4, 2, 8, 16, False),
        (2, 6, 2, 16, 6, True),
        (2, 14, 2, 32, 25, False),
        (1, 2, 1, 24, 65, False),
        (64, 12, 12, 64, 32, False),
        (80, 8, 2, 128, 64, False),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_steps(
    dtype: torch.dtype, rows: int, heads: int, kv_heads: int, dim: int, columns: int, relu: bool, gated: bool
) -> None:
    torch.manual_seed(rows + dim)
    own = random_heads(heads, kv_heads, dim, columns, relu=relu, gated=gated)
    compare(dtype, own, rows, 63, rotary=gated)


@pytest.mark.parametrize("window", [1, 2, 7, 63, 130, 1023])
@pytest.mark.parametrize("columns", [64, 16, 8])
def test_windows(window: int, columns: int) -> None:
    torch.manual_seed(window)
    own = random_heads(4, 1, 64, columns, relu=False, gated=True)
    compare(torch.float32, own, 2, window, rotary=True, steps=5)


@pytest.mark.parametrize("relu", [False, True])
def test_first_tokens(relu: bool) -> None:
    torch.manual_seed(0)
    own = random_heads(4, 2, 64, 32, relu=relu, gated=True)
    compare(torch.float32, own, 3, 5, rotary=True, kept=0.0, steps=14)


@pytest.mark.parametrize(("size", "scale"), [(6.0, 0.0), (1.0, 1.0)])
def test_sharp_softmaxes(size: float, scale: float) -> None:
    torch.manual_seed(0)
    own = random_heads(4, 2, 64, 32, relu=False, gated=True, size=size)
    compare(torch.float32, own, 2, 20, rotary=True, scale=scale)


def test_sides_without_a_kernel() -> None:
    def takes_it(dim: int, columns: int, heads: int = 2, window: int = 7, dtype: torch.dtype = torch.bfloat16) -> bool:
        own = random_heads(heads, 1, dim, columns, relu=False, gated=False)
        memory = Memory(*of(CUDA, *random_memory(1, own, window, dtype, 1.0)))  # type: ignore[arg-type]
        on_gpu = Heads(*of(CUDA, *own))  # type: ignore[arg-type]
        return takes(torch.zeros(1, heads + 2, dim, dtype=dtype, device=CUDA), memory, on_gpu)

    assert takes_it(64, 32)
    assert takes_it(128, 128, 8)
    assert not takes_it(136, 64)
    assert not takes_it(60, 32)
    assert not takes_it(128, 136)
    assert not takes_it(64, 32, 9)
    assert not takes_it(64, 8, 8, window=10_000)
    assert not takes_it(64, 32, dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_graph_makes_the_same_steps(rows: int) -> None:
    torch.manual_seed(0)
    own = random_heads(8, 2, 64, 32, relu=False, gated=True)
    heads = Heads(*of(CUDA, *own))  # type: ignore[arg-type]
    begun = Memory(*of(CUDA, *random_memory(rows, own, 6, torch.bfloat16, 0.5)))  # type: ignore[arg-type]
    graphed, eager = (Memory(*of(CUDA, *begun)) for _ in range(2))  # type: ignore[arg-type]
    qkv, Y, counters = torch.zeros(rows, 12, 64, device=CUDA).bfloat16(), torch.empty(0), (arrived(), arrived())

    def work() -> None:
        nonlocal Y
        Y = attend_new_tokens(qkv * 1, None, graphed, heads, 0.125, counters[0])

    graph = driver.captured(work)
    for tensor, before in zip(graphed, begun, strict=True):
        tensor.copy_(before)
    for _ in range(9):
        qkv.normal_()
        graph.replay()
        assert torch.equal(Y, attend_new_tokens(qkv * 1, None, eager, heads, 0.125, counters[1]))
        for ours, theirs in zip(graphed, eager, strict=True):
            assert torch.equal(ours, theirs)


def linear_caches(engine: Engine) -> list[LinearCache]:
    parts = [
        part
        for cache in engine._slots.caches
        for part in ([own for own, *_ in cache._parts] if isinstance(cache, HeadsCache) else [cache])
    ]
    return [part for part in parts if isinstance(part, LinearCache)]


@pytest.mark.parametrize("name", ["gpt2-nano", "llama3-8b"])
@pytest.mark.parametrize(
    "form",
    [
        {"window": 5},
        {"window": 9, "state": "gated"},
        {"window": 5, "feature_map": "t2r", "features": 12},
        {"window": 6, "state": "gated", "keep_softmax": ["0/1", "1/0"]},
    ],
    ids=lambda form: "-".join(map(str, form.values())),
)
def test_texts_with_the_kernel_and_without(name: str, form: dict[str, Any]) -> None:
    model = linearized(name, **form)
    generator = torch.Generator().manual_seed(4)
    lengths = (1, 2, 3, 5, 8, 13, 21, 34)
    prompts = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    found: list[list[list[int]]] = []
    for with_it in (True, False):
        engine = Engine(model, device=CUDA, dtype=torch.float32, max_batch=4)
        caches = linear_caches(engine)
        assert caches
        assert all(cache.heads is not None for cache in caches)
        for cache in caches if not with_it else ():
            cache.heads = None
        texts = [engine.submit(prompt, Sampling(tokens=20 + i, temperature=0)) for i, prompt in enumerate(prompts)]
        for _ in engine.stream():
            pass
        found.append([text.ids for text in texts])
    assert found[0] == found[1]
