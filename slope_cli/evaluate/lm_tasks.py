"""Tasks of lm-eval: its own prompts and scoring, on rows from the Hugging Face Hub or from local files."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.distributed.collectives import Group
from slope_cli.errors import SlopeError, UsageError, did_you_mean, first_line, missing
from slope_cli.evaluate.recall_items import GROUP, TASKS
from slope_cli.evaluate.rows import member_name, members, require_answers, unreadable, use_files
from slope_cli.utils.files import atomic_file

if TYPE_CHECKING:  # lm-eval is an optional dependency
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry
    from lm_eval.tasks.manager import TaskDict

Asked = dict[str, list[tuple[Any, ...]]]
"""The arguments of requests by their kind: loglikelihood, loglikelihood_rolling or generate_until."""
Answers = dict[str, list[Any]]
"""What the model answers to each request."""

FEWSHOT_SEED = 1234
"""That of lm-eval's own program, by which it draws examples."""


class LoadedTask(NamedTuple):
    """A task, group or tag ready to be scored: lm-eval's objects for it, and the split of its rows."""

    name: str
    task_dict: TaskDict
    split: str

    @property
    def leaves(self) -> dict[str, ConfigurableTask]:
        """The tasks that have rows: the task itself, or all those of its group."""
        return dict(self.task_dict["tasks"])


# ------------------------------------------------------------------------------------------------------- loading


class Registry:
    """lm-eval's tasks, groups and tags, and those of YAML files."""

    def __init__(self) -> None:
        self._manager: TaskManager

    def find(self, words: Sequence[str]) -> list[str]:
        """The names of what `words` mean, each once: names of lm-eval's registry, or paths of YAML files of tasks.

        A group in a file may list tasks in files beside it.

        Raises:
            UsageError: an unknown name, or lm-eval is not installed.
        """
        try:
            import lm_eval
            import lm_eval.models.huggingface
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise missing("--tasks", error.name, "eval") from None
        base = Path(lm_eval.__file__).parent / "tasks"
        own = {word: _entry_of_file(Path(word)) for word in words if word.endswith((".yaml", ".yml"))}
        names = list(dict.fromkeys(own[word].name if word in own else word for word in words))
        beside = [str(Path(word).resolve().parent) for word, entry in own.items() if entry.kind.name == "GROUP"]
        # Reading all of lm-eval's files takes many seconds, and most tasks are in a folder of their name's first words.
        near = dict.fromkeys(str(folder) for name in names for folder in _folders(base, name)[:1])
        for how in ({"include_defaults": False, "include_path": [*near, *beside]}, {"include_path": beside}):
            with quiet():
                self._manager = TaskManager(**how)
            self._manager.task_index.update({entry.name: entry for entry in own.values()})
            if all(self._is_whole(name) for name in names):
                return names
        for name in names:
            if name not in self._manager.task_index:
                hint = did_you_mean(name, [GROUP, *TASKS, *self._manager.all_tasks], "`lm-eval ls tasks` lists them")
                raise UsageError(f"--tasks {name}: unknown task; {hint}")
        return names

    def _is_whole(self, name: str, *, listed: bool = False) -> bool:
        """Whether a task is known, or a group with all that it lists.

        A tag may have members in any file; but one that a group lists is of the group's own folder.
        """
        entry = self._manager.task_index.get(name)
        if entry is None or (entry.kind.name == "TAG" and not listed):
            return False
        inside = members(self._manager, name) or []
        return all(self._is_whole(member_name(each), listed=True) for each in inside if isinstance(each, str))

    def load(self, name: str, folder: Path | None, fewshot: int | None = None) -> LoadedTask:
        """A task with its rows.

        Args:
            name: as returned by `find`.
            folder: of local rows, see `use_files`; None for those that the task's own settings name.
            fewshot: the examples in a prompt, if the task's settings do not rule them out; None for their number.

        Raises:
            UsageError: a task has no rows in the folder, or a row does not fit its task.
            SlopeError: the rows cannot be downloaded.
        """
        with quiet():
            if folder is not None:
                use_files(self._manager, name, folder)
            try:
                task_dict = self._manager.load([name])
            except Exception as error:  # the errors of datasets, the Hub, HTTP and tasks share no base class
                if folder is not None:
                    raise unreadable([folder / name], error) from error
                advice = "connect to a network, or give --task-data with a folder of rows"
                raise SlopeError(f"{name}: could not be loaded ({first_line(error)}); {advice}") from error
            for task in task_dict["tasks"].values():
                if folder is not None:
                    _require_answers(task, folder)
                own = task.get_config("num_fewshot")
                task.set_config("num_fewshot", own or 0 if fewshot is None or own == 0 else fewshot)
        config = next(iter(task_dict["tasks"].values())).config
        return LoadedTask(name, task_dict, config.test_split or config.validation_split)


