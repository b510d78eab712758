"""`slope compare`: train variants of a recipe, or take finished runs, and compare them.

OUT/<variant>-s<seed>/      each run; see slope_cli.compare.processes for the files beside it
OUT/compare.json, .md       the comparison, from the runs' own files
OUT/compare.png, .svg       validation loss against tokens
OUT/compare-time.png, .svg  validation loss against the time of training steps
OUT/step-times.*            with equal time; see slope_cli.compare.step_times
"""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from slope_cli.checkpoint import run_folder, store
from slope_cli.compare import processes, step_times, table, variants
from slope_cli.compare.rows import (
    FailedRun,
    Run,
    add_sizes,
    config_of,
    planned_terms,
    portable,
    read_run,
    require_alike,
    run_warnings,
    terms,
    without_folders,
)
from slope_cli.compare.summary import Comparison, summarize, warnings_of
from slope_cli.compare.variants import PlannedRun
from slope_cli.config import configs, schema
from slope_cli.config.schema import Config
from slope_cli.config.values import flat
from slope_cli.data.dataset import open_dataset
from slope_cli.distributed.launch import require_one_process
from slope_cli.distributed.signals import StopFlag, Stopped
from slope_cli.errors import SlopeError, UsageError
from slope_cli.report import plots
from slope_cli.utils.files import atomic_file, write_json
from slope_cli.utils.shards import shard_of
from slope_cli.utils.typed_json import from_json

TIMES = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
"""Units of time by their seconds."""
FILE = "compare.json"
EQUAL = ("tokens", "time")
"""What all variants can have alike."""


def compare(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    out: Path,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (1,),
    extra: Sequence[str] = (),
    lrs: Sequence[float] = (),
    jobs: int = 1,
    allow_different: bool = False,
    shard: str | None = None,
    equal: str = "tokens",
    exchange: float | None = None,
    stop: StopFlag | None = None,
) -> Comparison:
    """Train each variant with each seed (and at each learning rate) in a process of its own, and compare the runs.

    Finished runs are used as they are, unfinished ones resume. A run that fails is a row with its error.

    Args:
        methods, extra: see `variants.variants`.
        jobs: processes at a time.
        shard: "I/N": train and compare only the runs I, I + N, … and do not write the result. The tasks of a job array
            do so beside one another; then the same call without it compares all runs.
        equal: "tokens", or "time": the first variant keeps its steps, the others get as many as its time buys.
        exchange: also train the first variant with this share of its steps, to tell what a loss is worth in steps.
        stop: an open flag; by default one is opened here.

    Raises:
        UsageError: a wrong name or value, runs that cannot be compared, or a folder that holds another run.
        Stopped: a signal arrived; the finished runs have been compared.
    """
    require_one_process()
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: must be 1 or more")
    if equal not in EQUAL:
        rule = "choose tokens or time; a dense model of the sparse one's bytes is the variant same-bytes"
        raise UsageError(f"--equal {equal}: {rule}")
    compared = variants.variants(recipe, overrides, methods, extra)
    if exchange is not None:
        compared.append(compared[0].shortened(exchange))
    planned = variants.planned_runs(compared, seeds, lrs)
    data = {run.config.data.path: _fingerprint(run.config, out / run.name) for run in planned}
    own = {run.name: terms(run.config) | {"data": data[run.config.data.path]} for run in planned}
    decides = None if equal == "tokens" else "equal time"
    require_alike({run.name: planned_terms(own[run.name], run.share, decides) for run in planned}, allow_different)
    with contextlib.nullcontext(stop) if stop else StopFlag() as stop:
        measured: list[str] = []
        if equal == "time":
            compared, measured = step_times.equal_time(compared, out, stop)
        planned = variants.planned_runs(compared, seeds, lrs)
        notes = [*(f"{variant.name}: {variant.note}" for variant in compared if variant.note), *measured]
        if shard:
            planned = _share(planned, shard)
            notes.append(f"only the runs of --shard {shard}; the same command without it compares all")
        advice = warnings_of((run.variant, run.lr, run.seed, run.advice) for run in planned)
        for line in table.warning_lines(advice, len(planned)):
            print(line, file=sys.stderr)
        return _train(planned, data, notes, out, jobs, allow_different, shard, stop)


