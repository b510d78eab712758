"""Batches that are a pure function of (seed, step, micro-step, rank).

Shape letters: B sequences of a micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slope_cli.data.dataset import NO_VALIDATION
from slope_cli.data.token_file import TokenFile, TokenReader
from slope_cli.errors import UsageError

Batch = dict[str, NDArray[np.int64]]
IGNORED_LABEL = -100
"""The label of a position at which nothing is predicted."""
FEISTEL_ROUNDS = 6
OPEN_FILES = 64


class Blocks:
    """The tokens of files as one stream, in blocks that overlap by one token.

    Block i is tokens[i·T : i·T + T + 1], so that every token is a target exactly once per epoch, except the first one
    and the last (tokens - 1) mod T, which never are.
    """

    def __init__(self, files: Sequence[TokenFile], seq_len: int) -> None:
        self.seq_len = seq_len
        self._files = files = [file for file in files if file.header.tokens]
        self._ends = np.cumsum([file.header.tokens for file in self._files], dtype=np.int64)
        self.tokens = int(self._ends[-1]) if self._files else 0
        # A process may open about a thousand files, and a data set may have more sources. The cache does not refer to
        # `self`: the cycle would keep the files open until the next garbage collection.
        self._reader = lru_cache(OPEN_FILES)(lambda at: TokenReader(files[at]))

    def __len__(self) -> int:
        return max(self.tokens - 1, 0) // self.seq_len

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Block `index`, (T+1,) int64.

        IndexError outside range(len), SlopeError for an id outside the vocabulary or a file that was changed meanwhile.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * self.seq_len
        stop = start + self.seq_len + 1
        block, filled = np.empty(self.seq_len + 1, np.int64), 0
        at = int(np.searchsorted(self._ends, start, side="right"))
        while filled < len(block):
            end = int(self._ends[at])
            first = end - self._files[at].header.tokens
            piece = self._reader(at).read(start + filled - first, min(stop, end) - first)
            self._files[at].checked(piece)
            block[filled : filled + len(piece)] = piece
            filled, at = filled + len(piece), at + 1
        return block


def shuffled(indices: NDArray[np.int64], length: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """The images of indices, (N,) int64, under a keyed random permutation of range(length), without a table of it.

    A balanced Feistel network permutes the smallest even number of bits that hold the range. A value outside the range
    is permuted again until it is inside. ValueError if an index is outside.
    """
    if length < 1 or (indices.size and (indices.min() < 0 or indices.max() >= length)):
        raise ValueError(f"index outside range({length})")
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8 * FEISTEL_ROUNDS).digest(), "<u8")
    value = _feistel(indices.astype(np.uint64), half_bits, keys)
    while (outside := value >= length).any():
        value[outside] = _feistel(value[outside], half_bits, keys)
    return value.astype(np.int64)


def _feistel(value: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        left, right = right, left ^ (_splitmix64(right ^ key) & mask)
    return (left << shift) | right


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every input bit affects every output bit (array products wrap, as it requires)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_numbers(
    step: int, micro: int, rank: int, *, world: int, micro_batch: int, accumulation: int
) -> NDArray[np.int64]:
    """The samples of one micro-batch on one rank, numbered from the start of the run: (micro_batch,) int64."""
    first = ((step * accumulation + micro) * world + rank) * micro_batch
    return np.arange(first, first + micro_batch, dtype=np.int64)


def sample_indices(
    step: int, micro: int, rank: int, *, world: int, micro_batch: int, accumulation: int, seed: int, length: int
) -> NDArray[np.int64]:
    """The blocks of one micro-batch on one rank: (micro_batch,) int64 in range(length).

    Every block occurs once per epoch, and each epoch has its own order. The set of samples of a step depends only on
    the product world * micro_batch * accumulation. UsageError if there are no blocks.
    """
    if length < 1:
        raise UsageError("the training text is shorter than one sequence: lower train.seq_len or prepare more text")
    numbers = sample_numbers(step, micro, rank, world=world, micro_batch=micro_batch, accumulation=accumulation)
    epochs, positions = np.divmod(numbers, length)
    indices = np.empty_like(numbers)
    for epoch in np.unique(epochs):
        indices[epochs == epoch] = shuffled(positions[epochs == epoch], length, (seed, int(epoch)))
    return indices


def causal_batch(blocks: Blocks, indices: Iterable[int] | NDArray[np.int64]) -> Batch:
    """Next-token prediction: input_ids and labels, both (B, T) int64; labels[b, t] is the token after input_ids[b, t].

    The labels are already shifted: do not pass them to a model that shifts them itself.
    """
    rows_BT1 = np.stack([blocks[int(index)] for index in indices])
    return {"input_ids": rows_BT1[:, :-1].copy(), "labels": rows_BT1[:, 1:].copy()}


@dataclass(frozen=True)
class MaskingIds:
    """The special ids of a BERT tokenizer. never_mask: all ids that are neither predicted nor drawn."""

    cls: int
    sep: int
    mask: int
    pad: int
    vocab_size: int
    never_mask: tuple[int, ...]


def masked_batch(
    blocks: Blocks,
    indices: Iterable[int] | NDArray[np.int64],
    *,
    special: MaskingIds,
    seed: int,
    sample_numbers: Iterable[int] | NDArray[np.int64],
) -> Batch:
    """BERT's objective: input_ids, token_type_ids, labels (B, T) int64, next_sentence_label (B,) int64.

    A sample is [CLS] A [SEP] B [SEP]. A and B are not sentences but spans of running text, split at a random token. In
    half of the samples B is a span of another random block (label 1); else it follows A (label 0). Of the tokens that
    are not special, 15 % are predicted: 80 % of these become [MASK], 10 % a random token, and 10 % stay. Labels are
    -100 elsewhere. A sample depends only on its block, `seed` and its number. UsageError if T < 5.
    """
    if blocks.seq_len < 5:
        raise UsageError(f"train.seq_len {blocks.seq_len} is too short for the masked objective: [CLS] A [SEP] B [SEP]")
    never = np.array(special.never_mask, np.int64)
    drawable = np.setdiff1d(np.arange(special.vocab_size), never)
    rows: dict[str, list[Any]] = {"input_ids": [], "token_type_ids": [], "labels": [], "next_sentence_label": []}
    for index, number in zip(indices, sample_numbers, strict=True):
        rng = np.random.default_rng((seed, int(number)))
        ids_T, types_T, is_random = _sentence_pair(blocks, int(index), special, rng)
        rows["labels"].append(_mask_in_place(ids_T, never, drawable, special.mask, rng))
        rows["input_ids"].append(ids_T)
        rows["token_type_ids"].append(types_T)
        rows["next_sentence_label"].append(is_random)
    return {name: np.asarray(values, np.int64) for name, values in rows.items()}


def _sentence_pair(
    blocks: Blocks, index: int, special: MaskingIds, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    room = blocks.seq_len - 3
    start = int(rng.integers(0, 5))  # a block has 4 tokens more than a sample: this lets every token occur
    text = blocks[index][start : start + room]
    split = int(rng.integers(1, room))
    first, second = text[:split], text[split:]
    is_random = int(len(blocks) > 1 and rng.random() < 0.5)
    if is_random:
        other = blocks[(index + int(rng.integers(1, len(blocks)))) % len(blocks)]
        at = int(rng.integers(0, len(other) - len(second) + 1))
        second = other[at : at + len(second)]
    ids_T = np.concatenate(([special.cls], first, [special.sep], second, [special.sep]))
    return ids_T, (np.arange(len(ids_T)) >= split + 2).astype(np.int64), is_random


def _mask_in_place(
    ids_T: NDArray[np.int64],
    never: NDArray[np.int64],
    drawable: NDArray[np.int64],
    mask_id: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    labels_T = np.full_like(ids_T, IGNORED_LABEL)
    candidates = np.flatnonzero(~np.isin(ids_T, never))
    if len(candidates) == 0:
        return labels_T
    chosen = rng.choice(candidates, max(1, round(0.15 * len(candidates))), replace=False)
    labels_T[chosen] = ids_T[chosen]
    fate = rng.random(len(chosen))
    ids_T[chosen[fate < 0.8]] = mask_id
    replaced = chosen[(fate >= 0.8) & (fate < 0.9)]
    ids_T[replaced] = rng.choice(drawable, len(replaced))
    return labels_T


class Prefetcher:
    """Makes the batches of the next step in a thread while the current step runs.

    BERT needs it: its masking on the host takes half as long as a step on the GPU.

    Args:
        make: a pure function from a step, below `steps`, to its batches.
    """

    def __init__(self, make: Callable[[int], list[Batch]], steps: int) -> None:
        self._make, self._steps, self._thread = make, steps, ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[list[Batch]] | None] = -1, None

    def __call__(self, step: int) -> list[Batch]:
        """The batches of a step. Steps may come in any order; consecutive ones are fast."""
        number, batches = self._next
        if batches is None or number != step:
            batches = self._thread.submit(self._make, step)
        if step + 1 < self._steps:
            self._next = step + 1, self._thread.submit(self._make, step + 1)
        return batches.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def val_batches(
    file: TokenFile, *, seq_len: int, tokens: int, micro_batch: int, masking: MaskingIds | None = None, seed: int = 0
) -> Iterator[Batch]:
    """Evenly spaced blocks of a validation file, always the same: at most `tokens` tokens, but at least one block.

    Yields causal batches, or masked ones if `masking` is given; the last may be smaller. A file shorter than a block
    gives one shorter block, and one with fewer than 2 tokens (6 if masked) nothing.
    """
    blocks = Blocks([file], max(1, min(seq_len, file.header.tokens - 1)))
    count = min(len(blocks), max(1, tokens // blocks.seq_len))
    if masking is not None and blocks.seq_len < 5:
        return
    numbers = np.arange(count, dtype=np.int64)
    indices = numbers * len(blocks) // max(count, 1)
    for at in range(0, count, micro_batch):
        part = slice(at, at + micro_batch)
        if masking is None:
            yield causal_batch(blocks, indices[part])
        else:
            yield masked_batch(blocks, indices[part], special=masking, seed=seed, sample_numbers=numbers[part])


def bigram_loss(train: Sequence[TokenFile], val: Sequence[TokenFile], vocab_size: int) -> float:
    """The loss on `val`, in nats per token, of a bigram model counted on `train` with 0.1 added to each count.

    A model with a lower loss has learnt more than token pairs. It needs vocab_size² counts: use it for up to 4096 ids.
    UsageError if `val` has no pair of tokens.
    """
    train_counts = _pair_counts(train, vocab_size) + 0.1
    val_counts = _pair_counts(val, vocab_size)
    if val_counts.sum() == 0:
        raise UsageError(
            f"no validation text to compare with: prepare the data with --val-fraction above 0; {NO_VALIDATION}"
        )
    nats = np.log(train_counts.sum(axis=1, keepdims=True)) - np.log(train_counts)
    return float((val_counts * nats).sum() / val_counts.sum())


def _pair_counts(files: Sequence[TokenFile], vocab_size: int) -> NDArray[np.int64]:
    """The counts of all token pairs: (vocab_size, vocab_size) int64."""
    counts = np.zeros(vocab_size * vocab_size, np.int64)
    for file in files:
        last = np.empty(0, np.int64)
        for piece in file.pieces():
            ids = np.concatenate((last, file.checked(piece)), dtype=np.int64)
            counts += np.bincount(ids[:-1] * vocab_size + ids[1:], minlength=len(counts))
            last = ids[-1:]
    return counts.reshape(vocab_size, vocab_size)
