"""Zero-shot tasks: lm-eval's own prompts and scoring, on rows from the hub or from local files.

A local task is lm-eval's own YAML with nothing changed but where its rows come from and which split is scored.
"""

import contextlib
import difflib
import gzip
import io
import json
import logging
import math
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from slope_cli.errors import SlopeError, UsageError

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

Row = dict[str, Any]
ENDINGS = (".jsonl", ".jsonl.gz")


class Layout(NamedTuple):
    """What the rows of a task must hold; a dot leads into an object.

    where: the task's folder inside lm_eval/tasks. texts: fields with a text. lists: fields with a list of texts, all
    of one length. answer: the field with the right answer; answers: what it may be in a row. rule: what else must
    hold, in words. subject: the field that names the sub-task of a row.
    """

    where: str
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


TWO = "needs two choices or more"


def _lettered(where: str, question: str) -> Layout:
    """Choices with letters of their own, one of which is the answer."""
    letters: Callable[[Row], Sequence[str]] = lambda row: row["choices"]["label"]  # noqa: E731
    lists = ("choices.text", "choices.label")
    return Layout(where, (question,), lists, "answerKey", letters, TWO, lambda row: len(letters(row)) > 1)


LAYOUTS = {
    "hellaswag": Layout(
        "hellaswag",
        ("activity_label", "ctx_a", "ctx_b"),
        ("endings",),
        "label",
        lambda row: [str(place) for place in range(len(row["endings"]))],
        TWO,
        lambda row: len(row["endings"]) > 1,
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
        "the sentence needs a gap (_) and words after it",
        lambda row: bool(row["sentence"].partition("_")[2].strip()),
    ),
    "mmlu": Layout(
        "mmlu/default",
        ("question", "subject"),
        ("choices",),
        "answer",
        lambda row: (0, 1, 2, 3),
        "needs four choices",
        lambda row: len(row["choices"]) == 4,
        subject="subject",
    ),
}


class Loaded(NamedTuple):
    """A task ready to be scored: what lm-eval makes of it, and the split that its rows are of."""

    name: str
    built: "TaskDict"
    split: str

    @property
    def leaves(self) -> "dict[str, ConfigurableTask]":
        """The tasks that have rows: the task itself, or all those of its group."""
        return dict(self.built["tasks"])


# ------------------------------------------------------------------------------------------------------- loading


def check_names(names: Iterable[str]) -> list[str]:
    """The names, each once; UsageError for an unknown one."""
    found = list(dict.fromkeys(names))
    for name in found:
        if name not in LAYOUTS:
            close = difflib.get_close_matches(name.lower(), LAYOUTS, n=2, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(LAYOUTS)}"
            raise UsageError(f"--tasks {name}: unknown task; {hint}")
    return found


def load(names: Sequence[str], folder: Path | None) -> list[Loaded]:
    """Make the tasks called `names` ready.

    Args:
        folder: holds <task>/<split>.jsonl or .jsonl.gz with raw rows; None loads them as lm-eval does, from the hub.

    Raises:
        UsageError: lm-eval is not installed, an unknown task, no file of a task, or a row that does not fit.
        SlopeError: the hub gives no rows.
    """
    names = check_names(names)
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--task-data {folder}: no such folder")
    try:
        import lm_eval
        import lm_eval.models.huggingface
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"--tasks: {error.name} is missing; pip install slope-cli[eval]") from None
    base = Path(lm_eval.__file__).parent / "tasks"
    # Only these folders: lm-eval has thousands of other files.
    where = [str(base / place) for place in dict.fromkeys(LAYOUTS[name].where for name in names)]
    with quiet():
        manager = TaskManager(include_defaults=False, include_path=where)
        return [_from_hub(manager, name) if folder is None else _from_files(manager, name, folder) for name in names]


def _from_hub(manager: "TaskManager", name: str) -> Loaded:
    try:
        built = manager.load([name])
    except Exception as error:  # the errors of datasets, the hub and HTTP share no base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "this needs a network, or --task-data with a folder of rows"
        raise SlopeError(f"{name}: no rows to be had from the Hugging Face hub ({reason}); {hint}") from error
    config = next(iter(built["tasks"].values())).config
    return Loaded(name, built, config.test_split or config.validation_split)


