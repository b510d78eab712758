"""Results of `slope bench` as tables, in a terminal and in Markdown, and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slope_cli.benchmarks import report_generate
from slope_cli.benchmarks.tables import Row, Table, gib, number
from slope_cli.utils.files import atomic_file

_TORCH_NOTE = (
    "torch.sparse.to_sparse_semi_structured is no way to train: its product has no gradient for the packed weight, and "
    "no optimizer can write it. Its forward product alone is among the single products."
)


def tables(result: Row) -> list[Table]:
    """The tables of the sections that are there; those that speak of whole models first."""
    found = []
    if step := result.get("step"):
        found += [_steps(step["cases"]), _variants(step["cases"])]
    if gemm := result.get("gemm"):
        found += [_break_even(gemm["rows"]), _products(gemm)]
    if memory := result.get("memory"):
        found.append(_memory(memory["cases"]))
        if memory["allocator"]:
            found.append(_allocator(memory))
    if decoding := result.get("generate"):
        found += report_generate.tables(decoding["models"])
    return [table for table in found if table.rows]


def _steps(cases: Sequence[Row]) -> Table:
    timed_columns = ("model", "blocks timed", "dense ms", "sparse ms", "speed-up")
    block_columns = ("a block: dense ms", "sparse ms", "speed-up")
    rows = []
    for case in cases:
        s = case["summary"] or {}
        timed = f"{s['depth']} of {case['blocks']}" if s else f"none of {case['blocks']}"
        cells = [case["name"], timed, *(number(s.get(key)) for key in ("dense_ms", "sparse_ms"))]
        cells.append(number(s.get("ratio"), ".3f"))
        cells += [number(s.get(key)) for key in ("dense_block_ms", "sparse_block_ms")]
        cells.append(number(s.get("block_ratio"), ".3f"))
        cells += [whole_model(case), number(case["paper"]), number(case["target"]), case["not_run"]]
        rows.append(cells)
    note = (
        "Forward, backward, clipping, fused AdamW, and the mask renewals; speed-ups are over the "
        f"fastest dense variant, timed in the same rounds. {_TORCH_NOTE}"
    )
    columns = (*timed_columns, *block_columns, "whole model", "paper, A100", "target", "")
    return Table("Training steps", columns, rows, note)


def whole_model(case: Row) -> str:
    """The speed-up of the whole model, measured or extrapolated; empty if it is neither."""
    s = case["summary"] or {}
    if "extrapolated_ratio" in s:
        return f"{s['extrapolated_ratio']:.3f} extrapolated"
    return f"{s['ratio']:.3f} measured" if s.get("depth") == case["blocks"] else ""


def _variants(cases: Sequence[Row]) -> Table:
    columns = ("model", "blocks", "variant", "step ms", "fastest dense ms", "speed-up", "peak GiB", "")
    rows = []
    for row in (row for case in cases for row in case["rows"]):
        alone = "" if row["alternated"] or row["ratio"] is None else "timed alone: no room for both"
        cells = [row["case"], str(row["depth"]), row["variant"], number(row["step_ms"]), number(row["dense_ms"])]
        rows.append([*cells, number(row["ratio"], ".3f"), gib(row.get("peak_bytes")), row["error"] or alone])
    return Table("Every variant", columns, rows, "Peak: the allocator's, of one variant, its training state included.")


def break_even(rows: Sequence[Row]) -> dict[tuple[int, int], float]:
    """(width, tokens) to the time of dense over that of sparse, of all products of a block together."""
    sums: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row.get("sparse_ms") is not None:
            total = sums.setdefault((row["width"], row["tokens"]), [0.0, 0.0])
            total[0] += row["dense_ms"]
            total[1] += row["sparse_ms"]
    return {key: dense / sparse for key, (dense, sparse) in sums.items()}


def _break_even(rows: Sequence[Row]) -> Table:
    found = break_even(rows)
    widths, counts = (sorted({key[side] for key in found}) for side in (0, 1))
    columns = ("width", *(f"{count:,} tokens" for count in counts))
    lines = [[str(width), *(number(found.get((width, count)), ".3f") for count in counts)] for width in widths]
    note = (
        "Time of dense over that of sparse, forward products and input gradients of the four matrices together, "
        "without what surrounds them; below 1 sparse is slower. Training takes the faster one for each product."
    )
    return Table("Break-even of the products", columns, lines, note)


def _products(gemm: Row) -> Table:
    columns = (
        "width",
        "matrix",
        "product",
        "tokens",
        "dense ms",
        "sparse ms",
        "speed-up",
        "algorithm",
        "torch's ms",
        "",
    )
    torch_ms = {(r["width"], r["matrix"]): r.get("torch_ms") for r in gemm["rows"] if r.get("product") == "torch"}
    rows = []
    for row in gemm["rows"]:
        if row.get("product") == "torch" and not row["error"]:
            continue
        cells = [str(row[key]) if key in row else "" for key in ("width", "matrix", "product", "tokens")]
        sparse, dense = row.get("sparse_ms"), row.get("dense_ms")
        cells += [number(dense, ".3f"), number(sparse, ".3f"), number(dense / sparse if sparse else None)]
        forward = row.get("product") == "forward" and row["tokens"] == 8192
        cells += [str(row.get("algorithm", {}).get("config_id", ""))]
        cells += [number(torch_ms.get((row["width"], row["matrix"])) if forward else None, ".3f")]
        rows.append([*cells, row["error"] or ("" if sparse else row.get("reason", ""))])
    note = "dense and sparse: bf16, from CUDA graphs. torch's: to_sparse_semi_structured, forward only, called eagerly."
    return Table("Single products", columns, rows, " ".join(filter(None, (note, gemm["not_run"]))))


def _memory(cases: Sequence[Row]) -> Table:
    columns: tuple[str, ...] = (
        "model",
        "parameters",
        "state: dense GiB",
        "sparse GiB",
        "ratio",
        "with adapters",
        "with 16-bit copies",
    )
    columns += ("inference weights: dense GiB", "sparse GiB", "ratio", "with adapters")
    rows = []
    for row in cases:
        if row["error"]:
            rows.append([row["case"], row["error"], *[""] * 9])
            continue
        dense, sparse = row["dense"], row["sparse"]
        cells = [row["case"], f"{row['parameters']:,}", gib(dense["state"]), gib(sparse["state"])]
        ratios = ("state_ratio", "state_ratio_with_adapters", "state_and_copies_ratio")
        cells += [f"{row[key]:.3f}" for key in ratios]
        cells += [gib(dense["inference"]), gib(sparse["inference"])]
        rows.append([*cells, f"{row['inference_ratio']:.3f}", f"{row['inference_ratio_with_adapters']:.3f}"])
    note = (
        "Reckoned from shapes, embeddings and heads as they are. State: float32 weights, gradients, AdamW moments, and "
        "the bits of the masks. Copies: what the products read in 16 bits (dense: the casts; sparse: values and "
        "metadata of both weights). Inference: 16-bit weights, 9/16 of dense in a sparse layer."
    )
    return Table("Memory of whole models", columns, rows, note)


def _allocator(memory: Row) -> Table:
    columns = ("model", "blocks", "method", "reckoned GiB", "counted GiB", "allocated GiB", "allocated / reckoned", "")
    rows = []
    for row in memory["allocator"]:
        sizes = [row.get(key) for key in ("reckoned", "counted", "allocated")]
        share = number(sizes[2] / sizes[0] if sizes[0] and sizes[2] else None, ".4f")
        rows.append([row["case"], str(row["depth"]), row["method"], *map(gib, sizes), share, row["error"]])
    note = "counted: bytes of the live tensors; allocated: the allocator's peak in the optimizer's first step."
    return Table("Training state on the GPU", columns, rows, " ".join(filter(None, (note, memory["not_run"]))))


def _heads(result: Row) -> list[str]:
    """What each section was measured on, a line each for those that are alike."""
    found: dict[str, list[str]] = {}
    for name in ("step", "gemm", "memory", "generate"):
        if section := result.get(name):
            facts = {**section["machine"], **section["libraries"]}
            shown = (
                "gpu",
                "processor",
                "driver",
                "cuda",
                "torch",
                "transformers",
                "cupy",
                "cusparselt",
                "python",
                "date",
            )
            text = ", ".join(f"{key} {facts[key]}" for key in shown if facts.get(key))
            found.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}." for text, names in found.items()]


def markdown(result: Row) -> str:
    """All tables, with hardware and versions at the head."""
    lines = ["# slope bench", "", *_heads(result)]
    for table in tables(result):
        lines += ["", f"## {table.title}", "", *([table.note, ""] if table.note else [])]
        lines.append(f"| {' | '.join(table.columns)} |")
        lines.append("|" + "---|" * len(table.columns))
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"


def show(result: Row) -> None:
    """Print all tables to standard output."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # into a file: nothing is to be cut
    for table in tables(result):
        drawn = RichTable(title=table.title, caption=table.note or None, title_justify="left", caption_justify="left")
        for place, column in enumerate(table.columns):
            drawn.add_column(column, justify="left" if place == 0 or not column else "right")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    console.print(f"written to {result['folder']}", markup=False, highlight=False)


