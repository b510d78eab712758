"""The delta rule: chunks against the recurrence, and attention with its state against the definition written out.

Shape suffixes: B sequences, H query heads, G KV heads, T tokens, F features, D head dimension.
"""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import delta_as_defined
from torch import Tensor
from torch.nn import functional as F

from slope_cli.config.methods import LinearizeConfig
from slope_cli.linearize.delta import CHUNK, FIRST_BETA, FIRST_SHARE, attend_delta, delta_rule
from slope_cli.linearize.linear_attention import Branch
from slope_cli.linearize.linear_window import LinearWindow

B, H, G, D = 2, 4, 2, 6
SCALE = 0.4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, D), keys and values (B, G, T, D)."""
    q_BHTD, k_BGTD, v_BGTD = (drawn(B, heads, length, D, seed=seed + n) for n, heads in enumerate((H, G, G)))
    return q_BHTD, k_BGTD, v_BGTD


def made(window: int, **settings: Any) -> LinearWindow:
    """A LinearWindow in float64 with random parameters; of half of the keys the gate is 1."""
    generator = torch.Generator().manual_seed(4)
    config = LinearizeConfig(window=window, state="delta", **settings)
    linear = LinearWindow(config, heads=H, kv_heads=G, head_dim=D, causal=True, generator=generator).double()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return linear.requires_grad_(False)


def recurrence(
    q_BHTF: Tensor, k_BGTF: Tensor, v_BGTD: Tensor, beta_BGT: Tensor, log_gates_BGT: Tensor, state_BGFD: Tensor
) -> tuple[Tensor, Tensor]:
    """The rule token by token: each query reads, then its place's key is written."""
    reads = []
    for t in range(q_BHTF.shape[2]):
        reads.append((q_BHTF[:, :, t].unflatten(1, (k_BGTF.shape[1], -1)) @ state_BGFD).flatten(1, 2))
        k_BGF1, v_BG1D = k_BGTF[:, :, t, :, None], v_BGTD[:, :, t, None]
        beta_BG11, gate_BG11 = beta_BGT[:, :, t, None, None], log_gates_BGT[:, :, t, None, None].exp()
        state_BGFD = gate_BG11 * (state_BGFD - beta_BG11 * k_BGF1 @ (k_BGF1.mT @ state_BGFD))
        state_BGFD = state_BGFD + beta_BG11 * k_BGF1 @ v_BG1D
    return torch.stack(reads, dim=2), state_BGFD


