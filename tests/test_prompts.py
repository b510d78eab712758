"""Prompts of any lengths that linearized layers read together: each is read, remembered and continued as if alone.

Shape suffixes: P prompts, T tokens of a prompt, N of a text, H query heads, G KV heads, S = H + 2 G, D head dimension,
W remembered keys, X entries of an exact cache.
"""

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import FORMS, linearized
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slope_cli.config.methods import LinearizeConfig
from slope_cli.inference.cache import AttentionCache, HeadsCache, LinearCache, Prompts
from slope_cli.inference.decoder import Decoder
from slope_cli.linearize.cache import LinearWindowCache
from slope_cli.linearize.linear_window import LinearWindow
from sparse_kernels.attention import turned_heads

KINDS: dict[str, dict[str, Any]] = FORMS | {
    "one key": {"window": 1},
    "wide": {"window": 70},
    "cached terrace": {"window": 4, "kind": "terrace", "cache": 6},
    "delta heads": {"window": 5, "state": "delta", "keep_softmax": ["0/1"]},
    "cache heads": {"window": 4, "cache": 6, "keep_softmax": ["0/1"]},
}
H, G, D, SCALE = 4, 2, 8, 0.4
MAX_LENGTH, MORE = 180, 11
"""Tokens that a slot has room for, and that follow each prompt."""