def _train(
    planned: Sequence[PlannedRun],
    data: Mapping[str, str],
    notes: Sequence[str],
    out: Path,
    jobs: int,
    allow_different: bool,
    shard: str | None,
    stop: StopFlag,
) -> Comparison:
    """Train what is not finished, and compare all; the arguments are those of `compare` and of `_finished`."""
    finished = {run.name: last for run in planned if (last := _finished(run, out / run.name, data))}

    def conclude(chosen: Sequence[PlannedRun], errors: dict[str, str]) -> Comparison:
        rows = [_row(run, out / run.name, errors.get(run.name, ""), finished.get(run.name)) for run in chosen]
        shared = []
        if (most := processes.most_at_once(chosen, out)) > 1:
            shared = [f"up to {most} runs at a time shared the machine: their speed is not that of a run alone"]
        sized = add_sizes(rows, [out / run.name for run in chosen])
        result = summarize(sized, [*notes, *shared], allow_different)
        return result if shard else _write(result, out)

    try:
        errors = processes.train(planned, finished, out, jobs, stop)
    except Stopped as stopped:
        try:
            if done := [run for run in planned if run.name in finished or _finished(run, out / run.name, data)]:
                conclude(done, {})
        finally:
            raise stopped  # even if the comparison failed
    return conclude(planned, errors)


def _share(planned: list[PlannedRun], shard: str) -> list[PlannedRun]:
    number, count = shard_of(shard)
    if count > len(planned):
        raise UsageError(f"--shard {shard}: there are only {len(planned)} runs (sbatch --array=1-{len(planned)})")
    return planned[number - 1 :: count]


def compare_runs(folders: Sequence[Path], *, out: Path, allow_different: bool = False) -> Comparison:
    """Compare finished runs; those that differ only in the seed are one variant, named after their folder.

    A compare.json, or the folder that it is in, stands for all runs of that comparison, under their names there, and
    for its notes; the runs' own folders are not needed.

    Raises:
        UsageError: a folder holds no run or an unfinished one, a run is given twice, or the runs cannot be compared.
    """
    if not folders:
        raise UsageError("--runs: give the folder of at least one run")
    folders = [path if run_folder.is_run(path) or not (path / FILE).is_file() else path / FILE for path in folders]
    files = [path for path in folders if path.suffix == ".json"]
    folders = [path for path in folders if path.suffix != ".json"]
    before = [_earlier(path) for path in files]
    earlier = [run for found, _ in before for run in found]
    names: dict[str, str] = {}
    runs: list[Run] = []
    for folder in folders:
        config, run = run_folder.open_config(folder), read_run(folder)
        key = json.dumps({**configs.fixed(config), "train.seed": "", "data": run.terms["data"]}, sort_keys=True)
        if key not in names:
            taken = [*names.values(), *(each.variant for each in earlier)]
            names[key] = _unused(run.variant.removesuffix(f"-s{run.seed}"), taken)
        if same := next((each for each in runs if (each.variant, each.seed) == (names[key], run.seed)), None):
            raise UsageError(f"{folder}: duplicate run, with the config and seed of {same.run}")
        runs.append(replace(run, variant=names[key]))
    _require_distinct([*earlier, *runs])
    notes = [f"runs of {len(files)} earlier comparisons"] * (len(files) > 1)
    notes += [note for _, own in before for note in own]
    return _write(summarize([*earlier, *add_sizes(runs, folders)], notes, allow_different), out)


