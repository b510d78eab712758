"""The statistics of a comparison: each variant over its seeds, at its best learning rate, against the first one."""

import math
from collections.abc import Iterable, Mapping, Sequence
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
    """A difference of two variants over the seeds that both have.

    undecided: it is smaller than twice its standard error; None for a single seed, which has none.
    """

    seeds: list[int]
    undecided: bool | None = None


@dataclass(frozen=True)
class Exchange:
    """What a loss is worth in steps, from the baseline's runs with all of its steps and with fewer.

    variant, steps: of the shorter runs. nats: by how much their loss is higher.
    per_log_step: nats for a unit of the natural logarithm of the steps; None if `nats` is no more than twice its
    standard error, or not above 0.
    """

    variant: str
    steps: int
    nats: Gap
    per_log_step: float | None


@dataclass(frozen=True)
class Worth:
    """A gap as a difference of the baseline's length, with which it would have the variant's loss.

    steps: how many more steps; negative for a variant that is worse. time: by which share that would take longer than
    the variant's own steps. error: the standard error of both, as a share; None for a single seed.
    extrapolated: the length is not between those that the exchange rate was measured with.
    """

    steps: float
    time: float | None
    error: float | None
    extrapolated: bool


@dataclass(frozen=True)
class TimeGap:
    """By which share the steps of a variant took longer than the baseline's, by the logs, over the seeds of both.

    steady: without what the first steps of starts and phases, which compile, took beyond the median step; None if that
    is not known.
    """

    logged: float
    steady: float | None


@dataclass(frozen=True)
class Curve:
    """Validation loss over the seeds, at the numbers of tokens at which every seed has one.

    seconds: the mean time of the steps until then; empty if it is not known.
    """

    tokens: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """One variant at one learning rate, over its seeds.

    by_seed: the loss after the last step. peak_memory, training_bytes, inference_bytes: bytes, None if unknown.
    lr_at_edge: the best rate is the lowest or highest of those tried. gap: to the baseline; both for its best rate.
    share: see `variants.Variant`. step_seconds: the mean of a step, in alternating rounds if the run has a budget, else
    the median of its log. budget_seconds: of all steps by these rounds. worth: of the gap, by the exchange rate.
    time_gap: of a variant that was given the baseline's time.
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
    share: float | None = None
    steps: int | None = None
    step_seconds: float | None = None
    budget_seconds: float | None = None
    worth: Worth | None = None
    time_gap: TimeGap | None = None

    @property
    def seconds(self) -> float | None:
        """Of all steps: by the budget, or as logged."""
        return self.train_seconds if self.budget_seconds is None else self.budget_seconds


@dataclass(frozen=True)
class Warned:
    """A warning, and the seeds of the runs that gave it, by variant; where rates were tried, by "VARIANT at RATE"."""

    text: str
    seeds: dict[str, list[int]]


@dataclass(frozen=True)
class Comparison:
    """The content of compare.json.

    baseline: the first variant. different: a line for each difference between the terms of the runs. unequal: at equal
    time, a line for each variant whose steps took another time than the baseline's by their logs. variants: each
    at its best learning rate. rates: each at every learning rate, or empty if no rates were tried. equal: what all
    variants have alike, tokens or time. exchange: None if it was not measured. warnings: each that a run gave, once.
    """

    baseline: str
    different: list[str]
    notes: list[str]
    variants: list[Summary]
    rates: list[Summary]
    runs: list[Run]
    failures: list[FailedRun] = field(default_factory=list)
    equal: str = "tokens"
    exchange: Exchange | None = None
    unequal: list[str] = field(default_factory=list)
    warnings: list[Warned] = field(default_factory=list)


def warnings_of(runs: Iterable[tuple[str, float | None, int, Sequence[str]]]) -> list[Warned]:
    """Each warning once, in the order in which they come; runs: variant, learning rate, seed and warnings of each."""
    found: dict[str, Warned] = {}
    for variant, lr, seed, texts in runs:
        for text in dict.fromkeys(texts):
            name = variant if lr is None else f"{variant} at {lr:g}"
            found.setdefault(text, Warned(text, {})).seeds.setdefault(name, []).append(seed)
    return list(found.values())


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
    by_seed = {key: {row.seed: row for row in alike if isinstance(row, Run)} for key, alike in by_rate.items()}

    def against_baseline(each: Summary) -> Summary:
        ours, theirs = (by_seed[of.variant, of.lr] for of in (each, best[0]))
        same_time = each.budget_seconds is not None and each.share is None and each.variant != best[0].variant
        gap = paired(each.by_seed, best[0].by_seed)
        return replace(each, gap=gap, time_gap=time_gap(ours, theirs) if same_time else None)

    best = [against_baseline(each) for each in best]
    rate = next((exchange_rate(each, best[0]) for each in best if each.share is not None and each.seeds), None)
    whole = [run for run in runs if run.share is None] or runs
    return Comparison(
        baseline=best[0].variant,
        different=different,
        notes=list(dict.fromkeys([*notes, *mixed])),
        variants=[replace(each, worth=worth(each, best[0], rate)) for each in best],
        rates=rates if any(rate.lr is not None for rate in rates) else [],
        runs=runs,
        failures=[row for row in rows if isinstance(row, FailedRun)],
        equal="time" if whole and all(run.budget for run in whole) else "tokens",
        exchange=rate,
        unequal=unequal_times(best[0].variant, best),
        warnings=warnings_of((row.variant, row.lr, row.seed, row.warnings) for row in rows),
    )


def mean_and_error(values: Sequence[float]) -> Spread:
    """Mean and standard error of any number of values."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Spread(mean(values) if values else None, error, len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Gap:
    """The mean difference of two variants, ours minus theirs by seed, and its standard error."""
    common = [seed for seed in ours if seed in theirs]
    found = mean_and_error([ours[seed] - theirs[seed] for seed in common])
    known = found.mean is not None and found.stderr is not None
    undecided = abs(found.mean) < 2 * found.stderr if known else None  # type: ignore[arg-type, operator]
    return Gap(**vars(found), seeds=common, undecided=undecided)


