"""Five tasks of GLUE: their official files, their rows and their metrics."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.data.tokenizer import masking_ids
from slope_cli.errors import UsageError, os_reason
from slope_cli.finetune.examples import Evaluation, Example, Logits, Task, cut, join, standard_error

Numbers = NDArray[np.float64]

SCORES = (0.0, 5.0)
"""The lowest and the highest similarity in STS-B."""


class Row(NamedTuple):
    """One or two sentences, and the class (or the score of STS-B) as a number."""

    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True, kw_only=True)
class GlueTask(Task):
    """A task of one or two sentences.

    Attributes:
        columns: of the official files.
        header: whether the first line of a file names its columns.
        texts, label: the columns of the sentences and of the label.
        hub_texts: the fields of the sentences on the Hub, where they differ from `texts`.
        classes: the labels in the official files, in the order of the Hub's numbers; none for a score.
        metrics: keys of METRICS.
    """

    architecture: type[PreTrainedModel] = BertForSequenceClassification
    files: tuple[str, str] = ("train.tsv", "dev.tsv")
    epochs: int = 3
    batch: int = 32
    seq_len: int = 128
    columns: tuple[str, ...]
    header: bool = True
    texts: tuple[str, ...]
    label: str = "label"
    hub_texts: tuple[str, ...] = ()
    classes: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...]

    @property
    def hub(self) -> tuple[str, str | None]:
        return "nyu-mll/glue", self.name.lower().replace("-", "")

    @property
    def outputs(self) -> int:
        return max(1, len(self.classes))

    def read(self, path: Path) -> list[Row]:
        """The rows of train.tsv or dev.tsv: tab-separated UTF-8, in which a quotation mark has no special meaning.

        Raises:
            UsageError: the file cannot be read, or a line has missing or empty fields or an unknown label.
        """
        lines, columns = _tsv_lines(path), self.columns
        if self.header:
            columns = tuple(next(lines, (0, [""]))[1])
            if missing := [name for name in (*self.texts, self.label) if name not in columns]:
                official = ", ".join(self.columns)
                raise UsageError(f"{path}:1: no column {missing[0]!r}; the official file of {self.name} has {official}")
        return [self._row(columns, fields, f"{path}:{number}") for number, fields in lines]

    def _row(self, columns: tuple[str, ...], fields: list[str], where: str) -> Row:
        if len(fields) != len(columns):
            raise UsageError(f"{where}: {len(fields)} fields, expected {len(columns)} ({', '.join(columns)})")
        row = dict(zip(columns, fields, strict=True))
        for name in self.texts:
            if not row[name].strip():
                raise UsageError(f"{where}: {name} is empty")
        return Row(tuple(row[name] for name in self.texts), self._label(row[self.label].strip(), where))

    def _label(self, text: str, where: str) -> float:
        if self.classes:
            if text not in self.classes:
                known = " and ".join(self.classes)
                raise UsageError(f"{where}: unknown label {text!r}; the labels of {self.name} are {known}")
            return float(self.classes.index(text))
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not SCORES[0] <= score <= SCORES[1]:
            raise UsageError(f"{where}: the score {text!r} is not a number from {SCORES[0]:g} to {SCORES[1]:g}")
        return score

    def from_hub(self, record: Mapping[str, Any], where: str) -> Row:
        texts = self.hub_texts or self.texts
        if missing := [name for name in (*texts, "label") if record.get(name) in (None, "")]:
            raise UsageError(f"{where}: no {missing[0]}")
        label = float(record["label"])
        if not (label in range(len(self.classes)) if self.classes else SCORES[0] <= label <= SCORES[1]):
            raise UsageError(f"{where}: unknown label {record['label']}")
        return Row(tuple(record[name] for name in texts), label)

    def examples(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, seq_len: int) -> list[Example]:
        """One example for each row; of two texts that are too long, the longer one is cut."""
        special, columns = masking_ids(tokenizer), zip(*(row.texts for row in rows), strict=True)
        ids = zip(*(tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in columns), strict=True)
        result = []
        for row, (first, *more) in zip(rows, ids, strict=True):
            parts = cut(first, more[0] if more else None, seq_len - 2 - len(more))
            result.append(Example(*join(*parts, special), (row.label,)))
        return result

    def evaluate(self, rows: Sequence[Row], examples: Sequence[Example], logits: Logits) -> Evaluation:
        logits_NL = np.stack(logits).astype(np.float64)
        predicted = logits_NL.argmax(1).astype(np.float64) if self.classes else logits_NL[:, 0]
        lines = []
        for number, (prediction, row) in enumerate(zip(predicted, rows, strict=True)):
            line = {"row": number, "prediction": self._text(prediction), "label": self._text(row.label)}
            lines.append(line | ({"logits": logits_NL[number].tolist()} if self.classes else {}))
        return self.scores(predicted, np.array([row.label for row in rows])), lines

    def _text(self, label: float) -> str | float:
        """A class as the official files write it, or a score."""
        return self.classes[int(label)] if self.classes else float(label)

    def scores(self, predicted: Numbers, labels: Numbers) -> dict[str, Any]:
        """The metrics of predictions (n,), classes or scores, against labels (n,).

        Returns:
            `metric` by name, `stderr` of those that are means over rows, and for classes `majority`: the accuracy of
            always predicting the most frequent label.
        """
        result: dict[str, Any] = {"metric": {name: METRICS[name](predicted, labels) for name in self.metrics}}
        correct = (predicted == labels).astype(np.float64)
        result["stderr"] = {"accuracy": standard_error(correct)} if "accuracy" in self.metrics else {}
        if self.classes:
            result["majority"] = float(np.unique(labels, return_counts=True)[1].max() / len(labels))
        return result


def _tsv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number, from 1, and the fields of each line that is not blank."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {os_reason(error)}") from None


# ---------------------------------------------------------------------------------------------------------- metrics
#
# torchmetrics is not used: its Matthews coefficient is not 0 for a model that predicts only one class (0.026 on the dev
# set of CoLA), and its correlations with a constant are 0 although they are undefined.


def accuracy(predicted: Numbers, labels: Numbers) -> float:
    """The share of rows whose class is right."""
    return float((predicted == labels).mean())


def f1(predicted: Numbers, labels: Numbers) -> float:
    """The harmonic mean of precision and recall of class 1; 0 if it never occurs."""
    right = float(((predicted == 1) & (labels == 1)).sum())
    return 2 * right / max(1.0, float((predicted == 1).sum() + (labels == 1).sum()))


def matthews(predicted: Numbers, labels: Numbers) -> float:
    """The Matthews correlation of two classes; 0, as usual, if all predictions or all labels are equal."""
    return pearson(predicted, labels) or 0.0


def pearson(predicted: Numbers, labels: Numbers) -> float | None:
    """The linear correlation; None (undefined) if either is constant."""
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return None
    return float(np.corrcoef(predicted, labels)[0, 1])


def spearman(predicted: Numbers, labels: Numbers) -> float | None:
    """The correlation of ranks, with the mean rank for ties; None if either is constant."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Numbers) -> Numbers:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Numbers = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return ranks


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


# ------------------------------------------------------------------------------------------------------------ tasks


_PAIR = ("sentence1", "sentence2")
_COLA = ("source", "label", "star", "sentence")
_MRPC = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
_STSB = ("index", "genre", "filename", "year", "old_index", "source1", "source2", *_PAIR, "score")
_RTE = ("index", *_PAIR, "label")

TASKS = (
    GlueTask(name="CoLA", columns=_COLA, header=False, texts=("sentence",), metrics=("matthews",), epochs=5),
    GlueTask(name="SST-2", columns=("sentence", "label"), texts=("sentence",), metrics=("accuracy",)),
    GlueTask(name="MRPC", columns=_MRPC, texts=_MRPC[3:], hub_texts=_PAIR, label="Quality", metrics=("accuracy", "f1")),
    GlueTask(name="STS-B", columns=_STSB, texts=_PAIR, label="score", classes=(), metrics=("pearson", "spearman")),
    GlueTask(name="RTE", columns=_RTE, texts=_PAIR, classes=("entailment", "not_entailment"), metrics=("accuracy",)),
)