def _from_files(manager: "TaskManager", name: str, folder: Path) -> Loaded:
    layout, configs = LAYOUTS[name], dict(_configs(manager, name))
    split, path = _rows_file(folder / name, next(iter(configs.values())))
    rows = read_rows(path, layout, subjects={config.get("dataset_name") for config in configs.values()})

    def task(leaf: str) -> "ConfigurableTask | None":
        config = configs[leaf]
        own = [row for row in rows if not layout.subject or row[layout.subject] == config["dataset_name"]]
        return _task(config, split, own) if own else None

    return Loaded(name, manager.load(_items(manager, name, task)), split)


def _configs(manager: "TaskManager", name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each task that `name` stands for, with lm-eval's own settings for it, its functions included."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index[name]
    if entry.yaml_path is not None and "group" not in entry.cfg:
        yield name, load_yaml(entry.yaml_path)
        return
    for child in sorted(entry.tags) if entry.yaml_path is None else entry.cfg["task"]:
        yield from _configs(manager, child)


def _items(
    manager: "TaskManager", name: str, task: "Callable[[str], ConfigurableTask | None]"
) -> "list[ConfigurableTask | Group]":
    """The group `name` filled with tasks that have rows, or the task of that name; nothing where none has."""
    from lm_eval.api.group import Group

    entry = manager.task_index[name]
    if entry.yaml_path is not None and "group" not in entry.cfg:
        leaf = task(name)
        return [] if leaf is None else [leaf]
    below = sorted(entry.tags) if entry.yaml_path is None else entry.cfg["task"]
    items = [item for child in below for item in _items(manager, child, task)]
    if entry.yaml_path is None or not items:
        return items
    group = Group.from_config({key: value for key, value in entry.cfg.items() if key != "task"})
    for item in items:
        group.add(item)
    return [group]


def _task(config: dict[str, Any], split: str, rows: list[Row]) -> "ConfigurableTask":
    """lm-eval's own task, but for its rows; without examples, so that no other split is wanted."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    kept = {key: value for key, value in config.items() if key not in ("tag", "group", "dataset_kwargs")}
    splits = {key: split if config.get(key) == split else None for key in ("test_split", "validation_split")}
    rest = {"training_split": None, "fewshot_split": None, "num_fewshot": 0}
    found = {split: Dataset.from_list(rows)}
    return ConfigurableTask(config=kept | splits | rest | {"custom_dataset": lambda **_: found})


# ---------------------------------------------------------------------------------------------------------- rows


def _rows_file(folder: Path, config: dict[str, Any]) -> tuple[str, Path]:
    """The split that lm-eval would score, or the next best where only that has a file; and the file."""
    splits = [config[key] for key in ("test_split", "validation_split") if config.get(key)]
    for split in splits:
        for ending in ENDINGS:
            if (path := folder / f"{split}{ending}").is_file():
                return split, path
    wanted = " or ".join(f"{split}.jsonl" for split in splits)
    raise UsageError(f"--task-data: there is no {folder / wanted} (.gz)")


def read_rows(path: Path, layout: Layout, subjects: Iterable[str | None] = ()) -> list[Row]:
    """The rows of a JSONL file, cut down to what the layout names.

    Raises:
        UsageError: naming file, line and field, for a row that lacks something or has an unknown answer or subject;
            no row at all; a file that cannot be read.
    """
    known, rows = set(subjects), []
    opened: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_row(f"{path} line {number}", line, layout, known))
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise UsageError(f"{path}: holds no rows")
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
        raise UsageError(f"{where}: {layout.subject} {row[layout.subject]!r} is none of lm-eval's")
    given, allowed = str(row[layout.answer]).strip(), layout.answers(row)
    answer = next((known for known in allowed if str(known) == given), None)
    if answer is None:
        raise UsageError(f"{where}: {layout.answer} {given!r} is none of {', '.join(map(str, allowed))}")
    return {column: row[column] for column in layout.columns} | {layout.answer: answer}


def _fault(row: object, layout: Layout) -> str:
    """What a row lacks; empty for a sound one."""
    for field in (*layout.texts, *layout.lists, layout.answer):
        value = _value(row, field)
        if value is None:
            return f"has no field {field}"
        if field in layout.texts and not isinstance(value, str):
            return f"{field} is not a text"
        if field in layout.lists and not (isinstance(value, list) and all(isinstance(v, str) and v for v in value)):
            return f"{field} is not a list of texts"
    if len({len(_value(row, field)) for field in layout.lists}) > 1:
        return f"{' and '.join(layout.lists)} are not as many"
    return "" if isinstance(row, dict) and layout.holds(row) else layout.rule


def _value(row: object, field: str) -> Any:
    """What is at a dotted path, or None."""
    for part in field.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


# ------------------------------------------------------------------------------------------------------- scoring


def score(lm: "HFLM", task: Loaded, limit: int | None = None) -> dict[str, Any]:
    """Score one task without examples in the prompt.

    Args:
        lm: lm-eval's wrapper of a causal model and its tokenizer.
        limit: at most so many rows, the first ones, of the task; of a group, of each of its tasks.

    Returns:
        acc and, where lm-eval gives it, acc_norm, with their standard errors (None for a single row); `chance`, what
        a guess gets; `above_chance`, whether acc is above that by more than two standard errors of a guess; `n` rows
        of `split`;
        `truncated`, rows with a prompt longer than the model's positions, which loses its beginning; lm-eval's
        `version` of the task; for a group also its `subjects` and `groups`.

    Raises:
        UsageError: a choice is longer than the model's positions.
    """
    import lm_eval

    started = time.perf_counter()
    with quiet():
        chances, truncated = _look_ahead(lm, task, limit)
        found = lm_eval.evaluate(lm, task.built, limit=limit, log_samples=False)
    results, groups = found["results"], task.built.get("groups", {})
    scores = _scores(results[task.name])
    chance, variance = sum(chances) / len(chances), sum(p * (1 - p) for p in chances)
    above = scores["acc"] > chance + 2 * math.sqrt(variance) / len(chances)
    about = {"chance": chance, "above_chance": above, "n": len(chances), "split": task.split, "truncated": truncated}
    about["version"] = found["versions"].get(task.name)
    if groups:
        about["groups"] = {name: _scores(results[name]) for name in groups if name != task.name}
        about["subjects"] = {
            name.removeprefix(f"{task.name}_"): _scores(results[name]) | {"n": found["n-samples"][name]["effective"]}
            for name in task.leaves
        }
    seconds = time.perf_counter() - started
    print(f"{task.name}: {len(chances):,} rows in {seconds:.0f} s", file=sys.stderr)
    return scores | about


def _scores(found: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's `acc,none` and `acc_stderr,none` under plain names; what it calls N/A is None."""
    scores: dict[str, Any] = {}
    for name in ("acc", "acc_norm"):
        if f"{name},none" in found:
            error = found[f"{name}_stderr,none"]
            scores[name] = float(found[f"{name},none"])
            scores[f"{name}_stderr"] = None if error == "N/A" else float(error)
    return scores


def _look_ahead(lm: "HFLM", task: Loaded, limit: int | None) -> tuple[list[float], int]:
    """The chance of a guess for each row, and how many rows have a request longer than the model's positions."""
    chances: list[float] = []
    truncated = 0
    for leaf in task.leaves.values():
        leaf.build_all_requests(limit=limit, rank=0, world_size=1)
        choices = Counter(instance.doc_id for instance in leaf.instances)
        chances += [1 / count for count in choices.values()]
        long = {instance.doc_id for instance in leaf.instances if _too_long(lm, task.name, *instance.args)}
        truncated += len(long)
    return chances, truncated


def _too_long(lm: "HFLM", name: str, context: str, continuation: str) -> bool:
    """Whether a request is longer than the model's positions; UsageError if the scored part alone is."""
    if len((context + continuation).encode()) <= lm.max_length:  # a token is a byte at least
        return False
    answer, prompt = (len(lm.tok_encode(text, add_special_tokens=False)) for text in (continuation, context))
    if answer > lm.max_length:
        raise UsageError(f"{name}: a choice has {answer} tokens, and the model only {lm.max_length} positions")
    return bool(prompt + answer > lm.max_length + 1)  # the last token is only scored, never read


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars, prints and log lines of lm-eval and what it loads rows with."""
    logs = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels, nowhere = [log.level for log in logs], io.StringIO()
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
