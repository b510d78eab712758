"""The mathematics of linearized attention: chunks, recurrence and state against the definition written out.

Shape suffixes: B sequences, H query heads, G KV heads, T positions, D head dimension, F features.
"""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.marks import slow
from support.models import attend_as_defined, bytes_for_backward
from torch import Tensor, nn
from torch.nn import functional as F

from slope_cli.config.methods import LinearizeConfig
from slope_cli.linearize.cache import leading_padding
from slope_cli.linearize.gate import Gate, decays
from slope_cli.linearize.linear_attention import Branch, Maps, Pattern, attend, weights_of
from slope_cli.linearize.linear_window import LinearWindow
from slope_cli.linearize.maps import make_map

B, H, G, D = 2, 4, 2, 6
SCALE = 0.4
PATTERNS = [
    Pattern(4),
    Pattern(1),
    Pattern(70),
    Pattern(4, terrace=True),
    Pattern(1, terrace=True),
    Pattern(70, terrace=True),
    Pattern(4, causal=False),
    Pattern(70, causal=False),
]
STATES = [(pattern, gated) for pattern in PATTERNS for gated in (False, True) if pattern.causal or not gated]


def qkv(length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, D), keys and values (B, G, T, D)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(B, heads, length, D, dtype=torch.float64, generator=generator) for heads in (H, G, G))
    q_BHTD, k_BGTD, v_BGTD = (x.to(dtype) for x in drawn)
    return q_BHTD, k_BGTD, v_BGTD


def make_maps(name: str = "hedgehog", *, gated: bool = False) -> Maps:
    """Random maps in float64, and a random gate: of half of the keys it is 1."""
    generator = torch.Generator().manual_seed(1)
    q, k = (make_map(name, heads, D, 5, generator).double().requires_grad_(False) for heads in (H, G))
    for feature_map in (q, k):
        feature_map.weight.normal_(generator=generator)
    gate = Gate(G, D).double().requires_grad_(False)
    for parameter in gate.parameters():
        parameter.normal_(std=0.2, generator=generator)
    return Maps(q, k, gate if gated else None)


def mixes() -> Tensor:
    return torch.linspace(0.05, 0.9, H, dtype=torch.float64)


def padding(length: int) -> Tensor:
    """The second sequence has some padding at the left."""
    keep_BT = torch.ones(B, length, dtype=torch.bool)
    keep_BT[1, : min(3, length - 1)] = False
    return keep_BT


def window_linear(**form: Any) -> LinearWindow:
    """A LinearWindow in float64 with random maps and mix factors."""
    generator = torch.Generator().manual_seed(4)
    linear = LinearWindow(
        LinearizeConfig(**form), heads=H, kv_heads=G, head_dim=D, causal=True, generator=generator
    ).double()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return linear.requires_grad_(False)


@pytest.mark.parametrize("name", ["hedgehog", "t2r"])
@pytest.mark.parametrize(("pattern", "gated"), STATES, ids=str)
def test_the_chunked_form_is_the_definition(pattern: Pattern, gated: bool, name: str) -> None:
    for length in (1, 4, 5, 9, 150) if name == "hedgehog" else (9,):
        q, k, v = qkv(length)
        keep, maps = padding(length), make_maps(name, gated=gated)
        expected = attend_as_defined(q, k, v, keep, mixes(), maps, pattern, SCALE)
        first = leading_padding(keep).neg()
        y = attend(q, k, v, keep, mixes(), maps, pattern, SCALE, first_B=first).y
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("pattern", "gated"), STATES, ids=str)
def test_the_weights_are_the_definition_and_softmax(pattern: Pattern, gated: bool) -> None:
    length, start = 40, 9
    q, k, v = qkv(length)
    keep, maps = padding(length), make_maps(gated=gated)
    phi_q, phi_k, first = maps.q(q * SCALE * D**0.5), maps.k(k), leading_padding(keep).neg()
    parts = (q[:, :, start:], phi_q[:, :, start:], k, phi_k)
    how = {"log_gates_BGS": maps.gate(k) * keep[:, None]} if maps.gate else {}
    softmax, mixed = weights_of(*parts, keep, mixes(), pattern, SCALE, start=start, first_B=first, **how)
    v_BHTD = v.repeat_interleave(H // G, dim=1)
    expected = attend_as_defined(q, k, v, keep, mixes(), maps, pattern, SCALE)[:, :, start:]
    torch.testing.assert_close(mixed @ v_BHTD, expected, rtol=0, atol=1e-12)
    causal = torch.ones(length, length, dtype=torch.bool).tril() if pattern.causal else torch.ones(length, length) > 0
    seen = keep[:, None, None] & causal
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE, enable_gqa=True)[:, :, start:]
    torch.testing.assert_close(softmax @ v_BHTD, expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(1, 24),
    window=st.integers(1, 26),
    form=st.sampled_from(["window", "terrace", "two-sided"]),
    gated=st.booleans(),
    kept=st.lists(st.booleans(), min_size=24, max_size=24),
    seed=st.integers(0, 99),
)
def test_any_mask_of_padding(length: int, window: int, form: str, gated: bool, kept: list[bool], seed: int) -> None:
    pattern = Pattern(window, terrace=form == "terrace", causal=form != "two-sided")
    q, k, v = qkv(length, seed=seed)
    keep, maps = torch.tensor([kept[:length], kept[-length:]]), make_maps(gated=gated and pattern.causal)
    expected = attend_as_defined(q, k, v, keep, mixes(), maps, pattern, SCALE)
    y = attend(q, k, v, keep, mixes(), maps, pattern, SCALE, first_B=leading_padding(keep).neg()).y
    rows = keep.any(1)
    torch.testing.assert_close(y[rows], expected[rows], rtol=0, atol=1e-12)
    assert (y[~rows] == 0).all()


