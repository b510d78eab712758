"""SQuAD v1.1: its official files, contexts cut into windows, the best span over them, exact match and F1.

Shape letter: T tokens of a window.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import BertForQuestionAnswering, PreTrainedTokenizerFast

from slope_cli.data.tokenizer import masking_ids
from slope_cli.errors import UsageError, os_reason
from slope_cli.finetune.examples import Evaluation, Example, Logits, Task, join, standard_error

Span = tuple[int, int]

QUESTION_TOKENS = 64
"""Longer questions are cut, as in BERT's own code."""
STRIDE = 128
"""Tokens from the start of a window to the start of the next."""
BEST = 20
"""The number of likeliest starts of a window that are combined with as many of its likeliest ends."""
ANSWER_TOKENS = 30
"""The longest answer that is predicted."""


class Question(NamedTuple):
    """A question on a context, its answers, and the character of the context at which each begins."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Window(Example):
    """A question with a part of its context.

    Attributes:
        targets: the positions of the answer's first and last token; both are 0, the position of [CLS], if the window
            does not contain the whole answer.
        question: the index of the question.
        first: the position in the example at which the context begins.
        spans: for each context token of the window, its first character and the one after its last.
    """

    question: int
    first: int
    spans: list[Span]


class SquadTask(Task):
    """The rows are questions; an example is a window."""

    @property
    def hub(self) -> tuple[str, str | None]:
        return "rajpurkar/squad", None

    @property
    def outputs(self) -> int:
        return 2  # for each token, as the first and as the last of the answer

    def read(self, path: Path) -> list[Question]:
        """The questions of train-v1.1.json or dev-v1.1.json.

        Raises:
            UsageError: the file cannot be read, is not JSON, or an entry lacks a field; names the place.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {os_reason(error)}") from None
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"{path}: not JSON ({error})") from None
        return [
            _question(record, _get(paragraph, "context", str, inside), where)
            for article, outside in _entries(content, "data", f"{path}: ")
            for paragraph, inside in _entries(article, "paragraphs", outside)
            for record, where in _entries(paragraph, "qas", inside)
        ]

    def from_hub(self, record: Mapping[str, Any], where: str) -> Question:
        columns = record.get("answers") or {}
        pairs = zip(columns.get("text", ()), columns.get("answer_start", ()), strict=False)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        return _question({**record, "answers": answers}, _get(dict(record), "context", str, where), where)

    def trainable(self, rows: list[Question]) -> list[Question]:
        """The questions whose answer is in the context at its `answer_start`; UsageError if there are none."""
        sound = [q for q in rows if q.answers[0].strip() and q.context.startswith(q.answers[0], q.starts[0])]
        if not sound:
            raise UsageError("no training question has its answer at its `answer_start`")
        return sound

    def examples(self, rows: Sequence[Question], tokenizer: PreTrainedTokenizerFast, seq_len: int) -> list[Window]:
        special, result = masking_ids(tokenizer), []
        ids: list[int] = []
        spans: list[Span] = []
        for index, row in enumerate(rows):
            if not index or row.context != rows[index - 1].context:  # consecutive questions share a context
                context = tokenizer(row.context, add_special_tokens=False, return_offsets_mapping=True)
                ids, spans = context["input_ids"], [(int(begin), int(end)) for begin, end in context["offset_mapping"]]
            question = tokenizer(row.question, add_special_tokens=False)["input_ids"]
            question = question[: min(QUESTION_TOKENS, (seq_len - 3) // 2)]
            answer = token_span(row.starts[0], row.starts[0] + len(row.answers[0]), spans)
            for begin, end in _window_spans(len(spans), seq_len - 3 - len(question)):
                first, targets = len(question) + 2, (0.0, 0.0)
                if answer is not None and begin <= answer[0] and answer[1] < end:
                    targets = float(first + answer[0] - begin), float(first + answer[1] - begin)
                inputs = join(question, ids[begin:end], special)
                result.append(Window(*inputs, targets, index, first, spans[begin:end]))
        return result

    def evaluate(self, rows: Sequence[Question], examples: Sequence[Window], logits: Logits) -> Evaluation:
        """Exact match and F1 as shares of 1, with their standard errors; and the prediction for each question."""
        lines = []
        for row, text in zip(rows, best_answers(rows, examples, logits), strict=True):
            line = {"id": row.id, "prediction": text, "exact_match": exact_match(text, row.answers)}
            lines.append(line | {"f1": f1(text, row.answers)})
        values = {name: np.array([line[name] for line in lines]) for name in ("exact_match", "f1")}
        metric = {name: float(value.mean()) for name, value in values.items()}
        return {"metric": metric, "stderr": {name: standard_error(value) for name, value in values.items()}}, lines


SQUAD = SquadTask(
    name="SQuAD",
    architecture=BertForQuestionAnswering,
    files=("train-v1.1.json", "dev-v1.1.json"),
    epochs=2,
    batch=24,
    seq_len=384,
)


def _entries(holder: Any, key: str, where: str) -> Iterator[tuple[Any, str]]:
    """Each entry of a list in a JSON object, and its place."""
    separator = "" if where.endswith(" ") else "."
    for number, entry in enumerate(_get(holder, key, list, where)):
        yield entry, f"{where}{separator}{key}[{number}]"


def _get(holder: Any, key: str, kind: type, where: str) -> Any:
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UsageError(f"{where.rstrip(': ')}: no {key!r}; expected the format of SQuAD v1.1")
    return value


def _question(record: Any, context: str, where: str) -> Question:
    answers = [
        (_get(answer, "text", str, at), _get(answer, "answer_start", int, at))
        for answer, at in _entries(record, "answers", where)
    ]
    if not answers:
        raise UsageError(f"{where}: has no answer; expected SQuAD v1.1, not v2")
    texts, starts = zip(*answers, strict=True)
    return Question(_get(record, "id", str, where), _get(record, "question", str, where), context, texts, starts)


# ---------------------------------------------------------------------------------------------- windows and answers


def _window_spans(length: int, room: int) -> Iterator[Span]:
    """First and end token of each window of `room` tokens: STRIDE apart, or less to overlap enough."""
    begin = 0
    while True:
        yield begin, min(begin + room, length)
        if begin + room >= length:
            return
        begin += min(STRIDE, max(room - ANSWER_TOKENS, room // 2))


def token_span(begin: int, end: int, spans: Sequence[Span]) -> Span | None:
    """The first and the last token with characters from `begin` up to, not including, `end`; None if there is none."""
    inside = [index for index, (first, after) in enumerate(spans) if first < end and begin < after]
    return (inside[0], inside[-1]) if inside else None


def best_answers(questions: Sequence[Question], windows: Sequence[Window], logits: Logits) -> list[str]:
    """The likeliest answer of each question over its windows.

    Args:
        logits: (2, T) float32 of each window, for each token as the answer's first and as its last; padding and
            tokens outside the context are ignored.
    """
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
    for window, (starts_T, ends_T) in zip(windows, logits, strict=True):
        score, span = best_span(window, starts_T, ends_T)
        if span is not None and score > best[window.question][0]:
            best[window.question] = score, questions[window.question].context[slice(*span)]
    return [text for _, text in best]


def best_span(window: Window, starts_T: NDArray[np.float32], ends_T: NDArray[np.float32]) -> tuple[float, Span | None]:
    """The likeliest span of a window's context, in characters, and its score, the sum of its two logits."""
    tokens = slice(window.first, window.first + len(window.spans))
    starts, ends = starts_T[tokens], ends_T[tokens]
    likely_starts, likely_ends = (np.argsort(-logits, kind="stable")[:BEST] for logits in (starts, ends))
    best: tuple[float, Span | None] = -np.inf, None
    for start in likely_starts:
        for end in likely_ends:
            score = float(starts[start] + ends[end])
            if start <= end < start + ANSWER_TOKENS and score > best[0]:
                best = score, (window.spans[start][0], window.spans[end][1])
    return best


# ---------------------------------------------------------------------------------------------------------- metrics


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words, as in the official script."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 if the prediction equals one of the answers after normalisation, else 0."""
    return float(any(normalise(prediction) == normalise(answer) for answer in answers))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """The highest F1 of the bags of words, after normalisation, over the answers."""
    return max(_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers)


def _f1(predicted: list[str], answer: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(answer)).values())
    return 2 * common / (len(predicted) + len(answer)) if common else 0.0
