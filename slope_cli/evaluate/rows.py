"""The rows of zero-shot tasks in local files: their fields, and how they are read and checked."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from slope_cli.errors import UsageError

Row = dict[str, Any]
ENDINGS = (".jsonl", ".jsonl.gz")


class Layout(NamedTuple):
    """The fields that the rows of a task must have; a dot leads into an object.

    Attributes:
        folder: of the task, inside lm_eval/tasks.
        texts: fields with a text.
        lists: fields with a list of texts, all of one length.
        answer: the field with the right answer.
        answers: the possible answers of a row.
        rule, holds: a further condition, as a message and as a function.
        subject: the field that names the subtask of a row.
    """

    folder: str
    texts: tuple[str, ...]
    lists: tuple[str, ...]
    answer: str
    answers: Callable[[Row], Sequence[str | int]]
    rule: str = ""
    holds: Callable[[Row], bool] = lambda row: True
    subject: str = ""

    @property
    def columns(self) -> list[str]:
        """The top-level fields."""
        return list(dict.fromkeys(field.partition(".")[0] for field in (*self.texts, *self.lists, self.answer)))


def _lettered(folder: str, question: str) -> Layout:
    """Choices with labels of their own, such as A to D, one of which is the answer."""
    lists = ("choices.text", "choices.label")
    return Layout(folder, (question,), lists, "answerKey", lambda row: row["choices"]["label"])


LAYOUTS = {
    "hellaswag": Layout(
        "hellaswag",
        ("activity_label", "ctx_a", "ctx_b"),
        ("endings",),
        "label",
        lambda row: [str(number) for number in range(len(row["endings"]))],
    ),
    "piqa": Layout("piqa", ("goal", "sol1", "sol2"), (), "label", lambda row: (0, 1)),
    "arc_easy": _lettered("arc", "question"),
    "arc_challenge": _lettered("arc", "question"),
    "openbookqa": _lettered("openbookqa", "question_stem"),
    "winogrande": Layout(
        "winogrande",
        ("sentence", "option1", "option2"),
        (),
        "answer",
        lambda row: ("1", "2"),
        rule="the sentence needs a gap (_) and words after it",
        holds=lambda row: bool(row["sentence"].partition("_")[2].strip()),
    ),
    "mmlu": Layout(
        "mmlu/default",
        ("question", "subject"),
        ("choices",),
        "answer",
        lambda row: (0, 1, 2, 3),
        rule="needs four choices",
        holds=lambda row: len(row["choices"]) == 4,
        subject="subject",
    ),
}


def rows_file(folder: Path, config: dict[str, Any]) -> tuple[str, Path]:
    """The split that lm-eval would score, or another one if only that has a file; and the file."""
    splits = [config[key] for key in ("test_split", "validation_split") if config.get(key)]
    for split in splits:
        for ending in ENDINGS:
            if (path := folder / f"{split}{ending}").is_file():
                return split, path
    wanted = " or ".join(f"{split}.jsonl" for split in splits)
    raise UsageError(f"--task-data: no {folder / wanted} (.gz)")


def read_rows(path: Path, layout: Layout, subjects: Iterable[str | None] = ()) -> list[Row]:
    """The rows of a JSONL file, reduced to the fields of the layout.

    Raises:
        UsageError: the file cannot be read or contains no rows, or a row lacks a field or has an unknown answer or
            subject; the message names file, line and field.
    """
    known, rows = set(subjects), []
    open_text: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_row(f"{path} line {number}", line, layout, known))
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise UsageError(f"{path}: contains no rows")
    return rows


def _row(where: str, line: str, layout: Layout, subjects: set[str | None]) -> Row:
    """One line as a row, its answer written as in `Layout.answers`."""
    try:
        row = json.loads(line)
    except ValueError:
        raise UsageError(f"{where}: is not JSON") from None
    if fault := _fault(row, layout):
        raise UsageError(f"{where}: {fault}")
    if layout.subject and row[layout.subject] not in subjects:
        raise UsageError(f"{where}: {layout.subject} {row[layout.subject]!r} is unknown to lm-eval")
    given, allowed = str(row[layout.answer]).strip(), layout.answers(row)
    answer = next((known for known in allowed if str(known) == given), None)
    if answer is None:
        raise UsageError(f"{where}: {layout.answer} {given!r} is not one of {', '.join(map(str, allowed))}")
    return {column: row[column] for column in layout.columns} | {layout.answer: answer}


def _fault(row: Any, layout: Layout) -> str:
    """The first fault of a row; empty for a sound one."""
    for field in (*layout.texts, *layout.lists, layout.answer):
        value = _value(row, field)
        if value is None:
            return f"has no field {field}"
        if field in layout.texts and not isinstance(value, str):
            return f"{field} is not a text"
        if field in layout.lists and not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
            return f"{field} is not a list of texts"
    if len({len(_value(row, field)) for field in layout.lists}) > 1:
        return f"{' and '.join(layout.lists)} have different lengths"
    if len(layout.answers(row)) < 2:
        return "needs at least two choices"
    return "" if layout.holds(row) else layout.rule


def _value(row: Any, field: str) -> Any:
    """The value at a dotted path, or None."""
    for part in field.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row