def test_a_window_over_everything_is_softmax_attention() -> None:
    q, k, v = qkv(50)
    for pattern in (Pattern(50), Pattern(25, terrace=True), Pattern(50, causal=False)):
        y = attend(q, k, v, None, mixes(), make_maps(), pattern, SCALE).y
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=pattern.causal, scale=SCALE, enable_gqa=True)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("pattern", "gated"),
    [
        (Pattern(3), False),
        (Pattern(3, terrace=True), False),
        (Pattern(3, causal=False), False),
        (Pattern(3), True),
        (Pattern(3, terrace=True), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("branch", ["both", "linear"])
def test_gradients(pattern: Pattern, gated: bool, branch: Branch) -> None:
    length = 70  # two chunks
    q, k, v = (x[:1].requires_grad_() for x in qkv(length))
    mix, maps = mixes().requires_grad_(), make_maps(gated=gated)
    weights = [feature_map.weight.requires_grad_() for feature_map in (maps.q, maps.k)]
    weights += [p.requires_grad_() for p in maps.gate.parameters()] if isinstance(maps.gate, Gate) else []

    def run(*_: Tensor) -> Tensor:
        return attend(q, k, v, None, mix, maps, pattern, SCALE, branch=branch).y

    def defined(*_: Tensor) -> Tensor:
        return attend_as_defined(q, k, v, torch.ones(1, length, dtype=torch.bool), mix, maps, pattern, SCALE)

    inputs = (q, k, v, mix, *weights)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    if branch == "both":
        probe = torch.randn(1, H, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        ours = torch.autograd.grad((run() * probe).sum(), inputs)
        theirs = torch.autograd.grad((defined() * probe).sum(), inputs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_bands_overlap_in_no_view(pattern: Pattern) -> None:
    """Their gradients are sums of slices: one added entry by entry, a GPU would sum in no order."""
    q, k, v = (x.requires_grad_() for x in qkv(300))
    maps = make_maps(gated=pattern.causal)
    nodes, left = set[Any](), [attend(q, k, v, None, mixes(), maps, pattern, SCALE).y.grad_fn]
    while left:
        if (node := left.pop()) is not None and node not in nodes:
            nodes.add(node)
            left += [after for after, _ in node.next_functions]
    by_entry = {"UnfoldBackward0", "AsStridedBackward0", "IndexBackward0", "GatherBackward0"}
    assert not by_entry & {node.name() for node in nodes}


def test_the_branches_add_up() -> None:
    length, pattern, maps = 30, Pattern(4), make_maps()
    q, k, v = qkv(length)
    both, window, linear = (
        attend(q, k, v, None, mixes(), maps, pattern, SCALE, branch=branch).y for branch in ("both", "window", "linear")
    )
    everything = Pattern(length)
    narrow = attend(q[:, :, -1:], k[:, :, -4:], v[:, :, -4:], None, mixes(), maps, everything, SCALE).y
    torch.testing.assert_close(window[:, :, -1:], narrow, rtol=0, atol=1e-12)  # only the last four keys
    # both = a·window + (1 - a)·linear, with one a for all dimensions of a query.
    share = ((both - linear) / (window - linear))[:, :, 4:]
    assert (share.amax(-1) - share.amin(-1)).max() < 1e-6
    assert ((share > 0) & (share < 1)).all()
    torch.testing.assert_close(linear[:, :, :4], both[:, :, :4])  # no key is far yet: the window's


def test_dropped_windows_leave_the_linear_branch() -> None:
    q, k, v = qkv(30)
    dropped = torch.tensor([[True, False, False, True]] * B)
    arguments = (q, k, v, None, mixes(), make_maps(), Pattern(4), SCALE)
    y = attend(*arguments, dropped_BH=dropped).y
    both, linear = attend(*arguments).y, attend(*arguments, branch="linear").y
    torch.testing.assert_close(y, torch.where(dropped[:, :, None, None], linear, both), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "form",
    [
        form | {"state": state}
        for form in ({"window": 5}, {"window": 1}, {"window": 4, "kind": "terrace"})
        for state in ("additive", "gated", "delta")
        if "kind" not in form or state != "delta"
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("padded", "in_place"), [(True, True), slow(False, False), slow(False, True), slow(True, False)]
)
def test_any_split_of_a_sequence_gives_the_same(form: dict[str, Any], padded: bool, in_place: bool) -> None:
    length, linear = 150, window_linear(**form)
    q, k, v = qkv(length)
    keep = padding(length) if padded else None
    with torch.set_grad_enabled(not in_place):  # with gradients single tokens are chunks of one
        _compare_splits(linear, q, k, v, keep)


def _compare_splits(linear: LinearWindow, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> None:
    length, expected = q.shape[2], linear(q, k, v, SCALE, keep)
    for split in ([1] * length, [13, 17, 1, 19, 70, 30], [length], [2, 1, 1, 1, 2, 1, 142], [149, 1]):
        memory, parts, start = linear.new_cache(), [], 0
        for size in split:
            part = slice(start, start + size)
            k_part, v_part = memory.update(k[:, :, part], v[:, :, part])
            mask = None if keep is None else keep[:, part]
            parts.append(linear(q[:, :, part], k_part, v_part, SCALE, mask, memory))
            start += size
        y, real = torch.cat(parts, dim=2), torch.ones(B, length, dtype=torch.bool) if keep is None else keep
        torch.testing.assert_close(y.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=0, atol=1e-12)
        assert memory.get_seq_length() == length


@pytest.mark.parametrize("state", ["additive", "gated", "delta"])
def test_the_state_is_of_one_size_and_the_window_no_view_of_the_prompt(state: str) -> None:
    linear = window_linear(window=5, state=state)
    memory, sizes = linear.new_cache(), []
    for length in (200, 1, 3, 1):
        q, k, v = qkv(length)
        linear(q, *memory.update(k, v), SCALE, None, memory)
        sizes.append(memory.nbytes())
        assert memory.keys is not None
        assert memory.keys.untyped_storage().nbytes() == memory.keys.nbytes
    assert len(set(sizes)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        {"window": 16},
        {"window": 16, "kind": "terrace"},
        {"window": 16, "state": "gated"},
        {"window": 16, "state": "delta"},
    ],
    ids=str,
)
@torch.no_grad()
def test_bfloat16_inputs_with_a_float32_state_stay_accurate(form: dict[str, Any]) -> None:
    length, linear = 4096, window_linear(**form)
    q, k, v = qkv(length, torch.bfloat16)
    expected = linear(q.double(), k.double(), v.double(), SCALE)
    linear.float()
    memory = linear.new_cache()
    steps = []
    for t in range(length):
        one = slice(t, t + 1)
        steps.append(linear(q[:, :, one], *memory.update(k[:, :, one], v[:, :, one]), SCALE, None, memory))
    y = torch.cat(steps, dim=2)
    assert y.dtype == torch.bfloat16
    assert memory.state_BGFE.dtype == torch.float32
    for part in (slice(0, 512), slice(length - 512, length)):
        wrong = (y - expected)[:, :, part].norm() / expected[:, :, part].norm()
        assert wrong < 5e-3


def test_autocast_does_not_reach_it() -> None:
    q, k, v = qkv(80, torch.float32)
    linear = window_linear(window=5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear(q, k, v, SCALE)
    torch.testing.assert_close(inside, linear(q, k, v, SCALE), rtol=0, atol=0)


@pytest.mark.parametrize("state", ["additive", "gated", "delta"])
def test_time_and_memory_are_linear_in_length(state: str) -> None:
    """No tensor that autograd keeps grows faster than the sequence."""

    def kept_bytes(length: int) -> int:
        q, k, v = qkv(length, torch.float32)
        linear = window_linear(window=8, state=state).float().requires_grad_()
        return bytes_for_backward(lambda: linear.compute(q, k, v, SCALE, None))

    short, long = kept_bytes(512), kept_bytes(4096)
    assert long < 8.5 * short


@pytest.mark.parametrize("name", ["hedgehog", "t2r"])
def test_maps_start_as_the_identity(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    narrow, wide = (make_map(name, 3, 4, columns, generator) for columns in (2, 6))
    assert torch.equal(narrow.weight[1], torch.eye(4)[:, :2])
    assert torch.equal(wide.weight[2, :, :4], torch.eye(4))
    assert wide.weight[2, :, 4:].unique().numel() == 8  # equal columns would stay equal
    x = torch.randn(1, 3, 5, 4, generator=generator)
    assert wide(x).shape == (1, 3, 5, wide.features)
    assert (wide(x) > 0).all()
    assert make_map(name, 3, 64, None, generator).features == 64
    assert make_map(name, 3, 4, None, generator).features == {"hedgehog": 32, "t2r": 4}[name]


@pytest.mark.parametrize("kind", ["standard", "terrace"])
def test_a_gate_is_1_at_first_and_the_state_additive(kind: str) -> None:
    """To the last bit in a chunk and token by token; chunks are added up in another order."""
    form, q_k_v = {"window": 5, "kind": kind}, qkv(150)
    gated, additive = window_linear(**form, state="gated"), window_linear(**form)
    gated.load_state_dict(additive.state_dict(), strict=False)
    assert gated.gate is not None
    for parameter in gated.gate.parameters():
        parameter.zero_()  # as it is made
    assert all(torch.equal(p, torch.zeros_like(p)) for p in Gate(G, D).parameters())
    whole = [linear(*q_k_v, SCALE) for linear in (gated, additive)]
    torch.testing.assert_close(*whole, rtol=0, atol=1e-13)
    memories = gated.new_cache(), additive.new_cache()
    for part in (slice(0, 40), *(slice(t, t + 1) for t in range(40, 150))):
        q, k, v = (x[:, :, part] for x in q_k_v)
        pairs = zip((gated, additive), memories, strict=True)
        y, expected = (linear(q, *memory.update(k, v), SCALE, None, memory) for linear, memory in pairs)
        assert torch.equal(y, expected)
    assert torch.equal(memories[0].state_BGFE, memories[1].state_BGFE)


def test_a_gate_that_is_1_has_a_gradient() -> None:
    q, k, v = qkv(150)
    linear = window_linear(window=5, state="gated")
    assert linear.gate is not None
    for parameter in linear.gate.parameters():
        parameter.zero_().requires_grad_()
    linear(q, k, v, SCALE).square().sum().backward()
    assert all((p.grad != 0).all() for p in linear.gate.parameters() if p.grad is not None)
    assert linear.gate.bias.grad is not None


def test_gates_near_0_and_long_products_neither_overflow_nor_vanish() -> None:
    """Of far keys behind a closed gate nothing is left; the newest one counts in full, so that denominators do."""
    q, k, v = qkv(600, torch.float32)
    linear = window_linear(window=5, state="gated").float()
    assert linear.gate is not None
    for closed in (50.0, 1e6):
        linear.gate.weight.zero_()
        linear.gate.bias = nn.Parameter(torch.full((G,), closed))
        y = linear(q, k, v, SCALE)
        newest = attend_as_defined(*(x[:, :, -6:] for x in (q, k, v)), torch.ones(B, 6) > 0, *linear_parts(linear))
        torch.testing.assert_close(y[:, :, -1], newest[:, :, -1], rtol=0, atol=1e-6)
        y.sum().backward()
        assert linear.gate.bias.grad is not None
        assert linear.gate.bias.grad.isfinite().all()
    linear.gate.weight.normal_(std=30.0)
    keep = torch.ones(B, 600, dtype=torch.bool)
    expected = attend_as_defined(q[:, :, -90:], k[:, :, -90:], v[:, :, -90:], keep[:, -90:], *linear_parts(linear))
    torch.testing.assert_close(linear(q[:, :, -90:], k[:, :, -90:], v[:, :, -90:], SCALE), expected, rtol=0, atol=2e-4)


def linear_parts(linear: LinearWindow) -> tuple[Tensor, Maps, Pattern, float]:
    """What `attend_as_defined` takes of a module."""
    return linear.mix.sigmoid(), linear.maps, linear.pattern, SCALE


def test_decays_are_products_of_the_gates_of_far_keys() -> None:
    gates_S, far_CS = torch.tensor([0.5, 0.25, 0.1, 0.9]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]) > 0
    expected = torch.tensor([[0.125, 0.25, 1, 1, 1], [0.0125, 0.025, 0.1, 1, 1]])
    torch.testing.assert_close(decays(gates_S.log()[None], far_CS), expected)
