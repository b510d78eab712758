"""One run of a comparison: its metrics from its own files, its sizes from its shapes, and its terms."""

import json
import re
from bisect import bisect_right
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from slope_cli.checkpoint import run_folder, store
from slope_cli.compare.budget import Budget
from slope_cli.config import configs
from slope_cli.config.schema import Config
from slope_cli.config.values import flat
from slope_cli.errors import SlopeError, UsageError
from slope_cli.methods.accounting import account
from slope_cli.models import shapes
from slope_cli.report import metrics, warned
from slope_cli.train import starts
from slope_cli.train.dry_run import untrained_model
from slope_cli.utils import jsonl
from slope_cli.utils.typed_json import from_json

Terms = dict[str, int | str]
"""The properties that two runs must share for their validation losses to be comparable."""
_PRIVATE = ("time", "command", "host", "slurm_job")
"""Keys of environment.jsonl that do not affect a result."""


@dataclass(frozen=True)
class Validation:
    """A validation after `step` steps and `tokens` tokens: losses in nats per token, over all and by source.

    seconds: of these steps alone, by the run's budget if it has one, else by its log; None in files of version 0.1.
    """

    step: int
    tokens: int
    loss: float
    perplexity: float
    by_source: dict[str, float]
    seconds: float | None = None


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters at the end of a run; active: those that are not pruned."""

    all: int
    trained: int
    active: int


@dataclass(frozen=True)
class Sizes:
    """A run's model at its end.

    training_bytes: with gradients, optimizer state and masks; None where most of the model is frozen. inference_bytes:
    the active parameters in 16 bits, and a mask bit for each weight of a sparse layer.
    """

    parameters: Parameters
    training_bytes: int | None
    inference_bytes: int


@dataclass(frozen=True)
class Run:
    """A finished run.

    lr: None unless the comparison tried learning rates. val: the last one is after the last step. tokens_per_s: the
    median after the first tenth of the steps. train_seconds: of the training steps alone, by the log. first_seconds: by
    how much of them the first step of each start and phase, which compiles, was longer than the median step; None if it
    is not known. peak_memory: bytes, of the allocator of the rank with most. sizes: in one run of each variant.
    share, budget: see `variants.Variant`. warnings: what it has warned of.
    """

    run: str
    variant: str
    lr: float | None
    seed: int
    terms: Terms
    config: dict[str, Any]
    environment: list[dict[str, Any]]
    val: list[Validation]
    tokens: int
    tokens_per_s: float
    train_seconds: float
    peak_memory: int | None
    sizes: Sizes | None = None
    share: float | None = None
    budget: Budget | None = None
    warnings: list[str] = field(default_factory=list)
    first_seconds: float | None = None

    @property
    def steady_seconds(self) -> float | None:
        """Of the training steps as if none had compiled; None if that is not known."""
        return None if self.first_seconds is None else self.train_seconds - self.first_seconds

    @property
    def final(self) -> Validation:
        """The validation after the last step."""
        return self.val[-1]


@dataclass(frozen=True)
class FailedRun:
    """A run that ended with an error."""

    run: str
    variant: str
    lr: float | None
    seed: int
    error: str
    share: float | None = None
    warnings: list[str] = field(default_factory=list)


def read_run(folder: Path, checkpoint: store.Checkpoint | None = None) -> Run:
    """A finished run from its folder, as a variant of its own; checkpoint: its newest, if known to be sound.

    Raises:
        UsageError: the folder holds no run, or an unfinished one.
        SlopeError: a file is damaged.
    """
    config = run_folder.open_config(folder)
    checkpoint = checkpoint or store.latest(folder)
    step, steps = checkpoint.manifest["step"] if checkpoint else 0, config.train.steps
    if checkpoint is None or step != steps:
        raise UsageError(f"{folder}: is unfinished, step {step} of {steps}; train it to its end first")
    manifest, records = checkpoint.manifest, metrics.read(folder)
    train = [record for record in records if record["kind"] in metrics.STEPS]
    tokens = config.train.tokens_per_step
    val = [{**record, "tokens": record["step"] * tokens} for record in records if record["kind"] == "val"]
    if not val or val[-1]["step"] != steps or not train:
        raise SlopeError(f"{folder / metrics.JSONL}: does not contain the validation of step {steps}")
    metrics.require(folder, val, ("val",), "perplexity", "by_source")
    metrics.require(folder, train, metrics.STEPS, "tokens_per_s")
    tokenizer = ", ".join(f"{name} {sha256[:12]}" for name, sha256 in sorted(manifest["tokenizer"].items()))
    name = folder.resolve().name
    taken = [(record["step"], tokens / record["tokens_per_s"]) for record in train if record["tokens_per_s"]]
    passed = [0.0, *accumulate(seconds for _, seconds in taken)]
    for record in val:
        record["seconds"] = passed[bisect_right(taken, record["step"], key=itemgetter(0))]
    return Run(
        run=name,
        variant=name,
        lr=None,
        seed=config.train.seed,
        terms=terms(config) | {"data": manifest["data"], "tokenizer": tokenizer},
        config=portable(config),
        environment=_environments(folder),
        val=[from_json(Validation, record) for record in val],
        tokens=steps * tokens,
        tokens_per_s=median(record["tokens_per_s"] for record in train if record["step"] > steps // 10),
        train_seconds=passed[-1],
        peak_memory=metrics.peak_memory(records),
        warnings=run_warnings(folder),
        first_seconds=_beyond_median(taken, starts.first_steps(folder, records)),
    )


def _beyond_median(taken: Sequence[tuple[int, float]], chosen: Container[int]) -> float | None:
    """By how many seconds the chosen ones among steps, each with its seconds, were longer together than the median."""
    usual = median(seconds for _, seconds in taken) if taken else None
    return None if usual is None else sum(max(0.0, seconds - usual) for step, seconds in taken if step in chosen)


def planned_terms(own: Terms, share: float | None, rule: str | None) -> Terms:
    """The terms of a run in a comparison: its tokens are not those of others if it has a share of their steps, or time
    decides; then what decides, the `rule`, takes their place.
    """
    if share is None and rule is None:
        return own
    others = {key: value for key, value in own.items() if key != "tokens"}
    return others | ({} if rule is None or share is not None else {"tokens": rule})


def portable(config: Config) -> dict[str, Any]:
    """A config as plain JSON, without the folders above its data."""
    path = config.data.path
    named = replace(config, data=replace(config.data, path=Path(path).name if Path(path).is_absolute() else path))
    plain: dict[str, Any] = json.loads(json.dumps(configs.container(named)))
    return plain


def config_of(run: Run) -> Config:
    """The config of a run, which an earlier version may have written; missing keys get their defaults.

    Raises:
        UsageError: keys or values that this version does not know.
    """
    return configs.from_fixed({key: str(value) for key, value in flat(run.config).items()}, run.run)


def without_folders(text: str) -> str:
    """A text with only the last part of each absolute path, so that results do not leak local paths."""
    return re.sub(r"(?<![\w.~-])/(?:[^\s/:;,'\"()]+/)*", "", text)


def run_warnings(folder: Path) -> list[str]:
    """What a run has warned of, without folders."""
    return [without_folders(text) for text in warned.recorded(folder)]


def _environments(folder: Path) -> list[dict[str, Any]]:
    """The distinct environments of a run's starts."""
    path = folder / "environment.jsonl"
    lines = jsonl.read(path) if path.is_file() else []
    distinct: list[dict[str, Any]] = []
    for public in ({key: value for key, value in line.items() if key not in _PRIVATE} for line in lines):
        if public not in distinct:
            distinct.append(public)
    return distinct