def window_linear(kind: str, dtype: torch.dtype) -> LinearWindow:
    """A LinearWindow with random parameters."""
    generator, config = torch.Generator().manual_seed(4), LinearizeConfig(**KINDS[kind])
    linear = LinearWindow(config, heads=H, kv_heads=G, head_dim=D, causal=True, generator=generator).to(dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    linear.softmax_heads = (1,) if "keep_softmax" in KINDS[kind] else ()
    return linear.requires_grad_(False)


def in_order(memory: LinearWindowCache, row: int) -> dict[str, Tensor]:
    """What is remembered of a sequence, keys and entries from the oldest on; zeros for what counts as nothing."""
    order_W = (torch.arange(memory.pattern.lookback) + memory.oldest_1) % max(memory.pattern.lookback, 1)
    own = {name: tensor[row] for name, tensor in memory.tensors().items()}
    if not memory.pattern.blockwise:
        del own["tokens_B"]  # which nothing reads
    own["keep_BW"] = own["keep_BW"][order_W]
    for name in ("keys", "values"):
        own[name] = own[name][:, order_W] * own["keep_BW"][:, None]
    if memory.pattern.cache:
        own["entry_positions"], order_GX = own["entry_positions"].sort(dim=-1, stable=True)
        for name in ("entry_keys", "entry_values"):
            own[name] = own[name].take_along_dim(order_GX[..., None], 1) * (own["entry_positions"] >= 0)[..., None]
    return own


class Text:
    """Random queries, keys and values (N, S, D), with rotary positions or without, and what attention makes of them."""

    def __init__(self, length: int, rotary_2TD: Tensor | None, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.qkv_NSD = torch.randn(length, H + 2 * G, D, generator=generator, dtype=torch.float64).to(dtype)
        turned = turned_heads(self.qkv_NSD, None if rotary_2TD is None else rotary_2TD[:, :length], G)
        self.heads = [X_NHD.transpose(0, 1)[None] for X_NHD in turned]

    def attended(self, linear: LinearWindow) -> Tensor:
        """(N, H, D)."""
        q_1HND, k_1GND, v_1GND = self.heads
        y_1HND = F.scaled_dot_product_attention(*self.heads, is_causal=True, scale=SCALE, enable_gqa=True)
        own, kv_heads = linear.of_heads(linear.linear_heads), linear.linear_heads
        queries = linear.query_heads(kv_heads)
        y_1HND[:, queries] = own.compute(q_1HND[:, queries], k_1GND[:, kv_heads], v_1GND[:, kv_heads], SCALE, None)
        return y_1HND[0].transpose(0, 1)

    def remembered(self, linear: LinearWindow, length: int) -> dict[str, Tensor]:
        """By the linearized heads, after so many tokens."""
        kv_heads = linear.linear_heads
        own, (q_1HND, k_1GND, v_1GND) = linear.of_heads(kv_heads), (X_1HND[:, :, :length] for X_1HND in self.heads)
        memory = own.new_cache()
        k_1GND, v_1GND = memory.update(k_1GND[:, kv_heads], v_1GND[:, kv_heads])
        own(q_1HND[:, linear.query_heads(kv_heads)], k_1GND, v_1GND, SCALE, None, memory)
        return in_order(memory, 0)


@torch.no_grad()
def check(
    kind: str, rotary: bool, dtype: torch.dtype, lengths: list[int], width: int, first: int, turns: int, seed: int
) -> None:
    """Read prompts together into slots that others have used for some steps, and go on with each.

    width: to which the prompts are padded. first: the slot of the first of them.
    """
    generator, how = torch.Generator().manual_seed(seed), {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 2e-4}
    angles_TD = torch.randn(MAX_LENGTH, D // 2, generator=generator, dtype=torch.float64).repeat(1, 2)
    sines_TD = angles_TD.sin() * torch.tensor([-1.0, 1.0]).repeat_interleave(D // 2)
    rotary_2TD = torch.stack([angles_TD.cos(), sines_TD]).to(dtype) if rotary else None
    texts = [Text(length + MORE, rotary_2TD, dtype, generator) for length in lengths]

    linear, P, like = window_linear(kind, dtype), len(lengths), torch.zeros(1, dtype=dtype)
    linearized_H = linear.query_heads(linear.linear_heads)
    shape = (first + P + 1, G, MAX_LENGTH, D)
    cache: AttentionCache
    if linear.softmax_heads:
        cache = HeadsCache(linear, shape, H, SCALE, 0, like)
        memory = next(part.memory for part, *_ in cache._parts if isinstance(part, LinearCache))
    else:
        cache = LinearCache(linear, shape, SCALE, like)
        memory = cache.memory
    junk_PTSD = torch.randn(shape[0], width, H + 2 * G, D, generator=generator).to(dtype)
    cache.prefill(Prompts(torch.arange(shape[0]), torch.full(shape[:1], width)), junk_PTSD, None)
    for turn in range(turns):
        cache.decode(torch.full(shape[:1], width + turn, dtype=torch.int32), junk_PTSD[:, 0].clone(), None)

    prompts, qkv_PTSD = Prompts.of(first, lengths, torch.device("cpu")), junk_PTSD[:P].clone()
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        qkv_PTSD[row, :length] = text.qkv_NSD[:length]
    turned = None if rotary_2TD is None else rotary_2TD[:, None, :width].expand(-1, P, -1, -1)
    y_PTHD, expected = cache.prefill(prompts, qkv_PTSD, turned), [text.attended(linear) for text in texts]
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        torch.testing.assert_close(y_PTHD[row, :length], expected[row][:length], **how)
        torch.testing.assert_close(in_order(memory, first + row), text.remembered(linear, length), **how)
    for n in range(MORE):
        places_B = torch.cat([torch.zeros(first, dtype=torch.long), prompts.lengths_P + n])
        qkv_BSD = junk_PTSD[: first + P, 0].clone()
        qkv_BSD[first:] = torch.stack([text.qkv_NSD[length + n] for text, length in zip(texts, lengths, strict=True)])
        y_BHD = cache.decode(places_B.int(), qkv_BSD, None if rotary_2TD is None else rotary_2TD[:, places_B])
        # Softmax heads' scores are in float32.
        expected_PHD = torch.stack([y_NHD[length + n] for y_NHD, length in zip(expected, lengths, strict=True)])
        torch.testing.assert_close(y_BHD[first:, linearized_H], expected_PHD[:, linearized_H], **how)
        torch.testing.assert_close(y_BHD[first:], expected_PHD, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(
    rotary=st.booleans(),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    more=st.integers(0, 9),
    first=st.integers(0, 2),
    turns=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_any_prompts_together_are_as_each_alone(
    kind: str, rotary: bool, lengths: list[int], more: int, first: int, turns: int, seed: int
) -> None:
    check(kind, rotary, torch.float64, lengths, max(lengths) + more, first, turns, seed)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_long_prompts_and_single_tokens_in_both_precisions(kind: str, rotary: bool) -> None:
    """A token, less than a window, whole blocks, whole chunks, and more."""
    for dtype in (torch.float32, torch.float64):
        check(kind, rotary, dtype, [1, 3, 4, 8, 64, 65, 128, 150], 160, 1, 3, 0)
        check(kind, rotary, dtype, [1, 1], 1, 0, 2, 0)


class _Work(TorchDispatchMode):
    """What a device without data is told to do: operations and shapes; refuses what is of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        assert {tensor.device.type for tensor in tensors} <= {"meta"}, operation
        assert "lift_fresh" not in str(operation)  # torch.tensor
        self.operations.append((str(operation), [tensor.shape for tensor in tensors]))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2-nano", "llama3-8b"])
def test_reading_reads_nothing_of_the_device_and_brings_nothing_to_it(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it can be done on a device without data, as in the capture of a CUDA graph, and is the same each time."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which that device has not
    device = torch.device("meta")
    model = linearized(name, **KINDS[kind]).to(device)
    decoder = Decoder(model, torch.float32, device, sparse=False, max_length=MAX_LENGTH)
    caches = decoder.caches(4, MAX_LENGTH)
    work = []
    for lengths in ([1, 40, 64], [64, 64, 64]):
        prompts, ids_PT = Prompts.of(1, lengths, device), torch.zeros(3, 64, dtype=torch.long, device=device)
        with _Work() as done:
            decoder.prefill(caches, prompts, ids_PT)
        work.append(done.operations)
    assert work[0] == work[1]
    assert len(work[0]) > 50
