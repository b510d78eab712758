"""Continuing many texts at once with one model: those that wait enter as others end."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.errors import UsageError
from slope_cli.inference.decoder import Decoder, Spec
from slope_cli.inference.sampling import Sampling, mode_of
from slope_cli.inference.slots import PREFILL, PREFILL_ON_CPU, Slots, Tokens
from slope_cli.inference.text import TextStream, prompt_ids
from slope_cli.models import shapes


class Generation:
    """A prompt and its continuation so far.

    Attributes:
        prompt, sampling: as given. prompt_ids: the prompt's tokens.
        ids: the new tokens, without one that ends the text. text: their text, up to a stop string; "" without a
            tokenizer.
        finish_reason: "stop" at an end of text or a stop string, "length" after the last token that there is room for,
            "cancelled", or "" while it goes on.
        seconds: from the beginning of its prompt's reading to its last token.
    """

    def __init__(
        self, prompt: str | Sequence[int], ids: list[int], sampling: Sampling, limit: int, stream: TextStream | None
    ) -> None:
        self.prompt, self.prompt_ids, self.sampling = prompt, ids, sampling
        self.ids: list[int] = []
        self.finish_reason = ""
        self.seconds = 0.0
        self._limit, self._stream, self._started = limit, stream, 0.0

    @property
    def text(self) -> str:
        """The new text that is certain."""
        return "" if self._stream is None else self._stream.text

    @property
    def length(self) -> int:
        """Tokens of prompt and continuation."""
        return len(self.prompt_ids) + len(self.ids)

    def start(self) -> None:
        """Its prompt is read now."""
        self._started = time.monotonic()

    def add(self, token: int, ends: frozenset[int]) -> str:
        """Take the next token, unless it ends the text; the new text that is certain."""
        self.seconds = time.monotonic() - self._started
        piece = ""
        if token in ends:
            self.finish_reason = "stop"
        else:
            self.ids.append(token)
            piece = "" if self._stream is None else self._stream.push(token)
            if self._stream is not None and self._stream.stopped:
                self.finish_reason = "stop"
            elif len(self.ids) == self._limit:
                self.finish_reason = "length"
        if self.finish_reason and self._stream is not None:
            piece += self._stream.end()
        return piece


class Engine:
    """A model that continues texts.

    Attributes:
        max_batch, max_length: at most so many texts at once, each of at most so many tokens.
        positions: of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_batch: int = 16,
        max_length: int | None = None,
        sparse: bool | None = None,
        compiled: bool = False,
    ) -> None:
        """Read the weights of a model, which is not needed afterwards; keys and values are allocated at once.

        Args:
            model: GPT-2, OPT, Llama or Mistral of transformers, on any device; with the sparse layers, adapters and
                linearized attention of this package, or none.
            tokenizer: for prompts, stop strings and ends of texts; without one, prompts are ids.
            device: None for the model's.
            dtype: of weights, products and cache; None for bf16 on a GPU, and float32 elsewhere.
            max_length: None for all positions of the model.
            sparse: multiply 2:4 layers by their kept entries; None for doing so on a GPU. Else by dense copies.
            compiled: compile linearized attention's decoding step; pays off for many tokens on a GPU.

        Raises:
            UsageError: a model that cannot continue texts.
        """
        config = model.config
        if shapes.objective(config) == "masked":
            name = type(model).__name__
            raise UsageError(f"{name}: predicts masked tokens and cannot continue text; use a causal model")
        device = torch.device(model.device if device is None else device)
        on_gpu = device.type == "cuda"
        self.positions = Spec.of(config).positions
        self.max_batch, self.max_length = max_batch, min(max_length or self.positions, self.positions)
        self.decoder = Decoder(
            model,
            dtype or (torch.bfloat16 if on_gpu else torch.float32),
            device,
            sparse=on_gpu if sparse is None else sparse,
            max_length=self.max_length,
            compiled=compiled,
        )
        self._tokenizer = tokenizer
        self._ends = end_ids(model, tokenizer)
        self._slots = Slots(self.decoder, max_batch, self.max_length)
        self._most_together = PREFILL if on_gpu else PREFILL_ON_CPU  # tokens
        self._waiting: deque[Generation] = deque()
        self._active: list[Generation] = []  # in the order of their slots
        self._coming: tuple[list[Generation], Tokens] | None = None  # of the step that was launched last

    @property
    def busy(self) -> bool:
        """Whether a text is being continued, or waits for it."""
        return bool(self._active or self._waiting)

    def submit(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Generation:
        """Let a prompt wait for its continuation; `step` does the work.

        Raises:
            UsageError: an empty prompt where texts begin with no token of their own, one that leaves no room for a
                token, ids that the model does not have, or text, or stop strings, without a tokenizer.
        """
        generation = self._new(prompt, sampling or Sampling())
        self._waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a text now; it gets no further token."""
        if not generation.finish_reason:
            generation.finish_reason = "cancelled"
            if generation in self._waiting:
                self._waiting.remove(generation)
            self._release()

    def step(self) -> list[tuple[Generation, str]]:
        """Read the prompts that there is room for, then add a token to every text: each text and its new piece.

        A piece may be empty: a character, or what may be a stop string, is not complete. Texts that end have their
        `finish_reason` set, and their slots are free for the next step.
        """
        pieces, vocabulary = [], self.decoder.spec.vocabulary
        while new := self._admitted():
            samplings = [text.sampling for text in new]
            how = [text.prompt_ids for text in new], samplings, mode_of(samplings, vocabulary)
            tokens = self._slots.fill(len(self._active), *how).read()
            self._active += new
            pieces += [(text, text.add(token, self._ends)) for text, token in zip(new, tokens, strict=True)]
            self._release()
        before, self._coming = self._coming, None
        if self._active:
            mode = mode_of((generation.sampling for generation in self._active), vocabulary)
            self._coming = [*self._active], self._slots.step(len(self._active), mode)
        if before is not None:  # read while the device is at the next step; texts that end here waste their part of it
            texts = zip(before[0], before[1].read(), strict=True)
            pieces += [(text, text.add(token, self._ends)) for text, token in texts if not text.finish_reason]
            self._release()
        return pieces

    def stream(self) -> Iterator[tuple[Generation, str]]:
        """Take steps until no text is left: each text and its new piece, as they come."""
        while self.busy:
            yield from self.step()

    def generate(self, prompts: Iterable[str | Sequence[int]], sampling: Sampling | None = None) -> list[Generation]:
        """The continuations of all prompts, in their order; raises as `submit`, before any of them begins."""
        generations = [self._new(prompt, sampling or Sampling()) for prompt in prompts]
        self._waiting.extend(generations)
        for _ in self.stream():
            pass
        return generations

    def together(self, length: int) -> int:
        """How many prompts of so many tokens are read together at most."""
        return min(max(1, self._most_together // self._slots.width(length)), self.max_batch)

    def _admitted(self) -> list[Generation]:
        """Those of the waiting texts, in their order, whose prompts are read next, together."""
        new: list[Generation] = []
        longest = 0
        while self._waiting and len(self._active) + len(new) < self.max_batch:
            longest = max(longest, len(self._waiting[0].prompt_ids))
            if len(new) >= self.together(longest):
                break
            new.append(self._waiting.popleft())
            new[-1].start()
        return new

    def _new(self, prompt: str | Sequence[int], sampling: Sampling) -> Generation:
        if self._tokenizer is None and (isinstance(prompt, str) or sampling.stop):
            raise UsageError("without a tokenizer a prompt must be ids, and there are no stop strings")
        if isinstance(prompt, str):
            assert self._tokenizer is not None
            ids = prompt_ids(self._tokenizer, prompt)
        else:
            ids = list(prompt)
        if not ids:
            raise UsageError("prompt: is empty; give some text to continue")
        if wrong := [token for token in ids if not 0 <= token < self.decoder.spec.vocabulary]:
            raise UsageError(f"prompt: {wrong[0]} is no token; ids are below {self.decoder.spec.vocabulary}")
        if len(ids) >= self.max_length:
            whose = "model" if self.max_length == self.positions else "engine"
            raise UsageError(
                f"prompt: has {len(ids)} tokens and the {whose} only {self.max_length} positions; shorten it"
            )
        limit = min(sampling.tokens, self.max_length - len(ids))
        stream = None if self._tokenizer is None else TextStream(self._tokenizer, ids, sampling.stop)
        return Generation(prompt, ids, sampling, limit, stream)

    def _release(self) -> None:
        """Free the slots of texts that have ended."""
        for slot in reversed(range(len(self._active))):
            if self._active[slot].finish_reason:
                last = self._active[-1]
                self._slots.release(slot, len(self._active) - 1, last.length)
                self._active[slot] = last
                self._active.pop()


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and, if the model names several, all of these."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(named) if isinstance(named, list) else set()
    end = None if tokenizer is None else tokenizer.eos_token_id
    return frozenset(ends if end is None else {*ends, end})
