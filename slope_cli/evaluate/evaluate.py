"""`slope eval`: evaluate a trained model by its perplexity, by what it recalls, and on tasks of lm-eval."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from slope_cli.checkpoint.load import Loaded, load_model
from slope_cli.distributed import launch
from slope_cli.distributed.collectives import Group, join
from slope_cli.errors import UsageError, first_line, one_line, os_reason
from slope_cli.evaluate import lm_tasks
from slope_cli.evaluate.perplexity import length_of, measure, open_validation
from slope_cli.evaluate.recall import measure_recall, recall_lines, split_names
from slope_cli.linearize.linear_attention import BRANCHES
from slope_cli.linearize.swap import linear_windows, using
from slope_cli.utils.environment import environment
from slope_cli.utils.files import write_json
from sparse_kernels import using_backend

REQUESTS = 16
"""Requests of a task at a time."""


def evaluate(
    folder: Path,
    *,
    data_folder: Path | None = None,
    perplexity: bool = True,
    tokens: int | None = None,
    seq_len: int | None = None,
    task_names: Sequence[str] = (),
    task_data: Path | None = None,
    fewshot: int | None = None,
    samples: Path | None = None,
    limit: int | None = None,
    batch: int | None = None,
    branch: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, or a folder that transformers reads, such as `slope export` writes.

    Sparse layers stay sparse, and adapters are part of the model; bf16 on a GPU, else float32. Each of the processes
    that srun or torchrun started has the whole model; blocks of text and requests of tasks are dealt to them.

    Args:
        data_folder: prepared data with validation text; None for the run's own.
        perplexity: whether to measure it, with `tokens` and `seq_len` as in `measure`.
        task_names: recall tasks, of `recall_items.TASKS`, "recall" for all of them; and what `Registry.find` knows,
            with `task_data` and `fewshot` as the folder and number of `Registry.load`.
        samples: a folder to which the rows of each task are written with what was asked and answered, as TASK.jsonl.
        limit: the maximum number of rows of each task, of a group in each of its tasks; None for all. Of a recall task
            that of items of each distance and number of pairs; None for 400.
        batch: sequences at a time; None for the run's micro-batch, and 16 requests of a task.
        branch: the branch that is active in a linearized model: "both", "window" or "linear"; None for the model's.
        seed: of the items of recall tasks.
        out: a file to which the result is written as JSON.

    Returns:
        The same on every rank: run or folder (its name), step, objective, branch if given, perplexity (see `measure`)
        or None, recall (see `measure_recall`; absent without such tasks), tasks (by name, see `lm_tasks.score`), failed
        (the error of each task that could not be scored; absent without one), versions.

    Raises:
        UsageError: no run and no model, an unknown branch or a model without branches, data of another tokenizer,
            no validation text, a block longer than the positions, tasks with a masked model, and as `Registry`.
        SlopeError: no sound checkpoint, damaged data, a loss that is not finite, `out` cannot be written, ranks that
            do not come.
    """
    place = launch.pick_device(device, ranks := launch.ranks())
    group = join(ranks, place)
    group.first(lambda: _check(perplexity or bool(task_names), out, samples, task_data))
    registry, (recall_names, others) = lm_tasks.Registry(), split_names(task_names)
    names = group.first(lambda: registry.find(others)) if others else []
    loaded = load_model(folder, place, group=group)
    if task_names and loaded.objective == "masked":
        raise UsageError(f"{loaded.folder}: predicts masked tokens, not the next one; --tasks needs a causal model")
    dataset = open_validation(loaded, data_folder, group) if perplexity or recall_names else None
    result: dict[str, Any] = {"folder" if loaded.config is None else "run": loaded.name}
    result |= {"step": loaded.step, "objective": loaded.objective, **({"branch": branch} if branch else {})}
    result |= {"perplexity": None, "tasks": {}, "versions": environment() | {"device": loaded.model.device.type}}
    keep = partial(group.first, lambda: write_json(out, result) if out else None)
    with using_backend(loaded.model, "dense"), _only_branch(loaded, branch):
        load = partial(registry.load, folder=task_data, fewshot=fewshot)
        tasks = _Tasks(loaded, names, load, limit=limit, batch=batch or REQUESTS, samples=samples, group=group)
        if dataset is not None and perplexity:
            result["perplexity"] = measure(loaded, dataset, tokens=tokens, seq_len=seq_len, batch=batch, group=group)
            keep()
        if dataset is not None and recall_names:
            how: dict[str, Any] = {"length": length_of(loaded, seq_len), "limit": limit, "batch": batch, "seed": seed}
            result["recall"] = measure_recall(loaded, dataset, recall_names, group=group, **how)
            keep()
        for name in names:
            with _failure_noted(result, name):
                result["tasks"][name] = tasks.score(name)
            keep()
    return result