def write(result: Row, folder: Path) -> None:
    """Write bench.md, and speed.png and speed.svg where there is something to draw."""
    with atomic_file(folder / "bench.md") as file:
        file.write(markdown(result).encode())
    draw(result, folder / "speed")


def draw(result: Row, out: Path) -> list[Path]:
    """Speed-ups of whole models beside the paper's and the targets, of products over width, and decoding by length.

    Returns the files written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    cases = [case for case in result.get("step", {}).get("cases", ()) if case["summary"]]
    products = break_even(result.get("gemm", {}).get("rows", ()))
    decoding = result.get("generate", {}).get("models", ())
    panels = [*(panel for panel in (cases, products) if panel), *([decoding] * report_generate.panels(decoding))]
    if not panels:
        return []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "slope"}):
        figure = Figure(figsize=(7.5 * len(panels), 4.5), layout="constrained")
        axes = iter(figure.subplots(1, len(panels), squeeze=False)[0])
        if cases:
            _draw_steps(next(axes), cases)
        if products:
            _draw_products(next(axes), products)
        report_generate.draw(list(axes), decoding)
        files = [out.with_name(f"{out.name}.{ending}") for ending in ("png", "svg")]
        for file in files:
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def _draw_steps(axes: Any, cases: Sequence[Row]) -> None:
    places = range(len(cases))
    whole = [case["summary"].get("extrapolated_ratio", case["summary"]["ratio"]) for case in cases]
    # Bars from 1: their length is what is gained.
    axes.bar(places, [ratio - 1 for ratio in whole], bottom=1, color="C0", width=0.6, label="this program")
    for key, marker, label in (("paper", "D", "paper (A100)"), ("target", "_", "target")):
        known = [(place, case[key]) for place, case in zip(places, cases, strict=True) if case[key] is not None]
        axes.scatter([x for x, _ in known], [y for _, y in known], marker=marker, s=60, color="0.2", label=label)
    axes.axhline(1, color="0.4", linewidth=0.8)
    names = [f"{case['name']}{'*' if 'extrapolated_ratio' in case['summary'] else ''}" for case in cases]
    axes.set_xticks(places, names, rotation=30, ha="right")
    axes.set(title="Training step over the best dense one (* extrapolated)", ylabel="speed-up")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()


def _draw_products(axes: Any, products: dict[tuple[int, int], float]) -> None:
    for count in sorted({tokens for _, tokens in products}):
        points = sorted((width, ratio) for (width, tokens), ratio in products.items() if tokens == count)
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=f"{count:,} tokens")
    axes.axhline(1, color="0.4", linewidth=0.8)
    axes.set(title="Sparse products of a block over dense ones", xlabel="width", ylabel="speed-up")
    axes.grid(alpha=0.3)
    axes.legend()
