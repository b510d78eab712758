"""SQuAD v1.1: its official files, contexts cut into windows, the best span over them, exact match and F1.

Shape letter: T tokens of a window.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from slope_cli.data.batches import MaskingIds
from slope_cli.errors import UsageError
from slope_cli.finetune.examples import Example, Job, join
from slope_cli.finetune.glue import standard_error

Span = tuple[int, int]

HUB = "rajpurkar/squad"
QUESTION_TOKENS = 64
"""Longer questions are cut, as in BERT's own code."""
STRIDE = 128
"""Tokens from the start of a window to that of the next."""
BEST = 20
"""Starts, and ends, of a window that are tried with each other."""
ANSWER_TOKENS = 30
"""The longest answer that is given."""


class Question(NamedTuple):
    """A question on a context, its answers, and at which character of the context each begins."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


class Window(NamedTuple):
    """A question with a part of its context.

    question: the index of the question. first: where in the example the context begins. spans: the first character of
    each of the window's context tokens and the one after its last. targets of the example: the positions of the
    answer's first and last token, both 0 ([CLS]) where the answer is not wholly in the window.
    """

    question: int
    example: Example
    first: int
    spans: list[Span]


# ------------------------------------------------------------------------------------------------- questions


def read_questions(path: Path) -> list[Question]:
    """The questions of an official file, train-v1.1.json or dev-v1.1.json.

    Raises:
        UsageError: the file is missing, not JSON, has no question, or an entry lacks a field; names the place.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error})") from None
    questions = [
        _question(record, _get(paragraph, "context", str, inside), where)
        for article, outside in _entries(content, "data", f"{path}: ")
        for paragraph, inside in _entries(article, "paragraphs", outside)
        for record, where in _entries(paragraph, "qas", inside)
    ]
    if not questions:
        raise UsageError(f"{path}: there is no question in it")
    return questions


def _entries(holder: Any, key: str, where: str) -> Iterator[tuple[Any, str]]:
    """Each entry of a list in a JSON object, and the place it is at."""
    separator = "" if where.endswith(" ") else "."
    for number, entry in enumerate(_get(holder, key, list, where)):
        yield entry, f"{where}{separator}{key}[{number}]"


def _get(holder: Any, key: str, kind: type, where: str) -> Any:
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UsageError(f"{where.rstrip(': ')}: no {key!r}; a file of SQuAD v1.1 is wanted")
    return value


def _question(record: Any, context: str, where: str) -> Question:
    answers = [
        (_get(answer, "text", str, at), _get(answer, "answer_start", int, at))
        for answer, at in _entries(record, "answers", where)
    ]
    if not answers:
        raise UsageError(f"{where}: has no answer; a file of SQuAD v1.1 is wanted, not of v2")
    texts, starts = zip(*answers, strict=True)
    return Question(_get(record, "id", str, where), _get(record, "question", str, where), context, texts, starts)


def hub_questions(records: Iterable[Mapping[str, Any]], split: str) -> list[Question]:
    """The questions of a split of the hub's data set; UsageError if a row lacks a field."""
    questions = []
    for number, record in enumerate(records, 1):
        where, lists = f"{HUB} {split} row {number}", record.get("answers") or {}
        pairs = zip(lists.get("text", ()), lists.get("answer_start", ()), strict=False)
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        questions.append(_question({**record, "answers": answers}, _get(dict(record), "context", str, where), where))
    if not questions:
        raise UsageError(f"{HUB} {split}: there is no question in it")
    return questions


# --------------------------------------------------------------------------------------------------- windows