class _Tasks:
    """Tasks that are asked of a model: rank 0 reads the rows and scores, and every rank answers its share."""

    def __init__(
        self,
        loaded: Loaded,
        names: Sequence[str],
        load: Callable[[str], lm_tasks.LoadedTask],
        *,
        limit: int | None,
        batch: int,
        samples: Path | None,
        group: Group,
    ) -> None:
        """All is read and checked before any is scored: a choice that is too long should not cost hours."""
        self._limit, self._samples, self._group = limit, samples, group
        self._tasks: dict[str, lm_tasks.LoadedTask] = {}
        self._lm: Any = None

        def read() -> dict[str, lm_tasks.Requests]:
            self._tasks = {name: load(name) for name in names}
            self._lm = lm_tasks.harness(loaded.model, loaded.tokenizer, batch)
            return {name: lm_tasks.requests_of(self._lm, task, limit) for name, task in self._tasks.items()}

        self._requests = group.first(read) if names else {}
        if names and not group.ranks.first:
            self._lm = lm_tasks.harness(loaded.model, loaded.tokenizer, batch)

    def score(self, name: str) -> dict[str, Any]:
        """See `lm_tasks.score`; the same on every rank, as are its errors."""
        started, requests = time.perf_counter(), self._requests[name]
        answers = lm_tasks.answers_of(self._lm, requests.asked, self._group)
        samples = self._samples and self._samples / f"{name}.jsonl"
        scores = self._group.first(lambda: lm_tasks.score(self._tasks[name], requests, answers, self._limit, samples))
        if self._group.ranks.first:
            print(f"{name}: {scores['n']:,} rows in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        return scores


def _check(asked: bool, out: Path | None, samples: Path | None, task_data: Path | None) -> None:
    """UsageError if nothing is asked, a result cannot be written, or there is no folder of rows."""
    if not asked:
        raise UsageError("nothing to evaluate: give --tasks, or leave out --no-perplexity")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UsageError(f"--out {out}: " + ("is a folder; name a file" if out.is_dir() else "its folder is missing"))
    if task_data is not None and not task_data.is_dir():
        raise UsageError(f"--task-data {task_data}: no such folder")
    if samples is not None:
        try:
            samples.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--log-samples {samples}: cannot be made: {os_reason(error)}") from None


@contextlib.contextmanager
def _failure_noted(result: dict[str, Any], task_name: str) -> Iterator[None]:
    """Note a task's error, so that the other scores are kept; raise it with --debug."""
    try:
        yield
    except Exception as error:  # lm-eval's errors share no base class
        if "SLOPE_DEBUG" in os.environ:
            raise
        reason = one_line(error) or f"{type(error).__name__}: {first_line(error)}"
        result.setdefault("failed", {})[task_name] = reason


def _only_branch(loaded: Loaded, branch: str | None) -> contextlib.AbstractContextManager[Any]:
    """Activate only this branch of a linearized model."""
    if branch is None:
        return contextlib.nullcontext()
    if branch not in BRANCHES:
        raise UsageError(f"--branch {branch}: choose one of {', '.join(BRANCHES)}")
    if not linear_windows(loaded.model):
        raise UsageError(f"{loaded.folder}: is not linearized, so it has no branches; leave out --branch")
    return using(loaded.model, branch=branch)


# ------------------------------------------------------------------------------------------------------- the report


def report_lines(result: dict[str, Any], *, positions: bool = False) -> list[str]:
    """A result of `evaluate` as lines of text; positions: include the loss by position over all sources."""
    title = result.get("run") or result.get("folder") or ""
    title += f", step {result['step']}" if result["step"] else ""
    lines = [title + (f", branch {result['branch']}" if "branch" in result else "")]
    if (perplexity := result["perplexity"]) is not None:
        unit = "masked token" if result["objective"] == "masked" else "token"
        length = "" if "run" in result else " (--seq-len: as in training)"  # a folder does not say
        lines.append(f"validation text, blocks of {perplexity['seq_len']} tokens{length}; loss in nats per {unit}")
        if len(perplexity["sources"]) > 1:
            lines += [_perplexity_line(name, row) for name, row in perplexity["sources"].items()]
        lines.append(_perplexity_line("all", perplexity))
        if positions:
            lines += [_perplexity_line(f"{row['first']}-{row['last']}", row) for row in perplexity["positions"]]
    if "recall" in result:
        lines += recall_lines(result["recall"])
    if scores := result["tasks"]:
        lines += ["by lm-eval", *(line for name, row in scores.items() for line in _task_lines(name, row))]
        if below := [name for name, row in scores.items() if row.get("below_chance", False)]:
            lines.append(f"below chance (by more than two standard errors): {', '.join(below)}")
        not_above = [name for name, row in scores.items() if not row.get("above_chance", True)]
        if near := [name for name in not_above if name not in below]:
            lines.append(
                f"near chance (within two standard errors of it), as is usual for small models: {', '.join(near)}"
            )
        lines += [
            f"{name}: {row['truncated']:,} of {row['n']:,} rows are longer than the model's positions; "
            "their beginning was truncated"
            for name, row in scores.items()
            if row["truncated"]
        ]
    return [*lines, *(f"{name}: failed: {reason}" for name, reason in result.get("failed", {}).items())]


def _perplexity_line(name: str, row: dict[str, Any]) -> str:
    text = f"  {name:16} loss {_with_error(row['loss'], row.get('stderr'))}  perplexity {row['perplexity']:,.2f}"
    if "bits_per_byte" in row:
        text += f"  bits per byte {row['bits_per_byte']:.4f}"
    return f"{text}  ({row['tokens']:,} tokens)"


def _task_lines(name: str, row: dict[str, Any]) -> Iterator[str]:
    """A line of a task's metrics; one for each member of a group, or tag, that has none of its own."""
    about = f"({row['n']:,} rows, {row['split']}, {row['fewshot'] or 'zero'}-shot)"
    chance = f"  chance {row['chance']:.4f}" if "chance" in row else ""
    yield f"  {name:16}{_metrics(row)}{chance}  {about}"
    if not lm_tasks.metric_names(row):
        yield from (
            f"    {member:14}{_metrics(scores)}  ({scores['n']:,} rows)" for member, scores in row["subtasks"].items()
        )


def _metrics(row: dict[str, Any]) -> str:
    names = lm_tasks.metric_names(row)
    return "".join(f" {name} {_with_error(row[name], row[f'{name}_stderr'])} " for name in names).rstrip()


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
