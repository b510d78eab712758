"""The interface of all tasks, and BERT's inputs for one or two texts.

Shape letters: B examples of a batch, T tokens of the longest, L outputs of the head.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.data.batches import MaskingIds

Logits = Sequence[NDArray[np.float32]]
"""Of each example: (L,), or for question answering (2, T)."""
Evaluation = tuple[dict[str, Any], list[dict[str, Any]]]
"""The metrics for result.json, and the lines of predictions.jsonl."""


@dataclass(frozen=True)
class Example:
    """One input of the model, without padding, and its targets: a class, a score, or two token positions."""

    input_ids: list[int]
    token_type_ids: list[int]
    targets: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A task of GLUE, or SQuAD.

    Attributes:
        architecture: BERT with the head of the task.
        files: the names of the official files of train and dev.
        epochs, batch, seq_len: the default settings.
    """

    name: str
    architecture: type[PreTrainedModel]
    files: tuple[str, str]
    epochs: int
    batch: int
    seq_len: int

    @property
    @abstractmethod
    def hub(self) -> tuple[str, str | None]:
        """Name and configuration of the data set on the Hugging Face Hub."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """L: one for each class, one for a score, or two for each token."""

    @abstractmethod
    def read(self, path: Path) -> list[Any]:
        """The rows of an official file; UsageError, naming the place, if the file or a row is not as published."""

    @abstractmethod
    def from_hub(self, record: Mapping[str, Any], where: str) -> Any:
        """The row of a record on the Hub; UsageError, beginning with `where`, for a missing field or label."""

    def trainable(self, rows: list[Any]) -> list[Any]:
        """The rows that can be trained on; UsageError if there are none."""
        return rows

    @abstractmethod
    def examples(self, rows: Sequence[Any], tokenizer: PreTrainedTokenizerFast, seq_len: int) -> list[Any]:
        """The examples of rows, each of at most `seq_len` tokens; UsageError for a tokenizer without [CLS] or [SEP]."""

    @abstractmethod
    def evaluate(self, rows: Sequence[Any], examples: Sequence[Any], logits: Logits) -> Evaluation:
        """Compare the predictions for the examples of `rows` with the labels or answers."""


def join(first: list[int], second: list[int] | None, special: MaskingIds) -> tuple[list[int], list[int]]:
    """input_ids and token_type_ids of [CLS] first [SEP], or of [CLS] first [SEP] second [SEP]."""
    ids, types = [special.cls, *first, special.sep], [0] * (len(first) + 2)
    if second is None:
        return ids, types
    return [*ids, *second, special.sep], [*types, *[1] * (len(second) + 1)]


def cut(first: list[int], second: list[int] | None, room: int) -> tuple[list[int], list[int] | None]:
    """Truncate one text, or the longer of two texts until both fit in `room` tokens."""
    if second is None:
        return first[:room], None
    kept = min(len(first), max(room - len(second), room - room // 2))
    return first[:kept], second[: room - kept]


def collate(examples: Sequence[Example], pad: int, length: int | None) -> dict[str, NDArray[np.int64]]:
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


def standard_error(values: NDArray[np.float64]) -> float | None:
    """The standard error of the mean of values (n,); None for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