def windows(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast, special: MaskingIds, seq_len: int
) -> list[Window]:
    """Every question with every window of its context, each at most `seq_len` tokens long, in order."""
    found: list[Window] = []
    ids: list[int] = []
    spans: list[Span] = []
    for index, question in enumerate(questions):
        if not index or question.context != questions[index - 1].context:  # several questions in a row share one
            context = tokenizer(question.context, add_special_tokens=False, return_offsets_mapping=True)
            ids, spans = context["input_ids"], [(int(begin), int(end)) for begin, end in context["offset_mapping"]]
        asked = tokenizer(question.question, add_special_tokens=False)["input_ids"]
        asked = asked[: min(QUESTION_TOKENS, (seq_len - 3) // 2)]
        answer = token_span(question.starts[0], question.starts[0] + len(question.answers[0]), spans)
        for begin, end in _parts(len(spans), seq_len - 3 - len(asked)):
            first, targets = len(asked) + 2, (0.0, 0.0)
            if answer is not None and begin <= answer[0] and answer[1] < end:
                targets = float(first + answer[0] - begin), float(first + answer[1] - begin)
            example = join(asked, ids[begin:end], special, targets)
            found.append(Window(index, example, first, spans[begin:end]))
    return found


def _parts(length: int, room: int) -> Iterator[Span]:
    """Where windows of `room` tokens begin and end in a context: STRIDE apart, or less if they would hardly overlap."""
    begin = 0
    while True:
        yield begin, min(begin + room, length)
        if begin + room >= length:
            return
        begin += min(STRIDE, max(room - ANSWER_TOKENS, room // 2))


def token_span(begin: int, end: int, spans: Sequence[Span]) -> Span | None:
    """The first and the last token that hold characters from `begin` up to, not including, `end`; None if none does."""
    inside = [index for index, (first, after) in enumerate(spans) if first < end and begin < after]
    return (inside[0], inside[-1]) if inside else None


def with_answer(found: Sequence[Window], questions: Sequence[Question]) -> list[Window]:
    """The windows to train on: those of questions whose answer is in the context at the place that is given."""

    def right(q: Question) -> bool:
        return q.context.startswith(q.answers[0], q.starts[0]) and bool(q.answers[0].strip())

    return [window for window in found if right(questions[window.question])]


# ---------------------------------------------------------------------------------------------- answers, scores


def best_answers(
    found: Sequence[Window], logits: Sequence[NDArray[np.float32]], questions: Sequence[Question]
) -> list[str]:
    """The likeliest answer of each question over its windows, in the questions' order.

    Args:
        logits: (2, T) of each window, of each token to be the answer's first, and last; what is beyond the window's
            own tokens is not looked at.
    """
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
    for window, (starts_T, ends_T) in zip(found, logits, strict=True):
        score, span = best_span(window, starts_T, ends_T)
        if span is not None and score > best[window.question][0]:
            best[window.question] = score, questions[window.question].context[slice(*span)]
    return [text for _, text in best]


def best_span(window: Window, starts_T: NDArray[np.float32], ends_T: NDArray[np.float32]) -> tuple[float, Span | None]:
    """The likeliest span of a window's context, in characters, and its score, the sum of its two logits."""
    tokens = slice(window.first, window.first + len(window.spans))
    starts, ends = starts_T[tokens], ends_T[tokens]
    best: tuple[float, Span | None] = -np.inf, None
    for start in np.argsort(-starts, kind="stable")[:BEST]:
        for end in np.argsort(-ends, kind="stable")[:BEST]:
            score = float(starts[start] + ends[end])
            if start <= end < start + ANSWER_TOKENS and score > best[0]:
                best = score, (window.spans[start][0], window.spans[end][1])
    return best


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words: what the official script compares."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(given: str, answers: Iterable[str]) -> float:
    """1 if the answer given is one of the answers, after normalisation, else 0."""
    return float(any(normalise(given) == normalise(answer) for answer in answers))


def f1(given: str, answers: Iterable[str]) -> float:
    """The best F1, over the answers, of the bags of words."""
    return max(_f1(normalise(given).split(), normalise(answer).split()) for answer in answers)


def _f1(given: list[str], answer: list[str]) -> float:
    common = sum((Counter(given) & Counter(answer)).values())
    return 2 * common / (len(given) + len(answer)) if common else 0.0


def judge(given: Sequence[str], questions: Sequence[Question]) -> dict[str, Any]:
    """Exact match and F1 as shares of 1, and their standard errors."""
    pairs = list(zip(given, questions, strict=True))
    values = {
        "exact_match": np.array([exact_match(text, question.answers) for text, question in pairs]),
        "f1": np.array([f1(text, question.answers) for text, question in pairs]),
    }
    return {
        "metric": {name: float(value.mean()) for name, value in values.items()},
        "stderr": {name: standard_error(value) for name, value in values.items()},
    }


def job(
    rows: Mapping[str, Sequence[Question]], tokenizer: PreTrainedTokenizerFast, special: MaskingIds, seq_len: int
) -> Job:
    """The questions of `train` and `dev` made ready; UsageError if none can be trained on."""
    train = with_answer(windows(rows["train"], tokenizer, special, seq_len), rows["train"])
    dev = windows(rows["dev"], tokenizer, special, seq_len)
    trained = len({window.question for window in train})
    if not trained:
        raise UsageError("no training question has its answer where `answer_start` says")

    def judged(logits: list[NDArray[np.float32]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        given = best_answers(dev, logits, rows["dev"])
        lines = []
        for text, question in zip(given, rows["dev"], strict=True):
            line = {"id": question.id, "prediction": text, "exact_match": exact_match(text, question.answers)}
            lines.append(line | {"f1": f1(text, question.answers)})
        return judge(given, rows["dev"]), lines

    facts: dict[str, Any] = {"n_train": trained, "n": len(rows["dev"]), "left_out": len(rows["train"]) - trained}
    facts["windows"] = {"train": len(train), "dev": len(dev)}
    return Job([window.example for window in train], [window.example for window in dev], judged, facts, outputs=2)