def _earlier(path: Path) -> tuple[list[Run], list[str]]:
    """The finished runs of a compare.json, which may be of an older version, and its notes."""
    try:
        content = json.loads(path.read_text())
        runs = [from_json(Run, row) for row in content["runs"] if not row.get("error")]
        notes = [str(note) for note in content.get("notes", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        runs = None
    if runs is None or {run.variant for run in runs} != {run.variant for run in runs if run.sizes}:
        raise UsageError(f"{path}: is not a result of slope compare")
    if not runs:
        raise UsageError(f"{path}: holds no finished run")
    return runs, notes


def _require_distinct(runs: Sequence[Run]) -> None:
    """UsageError for a duplicate run, or a name with two configurations."""
    whole = [flat(portable(config_of(run))) for run in runs]
    seen: dict[tuple[str, float | None], dict[str, Any]] = {}
    for number, (run, config) in enumerate(zip(runs, whole, strict=True)):
        if config in whole[:number]:
            raise UsageError(f"{run.run}: duplicate run")
        # Each comparison measures its own step times.
        seedless = {**config, "train.seed": 0} | ({"train.steps": 0} if run.budget else {})
        if seen.setdefault((run.variant, run.lr), seedless) != seedless:
            raise UsageError(f"{run.run}: {run.variant} names two configurations; compare their folders")


def _unused(name: str, taken: Sequence[str]) -> str:
    names = (name if number == 1 else f"{name} ({number})" for number in range(1, len(taken) + 2))
    return next(each for each in names if each not in taken)


def _fingerprint(config: Config, run: Path) -> str:
    """The fingerprint of a run's data, or the name of the embedded text, which each run prepares for itself."""
    if config.data.path == schema.EMBEDDED:
        return schema.EMBEDDED
    return open_dataset(run_folder.data_folder(config, run), verify=False).fingerprint


def _finished(planned: PlannedRun, run: Path, data: Mapping[str, str]) -> store.Checkpoint | None:
    """The checkpoint of a planned run's last step if it exists; UsageError if the folder holds another run.

    data: the fingerprints of data sets by their paths.
    """
    if not run_folder.is_run(run):
        return None
    config = run_folder.open_config(run)
    changed = configs.differences(config, planned.config)
    if not store.folders(run):
        return None  # training handles the contents of the folder
    if changed:
        raise UsageError(f"{run} holds a run of another config ({'; '.join(changed)}); choose another --out")
    try:
        checkpoint = store.latest(run)
    except SlopeError:
        return None  # training reports the fault
    if checkpoint is None or checkpoint.manifest["step"] != planned.config.train.steps:
        return None
    fingerprint = data[planned.config.data.path]
    embedded = schema.EMBEDDED in (config.data.path, fingerprint)
    if (config.data.path if embedded else checkpoint.manifest["data"]) != fingerprint:
        raise UsageError(f"{run} was trained on other data than {planned.config.data.path}; choose another --out")
    if terms(config) != terms(planned.config):  # `differences` does not compare log.val_tokens
        values = f"{config.log.val_tokens} -> {planned.config.log.val_tokens}"
        raise UsageError(f"{run} was validated on other text (log.val_tokens: {values}); choose another --out")
    return checkpoint


def _row(planned: PlannedRun, run: Path, error: str, checkpoint: store.Checkpoint | None) -> Run | FailedRun:
    """The row of a planned run after training, or of its failure."""
    if not error:
        try:
            return _as_planned(read_run(run, checkpoint), planned)
        except SlopeError as fault:
            error = str(fault)
    own = planned.name, planned.variant, planned.lr, planned.seed, without_folders(error), planned.share
    return FailedRun(*own, _warnings(planned, run_warnings(run)))


def _warnings(planned: PlannedRun, own: Sequence[str]) -> list[str]:
    """What a planned run and its configuration warn of."""
    return list(dict.fromkeys([*map(without_folders, planned.advice), *own]))


def _as_planned(run: Run, planned: PlannedRun) -> Run:
    """A run with what its comparison knows of it; the times of its validations are those of its budget."""
    own, share = planned.budget, planned.share
    val = [replace(each, seconds=own.seconds_until(each.step)) for each in run.val] if own else run.val
    agreed = planned_terms(run.terms, share, own.rule if own else None)
    warnings = _warnings(planned, run.warnings)
    named = replace(run, variant=planned.variant, lr=planned.lr, share=share, budget=own)
    return replace(named, terms=agreed, val=val, warnings=warnings)


def _write(result: Comparison, out: Path) -> Comparison:
    """Write compare.json, compare.md and the picture of a comparison, and return it."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, asdict(result))
    with atomic_file(out / "compare.md") as file:
        file.write(table.document(result).markdown().encode())
    curves = {each.variant: vars(each.curve) for each in result.variants if each.curve.tokens}
    if curves:
        plots.draw_curves(curves, out / "compare")
    if timed := {name: curve for name, curve in curves.items() if curve["seconds"]}:  # not in results of version 0.1
        longest = max(curve["seconds"][-1] for curve in timed.values())
        size, unit = next((size, unit) for size, unit in TIMES if longest >= size or size == 1)
        over_time = {name: {**curve, "time": [s / size for s in curve["seconds"]]} for name, curve in timed.items()}
        label = f"{unit} of training steps as {'measured' if result.equal == 'time' else 'logged'}"
        plots.draw_curves(over_time, out / "compare-time", over="time", label=label)
    return result
