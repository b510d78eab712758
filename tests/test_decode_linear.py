"""One token of linearized attention in one launch: what it takes, and that the engine computes the same without it."""

from typing import Any

import pytest
import torch
from support.linear_step import of, random_heads, random_memory, random_rotary, step_as_defined
from torch import Tensor

from slope_cli.config.methods import LinearizeConfig
from slope_cli.inference.cache import LinearCache
from slope_cli.linearize.linear_window import LinearWindow
from sparse_kernels import linear_attention
from sparse_kernels.linear_attention import Heads, Memory, attend_new_tokens, plan, takes

ROWS, HEADS, KV_HEADS, DIM, WINDOW = 3, 4, 2, 16, 5
ARRIVED = torch.zeros(1, dtype=torch.int32)


def operands(*, relu: bool = False, gated: bool = True) -> tuple[Tensor, Tensor, Memory, Heads]:
    torch.manual_seed(0)
    heads = random_heads(HEADS, KV_HEADS, DIM, 16, relu=relu, gated=gated)
    memory = random_memory(ROWS, heads, WINDOW, torch.float32, 0.7)
    return torch.randn(ROWS, HEADS + 2 * KV_HEADS, DIM), random_rotary(ROWS, DIM, torch.float32), memory, heads


def layer(**settings: Any) -> LinearWindow:
    torch.manual_seed(1)
    config, generator = LinearizeConfig(**{"window": WINDOW + 1, **settings}), torch.Generator().manual_seed(2)
    sides: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "causal": True}
    linear = LinearWindow(config, **sides, generator=generator).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.4)
    return linear


def cache_of(linear: LinearWindow, like: Tensor) -> LinearCache:
    return LinearCache(linear, (ROWS, KV_HEADS, 64, DIM), DIM**-0.5, like)


@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r"])
@pytest.mark.parametrize("state", ["additive", "gated"])
def test_the_kernel_is_given_what_the_engine_computes_with(feature_map: str, state: str) -> None:
    cache = cache_of(layer(feature_map=feature_map, state=state), torch.zeros(1))
    assert cache.heads is not None
    memory = Memory(*of(torch.float64, *cache.memory.ring()))  # type: ignore[arg-type]
    heads = Heads(*of(torch.float64, *cache.heads))  # type: ignore[arg-type]
    for _ in range(3 * WINDOW):
        qkv, rotary = torch.randn(ROWS, HEADS + 2 * KV_HEADS, DIM), random_rotary(ROWS, DIM, torch.float32)
        expected = step_as_defined(qkv.double(), rotary.double(), memory, heads, cache.scale)
        found = cache.decode(torch.zeros(ROWS, dtype=torch.int32), qkv, rotary)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(cache.memory.ring(), memory, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize(
    "settings",
    [{"kind": "terrace"}, {"cache": 6}, {"state": "delta"}, {"window": 1}],
    ids=lambda settings: next(iter(settings)),
)
def test_other_forms_have_no_kernel(settings: dict[str, Any]) -> None:
    assert cache_of(layer(**settings), torch.zeros(1)).heads is None


@pytest.mark.parametrize("branch", ["window", "linear"])
def test_one_branch_alone_has_no_kernel(branch: Any) -> None:
    linear = layer()
    linear.branch = branch
    assert cache_of(linear, torch.zeros(1)).heads is None


def test_a_processor_has_no_kernel() -> None:
    qkv, rotary, memory, heads = operands()
    assert not takes(qkv, memory, heads)
    with pytest.raises(ValueError, match=r"no kernel for heads of \(4, 16, 16\) on cpu, torch.float32"):
        attend_new_tokens(qkv, rotary, memory, heads, 1.0, ARRIVED)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("qkv_BSD", lambda qkv: qkv[:, 1:]),
        ("rotary", lambda rotary: rotary[:, :2]),
        ("rotary", lambda rotary: rotary.bfloat16()),
        ("keys", lambda keys: keys[:2]),
        ("values", lambda values: values[:, :, 1:]),
        ("values", lambda values: values.mT.contiguous().mT),
        ("keep", lambda keep: keep.int()),
        ("state", lambda state: state[..., 1:].contiguous()),
        ("state", lambda state: state.double()),
        ("oldest", lambda oldest: oldest.int()),
        ("map_q", lambda map_q: map_q.bfloat16()),
        ("map_k", lambda map_k: map_k[..., :8]),
        ("mix", lambda mix: mix[:2]),
        ("gate", lambda gate: gate[:, 1:]),
        ("gate_bias", lambda bias: bias[:1]),
        ("bias_q", lambda bias: bias[:1]),
        ("bias_k", lambda bias: bias[:, :3]),
    ],
)
def test_sides_that_do_not_fit_are_named(name: str, wrong: Any) -> None:
    qkv, rotary, memory, heads = operands(relu=name.startswith("bias"))
    if name in memory._fields:
        memory = memory._replace(**{name: wrong(getattr(memory, name))})
    elif name in heads._fields:
        heads = heads._replace(**{name: wrong(getattr(heads, name))})
    else:
        qkv, rotary = (wrong(x) if own == name else x for own, x in (("qkv_BSD", qkv), ("rotary", rotary)))
    with pytest.raises(ValueError, match=f"^{name} must be "):
        attend_new_tokens(qkv, rotary, memory, heads, 1.0, ARRIVED)


def test_heads_that_do_not_fit_together() -> None:
    qkv, rotary, memory, heads = operands()
    with pytest.raises(ValueError, match="given together"):
        attend_new_tokens(qkv, rotary, memory, heads._replace(gate=None), 1.0, ARRIVED)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads evenly"):
        attend_new_tokens(qkv[:, 1:], rotary, memory, heads._replace(map_q=heads.map_q[1:]), 1.0, ARRIVED)


@pytest.mark.parametrize(
    ("dim", "window", "splits", "threads", "shared_bytes"),
    [
        (64, 63, 4, 288, 4 * (4 * 2 * 65 + 16 * 2)),
        (128, 63, 8, 288, 4 * (8 * 2 * 129 + 8 * 2)),
        (16, 4, 1, 288, 4 * (36 + 5 * 2)),
    ],
)
def test_the_sides_of_a_launch(dim: int, window: int, splits: int, threads: int, shared_bytes: int) -> None:
    heads = random_heads(4, 2, dim, 32, relu=False, gated=False)
    memory, qkv = random_memory(3, heads, window, torch.float16, 1.0), torch.zeros(3, 8, dim, dtype=torch.float16)
    sides = {"D": dim, "P": 2, "M": 32, "MAP": 0, "GATED": 0, "SPLITS": splits, "HALF": 1}
    assert plan(qkv, memory, heads, splits) == (sides, (3, splits, 2), threads, shared_bytes)
    relu = random_heads(4, 2, dim, 32, relu=True, gated=True)
    assert linear_attention.plan(qkv.float(), memory, relu, splits).definitions == {
        **{name: sides[name] for name in ("D", "P", "M", "SPLITS")},
        "MAP": 1,
        "GATED": 1,
    }
