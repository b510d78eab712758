"""Linearized attention with an exact cache against its definition, position by position, and against itself in pieces.

Shape suffixes: B sequences, H query heads, G KV heads, T positions, D head dimension, X entries.
"""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import bytes_for_backward, copying_model, linearized, tiny_model, tokens
from test_linear_attention import SCALE, B, D, G, H, make_maps, mixes, padding, qkv, window_linear
from torch import Tensor
from torch.nn import functional as F

from slope_cli.config.methods import SINKS, LinearizeConfig
from slope_cli.errors import UsageError
from slope_cli.linearize.cache import LinearWindowCache, leading_padding
from slope_cli.linearize.exact_cache import attend_cached
from slope_cli.linearize.linear_attention import Maps, Pattern
from slope_cli.linearize.linear_window import LinearWindow
from slope_cli.linearize.swap import linear_windows, linearize_attention, restore_attention, using

FORMS = [
    {"window": 4, "cache": 6},
    {"window": 1, "cache": 5},
    {"window": 7, "cache": SINKS},
    {"window": 3, "cache": 8, "kind": "terrace"},
    {"window": 70, "cache": 20},
]


class Defined(NamedTuple):
    """y (B, H, T, D), and of each sequence and KV head the positions of the entries after the last token."""

    y: Tensor
    positions: list[list[list[int]]]


def attend_as_defined(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, keep_BT: Tensor, mix_H: Tensor, maps: Maps, pattern: Pattern
) -> Defined:
    """Token by token, with lists of the tokens that are near and of those in the cache."""
    (rows, heads, length, _), groups = q_BHTD.shape, k_BGTD.shape[1]
    phi_q_BHTF, phi_k_BGTF = maps.q(q_BHTD * SCALE * q_BHTD.shape[-1] ** 0.5), maps.k(k_BGTD)
    outputs: dict[tuple[int, int, int], Tensor] = {}
    positions: list[list[list[int]]] = []
    for b in range(rows):
        positions.append([])
        first = int(keep_BT[b].int().argmax())
        for g in range(groups):
            k, v, phi_k = k_BGTD[b, g], v_BGTD[b, g], phi_k_BGTF[b, g]
            top, bottom = torch.zeros(phi_k.shape[1], v.shape[1], dtype=v.dtype), torch.zeros_like(phi_k[0])
            near: list[int] = []
            entries: list[int] = []
            for n in range(length):
                near += [n] if keep_BT[b, n] else []
                exact = entries + near
                for h in range(g * heads // groups, (g + 1) * heads // groups):
                    y = torch.zeros_like(v[0])
                    if exact:
                        scores = SCALE * k[exact] @ q_BHTD[b, h, n]
                        weights, phi_q = mix_H[h] * (scores - scores.max()).exp(), phi_q_BHTF[b, h, n]
                        y = (weights @ v[exact] + phi_q @ top) / (weights.sum() + phi_q @ bottom)
                    elif bool((bottom > 0).any()):
                        y = phi_q_BHTF[b, h, n] @ top / (phi_q_BHTF[b, h, n] @ bottom)
                    outputs[b, h, n] = y
                after = n + 1 - first
                if after % pattern.window:
                    continue
                begin = after - pattern.window + (not pattern.terrace)  # the oldest near key of the next token
                candidates, near = (
                    entries + [j for j in near if j - first < begin],
                    [j for j in near if j - first >= begin],
                )
                error = {}
                for j in candidates:
                    predicted = (
                        phi_k[j] @ top / (phi_k[j] @ bottom) if bool((bottom > 0).any()) else torch.zeros_like(v[j])
                    )
                    error[j] = (v[j] - predicted).square().sum().item() if j - first >= SINKS else float("inf")
                ranked = sorted(candidates, key=lambda j: (-error[j], j))
                entries = sorted(ranked[: pattern.cache])
                for j in ranked[pattern.cache :]:
                    top, bottom = top + phi_k[j][:, None] * v[j], bottom + phi_k[j]
            positions[b].append([j - first for j in entries])
    stacked = [
        torch.stack([torch.stack([outputs[b, h, n] for n in range(length)]) for h in range(heads)]) for b in range(rows)
    ]
    return Defined(torch.stack(stacked), positions)


def entries_of(memory: LinearWindowCache) -> list[list[list[int]]]:
    return [[[int(p) for p in head if p >= 0] for head in row] for row in memory.entry_positions]


def in_pieces(
    linear: LinearWindow, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, sizes: list[int]
) -> tuple[Tensor, LinearWindowCache]:
    memory, parts, start = linear.new_cache(), [], 0
    for size in sizes:
        part = slice(start, start + size)
        mask = None if keep is None else keep[:, part]
        parts.append(linear(q[:, :, part], *memory.update(k[:, :, part], v[:, :, part]), SCALE, mask, memory))
        start += size
    return torch.cat(parts, dim=2), memory


def defined(linear: LinearWindow, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Defined:
    maps = Maps(linear.map_q, linear.map_k)
    return attend_as_defined(q, k, v, keep, linear.mix.sigmoid(), maps, linear.pattern)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40),
    window=st.integers(1, 9),
    cache=st.integers(SINKS, 12),
    kind=st.sampled_from(["standard", "terrace"]),
    padded=st.lists(st.integers(0, 39), min_size=B, max_size=B),
    holes=st.booleans(),
    cuts=st.sets(st.integers(1, 39)),
    seed=st.integers(0, 99),
)
def test_every_form_is_the_definition(
    length: int, window: int, cache: int, kind: str, padded: list[int], holes: bool, cuts: set[int], seed: int
) -> None:
    linear = window_linear(window=window, cache=cache, kind=kind)
    q, k, v = qkv(length, seed=seed)
    keep = torch.arange(length) >= torch.tensor(padded)[:, None].clamp(max=length - 1)
    if holes:
        keep = keep & (torch.rand(B, length, generator=torch.Generator().manual_seed(seed)) > 0.2)
        keep[:, -1] = True
    expected = defined(linear, q, k, v, keep)
    torch.testing.assert_close(linear(q, k, v, SCALE, keep), expected.y, rtol=0, atol=1e-11)
    ends = [cut for cut in sorted(cuts) if cut < length] + [length]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    memories = []
    for split in (sizes, [1] * length, [length]):
        y, memory = in_pieces(linear, q, k, v, keep, split)
        torch.testing.assert_close(y, expected.y, rtol=0, atol=1e-11)
        assert entries_of(memory) == expected.positions
        memories.append(memory.tensors())
    for name, tensor in memories[0].items():
        if name in ("state_BGFE", "entry_positions"):
            assert all(torch.equal(tensor, other[name]) for other in memories), name


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_float32_in_any_pieces_chooses_as_float64(form: dict[str, Any]) -> None:
    length = 150
    linear, keep = window_linear(**form), padding(length)
    q, k, v = qkv(length)
    expected, positions = defined(linear, q, k, v, keep)
    torch.testing.assert_close(linear(q, k, v, SCALE, keep), expected, rtol=0, atol=1e-11)
    linear.float()
    q, k, v = qkv(length, torch.float32)
    torch.testing.assert_close(linear(q, k, v, SCALE, keep).double(), expected, rtol=0, atol=2e-4)
    with torch.no_grad():
        for sizes in ([1] * length, [13, 17, 1, 19, 70, 30], [149, 1]):
            y, memory = in_pieces(linear, q, k, v, keep, sizes)
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-4)
            assert entries_of(memory) == positions