@pytest.mark.parametrize("length", [1, 5, CHUNK, CHUNK + 1, 3 * CHUNK + 10])
@pytest.mark.parametrize("carried", [False, True])
def test_chunks_are_the_recurrence_with_all_gradients(length: int, carried: bool) -> None:
    features, inputs = 5, [F.normalize(drawn(B, heads, length, 5, seed=heads), dim=-1) for heads in (H, G)]
    beta_BGT = drawn(B, G, length, seed=6).sigmoid()
    log_gates_BGT = drawn(B, G, length, seed=7).clamp(max=0)
    for x_BGT in (beta_BGT, log_gates_BGT):
        x_BGT[1, :, : min(3, length - 1)] = 0  # padding
    inputs += [drawn(B, G, length, D, seed=5), beta_BGT, log_gates_BGT, drawn(B, G, features, D, seed=8) * carried]
    for tensor in inputs:
        tensor.requires_grad_()
    *given, state_BGFD = inputs
    found = delta_rule(*given, state_BGFD if carried else None)
    expected = recurrence(*given, state_BGFD)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    probes = [drawn(*tensor.shape, seed=9) for tensor in expected]
    wanted = inputs if carried else given
    ours, theirs = (torch.autograd.grad(results, wanted, probes) for results in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_a_key_that_comes_again_has_its_new_value_and_others_keep_theirs() -> None:
    """Where a sum would read the old and the new value together."""
    k_11TF, v_11TD = torch.eye(4)[[0, 1, 0, 2]][None, None], drawn(1, 1, 4, 3).float()
    ones_11T = torch.ones(1, 1, 4)
    _, state_11FD = delta_rule(k_11TF, k_11TF, v_11TD, ones_11T, 0 * ones_11T)
    torch.testing.assert_close(state_11FD[0, 0, :3], v_11TD[0, 0, [2, 1, 3]])
    assert not state_11FD[0, 0, 3].any()


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 24),
    window=st.integers(1, 26),
    kept=st.lists(st.booleans(), min_size=24, max_size=24),
    cuts=st.sets(st.integers(1, 23)),
    seed=st.integers(0, 99),
)
def test_any_window_mask_of_padding_and_pieces(
    length: int, window: int, kept: list[bool], cuts: set[int], seed: int
) -> None:
    linear, (q, k, v) = made(window), qkv(length, seed)
    keep_BT = torch.tensor([kept[:length], kept[-length:]])
    expected = delta_as_defined(q, k, v, keep_BT, linear.maps, window, SCALE)
    torch.testing.assert_close(linear(q, k, v, SCALE, keep_BT), expected, rtol=0, atol=1e-12)
    edges = [0, *sorted(cut for cut in cuts if cut < length), length]
    for decoding in (False, True):  # decoding takes single tokens in place
        memory, parts = linear.new_cache(), []
        with torch.set_grad_enabled(not decoding):
            for start, end in itertools.pairwise(edges):
                part = slice(start, end)
                pair = memory.update(k[:, :, part], v[:, :, part])
                parts.append(linear(q[:, :, part], *pair, SCALE, keep_BT[:, part], memory))
        torch.testing.assert_close(torch.cat(parts, dim=2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("branch", ["both", "linear"])
def test_gradients(branch: Branch) -> None:
    length, window = 3 * CHUNK, 40
    linear, q_k_v = made(window).requires_grad_(), [x[:1].requires_grad_() for x in qkv(length)]
    keep_BT = torch.ones(1, length, dtype=torch.bool)
    linear.branch = branch
    maps = linear.maps
    if branch == "linear":
        maps = maps._replace(share=lambda q_BHTD: torch.ones_like(q_BHTD[..., 0]))
    inputs = [*q_k_v, *(p for name, p in linear.named_parameters() if branch == "both" or "share" not in name)]
    probe = drawn(1, H, length, D, seed=5)
    found = linear(*q_k_v, SCALE, keep_BT)
    expected = delta_as_defined(*q_k_v, keep_BT, maps, window, SCALE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad((y * probe).sum(), inputs) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert all(gradient.any() for gradient in ours)


def test_a_window_over_everything_is_softmax_attention() -> None:
    q, k, v = qkv(50)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    for window in (50, 70):
        linear = made(window)
        y = linear(q, k, v, SCALE)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        memory = linear.new_cache()
        in_memory = linear(q, *memory.update(k, v), SCALE, None, memory)
        torch.testing.assert_close(in_memory, expected, rtol=0, atol=1e-12)


def test_branches_and_dropped_windows() -> None:
    q, k, v = qkv(30)
    linear = made(4)

    def attended(branch: Branch, dropped_BH: Tensor | None = None) -> Tensor:
        how: dict[str, Any] = {"branch": branch, "dropped_BH": dropped_BH}
        return attend_delta(q, k, v, None, linear.maps, linear.pattern, SCALE, **how).y

    both, window, read = (attended(branch) for branch in ("both", "window", "linear"))
    assert linear.share is not None
    share_BHT1 = linear.share(q * SCALE * D**0.5)[..., None]
    torch.testing.assert_close(both[:, :, 4:], torch.lerp(window, read, share_BHT1)[:, :, 4:], rtol=0, atol=1e-12)
    for y in (both, read):  # no key is far yet
        assert torch.equal(y[:, :, :4], window[:, :, :4])
    dropped_BH = torch.tensor([[True, False, False, True]] * B)
    found = attended("both", dropped_BH)
    torch.testing.assert_close(found, torch.where(dropped_BH[..., None, None], read, both), rtol=0, atol=1e-12)


def test_how_it_begins() -> None:
    """Equal shares for all queries and keys, gates of 1, and features that are queries and keys at length 1."""
    config, generator = LinearizeConfig(state="delta"), torch.Generator()
    linear = LinearWindow(config, heads=H, kv_heads=G, head_dim=D, causal=True, generator=generator)
    q, k, _ = (x.float() for x in qkv(9))
    assert linear.mix is None
    assert linear.beta is not None
    assert linear.share is not None
    assert linear.gate is not None
    assert not linear.gate(k).any()
    torch.testing.assert_close(linear.beta(k), torch.full((B, G, 9), FIRST_BETA))
    torch.testing.assert_close(linear.share(q), torch.full((B, H, 9), FIRST_SHARE))
    torch.testing.assert_close(linear.map_k(k), F.normalize(k, dim=-1))
    assert "delta rule" in repr(linear)


def test_closed_gates_neither_overflow_nor_vanish() -> None:
    """Of far keys behind a closed gate nothing is left; what the newest one writes counts in full."""
    (q, k, v), window = (tuple(x.float() for x in qkv(300)), 5)
    linear = made(window).float()
    assert linear.gate is not None
    for closed in (50.0, 1e6):
        linear.gate.weight.zero_()
        linear.gate.bias.data.fill_(closed)
        linear.requires_grad_()
        y = linear(q, k, v, SCALE)
        newest = [x[:, :, -window - 1 :] for x in (q, k, v)]
        expected = delta_as_defined(*newest, torch.ones(B, window + 1) > 0, linear.maps, window, SCALE)
        torch.testing.assert_close(y[:, :, -1], expected[:, :, -1], rtol=0, atol=1e-6)
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in linear.parameters() if p.grad is not None)
        linear.requires_grad_(False)
