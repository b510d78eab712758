"""Results of `slope bench generate` and `slope bench products` as tables, and the panels of their picture."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from slope_cli.report.tables import NONE, Table, bytes_text, number

from .records import GenerateResults, GenerateRow, GeneratingModel, ProductResults

REMARKS = "remarks"
PANELS = {
    "ratio": ("Decoding against the dense model in the same engine", "speed-up"),
    "tokens_per_s": ("Decoding", "tokens/s"),
}


def tables(results: GenerateResults) -> list[Table]:
    """Decoding by batch, its bounds and memory, and first tokens."""
    return [by_batch(results), _steps(results), first_tokens(results)]


def by_batch(results: GenerateResults) -> Table:
    """Tokens per second of each variant, and its speed-up, by batch."""
    batches = sorted({row.batch for model in results.models for row in _decode(model)})
    rows = []
    for model in results.models:
        for variant in dict.fromkeys(row.variant for row in _decode(model)):
            found = {row.batch: row for row in _decode(model) if row.variant == variant}
            cells = [_speed(found.get(batch)) for batch in batches]
            rows.append([_name(model), variant, *cells, _errors(found.values())])
        if model.not_run:
            rows.append([_name(model), "", *[""] * len(batches), model.not_run])
    note = (
        f"Tokens per second, and the speed-up over the dense model, for texts of {results.plan.context:,} tokens; "
        "random weights, 16 bits on a GPU. All of the engine from its CUDA graphs, in alternating rounds; r: rank over "
        "hidden size in per cent."
    )
    if any(row.variant == "transformers" for model in results.models for row in _decode(model)):
        note += " transformers: `generate` with a static cache, compiled, of the dense model."
    columns = ("model", "variant", *(f"batch {batch}" for batch in batches), REMARKS)
    return Table("Decoding by batch", columns, rows, note, left=["variant", REMARKS])


def _speed(row: GenerateRow | None) -> str:
    if row is None or row.tokens_per_s is None:
        return NONE
    return number(row.tokens_per_s, ",.0f") + ("" if row.ratio is None else f" ({row.ratio:.2f})")


def _steps(results: GenerateResults) -> Table:
    columns = (
        "model",
        "variant",
        "batch",
        "step ms",
        "tokens/s",
        "speed-up",
        "its bound",
        "bytes read",
        "of the bound",
    )
    rows = []
    for model in results.models:
        dense = {row.batch: row.read_bytes for row in _decode(model) if row.variant == "dense"}
        for row in _decode(model):
            all_dense = dense.get(row.batch)
            bound = all_dense / row.read_bytes if all_dense and row.read_bytes else None
            share = row.bound_ms / row.step_ms if row.bound_ms and row.step_ms else None
            cells = [_name(model), row.variant, str(row.batch), number(row.step_ms, ".3f")]
            cells += [number(row.tokens_per_s, ",.0f"), number(row.ratio, ".3f"), number(bound, ".3f")]
            of_text = None if row.remembered_bytes is None else row.remembered_bytes // row.batch
            cells += [bytes_text(row.read_bytes), number(share, ".0%"), bytes_text(of_text), bytes_text(row.peak_bytes)]
            rows.append([*cells, row.error or ("" if row.alternated else "timed alone")])
    speed = next((row.read_bytes / row.bound_ms * 1e3 for m in results.models for row in _bounded(m)), None)
    note = (
        "Bytes read: weights, keys, values and states of one step. Its bound: dense bytes over these. Of the bound: "
        f"the share of the time in which they could be read at {number(speed and speed / 1e9, ',.0f')} GB/s, at which "
        f"a copy reads and writes. A text: what is remembered of one of {results.plan.context:,} tokens. Peak: "
        "weights, what is remembered of the texts, and the allocator's peak above these."
    )
    return Table(
        "Steps of decoding", (*columns, "a text", "peak memory", REMARKS), rows, note, left=["variant", REMARKS]
    )


def first_tokens(results: GenerateResults) -> Table:
    """The time to the first token, and the weights, of each variant."""
    columns = (
        "model",
        "variant",
        "prompt",
        "first token ms",
        "speed-up",
        "weights",
        "of dense",
        "peak memory",
        REMARKS,
    )
    rows = []
    for model in results.models:
        found = [row for row in model.rows if row.part == "prefill"]
        dense = next((row.weight_bytes for row in found if row.variant == "dense"), None)
        for row in found:
            share = row.weight_bytes / dense if row.weight_bytes and dense else None
            cells = [_name(model), row.variant, f"{row.tokens:,}", number(row.step_ms), number(row.ratio, ".3f")]
            cells += [bytes_text(row.weight_bytes), number(share, ".3f"), bytes_text(row.peak_bytes)]
            rows.append([*cells, row.error])
    note = "One text: from its prompt's ids to the id of its first new token on the host. Weights: all on the device."
    return Table("First token and weights", columns, rows, note, left=["variant", REMARKS])


def products(results: ProductResults) -> list[Table]:
    """The speed-ups of single products by tokens, and their times."""
    counts = sorted({row.tokens for row in results.rows})
    by_matrix: dict[tuple[str, str, int, int], dict[int, Any]] = {}
    for row in results.rows:
        by_matrix.setdefault((row.model, row.matrix, row.rows, row.columns), {})[row.tokens] = row
    ratios, times = [], []
    for (model, matrix, out, inp), found in by_matrix.items():
        place = [model, matrix, f"{out:,} × {inp:,}"]
        errors = _errors(found.values())
        some = next(iter(found.values()))
        cells = [number(found[count].ratio) if count in found else NONE for count in counts]
        ratios.append([*place, number(some.bound), *cells, errors])
        cells = [
            f"{1e3 * found[n].dense_ms:.1f} / {1e3 * found[n].sparse_ms:.1f}" if n in found and found[n].ratio else NONE
            for n in counts
        ]
        times.append([*place, *cells])
    heads = ("model", "product", "matrix")
    by_count = [f"{count} token{'s' * (count > 1)}" for count in counts]
    note = (
        "Dense over 2:4 time of one product, both from CUDA graphs in alternating rounds, over several matrices in "
        "turn, so that the GPU's cache holds none. Bound: dense bytes over 2:4 bytes."
    )
    note = " ".join(filter(None, (note, results.not_run)))
    first = Table(
        "Products of few tokens", (*heads, "bound", *by_count, REMARKS), ratios, note, left=["product", REMARKS]
    )
    return [first, Table("Times of these products", (*heads, *by_count), times, "µs: dense / 2:4.", left=["product"])]


def panels(models: Sequence[GeneratingModel]) -> list[Any]:
    """What draws speed-ups and tokens per second by batch; nothing where no step was timed."""
    if not any(row.tokens_per_s for model in models for row in _decode(model)):
        return []
    return [partial(_draw, models=models, field=field) for field in PANELS]


def _draw(axes: Any, models: Sequence[GeneratingModel], field: str) -> None:
    styles = ("-", "--", ":", "-.")
    names = list(dict.fromkeys(row.variant for model in models for row in _decode(model)))
    for place, model in enumerate(models):
        for variant in names:
            rows = [row for row in _decode(model) if row.variant == variant and getattr(row, field) is not None]
            if not rows or (field == "ratio" and variant == "dense"):
                continue
            label = f"{model.model}, {variant}" if len(models) > 1 else variant
            points = [row.batch for row in rows], [getattr(row, field) for row in rows]
            style = styles[place % len(styles)]
            axes.plot(*points, style, marker="o", markersize=4, color=f"C{names.index(variant)}", label=label)
    title, label = PANELS[field]
    batches = sorted({row.batch for model in models for row in _decode(model)})
    axes.set(title=title, xlabel="texts at once", ylabel=label, xscale="log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    if field == "ratio":
        axes.axhline(1, color="0.4", linewidth=0.8)
    else:
        axes.set_yscale("log")


def _decode(model: GeneratingModel) -> list[GenerateRow]:
    return [row for row in model.rows if row.part == "decode"]


def _bounded(model: GeneratingModel) -> list[Any]:
    return [row for row in model.rows if row.read_bytes and row.bound_ms]


def _name(model: GeneratingModel) -> str:
    cut = "" if model.blocks == model.all_blocks else f", {model.blocks} of {model.all_blocks} blocks"
    return f"{model.model}{cut}"


def _errors(rows: Any) -> str:
    return "; ".join(dict.fromkeys(row.error for row in rows if row.error))