@pytest.mark.parametrize("kind", ["standard", "terrace"])
def test_a_window_or_a_cache_over_everything_is_softmax_attention(kind: str) -> None:
    q, k, v = qkv(50)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    for window, cache in ((50, 4), (3, 50)):
        pattern = Pattern(window, terrace=kind == "terrace", cache=cache)
        y = attend_cached(q, k, v, None, mixes(), make_maps(), pattern, SCALE).y
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def test_equal_errors_leave_the_older_tokens() -> None:
    linear, length, cache = window_linear(window=3, cache=7), 40, 7
    q, k, v = qkv(length)
    for sizes in ([length], [1] * length, [17, 23]):
        _, memory = in_pieces(linear, q, k, torch.zeros_like(v), None, sizes)
        assert entries_of(memory) == [[list(range(cache))] * G] * B


def test_a_token_that_nothing_predicts_is_recalled_exactly() -> None:
    """Of the exact branch: of both, a growing sum of features outweighs near keys, whose weights are gamma at most."""
    length, needle = 200, 50
    q, k, v = qkv(length)
    k, v = k * 0.1, v * 0.01
    k[:, :, needle] = q[:, ::2, -1] * 8 / q[:, ::2, -1].square().sum(-1, keepdim=True) / SCALE
    v[:, :, needle] = 3.0
    y = {}
    for cache in (0, 8):
        linear = window_linear(window=8, cache=cache)
        linear.branch = "window"
        y[cache] = linear(q, k, v, SCALE)[:, ::2, -1]
    assert (y[8] - 3).abs().max() < 0.1
    assert y[0].abs().max() < 0.1


def test_a_model_copies_what_its_cache_holds() -> None:
    """64 different tokens and then again, far beyond the window, which alone copies none of them."""
    model, generator = copying_model(64), torch.Generator().manual_seed(0)
    once_BT = torch.stack([torch.randperm(64, generator=generator) for _ in range(8)])
    ids_BT, right = torch.cat([once_BT, once_BT], dim=1), []
    for cache in (0, 16, 48):
        linearize_attention(model, LinearizeConfig(window=8, cache=cache))
        with torch.no_grad(), using(model, branch="window"):
            predicted_BT = model(ids_BT[:, :-1], use_cache=False).logits[:, 64:].argmax(-1)
        right.append(float((predicted_BT == ids_BT[:, 65:]).double().mean()))
        restore_attention(model)
    assert right[0] == 0
    assert right[1] > 0.1
    assert right[2] > 0.4


