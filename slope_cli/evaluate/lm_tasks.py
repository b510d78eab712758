"""Zero-shot tasks: lm-eval's own prompts and scoring, on rows from the Hugging Face Hub or from local files.

A local task is lm-eval's own YAML, except for the source of its rows and the split that is scored.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.distributed.collectives import Group
from slope_cli.errors import SlopeError, UsageError, did_you_mean, first_line
from slope_cli.evaluate.rows import LAYOUTS, Row, read_rows, rows_file

if TYPE_CHECKING:  # lm-eval is an optional dependency
    from lm_eval.api.group import Group as TaskGroup
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

Pair = tuple[str, str]
Answer = tuple[float, bool]


class LoadedTask(NamedTuple):
    """A task ready to be scored: lm-eval's object for it, and the split of its rows."""

    name: str
    task_dict: TaskDict
    split: str

    @property
    def leaves(self) -> dict[str, ConfigurableTask]:
        """The tasks that have rows: the task itself, or all those of its group."""
        return dict(self.task_dict["tasks"])


# ------------------------------------------------------------------------------------------------------- loading


def check_names(names: Iterable[str]) -> list[str]:
    """The names, each once; UsageError for an unknown one."""
    unique = list(dict.fromkeys(names))
    for name in unique:
        if name not in LAYOUTS:
            raise UsageError(f"--tasks {name}: unknown task; {did_you_mean(name, LAYOUTS)}")
    return unique


def load(names: Sequence[str], folder: Path | None) -> list[LoadedTask]:
    """Load tasks with their rows.

    Args:
        names: as returned by `check_names`.
        folder: contains <task>/<split>.jsonl or .jsonl.gz with raw rows; None downloads them from the Hub, as lm-eval
            does.

    Raises:
        UsageError: lm-eval is not installed, a task has no file, or a row does not fit its task.
        SlopeError: the rows cannot be downloaded.
    """
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
    folders = [str(base / name) for name in dict.fromkeys(LAYOUTS[name].folder for name in names)]
    with quiet():
        manager = TaskManager(include_defaults=False, include_path=folders)
        return [_from_hub(manager, name) if folder is None else _from_files(manager, name, folder) for name in names]


def _from_hub(manager: TaskManager, name: str) -> LoadedTask:
    try:
        task_dict = manager.load([name])
    except Exception as error:  # the errors of datasets, the Hub and HTTP share no base class
        raise SlopeError(
            f"{name}: could not be downloaded from the Hugging Face Hub ({first_line(error)}); "
            "connect to a network, or give --task-data with a folder of rows"
        ) from error
    config = next(iter(task_dict["tasks"].values())).config
    return LoadedTask(name, task_dict, config.test_split or config.validation_split)


def _from_files(manager: TaskManager, name: str, folder: Path) -> LoadedTask:
    layout, configs = LAYOUTS[name], dict(_configs(manager, name))
    split, path = rows_file(folder / name, next(iter(configs.values())))
    rows = read_rows(path, layout, subjects={config.get("dataset_name") for config in configs.values()})
    tasks = {}
    for leaf, config in configs.items():
        if own := [row for row in rows if not layout.subject or row[layout.subject] == config["dataset_name"]]:
            tasks[leaf] = _task(config, split, own)
    return LoadedTask(name, manager.load(_tree(manager, name, tasks)), split)


def _children(manager: TaskManager, name: str) -> list[str] | None:
    """The members of a tag or group; None for a task."""
    entry = manager.task_index[name]
    if entry.yaml_path is None:  # a tag
        return sorted(entry.tags)
    return list(entry.cfg["task"]) if "group" in entry.cfg else None


def _configs(manager: TaskManager, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each task of a name, tag or group, with lm-eval's own settings for it, including functions."""
    from lm_eval.tasks._yaml_loader import load_yaml

    children = _children(manager, name)
    if children is None:
        yield name, load_yaml(manager.task_index[name].yaml_path)
    for child in children or ():
        yield from _configs(manager, child)


def _tree(manager: TaskManager, name: str, tasks: Mapping[str, ConfigurableTask]) -> list[ConfigurableTask | TaskGroup]:
    """The task of this name, or its group with those of its tasks that are in `tasks`; empty if there are none."""
    from lm_eval.api.group import Group as TaskGroup

    children, entry = _children(manager, name), manager.task_index[name]
    if children is None:
        return [tasks[name]] if name in tasks else []
    items = [item for child in children for item in _tree(manager, child, tasks)]
    if entry.yaml_path is None or not items:
        return items
    group = TaskGroup.from_config({key: value for key, value in entry.cfg.items() if key != "task"})
    for item in items:
        group.add(item)
    return [group]


def _task(config: dict[str, Any], split: str, rows: list[Row]) -> ConfigurableTask:
    """lm-eval's own task with other rows; zero-shot, so that it needs no other split."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    kept = {key: value for key, value in config.items() if key not in ("tag", "group", "dataset_kwargs")}
    splits = {key: split if config.get(key) == split else None for key in ("test_split", "validation_split")}
    rest = {"training_split": None, "fewshot_split": None, "num_fewshot": 0}
    dataset = {split: Dataset.from_list(rows)}
    return ConfigurableTask(config=kept | splits | rest | {"custom_dataset": lambda **_: dataset})


# ------------------------------------------------------------------------------------------------------- scoring


def harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: int) -> HFLM:
    """lm-eval's wrapper of a causal model, with `batch` requests at a time; bf16 on a GPU."""
    from lm_eval.models.huggingface import HFLM

    # Without context, lm-eval begins with the beginning- or end-of-text token, if there is one.
    has_ends = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
    precision = {"mixed_precision_dtype": "bfloat16", "softmax_dtype": "float32"} if model.device.type == "cuda" else {}
    with quiet():
        return HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch,
            prefix_token_id=None if has_ends else tokenizer.sep_token_id,
            trust_remote_code=False,
            **precision,
        )


