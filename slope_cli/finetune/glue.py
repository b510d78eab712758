"""Five tasks of GLUE: their official files, their rows, and the numbers they are judged by."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from slope_cli.data.batches import MaskingIds
from slope_cli.errors import UsageError
from slope_cli.finetune.examples import Example, Job, cut, join

Numbers = NDArray[np.float64]

HUB = "nyu-mll/glue"
SCORES = (0.0, 5.0)
"""The least and the greatest similarity in STS-B."""


@dataclass(frozen=True)
class Task:
    """Where a task's files hold what, and how it is judged.

    columns: of the files; only CoLA's have no line that names them. texts: those of the one or two sentences. labels:
    what the label's column may hold, by class; none for a score. hub: its name and fields in the hub's data set.
    """

    columns: tuple[str, ...]
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    hub: str
    hub_texts: tuple[str, ...]
    measures: tuple[str, ...]
    header: bool = True
    epochs: int = 3


class Row(NamedTuple):
    """One or two sentences, and the class (or STS-B's score) as a number."""

    texts: tuple[str, ...]
    label: float


_PAIR = ("sentence1", "sentence2")
_STSB = ("index", "genre", "filename", "year", "old_index", "source1", "source2", *_PAIR, "score")
_MRPC = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
_COLA = ("source", "label", "star", "sentence")

TASKS: dict[str, Task] = {
    "CoLA": Task(
        _COLA, ("sentence",), "label", ("0", "1"), "cola", ("sentence",), ("matthews",), header=False, epochs=5
    ),
    "SST-2": Task(("sentence", "label"), ("sentence",), "label", ("0", "1"), "sst2", ("sentence",), ("accuracy",)),
    "MRPC": Task(_MRPC, ("#1 String", "#2 String"), "Quality", ("0", "1"), "mrpc", _PAIR, ("accuracy", "f1")),
    "STS-B": Task(_STSB, _PAIR, "score", (), "stsb", _PAIR, ("pearson", "spearman")),
    # The hub's classes are in this order too: 0 is entailment.
    "RTE": Task(
        ("index", *_PAIR, "label"),
        _PAIR,
        "label",
        ("entailment", "not_entailment"),
        "rte",
        _PAIR,
        ("accuracy",),
    ),
}


# ----------------------------------------------------------------------------------------------------- rows


def read_rows(task: str, path: Path) -> list[Row]:
    """The rows of an official file, train.tsv or dev.tsv: tab-separated UTF-8, a quotation mark is only a character.

    Raises:
        UsageError: the file is missing, empty or not text, a line has missing or empty fields, or an unknown label.
    """
    t, lines = TASKS[task], _lines(path)
    columns = t.columns
    if t.header:
        columns = tuple(next(lines, (0, [""]))[1])
        if absent := [name for name in (*t.texts, t.label) if name not in columns]:
            raise UsageError(f"{path}:1: no column {absent[0]!r}; {task}'s official file has {', '.join(t.columns)}")
    rows = [_row(task, columns, fields, f"{path}:{number}") for number, fields in lines]
    if not rows:
        raise UsageError(f"{path}: there is no row in it")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number from 1 and the fields of each line that is not blank."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def _row(task: str, columns: tuple[str, ...], fields: list[str], where: str) -> Row:
    t = TASKS[task]
    if len(fields) != len(columns):
        raise UsageError(f"{where}: {len(fields)} fields where {len(columns)} should be ({', '.join(columns)})")
    row = dict(zip(columns, fields, strict=True))
    for name in t.texts:
        if not row[name].strip():
            raise UsageError(f"{where}: {name} is empty")
    return Row(tuple(row[name] for name in t.texts), _label(task, row[t.label].strip(), where))


def _label(task: str, text: str, where: str) -> float:
    labels = TASKS[task].labels
    if labels:
        if text not in labels:
            raise UsageError(f"{where}: unknown label {text!r}; {task}'s are {' and '.join(labels)}")
        return float(labels.index(text))
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not SCORES[0] <= score <= SCORES[1]:
        raise UsageError(f"{where}: the score {text!r} is not a number from {SCORES[0]:g} to {SCORES[1]:g}")
    return score


def hub_rows(task: str, records: Iterable[Mapping[str, Any]], split: str) -> list[Row]:
    """The rows of a split of the hub's data set, whose classes are numbers already.

    Raises:
        UsageError: a row has missing fields or no label.
    """
    t, rows = TASKS[task], []
    for number, record in enumerate(records, 1):
        where = f"{HUB} {t.hub} {split} row {number}"
        if absent := [name for name in (*t.hub_texts, "label") if record.get(name) in (None, "")]:
            raise UsageError(f"{where}: no {absent[0]}")
        label = float(record["label"])
        if not (label in range(len(t.labels)) if t.labels else SCORES[0] <= label <= SCORES[1]):
            raise UsageError(f"{where}: unknown label {record['label']}")
        rows.append(Row(tuple(record[name] for name in t.hub_texts), label))
    if not rows:
        raise UsageError(f"{HUB} {t.hub} {split}: there is no row in it")
    return rows


# ------------------------------------------------------------------------------------------------------- job


def job(
    task: str,
    rows: Mapping[str, Sequence[Row]],
    tokenizer: PreTrainedTokenizerFast,
    special: MaskingIds,
    seq_len: int,
) -> Job:
    """A task made ready from the rows of `train` and `dev`; of texts that are too long, the longer one is cut."""
    t, dev = TASKS[task], rows["dev"]

    def judged(logits: list[NDArray[np.float32]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        stacked = np.stack(logits).astype(np.float64)
        predicted = stacked.argmax(1).astype(np.float64) if t.labels else stacked[:, 0]
        lines = []
        for number, (given, row) in enumerate(zip(predicted, dev, strict=True)):
            line = {"row": number, "prediction": _word(task, given), "label": _word(task, row.label)}
            lines.append(line | ({"logits": stacked[number].tolist()} if t.labels else {}))
        return judge(task, predicted, np.array([row.label for row in dev])), lines

    return Job(
        train=_examples(rows["train"], tokenizer, special, seq_len),
        dev=_examples(dev, tokenizer, special, seq_len),
        judge=judged,
        facts={"n_train": len(rows["train"]), "n": len(dev)},
        outputs=max(1, len(t.labels)),
    )


def _examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, special: MaskingIds, seq_len: int
) -> list[Example]:
    columns = zip(*(row.texts for row in rows), strict=True)
    ids = zip(*(tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in columns), strict=True)
    examples = []
    for row, (first, *more) in zip(rows, ids, strict=True):
        parts = cut(first, more[0] if more else None, seq_len - 2 - len(more))
        examples.append(join(*parts, special, (row.label,)))
    return examples


def _word(task: str, number: float) -> str | float:
    """A class as the files write it, or a score."""
    labels = TASKS[task].labels
    return labels[int(number)] if labels else float(number)


# -------------------------------------------------------------------------------------------------- measures
#
# Not torchmetrics': its Matthews coefficient of a model that gives every row one class is not 0 (0.026 on CoLA's dev),
# and its correlations with a constant are 0, where they are not defined.


def accuracy(predicted: Numbers, labels: Numbers) -> float:
    """The share of rows whose class is right."""
    return float((predicted == labels).mean())


def f1(predicted: Numbers, labels: Numbers) -> float:
    """The harmonic mean of precision and recall of class 1; 0 if there is none of it."""
    right = float(((predicted == 1) & (labels == 1)).sum())
    return 2 * right / max(1.0, float((predicted == 1).sum() + (labels == 1).sum()))


def matthews(predicted: Numbers, labels: Numbers) -> float:
    """Matthews' correlation of two classes; 0 if all rows are given one class, as usual."""
    return pearson(predicted, labels) or 0.0


def pearson(predicted: Numbers, labels: Numbers) -> float | None:
    """The linear correlation; None, for not defined, if either is constant."""
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return None
    return float(np.corrcoef(predicted, labels)[0, 1])


def spearman(predicted: Numbers, labels: Numbers) -> float | None:
    """The correlation of ranks, where equal numbers share their mean rank; None if either is constant."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Numbers) -> Numbers:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Numbers = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return ranks


MEASURES: dict[str, Callable[[Numbers, Numbers], float | None]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def judge(task: str, predicted: Numbers, labels: Numbers) -> dict[str, Any]:
    """A task's measures of its predictions (n,), classes or scores, against its labels (n,).

    Returns:
        `metric` by name, `stderr` of those that are means over rows, and for classes `majority`: the accuracy of
        giving every row the most frequent label.
    """
    t = TASKS[task]
    metric = {name: MEASURES[name](predicted, labels) for name in t.measures}
    result: dict[str, Any] = {"metric": metric, "stderr": {}}
    if "accuracy" in metric:
        result["stderr"]["accuracy"] = standard_error((predicted == labels).astype(np.float64))
    if t.labels:
        result["majority"] = float(np.unique(labels, return_counts=True)[1].max() / len(labels))
    return result


def standard_error(values: Numbers) -> float | None:
    """The standard error of the mean of values (n,); None for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