@pytest.mark.parametrize("pattern", [Pattern(3, cache=5), Pattern(2, terrace=True, cache=4)], ids=str)
@pytest.mark.parametrize("branch", ["both", "linear"])
def test_gradients(pattern: Pattern, branch: Any) -> None:
    length = 23
    q, k, v = (x[1:].requires_grad_() for x in qkv(length))
    mix, maps, keep = mixes().requires_grad_(), make_maps(), padding(length)[1:]
    inputs = (q, k, v, mix, *(feature_map.weight.requires_grad_() for feature_map in (maps.q, maps.k)))

    def run(*_: Tensor) -> Tensor:
        first = leading_padding(keep).neg()
        return attend_cached(q, k, v, keep, mix, maps, pattern, SCALE, first_B=first, branch=branch).y

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    if branch == "both":
        probe = torch.randn(1, H, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        ours = torch.autograd.grad((run() * probe).sum(), inputs)
        theirs = torch.autograd.grad((attend_as_defined(q, k, v, keep, mix, maps, pattern).y * probe).sum(), inputs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_dropped_windows_leave_the_linear_branch() -> None:
    q, k, v = qkv(40)
    dropped = torch.tensor([[True, False, False, True]] * B)
    arguments = (q, k, v, None, mixes(), make_maps(), Pattern(4, cache=5), SCALE)
    y = attend_cached(*arguments, dropped_BH=dropped).y
    both, linear = attend_cached(*arguments).y, attend_cached(*arguments, branch="linear").y
    torch.testing.assert_close(y, torch.where(dropped[:, :, None, None], linear, both), rtol=0, atol=1e-12)
    assert (both - linear)[:, :, 20:].abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS[:4], ids=str)
def test_the_memory_is_of_one_size_and_beams_take_their_entries_along(form: dict[str, Any]) -> None:
    linear = window_linear(**form)
    memory, sizes = linear.new_cache(), []
    for length in (60, 1, 5, 1):
        q, k, v = qkv(length)
        linear(q, *memory.update(k, v), SCALE, None, memory)
        sizes.append(memory.nbytes())
    assert len(set(sizes)) == 1
    assert memory.nbytes() - window_linear_bytes({**form, "cache": 0}) >= form["cache"] * B * G * 2 * D * 8
    before = entries_of(memory)
    memory.reorder_cache(torch.tensor([1, 0]))
    assert entries_of(memory) == before[::-1]
    assert form["cache"] == SINKS or before[::-1] != before


def window_linear_bytes(form: dict[str, Any]) -> int:
    memory = window_linear(**form).new_cache()
    memory.lazy_initialization(*qkv(1)[1:])
    return memory.nbytes()


def test_time_and_memory_are_linear_in_length() -> None:
    def kept_bytes(length: int) -> int:
        q, k, v = qkv(length, torch.float32)
        linear = window_linear(window=32, cache=16).float().requires_grad_()
        return bytes_for_backward(lambda: linear.compute(q, k, v, SCALE, None))

    assert kept_bytes(2048) < 4.5 * kept_bytes(512)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("gpt2-nano", {"cache": -1}, "linearize.cache=-1: must be 0, or 4 or more: the first tokens"),
        ("gpt2-nano", {"cache": 3}, "linearize.cache=3: must be 0, or 4 or more: the first tokens"),
        ("bert-base", {"cache": 8}, "linearize.cache=8: has no meaning in a two-sided model; set it to 0"),
    ],
)
def test_values_that_do_not_fit(name: str, config: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        linearize_attention(tiny_model(name), LinearizeConfig(**config))
    assert str(error.value) == said


def test_a_model_that_never_looks_so_far_has_no_cache() -> None:
    with pytest.raises(UsageError, match=r"^linearize.cache=8: the model itself never looks beyond its sliding_window"):
        linearize_attention(tiny_model("mistral-7b", sliding_window=9), LinearizeConfig(window=4, cache=8))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler's own
@pytest.mark.filterwarnings("ignore:The .grad")
def test_a_compiled_model_is_the_same() -> None:
    model, ids_BT = linearized("llama3-8b", window=4, cache=6), tokens(40)
    compiled = torch.compile(model, backend="aot_eager")
    found, expected = (net(ids_BT, use_cache=False).logits for net in (compiled, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = [parameter for linear in linear_windows(model).values() for parameter in linear.parameters()]
    gradients = [torch.autograd.grad(logits.square().mean(), weights) for logits in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