class Requests(NamedTuple):
    """What a task asks.

    Attributes:
        pairs: each context with a continuation, once.
        chances: of each row, the accuracy of a random choice.
        truncated: the number of rows that are longer than the model's positions.
    """

    pairs: list[Pair]
    chances: list[float]
    truncated: int


def answers_of(lm: HFLM, pairs: Sequence[Pair], group: Group | None = None) -> dict[Pair, Answer]:
    """The log-likelihood of each continuation after its context, and whether it is the likeliest one.

    Args:
        group: the ranks to which the pairs are dealt, those of one context to the same rank, which reads it once; every
            rank calls this with the same pairs and gets all answers.
    """
    from lm_eval.api.instance import Instance

    group = group or Group()
    numbers = {context: number for number, context in enumerate(dict.fromkeys(context for context, _ in pairs))}
    own = [pair for pair in pairs if numbers[pair[0]] % group.ranks.world == group.ranks.rank]

    def answer() -> dict[Pair, Answer]:
        requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(own)]
        with quiet():
            return dict(zip(own, lm.loglikelihood(requests), strict=True))

    return {pair: found for part in group.gather(group.agreed(answer)) for pair, found in part.items()}


def score(
    task: LoadedTask, requests: Requests, answers: Mapping[Pair, Answer], limit: int | None = None
) -> dict[str, Any]:
    """Score one task zero-shot.

    Args:
        requests: of this task and limit.
        answers: to its pairs.
        limit: the maximum number of rows, of a group in each of its tasks; None for all.

    Returns:
        acc and, if lm-eval gives it, acc_norm, with their standard errors (None for a single row); `chance`, the
        expected accuracy of random choices; `above_chance`, whether acc exceeds it by more than two standard errors of
        random choices; `n` rows of `split`; `truncated`, the number of rows whose prompt is longer than the model's
        positions and loses its beginning; lm-eval's `version` of the task; for a group also `subjects` and `groups`.
    """
    import lm_eval

    with quiet():
        output = lm_eval.evaluate(_answering(answers), task.task_dict, limit=limit, log_samples=False)
    chances, results, groups = requests.chances, output["results"], task.task_dict.get("groups", {})
    n = len(chances)
    chance, error = sum(chances) / n, math.sqrt(sum(p * (1 - p) for p in chances)) / n
    scores = _scores(results[task.name])
    scores |= {"chance": chance, "above_chance": scores["acc"] > chance + 2 * error, "n": n, "split": task.split}
    scores |= {"truncated": requests.truncated, "version": output["versions"].get(task.name)}
    if groups:
        scores["groups"] = {name: _scores(results[name]) for name in groups if name != task.name}
        scores["subjects"] = {
            name.removeprefix(f"{task.name}_"): _scores(results[name]) | {"n": output["n-samples"][name]["effective"]}
            for name in task.leaves
        }
    return scores


def _answering(answers: Mapping[Pair, Answer]) -> LM:
    """A model that knows these answers already, for lm-eval."""
    from lm_eval.api.model import LM

    class Answering(LM):  # type: ignore[misc] # lm-eval has no types
        def loglikelihood(self, requests: list[Instance]) -> list[Answer]:
            return [answers[request.args] for request in requests]

        loglikelihood_rolling = generate_until = loglikelihood  # no task here asks for them

    return Answering()


def _scores(result: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's `acc,none` and `acc_stderr,none` under plain names; its N/A becomes None."""
    scores: dict[str, Any] = {}
    for name in ("acc", "acc_norm"):
        if f"{name},none" in result:
            error = result[f"{name}_stderr,none"]
            scores[name] = float(result[f"{name},none"])
            scores[f"{name}_stderr"] = None if error == "N/A" else float(error)
    return scores


def requests_of(lm: HFLM, task: LoadedTask, limit: int | None = None) -> Requests:
    """The requests of a task; UsageError for a choice that is longer than the model's positions."""
    pairs: dict[Pair, None] = {}
    chances: list[float] = []
    truncated = 0
    with quiet():
        for leaf in task.leaves.values():
            leaf.build_all_requests(limit=limit, rank=0, world_size=1)
            pairs |= dict.fromkeys(instance.args for instance in leaf.instances)
            choices = Counter(instance.doc_id for instance in leaf.instances)
            chances += [1 / count for count in choices.values()]
            long = {instance.doc_id for instance in leaf.instances if _too_long(lm, task.name, *instance.args)}
            truncated += len(long)
    return Requests(list(pairs), chances, truncated)


def _too_long(lm: HFLM, name: str, context: str, continuation: str) -> bool:
    """Whether a request is longer than the model's positions; UsageError if the scored part alone is."""
    if len((context + continuation).encode()) <= lm.max_length:  # a token has at least one byte
        return False
    answer, prompt = (len(lm.tok_encode(text, add_special_tokens=False)) for text in (continuation, context))
    if answer > lm.max_length:
        raise UsageError(f"{name}: a choice has {answer} tokens, but the model only {lm.max_length} positions")
    return bool(prompt + answer > lm.max_length + 1)  # the last token is scored, but not read


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the progress bars, prints and logs of lm-eval and of the libraries that load its rows."""
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
