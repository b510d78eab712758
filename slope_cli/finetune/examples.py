"""One or two texts as BERT reads them: [CLS] first [SEP], or [CLS] first [SEP] second [SEP].

Shape letters: B examples of a batch, T tokens of the longest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slope_cli.data.batches import MaskingIds


class Example(NamedTuple):
    """What goes into the model for one row, and what should come out: a class, a score, or two token positions."""

    input_ids: list[int]
    token_type_ids: list[int]
    targets: tuple[float, ...]


@dataclass
class Job:
    """A task made ready: what to train on, what to predict, and how to judge it.

    judge: takes the logits of each of `dev`, float32, (outputs,) or for question answering (2, T), and returns the
    numbers of the result and the lines of predictions.jsonl. facts: what the result says of the rows. outputs: of the
    head: a logit of each class, or one score, or two logits of each token.
    """

    train: list[Example]
    dev: list[Example]
    judge: Callable[[list[NDArray[np.float32]]], tuple[dict[str, Any], list[dict[str, Any]]]]
    facts: dict[str, Any]
    outputs: int


def join(first: list[int], second: list[int] | None, special: MaskingIds, targets: tuple[float, ...]) -> Example:
    """One or two texts, as token ids without special ones, with the special ones."""
    ids, types = [special.cls, *first, special.sep], [0] * (len(first) + 2)
    if second is not None:
        ids, types = [*ids, *second, special.sep], [*types, *[1] * (len(second) + 1)]
    return Example(ids, types, targets)


def cut(first: list[int], second: list[int] | None, room: int) -> tuple[list[int], list[int] | None]:
    """Two texts cut at their ends, always the longer one, until both fit in `room` tokens; or one text alone."""
    if second is None:
        return first[:room], None
    kept = min(len(first), max(room - len(second), room - room // 2))
    return first[:kept], second[: room - kept]


def batch(examples: Sequence[Example], pad: int, length: int | None) -> dict[str, NDArray[np.int64]]:
    """input_ids, token_type_ids and attention_mask, (B, T) int64, padded to `length`, or to the longest if None."""
    shape = len(examples), length or max(len(example.input_ids) for example in examples)
    names = "input_ids", "token_type_ids", "attention_mask"
    arrays = {name: np.full(shape, pad if name == "input_ids" else 0, np.int64) for name in names}
    for row, example in enumerate(examples):
        used = slice(len(example.input_ids))
        arrays["input_ids"][row, used] = example.input_ids
        arrays["token_type_ids"][row, used] = example.token_type_ids
        arrays["attention_mask"][row, used] = 1
    return arrays