UNEQUAL = 0.03
"""The share by which times that are called equal may differ: a step's time is known to about one per cent, a GPU's
clock changes it by a few, and what so little more time is worth is less than what seeds differ by."""


def time_gap(ours: Mapping[int, Run], theirs: Mapping[int, Run]) -> TimeGap | None:
    """How much longer the steps of a variant's runs took than those of the baseline's; None without a common seed."""
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs and theirs[seed].train_seconds]
    if not pairs:
        return None
    steady = [(own.steady_seconds, other.steady_seconds) for own, other in pairs]
    known = [own / other for own, other in steady if own is not None and other]
    whole = mean(own.train_seconds / other.train_seconds for own, other in pairs)
    return TimeGap(whole - 1, mean(known) - 1 if len(known) == len(pairs) else None)


def unequal_times(baseline: str, variants: Sequence[Summary]) -> list[str]:
    """A line for each variant whose steps took another time than the baseline's by more than UNEQUAL."""
    lines = []
    for each in variants:
        if (gap := each.time_gap) is not None and abs(gap.logged) > UNEQUAL:
            steady = "" if gap.steady is None else f" ({_more(gap.steady)} without the first steps, which compile)"
            lines.append(f"by the logs {each.variant}'s steps took {_more(gap.logged)} time than {baseline}'s{steady}")
    return lines


def _more(share: float) -> str:
    return f"{abs(share):.1%} {'more' if share > 0 else 'less'}"


def exchange_rate(shorter: Summary, baseline: Summary) -> Exchange | None:
    """The exchange rate of losses to steps; None if no seed has been trained with both lengths."""
    nats = paired(shorter.by_seed, baseline.by_seed)
    if nats.mean is None or not shorter.steps or not baseline.steps:
        return None
    known = nats.mean > 0 and not nats.undecided
    rate = nats.mean / math.log(baseline.steps / shorter.steps) if known else None
    return Exchange(shorter.variant, shorter.steps, nats, rate)


FARTHEST = 4
"""The factor between lengths from which an extrapolated one says nothing."""


def worth(variant: Summary, baseline: Summary, exchange: Exchange | None) -> Worth | None:
    """What a variant's gap is worth; None for those that the rate is of, without a rate, and for a gap beyond it.

    The loss is taken as linear in the logarithm of the steps of a whole run, with the learning rate's whole schedule:
    the curve of a single run does not tell, because the schedule lowers it towards the end.
    """
    gap, rate, steps = variant.gap, exchange and exchange.per_log_step, baseline.steps
    measured_it = exchange is not None and variant.variant in (baseline.variant, exchange.variant)
    if not exchange or measured_it or not rate or not steps or gap is None or gap.mean is None:
        return None
    logarithm = -gap.mean / rate
    if abs(logarithm) > math.log(FARTHEST):
        return None
    factor, error = math.exp(logarithm), None
    if gap.stderr is not None and exchange.nats.stderr is not None and exchange.nats.mean:
        error = math.hypot(gap.stderr / rate, logarithm * exchange.nats.stderr / exchange.nats.mean)
    time = baseline.seconds and variant.seconds and factor * baseline.seconds / variant.seconds - 1
    return Worth(steps * (factor - 1), time, error, not exchange.steps <= steps * factor <= steps)


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
    budgets = [run.budget for run in runs if run.budget]
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
        share=rows[0].share,
        steps=max((run.final.step for run in runs), default=None),
        step_seconds=median(known) if (known := [*filter(None, map(_step_seconds, runs))]) else None,
        budget_seconds=mean(budget.seconds for budget in budgets) if budgets else None,
        **(vars(sizes) if sizes else {}),
    )


def _step_seconds(run: Run) -> float | None:
    if run.budget:
        return run.budget.seconds / run.budget.steps
    return run.tokens / run.final.step / run.tokens_per_s if run.tokens_per_s else None


def _curve(runs: Sequence[Sequence[Validation]]) -> Curve:
    seeds = [{validation.tokens: validation for validation in run} for run in runs]
    tokens = [at for at in (seeds[0] if seeds else {}) if all(at in seed for seed in seeds)]
    points = [[seed[at].loss for seed in seeds] for at in tokens]
    times = [[seed[at].seconds for seed in seeds] for at in tokens]
    known = [[time for time in row if time is not None] for row in times]
    seconds = [*map(mean, known)] if known == times else []
    return Curve(tokens, [*map(mean, points)], [*map(min, points)], [*map(max, points)], seconds)
