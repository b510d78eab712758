"""transformers' own `generate` on the dense model: its static cache, and its step compiled where it compiles it.

It is one of the things with which `slope bench generate` compares. It compiles for every batch, which takes minutes.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from .records import GenerateRow, Plan
from .timing import free, one_line, random_model, synchronize
from .variants import TRANSFORMERS

NEW_TOKENS, RUNS = 64, 3


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when the first and the last of `tokens` new tokens have come; stops nothing."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._calls = tokens, 0
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self._calls += 1
        if self._calls in (1, self._tokens):
            synchronize()
            self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def transformers_rows(
    config: PreTrainedConfig, plan: Plan, device: torch.device, dtype: torch.dtype
) -> Iterator[GenerateRow]:
    """A row for each batch; the last of the new tokens is the context's."""
    model = random_model(config, device, dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # every text has all of its tokens
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for batch in plan.batches:
        row = GenerateRow(
            part="decode",
            variant=TRANSFORMERS,
            tokens=plan.context,
            batch=batch,
            alternated=False,
            weight_bytes=weights,
        )
        try:
            seconds = step_seconds(model, batch, plan.context)
            yield replace(row, step_ms=seconds * 1e3, tokens_per_s=batch / seconds)
        except Exception as error:  # the other batches are still measured
            yield replace(row, error=one_line(error))
        free()


def step_seconds(model: Any, batch: int, context: int) -> float:
    """Seconds of a new token, without the prompt's and the first one's."""
    new = min(NEW_TOKENS, context - 1)
    ids_BT = torch.randint(model.config.vocab_size, (batch, context - new), device=model.device)
    times = []
    for _ in range(1 + RUNS):  # the first one compiles
        clock = Clock(new)
        model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        first, last = clock.times
        times.append((last - first) / (new - 1))
    return statistics.median(times[1:])
