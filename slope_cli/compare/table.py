"""The tables of `slope compare`, for a terminal and as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from slope_cli.config.load import flat
from slope_cli.config.schema import Config
from slope_cli.report.tables import bytes_text, clock

Row = dict[str, Any]
NONE = "–"


class Table(NamedTuple):
    title: str
    columns: list[str]
    rows: list[list[str]]


def show(result: Row) -> None:
    """Print a comparison: tables on a terminal, Markdown elsewhere."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    if not console.is_terminal:
        print(markdown(result), end="")
        return
    for table in tables(result):
        drawn = RichTable(title=table.title, title_justify="left")
        for number, column in enumerate(table.columns):
            drawn.add_column(column, justify="left" if number == 0 or column in ("error", "settings") else "right")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn, markup=False)
    for line in lines_below(result):
        console.print(line, markup=False, highlight=False)


def markdown(result: Row) -> str:
    """The same tables as Markdown, with what must be known to read them below."""
    names = list(dict.fromkeys(each["variant"] for each in result["variants"]))
    parts = [f"# {' against '.join(names)}" if len(names) <= 4 else f"# {len(names)} variants", ""]
    for table in tables(result):
        parts += [f"## {table.title}", "", _line(table.columns), _line(["---"] * len(table.columns))]
        parts += [*(_line(row) for row in table.rows), ""]
    return "\n".join([*parts, *(f"* {line}" for line in lines_below(result))]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables(result: Row) -> list[Table]:
    """Quality, learning rates where several were tried, cost, what the variants are, and the runs that failed."""
    found = [_quality(result), _rates(result), _cost(result), _settings(result), _failed(result)]
    return [table for table in found if table.rows]


def lines_below(result: Row) -> list[str]:
    """How the numbers were made, and what limits them."""
    lines = [f"NOT ALIKE: {line}" for line in result["different"]]
    lines.append(
        "loss: nats a token on the validation text after the last step, mean ± standard error over (n) seeds; "
        f"gap: to {result['baseline']}, of the same seeds"
    )
    lines.append(
        "active: parameters that take part at the end of the run, the pruned ones left out; inference: those in 16 "
        "bits, with a bit for each place of a pruned layer; time: of the training steps alone"
    )
    if any(each["lr_at_edge"] for each in result["variants"]):
        lines.append("(edge): the best rate is the lowest or highest of those tried; a better one may lie beyond")
    return [*lines, *result["notes"], *_made_with(result["runs"])]


def _made_with(runs: Sequence[Row]) -> list[str]:
    """Program and machine, one line for each that differs."""
    found = []
    for facts in (facts for run in runs for facts in run.get("environment", ())):
        where = facts.get("gpu") or f"{facts.get('device')}, {facts.get('threads')} threads"
        words = f"slope {facts.get('slope')}, torch {facts.get('torch')}, transformers {facts.get('transformers')}"
        found.append(f"{words}, Python {facts.get('python')}; {where}")
    return list(dict.fromkeys(found))


def _quality(result: Row) -> Table:
    sources = list(dict.fromkeys(source for each in result["variants"] for source in each["by_source"]))
    sources = sources if len(sources) > 1 else []
    rated = bool(result["rates"])
    columns = ["variant", *(["learning rate"] if rated else []), "validation loss", "perplexity"]
    columns += [f"gap to {result['baseline']}", *sources]
    rows = []
    for each in result["variants"]:
        row = [
            each["variant"],
            *([_rate(each)] if rated else []),
            spread(each["loss"]),
            _number(each["perplexity"]["mean"], ".2f"),
        ]
        first = each["variant"] == result["baseline"]
        row.append(NONE if first else spread(each["gap"], "+.4f"))
        rows.append(row + [spread(each["by_source"].get(source, {})) for source in sources])
    return Table("Validation", columns, rows)


def _rates(result: Row) -> Table:
    best = {(each["variant"], each["lr"]) for each in result["variants"] if each["seeds"]}
    rows = [
        [
            rate["variant"],
            NONE if rate["lr"] is None else f"{rate['lr']:g}",
            spread(rate["loss"]),
            "best" if (rate["variant"], rate["lr"]) in best else "",
        ]
        for rate in result["rates"]
    ]
    return Table("Learning rates", ["variant", "learning rate", "validation loss", ""], rows)


def _cost(result: Row) -> Table:
    columns = ["variant", "parameters", "trained", "active", "training state", "inference"]
    columns += ["tokens/s", "peak memory", "time", "tokens"]
    rows = []
    for each in (each for each in result["variants"] if each["seeds"]):
        counts = (f"{each['parameters'][kind]:,}" for kind in ("all", "trained", "active"))
        sizes = (_size(each[kind]) for kind in ("training_bytes", "inference_bytes"))
        speed, seconds = _number(each["tokens_per_s"], ",.0f"), _clock(each["train_seconds"])
        rows.append(
            [each["variant"], *counts, *sizes, speed, _size(each["peak_memory"]), seconds, f"{each['tokens']:,}"]
        )
    return Table("Cost", columns, rows)


def _settings(result: Row) -> Table:
    """The keys in which each variant departs from the baseline, the seed and tried rates apart.

    A key that the baseline lacks is one that its version of slope did not have: it did what the default does.
    """
    configs = {run["variant"]: flat(run["config"]) for run in reversed(result["runs"]) if not run["error"]}
    apart = ("train.seed", "log.", *(["optim.lr"] if result["rates"] else []))  # the log changes nothing computed
    base = flat(asdict(Config())) | configs.get(result["baseline"], {})
    rows = []
    for name in (each["variant"] for each in result["variants"] if each["variant"] in configs):
        own = configs[name]
        changed = [f"{key}={own[key]}" for key in own if not key.startswith(apart) and own[key] != base.get(key)]
        rows.append([name, " ".join(changed) or NONE])
    return Table(f"Settings that differ from {result['baseline']}'s", ["variant", "settings"], rows[1:] and rows)


def _failed(result: Row) -> Table:
    rows = [[run["run"], run["error"]] for run in result["runs"] if run["error"]]
    return Table("Failed", ["run", "error"], rows)


def _rate(each: Row) -> str:
    if not each["seeds"] or each["lr"] is None:  # None: its comparison tried no rates
        return NONE
    return f"{each['lr']:g}{' (edge)' if each['lr_at_edge'] else ''}"


def spread(found: Mapping[str, Any], form: str = ".4f") -> str:
    """Mean ± standard error (n)."""
    if not found or found["mean"] is None:
        return NONE
    error = "" if found["stderr"] is None else f" ± {found['stderr']:.4f}"
    return f"{found['mean']:{form}}{error} ({found['n']})"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _size(count: float | None) -> str:
    return NONE if count is None else bytes_text(count)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    return clock(seconds)
