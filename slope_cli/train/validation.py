"""Validation: the loss on each source's held-out text, whatever the number of processes."""

import itertools
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.config.schema import Config
from slope_cli.data.dataset import NO_VALIDATION, Dataset
from slope_cli.distributed.collectives import Group
from slope_cli.distributed.sharding import Sharding
from slope_cli.distributed.signals import StopFlag
from slope_cli.errors import UsageError
from slope_cli.inference.text import prompt_ids
from slope_cli.models.loss import Loss, forward, loss_fn
from slope_cli.train.batches import Batches
from slope_cli.train.step import eager


class Validation:
    """Validates a model. The batches are dealt to the ranks, and their losses summed in one order."""

    def __init__(self, dataset: Dataset, batches: Batches, group: Group, sharding: Sharding | None) -> None:
        self._dataset, self._batches, self._group, self._sharding = dataset, batches, group, sharding

    def __call__(
        self, model: PreTrainedModel, autocast: AbstractContextManager[Any], stop: StopFlag | None = None
    ) -> dict[str, Any] | None:
        """Mean token loss and perplexity of each source's validation text, and over all of it.

        Args:
            autocast: as in a step.
            stop: once it is set on any rank, the result is None.
        """
        sums = {}
        model.eval()
        try:
            with torch.no_grad(), autocast, eager():
                for source in self._dataset.val:
                    losses = self._losses(model, source, stop)
                    if losses is None:
                        return None
                    if losses:
                        counts = sum(count for _, count in losses)
                        sums[source] = sum(loss * count for loss, count in losses), counts
        finally:
            model.train()
            if self._sharding is not None:
                self._sharding.reshard(model)
        loss = sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values())
        by_source = {source: total / count for source, (total, count) in sums.items()}
        result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "by_source": by_source}
        return result | self._bits_per_byte({source: count for source, (_, count) in sums.items()}, loss)

    def _bits_per_byte(self, tokens: Mapping[str, float], loss: float) -> dict[str, float]:
        """A mean loss over so many tokens of each source in bits per byte of text; nothing if that is not known."""
        headers = {source: self._dataset.val[source].header for source in tokens}
        if not self._batches.causal or not all(header.text_bytes for header in headers.values()):
            return {}
        size = sum(tokens[source] * header.text_bytes / header.tokens for source, header in headers.items())
        return {"bits_per_byte": loss / math.log(2) * sum(tokens.values()) / size}

    def _losses(self, model: PreTrainedModel, source: str, stop: StopFlag | None) -> list[tuple[float, int]] | None:
        """Mean loss and number of targets of each batch of a source; None if a rank was stopped."""
        rank, world = self._group.ranks.rank, self._group.ranks.world
        own: list[Loss] = []
        batches = iter(self._batches.validation(source))
        while dealt := list(itertools.islice(batches, world)):
            if self._group.stopped_by(stop):
                return None
            if rank < len(dealt):
                own.append(loss_fn(forward(model, dealt[rank]), dealt[rank]))
            elif self._sharding is not None:  # every rank takes part in every forward pass
                forward(model, dealt[0])
        # Read from the device only now, so that it need not wait between batches.
        by_rank = self._group.gather([(float(loss.token_loss), int(loss.targets)) for loss in own])
        return [loss for row in itertools.zip_longest(*by_rank) for loss in row if loss is not None]


def check_evaluation(
    config: Config, dataset: Dataset, batches: Batches, tokenizer: PreTrainedTokenizerFast, shape: PreTrainedConfig
) -> None:
    """UsageError, before training, for missing validation text or a sample prompt that does not fit."""
    if not any(True for source in dataset.val for _ in batches.validation(source)):
        raise UsageError(f"{dataset.folder}: has no validation text, {NO_VALIDATION}")
    if batches.causal:
        length, room = len(prompt_ids(tokenizer, config.log.sample_prompt)), shape.max_position_embeddings
        rule = f"must have at least 1 token and fewer than the model's {room} positions, not {length}"
        if not 0 < length < room:
            raise UsageError(f"log.sample_prompt: {rule}")


def validation_line(where: str, record: dict[str, Any]) -> str:
    """A validation record for the terminal."""
    return f"{where}: validation loss {record['loss']:.4f} nats per token, perplexity {record['perplexity']:.2f}"
