"""The batches of a run on its device: for each step, for validation, and for calibrating masks."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.config.schema import Config
from slope_cli.data.batches import (
    Batch,
    Blocks,
    Prefetcher,
    causal_batch,
    masked_batch,
    sample_indices,
    sample_numbers,
    val_batches,
)
from slope_cli.data.dataset import Dataset
from slope_cli.data.tokenizer import masking_ids
from slope_cli.distributed.launch import Ranks
from slope_cli.models.loss import forward
from slope_cli.models.shapes import Objective
from sparse_kernels import input_norms
from sparse_kernels.convert import Norms

Tensors = dict[str, Tensor]


class Batches:
    """Makes the batches of a run: those of a step are a function of the configuration, the data and its number."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerFast,
        objective: Objective,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            ranks: which process this is; each has its own share of a step's samples.

        Raises:
            UsageError: a step's tokens are not a whole number of micro-batches on every rank.
        """
        self._config, self._dataset, self._device, self._ranks = config, dataset, device, ranks or Ranks()
        self._accumulation = config.train.accumulation(self._ranks.world)
        self._blocks = Blocks(dataset.train, config.train.seq_len)
        self._masking = masking_ids(tokenizer) if objective == "masked" else None
        self._prefetcher = Prefetcher(self._of_step, config.train.steps)

    @property
    def causal(self) -> bool:
        """Whether every token is predicted, from those before it."""
        return self._masking is None

    def of_step(self, step: int) -> list[Tensors]:
        """The micro-batches of a step, counted from 0; the next step's are prepared while it runs."""
        return [self._to_device(batch) for batch in self._prefetcher(step)]

    def _of_step(self, step: int) -> list[Batch]:
        ranks = self._ranks
        return [self._micro_batch(step, micro, ranks.rank, ranks.world) for micro in range(self._accumulation)]

    def _micro_batch(self, step: int, micro: int, rank: int, world: int) -> Batch:
        train = self._config.train
        where = {"world": world, "micro_batch": train.micro_batch, "accumulation": train.accumulation(world)}
        indices = sample_indices(step, micro, rank, **where, seed=train.seed, length=len(self._blocks))
        if self._masking is None:
            return causal_batch(self._blocks, indices)
        numbers = sample_numbers(step, micro, rank, **where)
        return masked_batch(self._blocks, indices, special=self._masking, seed=train.seed, sample_numbers=numbers)

    def validation(self, source: str) -> Iterator[Tensors]:
        """Batches of a source's validation text, the same at each call; there are none if it is too short."""
        train = self._config.train
        where = {"tokens": self._config.log.val_tokens, "micro_batch": train.micro_batch, "seed": train.seed}
        file = self._dataset.val[source]
        return map(self._to_device, val_batches(file, seq_len=train.seq_len, masking=self._masking, **where))

    def input_norms(self, model: PreTrainedModel, names: Sequence[str]) -> Norms:
        """The norms of the inputs of layers over the first sparsity.calibration training sequences; `input_norms`."""
        return input_norms(model, names, functools.partial(self._calibrate, model))

    def _calibrate(self, model: PreTrainedModel) -> None:
        """Feed a model the first sparsity.calibration training sequences, the same on every rank."""
        train, sequences = self._config.train, self._config.sparsity.calibration
        model.eval()
        for number, start in enumerate(range(0, sequences, train.micro_batch)):
            whole = self._micro_batch(*divmod(number, train.accumulation()), rank=0, world=1)
            batch = {name: rows[: sequences - start] for name, rows in whole.items()}
            with torch.no_grad():
                forward(model, self._to_device(batch))
        model.train()

    def close(self) -> None:
        """Stop the prefetching thread."""
        self._prefetcher.close()

    def _to_device(self, batch: Batch) -> Tensors:
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        if self._device.type == "cuda":
            return {name: tensor.pin_memory().to(self._device, non_blocking=True) for name, tensor in tensors.items()}
        return tensors
