"""`slope compare`: runs that differ in one thing, trained where they are not there yet, and set side by side.

OUT/<variant>-s<seed>/      each run; see slope_cli.compare_train for the files beside it
OUT/compare.json, .md       the comparison, read from the runs' own files
OUT/compare.png, .svg       validation loss against tokens
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from omegaconf import OmegaConf

from slope_cli.checkpoint import run_folder, run_model, store
from slope_cli.compare import processes, table, variants
from slope_cli.compare.variants import Planned
from slope_cli.config import load as configs
from slope_cli.config import schema
from slope_cli.config.schema import Config
from slope_cli.data.dataset import open_dataset
from slope_cli.distributed.launch import require_one_process
from slope_cli.distributed.signals import StopFlag, Stopped
from slope_cli.errors import SlopeError, UsageError
from slope_cli.methods import phases
from slope_cli.models import shapes
from slope_cli.models.accounting import account
from slope_cli.models.build import build_model, run_model_config
from slope_cli.report import metrics, plots
from slope_cli.utils.files import atomic_file
from sparse_kernels import sparse_layers

Row = dict[str, Any]
_PRIVATE = ("time", "command", "host", "slurm_job")
"""What environment.jsonl says that is no matter of the result."""


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
    stop: StopFlag | None = None,
) -> Row:
    """Train each variant with each seed (and at each learning rate) in a process of its own, then compare them.

    Finished runs are taken as they are, unfinished ones go on. A run that fails is a row with its error.

    Args:
        methods, extra: see `variants.variants`.
        jobs: processes at a time.
        stop: one that is open already; else one is opened here.

    Returns:
        What is in OUT/compare.json, where it is written too. `failed` counts the runs that failed.

    Raises:
        UsageError: a wrong name or value, runs that cannot be compared, or a folder that holds another run.
        Stopped: a signal asked for it.
    """
    require_one_process()
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: must be 1 or more")
    found = variants.variants(recipe, overrides, methods, extra)
    planned = variants.plan(found, seeds, lrs)
    prints = {run.config.data.path: _fingerprint(run.config, out / run.name) for run in planned}
    terms = {run.name: _terms(run.config) | {"data": prints[run.config.data.path]} for run in planned}
    _require_alike(terms, allow_different)

    sound: dict[str, run_folder.Found] = {}  # what is hashed already

    def finished(run: Planned) -> bool:
        if found := _finished(run, out / run.name, prints[run.config.data.path]):
            sound[run.name] = found
        return found is not None

    stopped = None
    try:
        errors = processes.train(planned, out, jobs, finished, stop)
    except Stopped as error:
        stopped, errors = error, {}
        planned = [run for run in planned if run.name in sound or finished(run)]
    rows = []
    for run in planned:
        row: Row = {"run": run.name, "variant": run.variant, "lr": run.lr, "seed": run.config.train.seed}
        rows.append(row | _read_or_error(out / run.name, errors.get(run.name, ""), sound.get(run.name)))
    notes = [f"{variant.name}: {variant.note}" for variant in found if variant.note]
    if (most := processes.most_at_once(planned, out)) > 1:
        notes.append(f"up to {most} runs at a time shared the machine: their speed is not that of a run alone")
    try:
        return _conclude(rows, out, notes, allow_different) if rows else {}
    finally:
        if stopped is not None:
            raise stopped  # with what is finished set side by side, whatever came of that


def compare_runs(folders: Sequence[Path], *, out: Path, allow_different: bool = False) -> Row:
    """Compare finished runs; those that differ in nothing but the seed are one variant, named after their folder.

    A compare.json stands for all runs of that comparison, under their names there, without their folders.

    Raises:
        UsageError: a folder that is no run, a run that is unfinished, the same one twice, or runs that cannot be
            compared.
    """
    if not folders:
        raise UsageError("--runs: needs the folder of one run at least")
    earlier = [path for path in folders if path.suffix == ".json"]
    rows = [row for path in earlier for row in _earlier(path)]
    notes = [f"runs of {len(earlier)} earlier comparisons"] * (len(earlier) > 1)
    names: dict[str, str] = {}
    for folder in (path for path in folders if path.suffix != ".json"):
        config, row = run_folder.open_config(folder), _read(folder)
        same = {**configs.fixed(config), "train.seed": "", "data": row["terms"]["data"]}
        stem = folder.resolve().name
        key = json.dumps(same, sort_keys=True)
        if key not in names:
            taken = [*names.values(), *(row["variant"] for row in rows)]
            names[key] = _unused(stem.removesuffix(f"-s{config.train.seed}"), taken)
        variant = names[key]
        if any((other["variant"], other["seed"]) == (variant, config.train.seed) for other in rows):
            raise UsageError(f"{folder}: a run of the same config and seed is there already")
        rows.append({"run": stem, "variant": variant, "lr": None, "seed": config.train.seed} | row)
    _require_distinct(rows)
    return _conclude(rows, out, notes, allow_different)


def _earlier(path: Path) -> list[Row]:
    """The runs of a compare.json."""
    try:
        rows: list[Row] = json.loads(path.read_text())["runs"]
        good = [dict(row) for row in rows if not row["error"]]
        sized = {(row["variant"], row["lr"]) for row in good if "sizes" in row}
        if sized != {(row["variant"], row["lr"]) for row in good}:
            raise ValueError
        return good
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: is not a result of slope compare") from None


def _require_distinct(rows: Sequence[Row]) -> None:
    """UsageError if a run is there twice, or a name stands for two configurations."""
    # A setting that the version which wrote a config did not have had its default then.
    defaults = configs.flat(_portable(Config()))
    whole = [defaults | configs.flat(row["config"]) for row in rows]
    seen: dict[tuple[Any, ...], Row] = {}
    for number, (row, config) in enumerate(zip(rows, whole, strict=True)):
        if config in whole[:number]:
            raise UsageError(f"{row['run']}: this run is there twice")
        seedless = {**config, "train.seed": 0}
        if seen.setdefault((row["variant"], row["lr"]), seedless) != seedless:
            raise UsageError(f"{row['run']}: {row['variant']} stands for two configurations; compare their folders")


def _unused(name: str, taken: Sequence[str]) -> str:
    names = (name if number == 1 else f"{name} ({number})" for number in range(1, len(taken) + 2))
    return next(each for each in names if each not in taken)


# ----------------------------------------------------------------------------------------------- what is alike


def _terms(config: Config) -> Row:
    """What must be the same in two runs for their validation losses to be compared."""
    train = config.train
    return {
        "tokens": train.steps * train.tokens_per_step,
        "validation": f"{config.log.val_tokens} tokens of each source in sequences of {train.seq_len}",
        "objective": shapes.SHAPES[config.model.name].objective if config.model.name in shapes.SHAPES else "",
    }


def _require_alike(terms: Mapping[str, Row], allow: bool) -> list[str]:
    """A line for each way in which runs differ from the first; the first as a UsageError unless they are allowed."""
    first, theirs = next(iter(terms.items()))
    others: dict[tuple[str, str, str], list[str]] = {}
    for name, own in terms.items():
        for key in (key for key in own if key in theirs and own[key] != theirs[key]):
            others.setdefault((key, str(theirs[key])[:60], str(own[key])[:60]), []).append(name)
    found = [f"{first} and {', '.join(names)} differ in {key}: {a} and {b}" for (key, a, b), names in others.items()]
    if found and not allow:
        raise UsageError(f"{found[0]}; with --allow-different they are compared all the same")
    return found


def _fingerprint(config: Config, run: Path) -> str:
    """Of the data that a run is to be trained on: of the embedded text, which is prepared in each run, its name."""
    if config.data.path == schema.EMBEDDED:
        return schema.EMBEDDED
    return open_dataset(run_folder.data_folder(config, run), verify=False).fingerprint


def _finished(planned: Planned, run: Path, fingerprint: str) -> run_folder.Found | None:
    """The checkpoint of this very run's last step, if it is there; UsageError if the folder holds another run."""
    if not run_folder.is_run(run):
        return None
    config = run_folder.open_config(run)
    changed = configs.differences(config, planned.config)
    if not store.folders(run):
        return None  # training settles what is in the folder
    if changed:
        raise UsageError(f"{run} holds a run of another config ({'; '.join(changed)}); choose another --out")
    try:
        found = store.latest(run)
    except SlopeError:
        return None  # training says what is wrong with it
    if found is None or found[1]["step"] != planned.config.train.steps:
        return None
    embedded = schema.EMBEDDED in (config.data.path, fingerprint)
    if (config.data.path if embedded else found[1]["data"]) != fingerprint:
        raise UsageError(f"{run} was trained on other data than {planned.config.data.path}; choose another --out")
    if _terms(config) != _terms(planned.config):  # log.val_tokens is no part of what `differences` compares
        values = f"{config.log.val_tokens} -> {planned.config.log.val_tokens}"
        raise UsageError(f"{run} was validated on other text (log.val_tokens: {values}); choose another --out")
    return found


