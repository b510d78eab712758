"""What the layers of a decoder remember of each slot, preallocated, and their attention over it.

A slot is the place of one text. Steps run over the first slots, so that nothing has to be gathered: texts that end make
room by `move`.

Shape suffixes: B slots of a step, P prompts, T tokens of a prompt or places of a slot, H query heads, G KV heads,
D head dimension.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from slope_cli.linearize.linear_window import LinearWindow
from sparse_kernels.attention import decode_attention


class Step(NamedTuple):
    """Where the new tokens of a step are: (B,), int64 places from 0, and int32 lengths, the new tokens included."""

    places: Tensor
    lengths: Tensor


class Prompts(NamedTuple):
    """Prompts that are read together, padded at their ends: the slot of the first one, and the tokens of each."""

    slot: int
    lengths: list[int]


class AttentionCache(Protocol):
    """The attention of one layer over what it remembers; queries, keys and values have their positions in them."""

    def prefill(self, prompts: Prompts, q_PTHD: Tensor, k_PTGD: Tensor, v_PTGD: Tensor) -> Tensor:
        """Whole prompts, which their slots then remember and nothing else: (P, T, H, D), anything for padding."""

    def decode(self, step: Step, q_BHD: Tensor, k_BGD: Tensor, v_BGD: Tensor) -> Tensor:
        """One token for each of the first B slots: (B, H, D). Fit for a CUDA graph."""

    def move(self, source: int, target: int, length: int) -> None:
        """Let slot `target` remember what `source` does, a text of so many tokens."""

    def changing(self) -> list[Tensor]:
        """What a repeated step would change once more."""


class SoftmaxCache:
    """All keys and values of every slot: (slots, G, T, D)."""

    def __init__(self, shape: tuple[int, int, int, int], scale: float, window: int, like: Tensor) -> None:
        """window: of a sliding window; 0 for none. like: a tensor of the dtype and the device."""
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.scale, self.window = scale, window

    def prefill(self, prompts: Prompts, q_PTHD: Tensor, k_PTGD: Tensor, v_PTGD: Tensor) -> Tensor:
        """See AttentionCache. Padding comes after all that a token sees, and later tokens overwrite it."""
        q_PHTD, k_PGTD, v_PGTD = (X.transpose(1, 2) for X in (q_PTHD, k_PTGD, v_PTGD))
        (P, H, T, _), mask_TT = q_PHTD.shape, None
        for kept, new in ((self.keys, k_PGTD), (self.values, v_PGTD)):
            kept[prompts.slot : prompts.slot + P, :, :T] = new
        if 0 < self.window < T:
            mask_TT = torch.ones(T, T, dtype=torch.bool, device=q_PHTD.device).tril().triu(1 - self.window)
            # The fused kernels take a mask or shared KV heads, not both.
            k_PGTD, v_PGTD = (X.repeat_interleave(H // X.shape[1], dim=1) for X in (k_PGTD, v_PGTD))
        y_PHTD = F.scaled_dot_product_attention(
            q_PHTD, k_PGTD, v_PGTD, mask_TT, is_causal=mask_TT is None, scale=self.scale, enable_gqa=True
        )
        return y_PHTD.transpose(1, 2)

    def decode(self, step: Step, q_BHD: Tensor, k_BGD: Tensor, v_BGD: Tensor) -> Tensor:
        """See AttentionCache."""
        B = len(q_BHD)
        rows_B = torch.arange(B, device=q_BHD.device)
        self.keys[rows_B, :, step.places], self.values[rows_B, :, step.places] = k_BGD, v_BGD
        return decode_attention(q_BHD, self.keys[:B], self.values[:B], step.lengths, self.scale, self.window)

    def move(self, source: int, target: int, length: int) -> None:
        """See AttentionCache."""
        for kept in (self.keys, self.values):
            kept[target, :, :length] = kept[source, :, :length]

    def changing(self) -> list[Tensor]:
        """None: a repeated step writes the same keys and values to the same places."""
        return []


class LinearCache:
    """The window and the state of a linearized layer for every slot; each step moves all rings by one place."""

    def __init__(self, linear: LinearWindow, shape: tuple[int, int, int, int], scale: float, like: Tensor) -> None:
        slots, heads, _, dim = shape
        self.linear, self.scale, self.memory = linear, scale, linear.new_cache()
        nothing_BGTD = like.new_zeros(slots, heads, 0, dim)
        self.memory.lazy_initialization(nothing_BGTD, nothing_BGTD)

    def prefill(self, prompts: Prompts, q_PTHD: Tensor, k_PTGD: Tensor, v_PTGD: Tensor) -> Tensor:
        """See AttentionCache. Each prompt by itself: a window ends with the last token that is there."""
        y_PTHD = torch.zeros_like(q_PTHD)
        for row, length in enumerate(prompts.lengths):
            q_1HTD, k_1GTD, v_1GTD = (X[row, :length].transpose(0, 1)[None] for X in (q_PTHD, k_PTGD, v_PTGD))
            memory = self.linear.new_cache()
            memory.update(k_1GTD, v_1GTD)
            y_1HTD = self.linear(q_1HTD, k_1GTD, v_1GTD, self.scale, None, memory)
            self.memory.put(prompts.slot + row, memory)
            y_PTHD[row, :length] = y_1HTD[0].transpose(0, 1)
        return y_PTHD

    def decode(self, step: Step, q_BHD: Tensor, k_BGD: Tensor, v_BGD: Tensor) -> Tensor:
        """See AttentionCache."""
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

    def changing(self) -> list[Tensor]:
        """All that is remembered."""
        return [self.memory.oldest_1, *self.memory.tensors().values()]
