"""Rows of supervised fine-tuning, and what of them a causal model learns: the answers.

A row is a JSON object in a line, {"messages": [{"role": …, "content": …}, …]} or {"prompt": …, "completion": …}.
Answers are the messages of the role assistant, or the completion, and the end of text after each.
"""

import bisect
import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from slope_cli.data.batches import IGNORED_LABEL
from slope_cli.data.tokenizer import begin_id, separator_id
from slope_cli.errors import UsageError, first_line, os_reason

ANSWERER = "assistant"
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content | trim }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""What a tokenizer without a chat template gets: a line <|ROLE|>, the content without space around it, the end-of-text
token after an answer, a line break. It needs no tokens of its own."""


class Row(NamedTuple):
    """Messages, or a prompt and its completion; where: its file and line, for errors."""

    where: str
    messages: list[dict[str, str]]
    prompt: str
    completion: str


class CausalExample(NamedTuple):
    """One input of a causal model, without padding, and for each of its tokens the one after it, or IGNORED_LABEL."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Examples:
    """The examples of some rows; how many rows were cut to the length, and how many had no answer left then."""

    kept: list[CausalExample]
    cut: int
    dropped: int


def read(path: Path) -> list[Row]:
    """The rows of a JSON Lines file in UTF-8.

    Raises:
        UsageError: the file cannot be read or has no row, or, naming the line, a row that is neither of the two kinds.
    """
    try:
        lines = path.read_bytes().decode().split("\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {os_reason(error)}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not text in UTF-8") from None
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UsageError(f"{path}: contains no rows")
    return rows


def _row(line: str, where: str) -> Row:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{where}: is not JSON") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where}: is not a JSON object")
    if "messages" not in record:
        for name in ("prompt", "completion"):
            if not isinstance(record.get(name), str):
                raise UsageError(f"{where}: has neither messages nor a {name} that is text")
        return Row(where, [], record["prompt"], record["completion"])
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: messages must be a list of objects with role and content")
    for number, message in enumerate(messages, 1):
        texts = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{where}: message {number} must be an object with role and content, both text")
    if all(message["role"] != ANSWERER for message in messages):
        raise UsageError(f"{where}: no message has the role {ANSWERER}, so there is nothing to learn")
    return Row(where, [{name: message[name] for name in ("role", "content")} for message in messages], "", "")


def set_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Give a tokenizer without a chat template TEMPLATE, after the begin of text if texts begin with it."""
    if not tokenizer.chat_template:
        begins = begin_id(tokenizer) is not None
        tokenizer.chat_template = "{{ bos_token }}" * begins + TEMPLATE


def examples(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, ends: Collection[int], seq_len: int) -> Examples:
    """The examples of rows.

    A row is tokenized as one text, unless a token would then hold the end of a prompt and the begin of an answer: what
    a model is given ends with the prompt.

    Args:
        tokenizer: with a chat template, if a row has messages.
        ends: the ids that end a generated text.
        seq_len: most tokens of an input; what comes after is cut off.

    Raises:
        UsageError: naming the row, what the template refuses, or writes in another way when more messages follow.
    """
    kept, cut = [], 0
    for row in rows:
        if row.messages:
            ids, labels = _labelled(*_conversation(row, tokenizer), tokenizer, ends)
        else:  # begins as `slope generate` lets it begin
            text, begin = row.prompt + row.completion, begin_id(tokenizer)
            ids, labels = _labelled(text, [(len(row.prompt), len(text))], tokenizer, ends, begin)
        cut += len(ids) > seq_len
        labels = labels[:seq_len]
        if places := [place for place, label in enumerate(labels) if label != IGNORED_LABEL]:
            end = places[-1] + 1  # after the last target there is nothing to predict
            kept.append(CausalExample(ids[:end], labels[:end]))
    return Examples(kept, cut, len(rows) - len(kept))


Spans = list[tuple[int, int]]
"""The first and the last character (exclusive) of each answer in a text."""


def _conversation(row: Row, tokenizer: PreTrainedTokenizerFast) -> tuple[str, Spans]:
    def rendered(count: int, answering: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(
                row.messages[:count], tokenize=False, add_generation_prompt=answering, return_dict=False
            )
        except Exception as error:  # templates refuse what they do not know by errors of their own
            raise UsageError(f"{row.where}: the chat template refuses the messages: {first_line(error)}") from error
        return str(text)

    text, spans = rendered(len(row.messages), False), []
    for place, message in enumerate(row.messages):
        if message["role"] != ANSWERER:
            continue
        before, after = rendered(place, True), rendered(place + 1, False)
        if not (text.startswith(after) and after.startswith(before)):
            raise UsageError(
                f"{row.where}: the chat template writes message {place + 1} otherwise when others follow; split the row"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _labelled(
    text: str, answers: Spans, tokenizer: PreTrainedTokenizerFast, ends: Collection[int], begin: int | None = None
) -> tuple[list[int], list[int]]:
    """The ids of a text, and of each the label: the id after it, if that belongs to an answer.

    The targets of an answer end with its first id of `ends`. Where it has none, its last token has the end of text as
    its label: so a template need not write it.

    Args:
        begin: the id before the text, if the text does not have it itself.
    """
    ids, firsts = _tokens(text, tokenizer)
    if not {first for first, _ in answers} <= {*firsts, len(text)}:
        cuts = [0, *(first for first, _ in answers), len(text)]
        pieces = [(start, *_tokens(text[start:end], tokenizer)) for start, end in itertools.pairwise(cuts)]
        ids = [token for _, own, _ in pieces for token in own]
        firsts = [start + first for start, _, own in pieces for first in own]
    if begin is not None:
        ids, firsts = [begin, *ids], [-1, *firsts]
    labels = [IGNORED_LABEL] * len(ids)
    for first, last in answers:
        start, stop = (bisect.bisect_left(firsts, place) for place in (first, last))
        end = next((place for place in range(start, stop) if ids[place] in ends), None)
        for place in range(max(start, 1), stop if end is None else end + 1):
            labels[place - 1] = ids[place]
        if end is None and stop > 0:
            labels[stop - 1] = separator_id(tokenizer)
    return ids, labels


def _tokens(text: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The ids of a text, and where in it each begins."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded.input_ids), [first for first, _ in encoded.offset_mapping]


def collate(batch: Sequence[CausalExample], length: int) -> dict[str, NDArray[np.int64]]:
    """input_ids and labels, (B, length) int64. Padding is at the end, where causal attention does not see it."""
    arrays = {"input_ids": np.zeros((len(batch), length), np.int64)}
    arrays["labels"] = np.full((len(batch), length), IGNORED_LABEL, np.int64)
    for row, example in enumerate(batch):
        used = slice(len(example.input_ids))
        arrays["input_ids"][row, used] = example.input_ids
        arrays["labels"][row, used] = example.labels
    return arrays


def targets(batch: Sequence[CausalExample]) -> int:
    """How many tokens are predicted."""
    return sum(label != IGNORED_LABEL for example in batch for label in example.labels)


def parts(batch: Sequence[CausalExample], size: int) -> Iterator[list[CausalExample]]:
    """The examples of a batch in groups of at most `size`, those of about the same length together."""
    ordered = sorted(batch, key=lambda example: len(example.input_ids))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))
