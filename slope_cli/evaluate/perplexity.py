"""The loss and perplexity of a model on the validation text of a prepared data set.

Shape suffixes: N blocks, B blocks of a batch, T positions, V vocabulary.
"""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from slope_cli.checkpoint import run_folder
from slope_cli.checkpoint.load import Loaded
from slope_cli.data.batches import IGNORED_LABEL, Batch, val_batches
from slope_cli.data.dataset import NO_VALIDATION, Dataset, open_dataset
from slope_cli.data.token_file import TokenFile
from slope_cli.data.tokenizer import load_tokenizer, masking_ids, require_same_tokens
from slope_cli.distributed.collectives import Group
from slope_cli.errors import SlopeError, UsageError
from slope_cli.models.loss import autocast, forward

LONGEST = 1024
"""The longest block for a model whose folder does not record its training length."""
BATCH = 8


class BlockLosses(NamedTuple):
    """The losses of the validation blocks of one source.

    Attributes:
        nats_N, tokens_N: summed loss and number of predicted tokens of each block.
        nats_T, tokens_T: the same of each position in a block, over all blocks.
        bytes_per_token: of the text; None if unknown, or if only some tokens are predicted.
    """

    nats_N: NDArray[np.float64]
    tokens_N: NDArray[np.int64]
    nats_T: NDArray[np.float64]
    tokens_T: NDArray[np.int64]
    bytes_per_token: float | None

    @property
    def nats(self) -> float:
        """The summed loss."""
        return float(self.nats_N.sum())

    @property
    def tokens(self) -> int:
        """The number of predicted tokens."""
        return int(self.tokens_N.sum())

    def variance(self) -> float:
        """The variance of the summed loss, estimated from the differences between blocks; NaN for a single block."""
        count = len(self.nats_N)
        if count < 2:
            return math.nan
        residuals_N = self.nats_N - self.nats / self.tokens * self.tokens_N
        return float(residuals_N @ residuals_N) * count / (count - 1)


def open_validation(loaded: Loaded, folder: Path | None, group: Group | None = None) -> Dataset:
    """The data set in a folder, or the run's own if None; each rank of the group checks its share of the bytes.

    Raises:
        UsageError: no data set, or one that was prepared with another tokenizer than the model's.
        SlopeError: damaged data.
    """
    if folder is None:
        if loaded.config is None:
            advice = "give --data, or --no-perplexity with --tasks that are not of recall"
            raise UsageError(f"{loaded.folder}: has no data of its own; {advice}")
        folder = run_folder.data_folder(loaded.config, loaded.folder)
    group, vocab_size = group or Group(), loaded.model.config.vocab_size
    share = group.ranks.rank, group.ranks.world
    dataset = group.agreed(lambda: open_dataset(folder, share=share))
    for file in dataset.val.values():
        if (token_id := file.header.max_id) >= vocab_size:
            raise UsageError(f"{file.path}: token id {token_id} is above the model's vocabulary of {vocab_size}")
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    require_same_tokens(str(folder), tokenizer, str(loaded.folder), loaded.tokenizer)
    return dataset


def length_of(loaded: Loaded, seq_len: int | None) -> int:
    """The tokens of a sequence that is evaluated: those given, else the run's own, or 1,024 at most.

    Raises:
        UsageError: more than the model has positions.
    """
    positions = loaded.model.config.max_position_embeddings
    length = seq_len or (min(positions, LONGEST) if loaded.config is None else loaded.config.train.seq_len)
    if length > positions:
        raise UsageError(f"--seq-len {length}: the model has only {positions} positions")
    return length


def measure(
    loaded: Loaded,
    dataset: Dataset,
    *,
    tokens: int | None = None,
    seq_len: int | None = None,
    batch: int | None = None,
    first_bucket: int = 64,
    group: Group | None = None,
) -> dict[str, Any]:
    """The loss of a model on the validation text of a data set, over all of it and by source.

    Blocks, and for a masked model the masked tokens, are the same as in validation during training: the rest of a
    source after its last whole block is left out.

    Args:
        tokens: the maximum of each source, in evenly spaced blocks; None for all blocks.
        seq_len: tokens of a block; None for the run's own, or 1,024 at most.
        batch: blocks at a time; None for the run's micro-batch.
        group: the ranks to which the batches are dealt; every rank calls this with the same model and gets the result.
        first_bucket: positions in the first bucket of the loss by position; each later one ends at twice the position.

    Returns:
        loss (nats per token), its standard error over blocks (None for a single block), perplexity, tokens (predicted
        ones), blocks, positions (loss, perplexity and tokens of buckets of the inputs' positions in a block, "first" to
        "last"); for a causal model nats_per_byte and bits_per_byte of the text, which are comparable between
        vocabularies; all this also for each of `sources`; seq_len; `data`, the fingerprint of the data set.

    Raises:
        UsageError: no validation text, or seq_len is beyond the positions.
        SlopeError: a loss that is not finite.
    """
    group, config, length = group or Group(), loaded.config, length_of(loaded, seq_len)
    masking = masking_ids(loaded.tokenizer) if loaded.objective == "masked" else None
    micro_batch = batch or (BATCH if config is None else config.train.micro_batch)
    sources = {}
    for source, file in dataset.val.items():
        most = tokens or file.header.tokens
        batches = val_batches(
            file, seq_len=length, tokens=most, micro_batch=micro_batch, masking=masking, seed=loaded.seed
        )
        if (losses := _block_losses(loaded, file, batches, group)) is not None:
            sources[source] = losses
            if group.ranks.first:
                print(f"{source}: {losses.tokens:,} tokens, loss {losses.nats / losses.tokens:.4f}", file=sys.stderr)
    if not sources:
        raise UsageError(f"{dataset.folder}: has no validation text, {NO_VALIDATION}")
    result = _statistics(list(sources.values()), first_bucket)
    result["sources"] = {source: _statistics([losses], first_bucket) for source, losses in sources.items()}
    return result | {"seq_len": length, "data": dataset.fingerprint}


