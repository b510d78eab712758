"""The texts that are being continued, on the device: what each remembers, and the step that adds a token to all.

Texts in use are in the first slots. A step runs over the next power of two of them, so that a few CUDA graphs serve all
numbers of texts; the slots behind those in use stay at place 0. Prompts are padded to one of a few widths, and a graph
is captured for sides that come again: reading a prompt is some ten launches a layer, which a host can be slower at than
a GPU is with the products.

Shape suffixes: B slots, P prompts, T their tokens, V vocabulary.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from slope_cli.inference.cache import AttentionCache, Prompts
from slope_cli.inference.decoder import Decoder
from slope_cli.inference.sampling import Mode, Sampling, Settings, choose
from sparse_kernels.driver import captured

PREFILL = 4096
"""Tokens, padding among them, up to which a GPU reads prompts together, and from a graph."""
PREFILL_ON_CPU = 256
"""The same for a CPU, without graphs: more tokens at once are hardly faster, and padding is as slow as any."""
MOST_PREFILLS = 64
"""Graphs of prompts that are held at most; what comes again beyond them is read without one."""


class Slots:
    """Texts of up to `max_length` tokens in `count` slots.

    Attributes:
        ids, lengths: (count,), int64 and int32: the newest token of each text, which the model has not read yet, and
            how many it has.
    """

    def __init__(
        self, decoder: Decoder, count: int, max_length: int, caches: list[AttentionCache] | None = None
    ) -> None:
        """caches: memories for as many texts or more, of this decoder or one of its shape; None for new ones."""
        device = decoder.tokens.device
        self.decoder, self.count, self.max_length = decoder, count, max_length
        self.caches = decoder.caches(count, max_length) if caches is None else caches
        self.ids = torch.zeros(count, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(count, dtype=torch.int32, device=device)
        self._used = torch.zeros(count, dtype=torch.int32, device=device)
        self._settings = Settings.of([Sampling()] * count, device)
        self._graphs: dict[tuple[int, Mode], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._padded = self._pool is not None and all(cache.prompts_in_graphs for cache in self.caches)
        self._prefills: dict[tuple[int, int], _Prefill] = {}  # by sides of the padded prompts
        self._seen: set[tuple[int, int]] = set()
        # What all graphs of prompts write.
        self._logits = torch.empty(count if self._padded else 0, decoder.spec.vocabulary, device=device)

    def width(self, length: int) -> int:
        """To how many tokens a prompt is padded."""
        return min(padded_width(length), self.max_length) if self._padded else length

    @torch.no_grad()
    def fill(self, slot: int, prompts: list[list[int]], samplings: list[Sampling], mode: Mode) -> "Tokens":
        """Begin texts in slots from this one on, which are not in use: the first token after each prompt."""
        device, lengths = self.ids.device, [len(prompt) for prompt in prompts]
        width = self.width(max(lengths))
        ids_PT = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)
        where, settings = Prompts.of(slot, lengths, device), Settings.of(samplings, device)
        logits_PV, lengths_P = self._prefilled(where, ids_PT), where.lengths_P.int()
        new = slice(slot, slot + len(prompts))
        self.ids[new], self.lengths[new], self._used[new] = choose(logits_PV, settings, lengths_P, mode), lengths_P, 1
        for own, setting in zip(self._settings, settings, strict=True):
            own[new] = setting
        return Tokens(self.ids[new])

    def _prefilled(self, prompts: Prompts, ids_PT: Tensor) -> Tensor:
        """`Decoder.prefill`, from the second time on by a graph where there can be one."""
        sides, inputs = (len(ids_PT), ids_PT.shape[1]), (ids_PT, prompts.slots_P, prompts.lengths_P)
        if not self._padded or ids_PT.numel() > PREFILL:
            return self.decoder.prefill(self.caches, prompts, ids_PT)
        if sides not in self._prefills:
            if sides not in self._seen or len(self._prefills) == MOST_PREFILLS:
                self._seen.add(sides)
                return self.decoder.prefill(self.caches, prompts, ids_PT)
            self._seen.remove(sides)  # if there is no room for a graph, the next one is read without

            def work() -> None:
                self._logits[: len(ids_PT)] = self.decoder.prefill(self.caches, prompts, ids_PT)

            self._prefills[sides] = _Prefill(captured(work, self._pool), inputs)
        graph, own = self._prefills[sides]
        for kept, new in zip(own, inputs, strict=True):
            kept.copy_(new)
        graph.replay()
        return self._logits[: len(ids_PT)]

    def release(self, slot: int, last: int, length: int) -> None:
        """End the text of a slot in use; the one in the last such slot, of so many tokens, takes its place."""
        if slot != last:
            for cache in self.caches:
                cache.move(last, slot, length)
            for own in (self.ids, self.lengths, *self._settings):
                own[slot] = own[last]
        self.lengths[last] = self._used[last] = 0

    @torch.no_grad()
    def step(self, used: int, mode: Mode) -> "Tokens":
        """Add a token to each text of the first `used` slots."""
        size = min(1 << (used - 1).bit_length(), self.count)
        if self._pool is None:
            self._run(size, mode)
        else:
            if (size, mode) not in self._graphs:
                self._graphs[size, mode] = self._captured(size, mode)
            self._graphs[size, mode].replay()
        return Tokens(self.ids[:used])

    def _run(self, size: int, mode: Mode) -> None:
        """All of a step that the device does: from the tensors of this object to them."""
        ids_B, lengths_B = self.ids[:size], self.lengths[:size]
        logits_BV = self.decoder.decode(self.caches, ids_B, lengths_B)
        settings = Settings(*(own[:size] for own in self._settings))
        ids_B.copy_(choose(logits_BV, settings, lengths_B + 1, mode))
        lengths_B.add_(self._used[:size]).clamp_(max=self.max_length - 1)  # a text at its end waits there

    def _captured(self, size: int, mode: Mode) -> torch.cuda.CUDAGraph:
        changing: list[Tensor] = [self.ids, self.lengths, *(t for cache in self.caches for t in cache.changing())]
        before = [tensor.clone() for tensor in changing]
        graph = captured(functools.partial(self._run, size, mode), self._pool)
        for tensor, old in zip(changing, before, strict=True):
            tensor.copy_(old)
        return graph


class _Prefill(NamedTuple):
    """A graph that reads prompts of some sides, and what it reads: their ids, slots and lengths."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]


def padded_width(length: int) -> int:
    """To how many tokens a prompt is padded: the next multiple of 32, and from 512 on of an eighth of its octave."""
    unit = max(32, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // unit) * unit


class Tokens:
    """The tokens of a step, on their way to the host while the device goes on."""

    def __init__(self, ids_B: Tensor) -> None:
        on_gpu = ids_B.is_cuda
        self._ids = torch.empty(len(ids_B), dtype=ids_B.dtype, pin_memory=on_gpu)
        self._ids.copy_(ids_B, non_blocking=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[int]:
        """Them, once they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        ids: list[int] = self._ids.tolist()
        return ids
