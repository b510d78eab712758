"""The tables of `slope compare`, for a terminal and as Markdown."""

from collections.abc import Sequence
from dataclasses import asdict

from slope_cli.compare.rows import Run, config_of
from slope_cli.compare.summary import Comparison, Spread, Summary
from slope_cli.config.load import container, flat, follows
from slope_cli.config.schema import Config
from slope_cli.report import tables as printing
from slope_cli.report.tables import NONE, Table, bytes_text, clock, number


def show(result: Comparison) -> None:
    """Print a comparison: tables on a terminal, Markdown elsewhere."""
    printing.show(_title(result), tables(result), below=lines_below(result))


def markdown(result: Comparison) -> str:
    """The same tables as Markdown, and below them the notes that they need."""
    return printing.document(_title(result), tables(result), below=lines_below(result))


def _title(result: Comparison) -> str:
    names = [each.variant for each in result.variants]
    return " against ".join(names) if len(names) <= 4 else f"{len(names)} variants"


def tables(result: Comparison) -> list[Table]:
    """Quality, learning rates where several were tried, cost, settings of the variants, and the runs that failed."""
    found = [_quality(result), _rates(result), _cost(result), settings(result), _failed(result)]
    return [table for table in found if table.rows]


def lines_below(result: Comparison) -> list[str]:
    """How the numbers were made, and what limits them."""
    lines = [f"NOT ALIKE: {line}" for line in result.different]
    lines.append(
        "loss: nats per token on the validation text after the last step, mean ± standard error over (n) seeds; "
        f"gap: to {result.baseline}, over the same seeds"
    )
    lines.append(
        "active: parameters at the end of the run without the pruned ones; inference: the active ones in 16 bits, and "
        "a mask bit for each weight of a sparse layer; time: of the training steps alone"
    )
    if any(each.lr_at_edge for each in result.variants):
        lines.append("(edge): the best rate is the lowest or highest of those tried; a better one may lie beyond")
    return [*lines, *result.notes, *_made_with(result.runs)]


def _made_with(runs: Sequence[Run]) -> list[str]:
    """A line for each combination of program and machine."""
    found = []
    for facts in (facts for run in runs for facts in run.environment):
        where = facts.get("gpu") or f"{facts.get('device')}, {facts.get('threads')} threads"
        words = f"slope {facts.get('slope')}, torch {facts.get('torch')}, transformers {facts.get('transformers')}"
        found.append(f"{words}, Python {facts.get('python')}; {where}")
    return list(dict.fromkeys(found))


def _quality(result: Comparison) -> Table:
    sources = list(dict.fromkeys(source for each in result.variants for source in each.by_source))
    sources = sources if len(sources) > 1 else []
    rated = bool(result.rates)
    columns = ["variant", *(["learning rate"] if rated else []), "validation loss", "perplexity"]
    columns += [f"gap to {result.baseline}", *sources]
    rows = []
    for each in result.variants:
        row = [each.variant, *([_rate(each)] if rated else []), spread(each.loss), number(each.perplexity.mean)]
        row.append(NONE if each.variant == result.baseline else spread(each.gap, "+.4f"))
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
    columns = ["variant", "parameters", "trained", "active", "training state", "inference"]
    columns += ["tokens/s", "peak memory", "time", "tokens"]
    rows = []
    for each in (each for each in result.variants if each.seeds):
        counts = vars(each.parameters).values() if each.parameters else (None, None, None)
        sizes = map(bytes_text, (each.training_bytes, each.inference_bytes))
        cells = [each.variant, *(number(count, ",") for count in counts), *sizes]
        cells += [number(each.tokens_per_s, ",.0f"), bytes_text(each.peak_memory), _time(each.train_seconds)]
        rows.append([*cells, number(each.tokens, ",")])
    return Table("Cost", columns, rows)


def settings(result: Comparison) -> Table:
    """The keys in which each variant departs from the baseline, apart from the seed and from rates that were tried.

    A key that the baseline lacks has its default. What only follows from other keys is left out.
    """
    found = {run.variant: config_of(run) for run in reversed(result.runs)}
    configs = {name: flat(container(config)) for name, config in found.items()}
    apart = ("train.seed", "log.", *(["optim.lr"] if result.rates else []))  # the log changes nothing computed
    base = flat(asdict(Config())) | configs.get(result.baseline, {})
    rows = []
    for name in (each.variant for each in result.variants if each.variant in configs):
        own = configs[name]
        keys = [key for key in own if not key.startswith(apart) and own[key] != base.get(key)]
        changed = [f"{key}={own[key]}" for key in keys if not follows(found[name], key)]
        rows.append([name, " ".join(changed) or NONE])
    title = f"Settings that differ from {result.baseline}'s"
    return Table(title, ["variant", "settings"], rows[1:] and rows, left=["settings"])


def _failed(result: Comparison) -> Table:
    return Table("Failed", ["run", "error"], [[run.run, run.error] for run in result.failures], left=["error"])


def _rate(each: Summary) -> str:
    if not each.seeds or each.lr is None:  # None: its comparison tried no rates
        return NONE
    return f"{each.lr:g}{' (edge)' if each.lr_at_edge else ''}"


def spread(found: Spread | None, form: str = ".4f") -> str:
    """Mean ± standard error (n)."""
    if found is None or found.mean is None:
        return NONE
    error = "" if found.stderr is None else f" ± {found.stderr:.4f}"
    return f"{found.mean:{form}}{error} ({found.n})"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)
