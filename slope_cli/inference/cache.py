"""What the layers of a decoder remember of each slot, preallocated, and their attention over it.

A slot is the place of one text. Steps run over the first slots, so that nothing has to be gathered: texts that end make
room by `move`.

Shape suffixes: B slots of a step, P prompts, T tokens of a prompt or places of a slot, H query heads, G KV heads,
D head dimension.
"""

from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from slope_cli.linearize.linear_window import LinearWindow
from sparse_kernels.attention import attend_new_tokens, attention_space, remember_prompts, turned_heads

Shape = tuple[int, int, int, int]
"""(slots, G, T, D)."""


class Prompts(NamedTuple):
    """Prompts that are read together, padded at their ends: their slots, and the tokens of each; int64."""

    slots_P: Tensor
    lengths_P: Tensor

    @classmethod
    def of(cls, slot: int, lengths: list[int], device: torch.device) -> "Prompts":
        """Those of so many tokens, in slots from this one on."""
        on_host = torch.tensor([[slot + row for row in range(len(lengths))], lengths])
        return cls(*on_host.to(device).unbind())


class AttentionCache(Protocol):
    """The attention of one layer over what it remembers.

    It is given queries, keys and values in one tensor, in this order of heads, and what `turn` takes (2, …, D) where
    queries and keys are to be turned by their positions.
    """

    prompts_in_graphs: ClassVar[bool]
    """Whether prompts are read from CUDA graphs."""

    def prefill(self, prompts: Prompts, qkv_PTSD: Tensor, rotary: Tensor | None) -> Tensor:
        """Whole prompts, which their slots then remember and nothing else: (P, T, H, D), anything for padding.

        What the device does depends on the padded sides alone, and the host reads nothing of it.
        """

    def decode(self, places_B: Tensor, qkv_BSD: Tensor, rotary: Tensor | None) -> Tensor:
        """One token for each of the first B slots, at its place (int32): (B, H, D). Fit for a CUDA graph."""

    def move(self, source: int, target: int, length: int) -> None:
        """Let slot `target` remember what `source` does, a text of so many tokens."""

    def tensors(self) -> list[Tensor]:
        """All that is remembered."""

    def changing(self) -> list[Tensor]:
        """What a repeated step would change once more."""