def _folders(base: Path, name: str) -> list[Path]:
    """The folders that a task of lm-eval may be in, by the first words of its name; the likeliest first."""
    words = name.split("_")
    folders = [base / "_".join(words[:count]) for count in range(len(words), 0, -1)]
    return [place for folder in folders for place in (folder / "default", folder) if place.is_dir()]


def _entry_of_file(path: Path) -> Entry:
    """lm-eval's entry for the task or group of a YAML file; UsageError if there is none."""
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[str, Entry] = {}
    try:
        TaskIndex.process_cfg(load_yaml(path.resolve(), resolve_func=False), path.resolve(), found)
    except Exception as error:  # those of YAML, files and lm-eval share no base class
        raise UsageError(f"--tasks {path}: is no task ({first_line(error)})") from error
    return next(entry for entry in found.values() if entry.kind.name != "TAG")


def _require_answers(task: ConfigurableTask, folder: Path) -> None:
    try:
        require_answers(task, folder)
    except UsageError:
        raise
    except Exception as error:  # a template or function of the task that finds no such field
        raise unreadable([folder / str(task.config.task)], error) from error


# ------------------------------------------------------------------------------------------------------- scoring


def harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: int) -> HFLM:
    """lm-eval's wrapper of a causal model, with `batch` requests at a time; bf16 on a GPU."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return HFLM(model, batch_size=batch, **wrapper_options(model, tokenizer))


def wrapper_options(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The options of lm-eval's wrapper for a model that is loaded."""
    # Without context, lm-eval begins with the beginning- or end-of-text token, if there is one.
    has_ends = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
    precision = {"mixed_precision_dtype": "bfloat16", "softmax_dtype": "float32"} if model.device.type == "cuda" else {}
    begin = None if has_ends else tokenizer.sep_token_id
    return {"tokenizer": tokenizer, "prefix_token_id": begin, "trust_remote_code": False, **precision}


class Requests(NamedTuple):
    """What a task asks.

    Attributes:
        asked: in the order in which lm-eval asks it.
        chances: of each row, the accuracy of a random choice; empty unless all rows have choices.
        truncated: the number of rows that are longer than the model's positions.
    """

    asked: Asked
    chances: list[float]
    truncated: int


def requests_of(lm: HFLM, task: LoadedTask, limit: int | None = None) -> Requests:
    """The requests of a task; UsageError for a choice that is longer than the model's positions."""
    asked: Asked = defaultdict(list)
    chances: list[float] = []
    truncated = 0
    with quiet():
        for leaf in task.leaves.values():
            leaf.set_fewshot_seed(FEWSHOT_SEED)
            leaf.build_all_requests(limit=limit, rank=0, world_size=1)
            for instance in leaf.instances:
                asked[instance.request_type] += [instance.args] * instance.repeats
            truncated += len({each.doc_id for each in leaf.instances if _too_long(lm, task.name, each)})
            if leaf.OUTPUT_TYPE == "multiple_choice":
                # That metric also asks for each choice without its context.
                times = 2 if "acc_mutual_info" in leaf._metric_fn_list else 1
                chances += [times / count for count in Counter(each.doc_id for each in leaf.instances).values()]
    if any(leaf.OUTPUT_TYPE != "multiple_choice" for leaf in task.leaves.values()):
        chances = []
    return Requests(dict(asked), chances, truncated)


def _too_long(lm: HFLM, name: str, request: Instance) -> bool:
    """Whether a request is longer than the model's positions; UsageError if the scored part alone is."""
    if request.request_type == "loglikelihood_rolling":  # read in windows
        return False
    context, rest = request.args
    if request.request_type == "generate_until":
        new = rest.get("max_gen_toks", lm.max_gen_toks)
        return bool(len(lm.tok_encode(context, add_special_tokens=False)) + new > lm.max_length)
    if len((context + rest).encode()) <= lm.max_length:  # a token has at least one byte
        return False
    answer, prompt = (len(lm.tok_encode(text, add_special_tokens=False)) for text in (rest, context))
    if answer > lm.max_length:
        raise UsageError(f"{name}: a choice has {answer} tokens, but the model only {lm.max_length} positions")
    return bool(prompt + answer > lm.max_length + 1)  # the last token is scored, but not read


