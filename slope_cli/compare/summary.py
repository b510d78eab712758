"""The statistics of a comparison: each variant over its seeds, at its best learning rate, against the first one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, median, stdev

from slope_cli.compare.rows import FailedRun, Parameters, Run, Validation, require_alike


@dataclass(frozen=True)
class Spread:
    """Mean, its standard error (None for fewer than two values), and the number of values."""

    mean: float | None
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Gap(Spread):
    """A difference of two variants over the seeds that both have."""

    seeds: list[int]


@dataclass(frozen=True)
class Curve:
    """Validation loss over the seeds, at the numbers of tokens at which every seed has one."""

    tokens: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Summary:
    """One variant at one learning rate, over its seeds.

    by_seed: the loss after the last step. peak_memory, training_bytes, inference_bytes: bytes, None if unknown.
    lr_at_edge: the best rate is the lowest or highest of those tried. gap: to the baseline; both for its best rate.
    """

    variant: str
    lr: float | None
    seeds: list[int]
    failed_seeds: list[int]
    loss: Spread
    by_seed: dict[int, float]
    perplexity: Spread
    by_source: dict[str, Spread]
    tokens: int | None
    tokens_per_s: float | None
    train_seconds: float | None
    peak_memory: int | None
    curve: Curve
    parameters: Parameters | None = None
    training_bytes: int | None = None
    inference_bytes: int | None = None
    lr_at_edge: bool = False
    gap: Gap | None = None


@dataclass(frozen=True)
class Comparison:
    """The content of compare.json.

    baseline: the first variant. different: a line for each difference between the terms of the runs. variants: each
    at its best learning rate. rates: each at every learning rate, or empty if no rates were tried.
    """

    baseline: str
    different: list[str]
    notes: list[str]
    variants: list[Summary]
    rates: list[Summary]
    runs: list[Run]
    failures: list[FailedRun] = field(default_factory=list)


def summarize(rows: Sequence[Run | FailedRun], notes: Sequence[str], allow_different: bool) -> Comparison:
    """Compare runs, the variants in the order of their first runs.

    Raises:
        UsageError: the runs differ in their terms, unless that is allowed.
    """
    runs = [row for row in rows if isinstance(row, Run)]
    different = require_alike({run.run: run.terms for run in runs}, allow_different) if runs else []
    by_rate: dict[tuple[str, float | None], list[Run | FailedRun]] = {}
    for row in rows:
        by_rate.setdefault((row.variant, row.lr), []).append(row)
    rates = [_summary(*key, alike) for key, alike in by_rate.items()]
    names = dict.fromkeys(rate.variant for rate in rates)
    best = [best_rate([rate for rate in rates if rate.variant == name]) for name in names]
    gpus = dict.fromkeys(str(e.get("gpu") or e.get("device")) for run in runs for e in run.environment)
    mixed = [f"trained on {', '.join(gpus)}: speed, time and memory are not comparable"] * (len(gpus) > 1)
    return Comparison(
        baseline=best[0].variant,
        different=different,
        notes=[*notes, *mixed],
        variants=[replace(each, gap=paired(each.by_seed, best[0].by_seed)) for each in best],
        rates=rates if any(rate.lr is not None for rate in rates) else [],
        runs=runs,
        failures=[row for row in rows if isinstance(row, FailedRun)],
    )


def mean_and_error(values: Sequence[float]) -> Spread:
    """Mean and standard error of any number of values."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Spread(mean(values) if values else None, error, len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Gap:
    """The mean difference of two variants, ours minus theirs by seed, and its standard error."""
    common = [seed for seed in ours if seed in theirs]
    return Gap(**vars(mean_and_error([ours[seed] - theirs[seed] for seed in common])), seeds=common)


def best_rate(rates: Sequence[Summary]) -> Summary:
    """The summary with the lowest mean loss over the seeds that all rates have, and `lr_at_edge`.

    A rate with a failed seed is only considered if every rate has one.
    """
    most = max(len(rate.seeds) for rate in rates)
    begun = [rate for rate in rates if rate.seeds]
    complete = [rate for rate in begun if not rate.failed_seeds] or [r for r in begun if len(r.seeds) == most]
    common = set[int].intersection(*(set(rate.by_seed) for rate in complete)) if complete else set[int]()

    def mean_loss(rate: Summary) -> float:
        return mean(loss for seed, loss in rate.by_seed.items() if seed in common or not common)

    best = min(complete, key=mean_loss) if complete else rates[0]
    tried = [rate.lr for rate in rates if rate.lr is not None]
    return replace(best, lr_at_edge=best.lr is not None and bool(begun) and best.lr in (min(tried), max(tried)))


def _summary(variant: str, lr: float | None, rows: Sequence[Run | FailedRun]) -> Summary:
    runs = [row for row in rows if isinstance(row, Run)]
    by_seed = {run.seed: run.final.loss for run in runs}
    sources = [s for s in (runs[0].final.by_source if runs else ()) if all(s in run.final.by_source for run in runs)]
    peaks = [run.peak_memory for run in runs if run.peak_memory is not None]
    sizes = next((run.sizes for run in runs if run.sizes), None)
    return Summary(
        variant=variant,
        lr=lr,
        seeds=[run.seed for run in runs],
        failed_seeds=[row.seed for row in rows if isinstance(row, FailedRun)],
        loss=mean_and_error(list(by_seed.values())),
        by_seed=by_seed,
        perplexity=mean_and_error([run.final.perplexity for run in runs]),
        by_source={source: mean_and_error([run.final.by_source[source] for run in runs]) for source in sources},
        tokens=max((run.tokens for run in runs), default=None),
        tokens_per_s=median(run.tokens_per_s for run in runs) if runs else None,
        train_seconds=mean(run.train_seconds for run in runs) if runs else None,
        peak_memory=max(peaks, default=None),
        curve=_curve([run.val for run in runs]),
        **(vars(sizes) if sizes else {}),
    )


def _curve(runs: Sequence[Sequence[Validation]]) -> Curve:
    seeds = [{validation.tokens: validation.loss for validation in run} for run in runs]
    tokens = [at for at in (seeds[0] if seeds else {}) if all(at in seed for seed in seeds)]
    points = [[seed[at] for seed in seeds] for at in tokens]
    return Curve(tokens, [*map(mean, points)], [*map(min, points)], [*map(max, points)])