def terms(config: Config) -> Terms:
    """The terms of a run that follow from its config."""
    train, name = config.train, config.model.name
    return {
        "tokens": train.steps * train.tokens_per_step,
        "validation": f"{config.log.val_tokens} tokens of each source in sequences of {train.seq_len}",
        "objective": shapes.FAMILIES[shapes.SHAPES[name].family].objective if name in shapes.SHAPES else "",
    }


def require_alike(terms_of: Mapping[str, Terms], allow: bool) -> list[str]:
    """A line for each difference between the terms of the first run and of the others, by name.

    Raises:
        UsageError: there is a difference, unless differences are allowed.
    """
    first, theirs = next(iter(terms_of.items()))
    others: dict[tuple[str, str, str], list[str]] = {}
    for name, own in terms_of.items():
        for key in (key for key in own if key in theirs and own[key] != theirs[key]):
            others.setdefault((key, str(theirs[key])[:60], str(own[key])[:60]), []).append(name)
    lines = [f"{first} and {', '.join(names)} differ in {key}: {a} and {b}" for (key, a, b), names in others.items()]
    if lines and not allow:
        raise UsageError(f"{lines[0]}; add --allow-different to compare them anyway")
    return lines


def add_sizes(rows: Sequence[Run | FailedRun], folders: Sequence[Path]) -> list[Run | FailedRun]:
    """The rows, with sizes in the first finished run of each variant and learning rate; folders: of the runs."""
    sized, result = set(), list(rows)
    for number, (row, folder) in enumerate(zip(rows, folders, strict=True)):
        if isinstance(row, Run) and (key := (row.variant, row.lr)) not in sized:
            sized.add(key)
            result[number] = replace(row, sizes=_sizes(folder))
    return result


def _sizes(folder: Path) -> Sizes:
    config = run_folder.open_config(folder)
    a = account(untrained_model(config, folder), config)
    beside = a.all_adapter_parameters + a.map_parameters
    trained = a.trained_parameters + a.adapter_parameters + a.trained_map_parameters
    return Sizes(
        Parameters(a.dense_parameters + beside, trained, a.active_parameters + beside),
        training_bytes=None if a.frozen_parameters else sum(a.state_bytes.values()),
        inference_bytes=a.inference_bytes,
    )