# -------------------------------------------------------------------------------------------------- reading


def _read_or_error(run: Path, error: str, found: run_folder.Found | None) -> Row:
    try:
        return {"error": _without_folders(error)} if error else _read(run, found)
    except SlopeError as fault:
        return {"error": _without_folders(str(fault))}


def _without_folders(text: str) -> str:
    """Absolute paths as their last part: a result names nothing of the machine."""
    return re.sub(r"(?<![\w.~-])/(?:[^\s/:;,'\"()]+/)*", "", text)


def _read(run: Path, found: run_folder.Found | None = None) -> Row:
    """What a finished run's files say of it.

    Args:
        found: its newest checkpoint if that is known to be sound.

    Raises:
        UsageError: not the folder of a run, or it is unfinished.
        SlopeError: a damaged file.
    """
    config = run_folder.open_config(run)
    found = found or store.latest(run)
    step, steps = found[1]["step"] if found else 0, config.train.steps
    if found is None or step != steps:
        raise UsageError(f"{run}: is unfinished, step {step} of {steps}; train it to its end first")
    manifest, records = found[1], metrics.read(run)
    train = [record for record in records if record["kind"] in metrics.STEPS]
    val = [record for record in records if record["kind"] == "val"]
    if not val or val[-1]["step"] != steps or not train:
        raise SlopeError(f"{run / metrics.JSONL}: does not hold the validation of step {steps}")
    tokens = config.train.tokens_per_step
    return {
        "error": "",
        "folder": run,
        "terms": _terms(config) | {"data": manifest["data"], "tokenizer": _together(manifest["tokenizer"])},
        "config": _portable(config),
        "environment": _environments(run),
        "final": val[-1],
        "val": [{**record, "tokens": record["step"] * tokens} for record in val],
        "tokens": steps * tokens,
        "tokens_per_s": median(r["tokens_per_s"] for r in train if r["step"] > steps // 10),
        "train_seconds": sum(tokens / r["tokens_per_s"] for r in train if r["tokens_per_s"]),
        "peak_memory": max((r["peak_memory"] for r in train if "peak_memory" in r), default=None),
    }


def _together(files: Mapping[str, str]) -> str:
    """One word for the tokenizer's files."""
    return ", ".join(f"{name} {sha256[:12]}" for name, sha256 in sorted(files.items()))


def _portable(config: Config) -> Any:
    """The config as it is read back from JSON; of a folder of data its name."""
    path = config.data.path
    named = replace(config, data=replace(config.data, path=Path(path).name if Path(path).is_absolute() else path))
    return json.loads(json.dumps(OmegaConf.to_container(OmegaConf.structured(named))))


def _environments(run: Path) -> list[Row]:
    """What the run was trained on, once for all starts alike."""
    path = run / "environment.jsonl"
    found: list[Row] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        facts = {key: value for key, value in json.loads(line).items() if key not in _PRIVATE}
        if facts not in found:
            found.append(facts)
    return found


def _sizes_of(rows: Sequence[Row]) -> Row:
    """The sizes of one variant's model, which its runs share; kept in one of them for a later comparison."""
    good = [row for row in rows if not row["error"]]
    if good and not any("sizes" in row for row in good):
        good[0]["sizes"] = _sizes(good[0]["folder"])
    found: Row = next((row["sizes"] for row in good if "sizes" in row), {})
    return found


def _sizes(run: Path) -> Row:
    """Parameters and bytes of a run's model as it is at its end, from its shapes."""
    config = run_folder.open_config(run)
    if config.method == "linearize":
        return _linearized_sizes(config, run)
    model = build_model(run_model_config(config), device="meta")
    report = phases.plan(config, model)
    counted = account(config, report, model)
    adapters = counted.adapter_parameters
    pruned = phases.stage(config, config.train.steps - 1).layers in ("sparse", "masked")
    places = sum(layer.out_features * layer.in_features for layer in report.swapped) if report and pruned else 0
    active = (counted.active_parameters if pruned else counted.dense_parameters) + adapters
    return {
        "parameters": {
            "all": counted.dense_parameters + adapters,
            "trained": counted.trained_parameters + adapters,
            "active": active,
        },
        "training_bytes": sum(counted.state_bytes.values()),
        # In 16 bits: the kept weights, and a bit for each place of a pruned layer.
        "inference_bytes": 2 * active + places // 8,
    }


def _linearized_sizes(config: Config, run: Path) -> Row:
    """Of a run that linearizes: its shapes are those of what it began with, which the run's folder describes."""
    model, _ = run_model.build(config, "cpu", run)
    phases.enter(model, config, phases.stage(config, 0), phases.stage(config, config.train.steps - 1))
    active = sum(p.numel() for p in model.parameters())
    sparse = [layer for _, layer in sparse_layers(model)]
    places = sum(layer.out_features * layer.in_features for layer in sparse)
    pruned = places - sum(layer.values.numel() for layer in sparse)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "parameters": {"all": active + pruned, "trained": trained, "active": active},
        "training_bytes": None,  # most of it is frozen
        "inference_bytes": 2 * active + places // 8,
    }