class SoftmaxCache:
    """All keys and values of every slot: (slots, G, T, D)."""

    prompts_in_graphs: ClassVar[bool] = True

    def __init__(
        self, shape: Shape, heads: int, scale: float, window: int, like: Tensor, space: Tensor | None = None
    ) -> None:
        """heads: of queries. window: of a sliding window; 0 for none. like: a tensor of the dtype and the device.

        space: that of another layer, whose steps come before this one's or after them.
        """
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.scale, self.window = scale, window
        self.space = attention_space(self.keys, heads) if space is None else space

    def prefill(self, prompts: Prompts, qkv_PTSD: Tensor, rotary: Tensor | None) -> Tensor:
        """See AttentionCache. Padding comes after all that a token sees, and later tokens overwrite it."""
        new = remember_prompts(qkv_PTSD, rotary, self.keys, self.values, prompts.slots_P)
        q_PHTD, k_PGTD, v_PGTD = (X.transpose(1, 2) for X in new)
        (_, H, T, _), mask_TT = q_PHTD.shape, None
        if 0 < self.window < T:
            mask_TT = torch.ones(T, T, dtype=torch.bool, device=q_PHTD.device).tril().triu(1 - self.window)
            # The fused kernels take a mask or shared KV heads, not both.
            k_PGTD, v_PGTD = (X.repeat_interleave(H // X.shape[1], dim=1) for X in (k_PGTD, v_PGTD))
        y_PHTD = F.scaled_dot_product_attention(
            q_PHTD, k_PGTD, v_PGTD, mask_TT, is_causal=mask_TT is None, scale=self.scale, enable_gqa=True
        )
        return y_PHTD.transpose(1, 2)

    def decode(self, places_B: Tensor, qkv_BSD: Tensor, rotary: Tensor | None) -> Tensor:
        """See AttentionCache."""
        kept = self.keys[: len(qkv_BSD)], self.values[: len(qkv_BSD)]
        return attend_new_tokens(qkv_BSD, rotary, *kept, places_B, self.scale, self.window, self.space)

    def move(self, source: int, target: int, length: int) -> None:
        """See AttentionCache."""
        for kept in (self.keys, self.values):
            kept[target, :, :length] = kept[source, :, :length]

    def tensors(self) -> list[Tensor]:
        """See AttentionCache."""
        return [self.keys, self.values]

    def changing(self) -> list[Tensor]:
        """None: a repeated step writes the same keys and values to the same places."""
        return []


class LinearCache:
    """The window and the state of a linearized layer for every slot; each step moves all rings by one place."""

    prompts_in_graphs: ClassVar[bool] = False  # until tests/gpu, which set it, have seen a GPU record them

    def __init__(self, linear: LinearWindow, shape: Shape, scale: float, like: Tensor) -> None:
        slots, self.kv_heads, _, dim = shape
        self.linear, self.scale, self.memory = linear, scale, linear.new_cache()
        nothing_BGTD = like.new_zeros(slots, self.kv_heads, 0, dim)
        self.memory.lazy_initialization(nothing_BGTD, nothing_BGTD)

    def prefill(self, prompts: Prompts, qkv_PTSD: Tensor, rotary: Tensor | None) -> Tensor:
        """See AttentionCache. Padding goes before the prompts: a window ends with the last token that is there."""
        P, T = qkv_PTSD.shape[:2]
        rows_P1, places_T = (torch.arange(count, device=qkv_PTSD.device) for count in (P, T))
        rows_P1, lengths_P1 = rows_P1[:, None], prompts.lengths_P[:, None]
        to_end, back = ((rows_P1, from_PT % T) for from_PT in (places_T + lengths_P1, places_T - lengths_P1))
        rotary = None if rotary is None else rotary[:, *to_end]
        heads = turned_heads(qkv_PTSD[to_end], rotary, self.kv_heads)
        q_PHTD, k_PGTD, v_PGTD = (X_PTHD.transpose(1, 2) for X_PTHD in heads)
        memory = self.linear.new_cache()
        memory.update(k_PGTD, v_PGTD)
        y_PHTD: Tensor = self.linear(q_PHTD, k_PGTD, v_PGTD, self.scale, places_T >= T - lengths_P1, memory)
        self.memory.put(prompts.slots_P, memory)
        return y_PHTD.transpose(1, 2)[back]

    def decode(self, places_B: Tensor, qkv_BSD: Tensor, rotary: Tensor | None) -> Tensor:
        """See AttentionCache."""
        q_BHD, k_BGD, v_BGD = turned_heads(qkv_BSD, rotary, self.kv_heads)
        memory = self.memory.first(len(q_BHD))
        before = memory.tensors()
        y_BH1D: Tensor = self.linear(q_BHD[:, :, None], k_BGD[:, :, None], v_BGD[:, :, None], self.scale, None, memory)
        for name, tensor in memory.tensors().items():
            if tensor is not before[name]:  # a terrace's step makes new ones
                before[name].copy_(tensor)
        return y_BH1D[:, :, 0]

    def move(self, source: int, target: int, length: int) -> None:
        """See AttentionCache."""
        for tensor in self.memory.tensors().values():
            tensor[target] = tensor[source]

    def tensors(self) -> list[Tensor]:
        """See AttentionCache."""
        return [self.memory.oldest_1, *self.memory.tensors().values()]

    def changing(self) -> list[Tensor]:
        """All of it."""
        return self.tensors()


class HeadsCache:
    """A layer some of whose KV heads have softmax attention: their cache, and that of the others, side by side."""

    prompts_in_graphs: ClassVar[bool] = LinearCache.prompts_in_graphs

    def __init__(self, linear: LinearWindow, shape: Shape, heads: int, scale: float, window: int, like: Tensor) -> None:
        """heads: of queries. The others as in SoftmaxCache."""
        slots, kv_heads, length, dim = shape
        kept = [*linear.softmax_heads]
        others = [head for head in range(kv_heads) if head not in kept]
        self.heads = heads
        softmax = SoftmaxCache((slots, len(kept), length, dim), len(linear.query_heads(kept)), scale, window, like)
        linearized = LinearCache(linear.of_heads(others), (slots, len(others), length, dim), scale, like)
        # Each with the places of its q, k and v, and of q alone.
        self._parts: list[tuple[AttentionCache, Tensor, Tensor]] = []
        parts: tuple[tuple[AttentionCache, list[int]], ...] = (softmax, kept), (linearized, others)
        for cache, own in parts:
            of_queries = linear.query_heads(own)
            given = [*of_queries, *(heads + head for head in own), *(heads + kv_heads + head for head in own)]
            given_S, of_queries_H = (torch.tensor(each, device=like.device) for each in (given, of_queries))
            self._parts.append((cache, given_S, of_queries_H))

    def prefill(self, prompts: Prompts, qkv_PTSD: Tensor, rotary: Tensor | None) -> Tensor:
        """See AttentionCache."""
        y_PTHD = torch.empty_like(qkv_PTSD[:, :, : self.heads])
        for cache, given, of_queries in self._parts:
            y_PTHD.index_copy_(2, of_queries, cache.prefill(prompts, qkv_PTSD.index_select(2, given), rotary))
        return y_PTHD

    def decode(self, places_B: Tensor, qkv_BSD: Tensor, rotary: Tensor | None) -> Tensor:
        """See AttentionCache."""
        y_BHD = torch.empty_like(qkv_BSD[:, : self.heads])
        for cache, given, of_queries in self._parts:
            y_BHD.index_copy_(1, of_queries, cache.decode(places_B, qkv_BSD.index_select(1, given), rotary))
        return y_BHD

    def move(self, source: int, target: int, length: int) -> None:
        """See AttentionCache."""
        for cache, *_ in self._parts:
            cache.move(source, target, length)

    def tensors(self) -> list[Tensor]:
        """See AttentionCache."""
        return [tensor for cache, *_ in self._parts for tensor in cache.tensors()]

    def changing(self) -> list[Tensor]:
        """See AttentionCache."""
        return [tensor for cache, *_ in self._parts for tensor in cache.changing()]
