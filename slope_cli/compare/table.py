"""The tables of `slope compare`, for a terminal and as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from slope_cli.compare.rows import Run, config_of
from slope_cli.compare.summary import Comparison, Spread, Summary, Warned, Worth
from slope_cli.config.configs import container, follows
from slope_cli.config.schema import Config
from slope_cli.config.values import flat
from slope_cli.report.tables import NONE, Document, Table, bytes_text, clock, number


def document(result: Comparison) -> Document:
    """A comparison as tables, with the notes that they need."""
    names = [each.variant for each in result.variants]
    title = " against ".join(names) if len(names) <= 4 else f"{len(names)} variants"
    return Document(title, tables(result), below=_notes(result))


def tables(result: Comparison) -> list[Table]:
    """Quality, learning rates if several were tried, cost, settings, and failed runs."""
    every = (_quality(result), _rates(result), _cost(result), settings(result), _failed(result))
    return [table for table in every if table.rows]


def _notes(result: Comparison) -> list[str]:
    """How the numbers were measured, and their limits."""
    lines = [f"NOT COMPARABLE: {line}" for line in result.different]
    lines += [f"NOT EQUAL TIME: {line}" for line in result.unequal]
    lines.append(
        "loss: nats per token on the validation text after the last step, mean ± standard error over (n) seeds; "
        f"gap: to {result.baseline}, over the same seeds"
    )
    gaps = [each.gap for each in result.variants if each.gap and each.variant != result.baseline and each.gap.n]
    if any(gap.undecided for gap in gaps):
        lines.append("undecided: the gap is smaller than twice its standard error, as one of nothing may be")
    if any(gap.undecided is None for gap in gaps):
        lines.append("a gap over one seed has no standard error, so that nothing says whether it is chance")
    if gaps:
        lines.append(_exchange(result))
    lines.append(
        "active: parameters at the end of the run without the pruned ones; inference: the active ones in 16 bits, and "
        "a mask bit for each weight of a sparse layer; time: of the training steps alone"
    )
    if result.equal == "time":
        lines.append(
            "time: steps times the step time that was measured; logged: what the steps of the runs took, with compiling"
        )
    if any(each.lr_at_edge for each in result.variants):
        lines.append("(edge): the best rate is the lowest or highest of those tried; a better one may lie beyond")
    warnings = warning_lines(result.warnings, len(result.runs) + len(result.failures))
    return [*lines, *result.notes, *warnings, *_environments(result.runs)]


def warning_lines(warnings: Sequence[Warned], runs: int) -> list[str]:
    """Warnings, each with the variants and seeds that gave it; runs: how many there are in all."""

    def given(by: Mapping[str, Sequence[int]]) -> str:
        if sum(map(len, by.values())) == runs > 1:
            return "all runs"
        return "; ".join(f"{name}, seed{'s' * (len(by[name]) > 1)} {', '.join(map(str, by[name]))}" for name in by)

    return [f"warning: {each.text} ({given(each.seeds)})" for each in warnings]


def _exchange(result: Comparison) -> str:
    """How gaps become steps, or why they do not."""
    rate = result.exchange
    if rate is None and (shorter := next((each for each in result.variants if each.share is not None), None)):
        return f"gaps in steps: not measured, as no seed of {shorter.variant} and {result.baseline} is finished in both"
    if rate is None:
        return f"gaps in steps: not measured; --exchange 0.8 also trains {result.baseline} with 0.8 of its steps"
    nats = f"{rate.variant} has {spread(rate.nats, '+.4f')} nats"
    if rate.per_log_step is None:
        return f"gaps in steps: not measured, as {nats}, which is undecided or no loss; take fewer steps, or more seeds"
    return (
        f"gap in steps: how many more {result.baseline} would need for the same loss; in time: how much longer all of "
        f"these would take than the variant's own. Rate of exchange: {rate.per_log_step:.4f} nats for a unit of the "
        f"natural logarithm of the steps ({nats}), each length with a whole schedule; (extrapolated): beyond the two"
    )


def _environments(runs: Sequence[Run]) -> list[str]:
    """A line for each combination of versions and machine."""
    lines = []
    for env in (env for run in runs for env in run.environment):
        versions = f"slope {env.get('slope')}, torch {env.get('torch')}, transformers {env.get('transformers')}"
        machine = env.get("gpu") or f"{env.get('device')}, {env.get('threads')} threads"
        lines.append(f"{versions}, Python {env.get('python')}; {machine}")
    return list(dict.fromkeys(lines))


def _quality(result: Comparison) -> Table:
    sources = list(dict.fromkeys(source for each in result.variants for source in each.by_source))
    sources = sources if len(sources) > 1 else []
    rated = bool(result.rates)
    columns = ["variant", *(["learning rate"] if rated else []), "validation loss", "perplexity"]
    exchanged = ["gap in steps", "gap in time"] if any(each.worth for each in result.variants) else []
    columns += [f"gap to {result.baseline}", *exchanged, *sources]
    rows = []
    for each in result.variants:
        row = [each.variant, *([_rate(each)] if rated else []), spread(each.loss), number(each.perplexity.mean)]
        undecided = ", undecided" if each.gap and each.gap.undecided else ""
        row.append(NONE if each.variant == result.baseline else spread(each.gap, "+.4f") + undecided)
        row += _worth(each.worth) if exchanged else []
        rows.append(row + [spread(each.by_source.get(source)) for source in sources])
    return Table("Validation", columns, rows)


def _rates(result: Comparison) -> Table:
    best = {(each.variant, each.lr) for each in result.variants if each.seeds}
    rows = [
        [each.variant, number(each.lr, "g"), spread(each.loss), "best" if (each.variant, each.lr) in best else ""]
        for each in result.rates
    ]
    return Table("Learning rates", ["variant", "learning rate", "validation loss", ""], rows)


def _cost(result: Comparison) -> Table:
    measured = any(each.budget_seconds is not None for each in result.variants)
    columns = ["variant", "parameters", "trained", "active", "training state", "inference"]
    columns += ["tokens/s", "peak memory", "steps", "a step", "time", *(["logged"] if measured else []), "tokens"]
    rows = []
    for each in (each for each in result.variants if each.seeds):
        counts = vars(each.parameters).values() if each.parameters else (None, None, None)
        sizes = map(bytes_text, (each.training_bytes, each.inference_bytes))
        cells = [each.variant, *(number(count, ",") for count in counts), *sizes]
        cells += [number(each.tokens_per_s, ",.0f"), bytes_text(each.peak_memory), number(each.steps, ",")]
        step = NONE if each.step_seconds is None else f"{1e3 * each.step_seconds:.4g} ms"
        cells += [step, _time(each.seconds), *([_time(each.train_seconds)] if measured else [])]
        rows.append([*cells, number(each.tokens, ",")])
    return Table("Cost", columns, rows)


def settings(result: Comparison) -> Table:
    """The keys in which each variant differs from the baseline, except the seed and the learning rates that were tried.

    A key that the baseline lacks has its default. Keys whose values only follow from others are left out.
    """
    first = {run.variant: run for run in reversed(result.runs)}
    configs = {name: config_of(run) for name, run in first.items()}
    keys_of = {name: flat(container(config)) for name, config in configs.items()}
    ignored = ("train.seed", "log.", *(["optim.lr"] if result.rates else []))  # logging does not affect the results
    base = flat(asdict(Config())) | keys_of.get(result.baseline, {})
    rows = []
    for name in (each.variant for each in result.variants if each.variant in keys_of):
        own = keys_of[name]
        keys = [key for key in own if not key.startswith(ignored) and own[key] != base.get(key)]
        changed = [f"{key}={own[key]}" for key in keys if not follows(configs[name], key)]
        rows.append([name, " ".join(changed) or NONE])
    title = f"Settings that differ from {result.baseline}'s"
    return Table(title, ["variant", "settings"], rows[1:] and rows, left=["settings"])


def _failed(result: Comparison) -> Table:
    return Table("Failed", ["run", "error"], [[run.run, run.error] for run in result.failures], left=["error"])


def _rate(each: Summary) -> str:
    if not each.seeds or each.lr is None:  # None: its comparison tried no rates
        return NONE
    return f"{each.lr:g}{' (edge)' if each.lr_at_edge else ''}"


def spread(value: Spread | None, form: str = ".4f") -> str:
    """Mean ± standard error (n)."""
    if value is None or value.mean is None:
        return NONE
    error = "" if value.stderr is None else f" ± {value.stderr:.4f}"
    return f"{value.mean:{form}}{error} ({value.n})"


def _worth(worth: Worth | None) -> list[str]:
    """What a gap is worth in steps and in time."""
    if worth is None:
        return [NONE, NONE]
    error = "" if worth.error is None else f" ± {worth.error:.1%}"
    beyond = " (extrapolated)" if worth.extrapolated else ""
    return [f"{worth.steps:+,.0f}{beyond}", NONE if worth.time is None else f"{worth.time:+.1%}{error}"]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)