# ----------------------------------------------------------------------------------------------- statistics


def mean_and_error(values: Sequence[float]) -> Row:
    """Mean, its standard error (None for fewer than two values), and the number of values."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": mean(values) if values else None, "stderr": error, "n": len(values)}


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Row:
    """The mean difference of two variants over the seeds that both have, and its standard error."""
    common = [seed for seed in ours if seed in theirs]
    return {**mean_and_error([ours[seed] - theirs[seed] for seed in common]), "seeds": common}


def _losses(rows: Sequence[Row]) -> dict[int, float]:
    return {row["seed"]: row["final"]["loss"] for row in rows}


def _summary(variant: str, lr: float | None, rows: Sequence[Row]) -> Row:
    """One variant at one learning rate, over its seeds."""
    good = [row for row in rows if not row["error"]]
    sources = list(good[0]["final"]["by_source"]) if good else []
    loss = mean_and_error(list(_losses(good).values()))
    shared = [source for source in sources if all(source in row["final"]["by_source"] for row in good)]

    def over(key: str, combine: Callable[[list[float]], float]) -> float | None:
        values = [row[key] for row in good if row[key] is not None]
        return combine(values) if values else None

    return {
        "variant": variant,
        "lr": lr,
        "seeds": [row["seed"] for row in good],
        "failed_seeds": [row["seed"] for row in rows if row["error"]],
        "loss": loss,
        "by_seed": {str(row["seed"]): row["final"]["loss"] for row in good},
        "perplexity": mean_and_error([row["final"]["perplexity"] for row in good]),
        "by_source": {s: mean_and_error([row["final"]["by_source"][s] for row in good]) for s in shared},
        "tokens": over("tokens", max),
        "tokens_per_s": over("tokens_per_s", median),
        "train_seconds": over("train_seconds", mean),
        "peak_memory": over("peak_memory", max),
        "curve": _curve([row["val"] for row in good]),
    }


def _curve(each: Sequence[Sequence[Row]]) -> Row:
    """Validation loss over seeds at the tokens where every seed has one: mean, lowest, highest."""
    seeds = [{record["tokens"]: record["loss"] for record in records} for records in each]
    tokens = [at for at in (seeds[0] if seeds else {}) if all(at in seed for seed in seeds)]
    points = [[seed[at] for seed in seeds] for at in tokens]
    return {"tokens": tokens, "mean": [*map(mean, points)], "low": [*map(min, points)], "high": [*map(max, points)]}


def best_rate(rates: Sequence[Row]) -> Row:
    """The summary with the lowest mean loss over the seeds that all rates have; `lr_at_edge` says whether a rate beyond
    the list may be better still. A rate that lost a seed is compared only where all did."""
    most = max(len(rate["seeds"]) for rate in rates)
    begun = [rate for rate in rates if rate["seeds"]]
    complete = [rate for rate in begun if not rate["failed_seeds"]] or [r for r in begun if len(r["seeds"]) == most]
    common = set[str].intersection(*(set(rate["by_seed"]) for rate in complete)) if complete else set[str]()

    def judged(rate: Row) -> float:
        return float(mean(loss for seed, loss in rate["by_seed"].items() if seed in common or not common))

    best = min(complete, key=judged) if complete else rates[0]
    tried = [rate["lr"] for rate in rates if rate["lr"] is not None]
    return best | {"lr_at_edge": best["lr"] is not None and bool(begun) and best["lr"] in (min(tried), max(tried))}


def _conclude(rows: Sequence[Row], out: Path, notes: Sequence[str], allow_different: bool) -> Row:
    """Check that the runs are alike, set them side by side, and write the result's files."""
    alike = {row["run"]: row["terms"] for row in rows if not row["error"]}
    different = _require_alike(alike, allow_different) if alike else []
    rates = []
    for variant, lr in dict.fromkeys((row["variant"], row["lr"]) for row in rows):
        alike_rows = [row for row in rows if (row["variant"], row["lr"]) == (variant, lr)]
        rates.append(_summary(variant, lr, alike_rows) | _sizes_of(alike_rows))
    found = [
        best_rate([r for r in rates if r["variant"] == name]) for name in dict.fromkeys(r["variant"] for r in rates)
    ]
    for each in found:
        each["gap"] = paired(_of(rows, each), _of(rows, found[0]))
    gpus = dict.fromkeys(str(e.get("gpu") or e.get("device")) for row in rows for e in row.get("environment", ()))
    mixed = [f"trained on {', '.join(gpus)}: speed, time and memory are not alike"] * (len(gpus) > 1)
    result = {
        "baseline": found[0]["variant"],
        "different": different,
        "notes": [*notes, *mixed],
        "variants": found,
        "rates": rates if any(rate["lr"] is not None for rate in rates) else [],
        "runs": [{key: value for key, value in row.items() if key != "folder"} for row in rows],
        "failed": sum(bool(row["error"]) for row in rows),
    }
    return _write(result, out)


def _of(rows: Sequence[Row], summary: Row) -> dict[int, float]:
    key = (summary["variant"], summary["lr"])
    return _losses([row for row in rows if not row["error"] and (row["variant"], row["lr"]) == key])


def _write(result: Row, out: Path) -> Row:
    """Write the result's files; returns the result as it is in JSON."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    with atomic_file(out / "compare.json") as file:
        file.write(text.encode() + b"\n")
    with atomic_file(out / "compare.md") as file:
        file.write(table.markdown(result).encode())
    curves = {each["variant"]: each["curve"] for each in result["variants"] if each["curve"]["tokens"]}
    if curves:
        plots.draw_curves(curves, out / "compare")
    written: Row = json.loads(text)
    return written