def answers_of(lm: HFLM, asked: Asked, group: Group | None = None) -> Answers:
    """The answers to requests, in their order.

    Args:
        group: the ranks to which they are dealt, those of one context to the same rank, which reads it once; every rank
            calls this with the same requests and gets all answers.
    """
    from lm_eval.api.instance import Instance

    group = group or Group()
    answers: Answers = {}
    for kind, arguments in asked.items():
        numbers = {context: number for number, context in enumerate(dict.fromkeys(each[0] for each in arguments))}
        own = [n for n, each in enumerate(arguments) if numbers[each[0]] % group.ranks.world == group.ranks.rank]

        def answer(kind: str = kind, own: list[int] = own) -> dict[int, Any]:
            requests = [Instance(kind, {}, asked[kind][n], n) for n in own]
            with quiet():
                return dict(zip(own, getattr(lm, kind)(requests), strict=True)) if own else {}

        by_number = {n: found for part in group.gather(group.agreed(answer)) for n, found in part.items()}
        answers[kind] = [by_number[n] for n in range(len(arguments))]
    return answers


def score(
    task: LoadedTask, requests: Requests, answers: Answers, limit: int | None = None, samples: Path | None = None
) -> dict[str, Any]:
    """Score a task.

    Args:
        requests: of this task and limit.
        answers: to them.
        limit: the maximum number of rows, of a group in each of its tasks; None for all.
        samples: the file for a JSON object of each row: what was asked, answered and found.

    Returns:
        The metrics that lm-eval gives the task, such as acc, with their standard errors (None if unknown); those of
        other filters than "none" as METRIC,FILTER. For choices also `chance`, the expected accuracy of random ones, and
        `above_chance` and `below_chance`, whether acc is more than two standard errors of these above or below it. `n`
        rows of `split`; `fewshot` examples in a prompt; `truncated`, the number of rows whose prompt is longer than the
        model's positions and loses its beginning; lm-eval's `version` of the task; for a group or tag also `subtasks`
        and `groups`.
    """
    import lm_eval

    for leaf in task.leaves.values():
        leaf.set_fewshot_seed(FEWSHOT_SEED)  # so that the same examples are drawn again
    log = samples is not None or any("bypass" in leaf._metric_fn_list for leaf in task.leaves.values())
    with quiet():
        output = lm_eval.evaluate(_answering(requests.asked, answers), task.task_dict, limit=limit, log_samples=log)
    results, sizes = output["results"], {name: size["effective"] for name, size in output["n-samples"].items()}
    n, scores = sum(sizes[name] for name in task.leaves), _scores(results.get(task.name, {}))
    if requests.chances and "acc" in scores:
        chance, error = sum(requests.chances) / n, math.sqrt(sum(p * (1 - p) for p in requests.chances)) / n
        above, below = scores["acc"] > chance + 2 * error, scores["acc"] < chance - 2 * error
        scores |= {"chance": chance, "above_chance": above, "below_chance": below}
    first = next(iter(task.leaves))
    scores |= {"n": n, "split": task.split, "fewshot": output["n-shot"][first], "truncated": requests.truncated}
    scores["version"] = output["versions"].get(task.name)
    if list(task.leaves) != [task.name]:
        groups = task.task_dict.get("groups", {})
        scores["groups"] = {name: _scores(results.get(name, {})) for name in groups if name != task.name}
        short = {name: name.removeprefix(f"{task.name}_") for name in task.leaves}
        scores["subtasks"] = {short[name]: _scores(results[name]) | {"n": sizes[name]} for name in task.leaves}
    if samples is not None:
        with atomic_file(samples) as file:
            for name, rows in output["samples"].items():
                for row in rows:
                    file.write(json.dumps({"task": name} | row, default=str, ensure_ascii=False).encode() + b"\n")
    return scores


def _answering(asked: Asked, answers: Answers) -> LM:
    """A model that knows the answers to these requests, which lm-eval asks in the same order."""
    from lm_eval.api.model import LM

    def answer(kind: str, requests: list[Instance]) -> list[Any]:
        if [request.args for request in requests] != asked[kind]:
            raise RuntimeError(f"lm-eval asks other {kind} requests the second time")
        return answers[kind]

    class Answering(LM):  # type: ignore[misc] # lm-eval has no types
        def loglikelihood(self, requests: list[Instance]) -> list[Any]:
            return answer("loglikelihood", requests)

        def loglikelihood_rolling(self, requests: list[Instance]) -> list[Any]:
            return answer("loglikelihood_rolling", requests)

        def generate_until(self, requests: list[Instance]) -> list[Any]:
            return answer("generate_until", requests)

    return Answering()


def metric_names(scores: Mapping[str, Any]) -> list[str]:
    """The metrics among what `score` returns."""
    return [name for name in scores if f"{name}_stderr" in scores]


def _scores(result: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's `acc,none` and `acc_stderr,none` under plain names; its N/A becomes None."""
    scores: dict[str, Any] = {}
    for key, value in result.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
            name = metric if filtered == "none" else key
            error = result.get(f"{metric}_stderr,{filtered}")
            scores[name] = float(value)
            scores[f"{name}_stderr"] = float(error) if isinstance(error, int | float) else None
    return scores


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
