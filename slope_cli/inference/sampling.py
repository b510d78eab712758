"""Choosing the next token of each text on the device, by settings and random numbers that are its own.

A random number is a hash of (seed, place, token): no state, and nothing of the other texts of a batch, so that a text
is the same alone and in company.

Shape suffixes: B texts, V vocabulary, K ranked logits.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slope_cli.errors import UsageError

RANKED = (64, 1024)
"""How many of the largest logits are ranked for a top_k up to that; a larger one, or top_p alone, ranks all."""
_32_BITS = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """How a text is continued.

    tokens: at most so many new ones. temperature: 0 for always the likeliest token. top_k: only the k likeliest; 0 for
    all. top_p: of these only the likeliest whose probabilities reach p together. stop: the text ends before the first
    of these strings.
    """

    tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """UsageError for a value out of range."""
        if self.tokens < 1:
            raise UsageError(f"tokens must be at least 1, not {self.tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise UsageError(f"top_k must be 0 or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        if "" in self.stop:
            raise UsageError("a stop string is empty")


class Mode(NamedTuple):
    """What a step has to compute for its texts: only argmax, or samples; and how many logits it ranks, 0 for none."""

    greedy: bool
    ranked: int


class Settings(NamedTuple):
    """The sampling of B texts on the device, each (B,): float32, int32, float32, and int64, a hash of the seed."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    key: Tensor

    @classmethod
    def of(cls, samplings: Iterable[Sampling], device: torch.device | str) -> "Settings":
        """Those of these texts."""
        rows = list(samplings)
        # A sum of all probabilities may come out a little above 1.
        top_p = [2.0 if row.top_p == 1 else row.top_p for row in rows]
        seed_B = torch.tensor([row.seed for row in rows], dtype=torch.int64)
        return cls(
            torch.tensor([row.temperature for row in rows], dtype=torch.float32, device=device),
            torch.tensor([row.top_k for row in rows], dtype=torch.int32, device=device),
            torch.tensor(top_p, dtype=torch.float32, device=device),
            _hash(seed_B & _32_BITS, seed_B >> 32).to(device),
        )


def mode_of(samplings: Iterable[Sampling], vocabulary: int) -> Mode:
    """The least that serves all of these texts."""
    sampled = [row for row in samplings if row.temperature > 0]
    if all(row.top_k == 0 and row.top_p == 1 for row in sampled):
        return Mode(greedy=not sampled, ranked=0)
    sizes = [next((size for size in RANKED if 0 < row.top_k <= size), vocabulary) for row in sampled]
    return Mode(greedy=False, ranked=min(max(sizes), vocabulary))


def choose(logits_BV: Tensor, settings: Settings, places_B: Tensor, mode: Mode) -> Tensor:
    """The next token of each text: (B,), int64. Fit for a CUDA graph: the host reads nothing of the device.

    Args:
        logits_BV: float32.
        places_B: where in their texts the chosen tokens will be.
        mode: of `mode_of`.
    """
    likeliest_B = logits_BV.argmax(-1)
    if mode.greedy:
        return likeliest_B
    values_BK, V = logits_BV / settings.temperature[:, None].clamp(min=1e-6), logits_BV.shape[1]
    if mode.ranked:
        values_BK, ids_BK = values_BK.topk(mode.ranked) if mode.ranked < V else values_BK.sort(descending=True)
        values_BK = values_BK.masked_fill(values_BK < _least(values_BK, settings), -torch.inf)
    else:
        ids_BK = torch.arange(V, device=values_BK.device).expand_as(values_BK)
    drawn_B1 = (values_BK + _gumbel(settings.key, places_B, ids_BK)).argmax(-1, keepdim=True)
    return torch.where(settings.temperature > 0, ids_BK.gather(1, drawn_B1)[:, 0], likeliest_B)


def _least(ordered_BK: Tensor, settings: Settings) -> Tensor:
    """The smallest of the K largest logits, in descending order, that a text still takes: (B, 1)."""
    top_k_B1, top_p_B1 = settings.top_k[:, None], settings.top_p[:, None]
    among_k_BK = (torch.arange(ordered_BK.shape[1], device=ordered_BK.device) < top_k_B1) | (top_k_B1 == 0)
    share_BK = ordered_BK.masked_fill(~among_k_BK, -torch.inf).softmax(-1)
    kept_BK = among_k_BK & (share_BK.cumsum(-1) - share_BK < top_p_B1)
    return ordered_BK.masked_fill(~kept_BK, torch.inf).amin(-1, keepdim=True)


def _gumbel(key_B: Tensor, places_B: Tensor, ids_BK: Tensor) -> Tensor:
    """Gumbel noise (B, K), float32: the argmax of logits with it is a sample of their softmax."""
    bits_BK = _hash(ids_BK, _hash(places_B.long(), key_B)[:, None])
    uniform_BK = ((bits_BK.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)  # a float32 below 1
    return -torch.log(-torch.log1p(-uniform_BK))


def _hash(number: Tensor, key: Tensor) -> Tensor:
    """32 bits of two numbers of 32 bits, by the last steps of MurmurHash3; int64, as torch multiplies no uint32."""
    number = (number ^ key) * 0x9E3779B1 & _32_BITS
    number = (number ^ number >> 16) * 0x85EBCA6B & _32_BITS
    number = (number ^ number >> 13) * 0xC2B2AE35 + key & _32_BITS
    return number ^ number >> 16