def _block_losses(loaded: Loaded, file: TokenFile, batches: Iterator[Batch], group: Group) -> BlockLosses | None:
    """The losses of a source; None if none of its tokens is predicted."""
    dealt = itertools.islice(batches, group.ranks.rank, None, group.ranks.world)
    by_rank = group.gather(group.agreed(lambda: _batch_losses(loaded, dealt)))
    parts = [part for row in itertools.zip_longest(*by_rank) for part in row if part is not None]
    if not parts:
        return None
    nats_N, tokens_N, nats_T, tokens_T = zip(*parts, strict=True)
    known = loaded.objective == "causal" and file.header.text_bytes
    losses = BlockLosses(
        np.concatenate(nats_N),
        np.concatenate(tokens_N),
        np.sum(nats_T, axis=0),
        np.sum(tokens_T, axis=0),
        bytes_per_token=file.header.text_bytes / file.header.tokens if known else None,
    )
    if not math.isfinite(losses.nats):
        raise SlopeError(f"{loaded.folder}: the loss is not finite")
    return losses if losses.tokens else None


def _batch_losses(loaded: Loaded, batches: Iterator[Batch]) -> list[tuple[NDArray[Any], ...]]:
    """Of each batch the first four attributes of BlockLosses: (B), (B), (T), (T), float64 and int64."""
    device, sums = loaded.model.device, []
    with torch.no_grad(), autocast(device):
        for batch in batches:
            tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
            nats_BT, predicted_BT = _token_losses(loaded, tensors)
            sums.append((nats_BT.sum(1), predicted_BT.sum(1), nats_BT.sum(0), predicted_BT.sum(0)))
    # Read from the device only now, so that it need not wait between batches.
    return [tuple(tensor.cpu().numpy() for tensor in of_batch) for of_batch in sums]


def _token_losses(loaded: Loaded, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss in nats, float64, 0 where nothing is predicted; and whether something is: both (B, T)."""
    labels_BT, logits_BTV = batch["labels"], forward(loaded.model, batch).logits
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.view_as(labels_BT).double(), labels_BT != IGNORED_LABEL


def _statistics(sources: Sequence[BlockLosses], first_bucket: int) -> dict[str, Any]:
    """Loss and perplexity over all blocks of some sources, which are not a sample: only blocks within a source vary."""
    tokens = sum(losses.tokens for losses in sources)
    nats = sum(losses.nats for losses in sources)
    error = math.sqrt(sum(losses.variance() for losses in sources)) / tokens
    result = {
        **_loss_and_perplexity(nats, tokens),
        "stderr": error if math.isfinite(error) else None,
        "blocks": sum(len(losses.nats_N) for losses in sources),
        "positions": _by_position(sources, first_bucket),
    }
    sizes = [losses.tokens * losses.bytes_per_token for losses in sources if losses.bytes_per_token is not None]
    if len(sizes) == len(sources):
        result |= {"nats_per_byte": nats / sum(sizes), "bits_per_byte": nats / sum(sizes) / math.log(2)}
    return result


def _by_position(sources: Sequence[BlockLosses], first_bucket: int) -> list[dict[str, Any]]:
    """The loss of buckets of positions; those in which nothing is predicted are left out."""
    length = max(len(losses.nats_T) for losses in sources)
    nats_T, tokens_T = np.zeros(length), np.zeros(length, np.int64)
    for losses in sources:  # a source with less text than a block has a shorter one
        nats_T[: len(losses.nats_T)] += losses.nats_T
        tokens_T[: len(losses.tokens_T)] += losses.tokens_T
    buckets, first = [], 0
    while first < length:
        end = min(max(2 * first, first_bucket), length)
        if tokens := int(tokens_T[first:end].sum()):
            loss = _loss_and_perplexity(float(nats_T[first:end].sum()), tokens)
            buckets.append({"first": first, "last": end - 1, **loss})
        first = end
    return buckets


def _loss_and_perplexity(nats: float, tokens: int) -> dict[str, Any]:
    loss = nats / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
