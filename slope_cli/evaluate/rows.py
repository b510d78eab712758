"""The rows of lm-eval's tasks in local files, which its own json loader reads.

A task's entry in lm-eval's index becomes the same settings with another source of rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope_cli.errors import UsageError

if TYPE_CHECKING:  # lm-eval is an optional dependency
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

Splits = dict[str, "Dataset"]

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
SCORED = ("test_split", "validation_split")
"""The settings that name the split that is scored, in lm-eval's order."""
SPLITS = (*SCORED, "training_split", "fewshot_split")
SUBJECT = "subject"
"""The field of a row in a file of a whole group that says to which of its tasks it belongs, as in MMLU's files."""


def members(manager: TaskManager, name: str) -> list[Any] | None:
    """What a tag or group lists, as in its YAML: names, or objects with a "task" or "group"; None for a task."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index[name]
    if entry.yaml_path is None and entry.cfg is None:  # a tag
        return sorted(entry.tags)
    config = entry.cfg or load_yaml(entry.yaml_path, resolve_func=False)
    return list(config["task"]) if "group" in config else None


def member_name(member: Any) -> str:
    """The name of what a group lists."""
    return str(member if isinstance(member, str) else member.get("task") or member.get("group"))


def use_files(manager: TaskManager, name: str, folder: Path) -> None:
    """Let a task, or those of a group or tag, read their rows from FOLDER/TASK/SPLIT.jsonl.

    Tasks of a group that have no rows are left out of it. Rows of all of them may be in FOLDER/GROUP/SPLIT.jsonl, where
    each one's field `SUBJECT` is the `dataset_name` of its task.

    Raises:
        UsageError: there are no files, none of a split that can be scored, or one that cannot be read.
    """
    if not _use(manager, name, folder, None):
        raise UsageError(f"--task-data: no rows of {name} in {folder}: expected {folder / name}/SPLIT.jsonl (.gz)")


def _use(manager: TaskManager, name: str, folder: Path, shared: dict[str, Splits] | None) -> bool:
    """As `use_files`; whether there are rows. shared: by subject, those of the group that lists this."""
    from lm_eval.tasks._index import Entry
    from lm_eval.tasks._yaml_loader import load_yaml

    if (entry := manager.task_index.get(name)) is None:
        return False
    listed, files = members(manager, name), _files(folder / name)
    if listed is None:
        config = load_yaml(entry.yaml_path) if entry.yaml_path else entry.cfg
        if files:
            own: dict[str, Any] = {"dataset_path": "json", "dataset_name": None, "custom_dataset": None}
            own |= {"dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}}}
            settings = own | _splits(config, files, folder / name)
        elif shared and (rows := shared.get(str(config.get("dataset_name")))):
            settings = {"custom_dataset": lambda **_: rows} | _splits(config, rows, folder / name)
        else:
            return False
        manager.task_index[name] = Entry(name, entry.kind, None, config | settings, entry.tags)
        return True
    shared = _shared(manager, name, files) if files else shared
    kept = [member for member in listed if _use(manager, member_name(member), folder, shared)]
    if entry.yaml_path is None and entry.cfg is None:
        manager.task_index[name] = Entry(name, entry.kind, None, None, set(kept))
    else:
        config = load_yaml(entry.yaml_path) if entry.yaml_path else entry.cfg
        manager.task_index[name] = Entry(name, entry.kind, None, config | {"task": kept}, entry.tags)
    return bool(kept)


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder by the splits that they are named after."""
    paths = [(ending, path) for ending in ENDINGS for path in sorted(folder.glob(f"*{ending}"))]
    return {path.name.removesuffix(ending): path for ending, path in reversed(paths)}


def _splits(config: dict[str, Any], known: Collection[str], folder: Path) -> dict[str, Any]:
    """A task's settings that name splits, without those that have no rows."""
    splits = {key: config[key] if config.get(key) in known else None for key in SPLITS}
    if not any(splits[key] for key in SCORED):
        wanted = " or ".join(f"{config[key]}.jsonl" for key in SCORED if config.get(key))
        raise UsageError(f"--task-data: no {folder / wanted} (.gz)")
    examples = config.get("fewshot_config")
    if isinstance(examples, dict) and examples.get("split") not in known:
        splits["fewshot_config"] = {key: value for key, value in examples.items() if key != "split"}
    return splits


def _shared(manager: TaskManager, name: str, files: dict[str, Path]) -> dict[str, Splits]:
    """The rows of a group by their subjects; UsageError if one is that of none of its tasks."""
    from datasets import load_dataset

    data_files = {split: str(path) for split, path in files.items()}
    try:
        splits = dict(load_dataset("json", data_files=data_files))
    except Exception as error:  # those of datasets and pyarrow share no base class
        raise unreadable(files.values(), error) from error
    known, by_subject = set(_subjects(manager, name)), defaultdict[str, Splits](dict)
    for split, rows in splits.items():
        numbers = defaultdict[str, list[int]](list)
        for number, subject in enumerate(rows[SUBJECT] if SUBJECT in rows.column_names else [None]):
            numbers[str(subject)].append(number)
        if unknown := sorted(numbers.keys() - known):
            raise UsageError(f"{files[split]}: the {SUBJECT} {unknown[0]!r} of a row is that of no task of {name}")
        for subject, own in numbers.items():
            by_subject[subject][split] = rows.select(own)
    return by_subject


def _subjects(manager: TaskManager, name: str) -> list[str]:
    from lm_eval.tasks._yaml_loader import load_yaml

    entry, listed = manager.task_index[name], members(manager, name)
    if listed is not None:
        names = [member_name(member) for member in listed]
        return [subject for each in names if each in manager.task_index for subject in _subjects(manager, each)]
    config = entry.cfg or load_yaml(entry.yaml_path, resolve_func=False)
    return [str(config.get("dataset_name"))]


def unreadable(files: Collection[Path], error: Exception) -> UsageError:
    """An error of reading local rows, as one line that names the files and the cause."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
    return UsageError(f"{', '.join(map(str, files))}: cannot be used as rows ({reason})")


def require_answers(task: ConfigurableTask, folder: Path) -> None:
    """UsageError unless each row of a multiple-choice task has one of its choices for an answer.

    lm-eval counts other rows as wrong, such as those of a test split whose answers are not published.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, row in enumerate(task.eval_docs, 1):
        choices = task.doc_to_choice(row)
        if len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
            raise UsageError(f"{folder}: row {number} of {task.config.task}: has no two choices that are texts")
        # Where the contexts differ, not the choices, lm-eval's text is the answer's number.
        answer = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
        for each in answer if isinstance(answer, list) else [answer]:
            if each not in (range(len(choices)) if isinstance(each, int) else choices):
                reason = f"the answer {each!r} is not one of its {len(choices)} choices"
                raise UsageError(f"{folder}: row {number} of {task.config.task}: {reason}")
