"""Results of `slope bench` as tables, on a terminal and in Markdown, and as a picture."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from slope_cli.report.plots import picture
from slope_cli.report.tables import NONE, Document, Table, bytes_text, number
from slope_cli.utils.files import atomic_file
from slope_cli.utils.gpus import dense_peak

from . import generate_report, records
from .records import (
    BenchResults,
    CaseResult,
    DecodeRow,
    GemmResults,
    GemmRow,
    MemoryResults,
    MemoryRow,
    ModelResult,
    Speedup,
    StepResults,
    StepSummary,
)

TITLE = "slope bench"
REMARKS = "remarks"
SPEED_TARGET, BATCH_TARGET, TARGET_LENGTH = 2.0, 8.0, 4096
"""Targets from TARGET_LENGTH tokens on: tokens/s at the largest batch that both sides hold, and the largest batch, over
softmax's."""
SHOWN_LENGTHS = (4096, 16384)
SHOWN_MICRO_BATCHES = (1, 8)
SPEED_COLUMNS = ("softmax tokens/s", "linear tokens/s", "compiled tokens/s", "speed-up")
_ENVIRONMENT = ("gpu", "processor", "driver", "cuda", "torch", "transformers", "cupy", "cusparselt", "python", "date")
KINDS = {"sparse bf16": (False, "bf16"), "dense fp8": (True, "fp8"), "sparse fp8": (False, "fp8")}
"""The steps that are compared with a dense one in bf16: whether dense, and in what precision."""
OVER_FP8 = "sparse fp8 over dense fp8"
_TORCH_NOTE = (
    "torch.sparse.to_sparse_semi_structured cannot be used for training: its product has no gradient for the packed "
    "weight, and no optimizer can update it. Only its forward product is among the single products."
)


def tables(results: BenchResults) -> list[Table]:
    """The tables of the measured parts, those of whole models first."""
    every = []
    if step := results.step:
        every += [steps(step.cases), *(precisions(step, count) for count in SHOWN_MICRO_BATCHES), _variants(step.cases)]
    if gemm := results.gemm:
        every += [_break_even(gemm.rows), _products(gemm)]
    if memory := results.memory:
        every += [whole_models(memory.cases), _allocator(memory)]
    if decoding := results.linearize:
        models = decoding.models
        every += [largest_batches(models), _speed(models), _remembered(models), _transfer(models)]
    if results.generate:
        every += generate_report.tables(results.generate)
    if results.products:
        every += generate_report.products(results.products)
    return [table for table in every if table.rows]


def steps(cases: Sequence[CaseResult]) -> Table:
    """The training step of each case."""
    columns = ["model", "blocks timed", "dense ms", "sparse ms", "speed-up", "block: dense ms", "block: sparse ms"]
    columns += ["block: speed-up", "whole model", "paper (A100)", "target", REMARKS]
    rows = []
    for case in cases:
        s = case.summary
        cells = [case.name, f"{s.depth if s else 'none'} of {case.blocks}"]
        for part in (s.timed if s else None, s.block if s else None):
            times = [number(part.dense_ms), number(part.sparse_ms), number(part.ratio, ".3f")] if part else [NONE] * 3
            cells += times
        rows.append([*cells, whole_model(case), number(case.paper), number(case.target), case.not_run])
    note = (
        "Forward, backward, clipping, fused AdamW, and the mask updates; speed-ups are over the fastest dense variant, "
        f"timed in the same rounds. {_TORCH_NOTE}"
    )
    return Table("Training steps", columns, rows, note, left=[REMARKS])


def precisions(step: StepResults, micro_batches: int) -> Table:
    """The steps of whole models, dense and sparse, in bf16 and fp8, of the cases with steps in fp8."""
    columns = ["model", "tokens/s: dense bf16", "MFU", *KINDS, OVER_FP8]
    peak, rows = dense_peak(str(step.machine.get("gpu")), "bf16"), []
    for case in step.cases:
        found = {kind: case.whole_times(each) for kind, each in by_kind(case, micro_batches).items()}
        if not found["dense fp8"] and not found["sparse fp8"]:
            continue
        known = next(side for side in found.values() if side)
        speed = 1e3 * case.tokens * micro_batches / known.dense_ms
        share = speed * case.flops_per_token / peak if case.flops_per_token and peak else None
        cells = [case.name, number(speed, ",.0f"), NONE if share is None else f"{share:.1%}"]
        rows.append([*cells, *ratios(found)])
    note = (
        "Of whole models, extrapolated where they were cut. Speed-ups are over the fastest dense variant in bf16, in "
        "its rounds; tokens/s and MFU are that one's, beside the first variant. MFU: of the data sheet's dense rate "
        "in bf16, attention's operations counted."
    )
    title = "Precisions"
    if micro_batches > 1:
        title, note = (
            f"{title}, {micro_batches} micro-batches a step",
            f"{note} Each further one takes as long as the second.",
        )
    return Table(title, columns, rows, note)


def by_kind(case: CaseResult, micro_batches: int) -> dict[str, StepSummary | None]:
    """The comparisons of KINDS, of steps of so many micro-batches."""
    return {
        kind: case.compared(dense=dense, precision=precision, micro_batches=micro_batches)
        for kind, (dense, precision) in KINDS.items()
    }


def ratios(found: Mapping[str, Speedup | None]) -> list[str]:
    """The speed-ups of KINDS, and that of sparse over dense in fp8."""
    dense, sparse = found["dense fp8"], found["sparse fp8"]
    cells = [number(side.ratio, ".3f") if side else NONE for side in map(found.get, KINDS)]
    return [*cells, number(sparse.ratio / dense.ratio, ".3f") if sparse and dense else NONE]


def whole_model(case: CaseResult) -> str:
    """The speed-up of the whole model, measured or extrapolated; a dash if neither is known."""
    found, how = case.whole_times(case.summary), "extrapolated" if case.summary and case.summary.whole else "measured"
    return NONE if found is None else f"{found.ratio:.3f} {how}"


def _variants(cases: Sequence[CaseResult]) -> Table:
    columns = ("model", "blocks", "variant", "step ms", "fastest dense ms", "speed-up", "peak memory", REMARKS)
    rows = []
    for row in (row for case in cases for row in case.rows):
        alone = "" if row.alternated or row.ratio is None else "timed alone: no room for both"
        cells = [row.case, str(row.depth), row.variant, number(row.step_ms), number(row.dense_ms)]
        rows.append([*cells, number(row.ratio, ".3f"), bytes_text(row.peak_bytes), row.error or alone])
    note = "Peak: the allocator's, of one variant, its training state included."
    return Table("Every variant", columns, rows, note, left=["variant", REMARKS])


def break_even(rows: Sequence[GemmRow]) -> dict[tuple[int, int], float]:
    """Dense over sparse time of all products of a block together, by (width, tokens)."""
    sums: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row.sparse_ms is not None and row.dense_ms is not None:
            total = sums.setdefault((row.width, row.tokens), [0.0, 0.0])
            total[0] += row.dense_ms
            total[1] += row.sparse_ms
    return {key: dense / sparse for key, (dense, sparse) in sums.items()}


def _break_even(rows: Sequence[GemmRow]) -> Table:
    ratios = break_even(rows)
    widths, counts = (sorted({key[side] for key in ratios}) for side in (0, 1))
    columns = ("width", *(f"{count:,} tokens" for count in counts))
    lines = [[str(width), *(number(ratios.get((width, count)), ".3f") for count in counts)] for width in widths]
    note = (
        "Dense over sparse time of the forward products and input gradients of the four matrices together, without the "
        "work around them; below 1 sparse is slower. Training uses the faster one for each product."
    )
    return Table("Break-even of the products", columns, lines, note)


def _products(gemm: GemmResults) -> Table:
    columns = ("width", "matrix", "product", "tokens", "dense ms", "sparse ms", "speed-up", "algorithm", "torch's ms")
    torch_ms = {(row.width, row.matrix, row.tokens): row.torch_ms for row in gemm.rows if row.product == "torch"}
    rows = []
    for row in (row for row in gemm.rows if row.product != "torch" or row.error):
        speed_up = row.dense_ms / row.sparse_ms if row.dense_ms and row.sparse_ms else None
        theirs = torch_ms.get((row.width, row.matrix, row.tokens)) if row.product == "forward" else None
        cells = [str(row.width), row.matrix, row.product, str(row.tokens), number(row.dense_ms, ".3f")]
        cells += [number(row.sparse_ms, ".3f"), number(speed_up), str(row.algorithm.get("config_id", ""))]
        rows.append([*cells, number(theirs, ".3f"), row.error or ("" if row.sparse_ms else row.reason)])
    note = "dense and sparse: bf16, from CUDA graphs. torch's: to_sparse_semi_structured, forward only, called eagerly."
    note = " ".join(filter(None, (note, gemm.not_run)))
    return Table("Single products", (*columns, REMARKS), rows, note, left=["matrix", "product", REMARKS])


def whole_models(cases: Sequence[MemoryRow]) -> Table:
    """The estimated memory of each case."""
    columns = ["model", "parameters", "state: dense", "state: sparse", "state: ratio", "state: with adapters"]
    columns += ["state: with 16-bit copies", "inference: dense", "inference: sparse", "inference: ratio"]
    columns += ["inference: with adapters"]
    rows = []
    for row in cases:
        cells = [row.case, f"{row.parameters:,}", bytes_text(row.dense.state), bytes_text(row.sparse.state)]
        cells += [f"{r:.3f}" for r in (row.state_ratio, row.state_ratio_with_adapters, row.state_and_copies_ratio)]
        cells += [bytes_text(row.dense.inference), bytes_text(row.sparse.inference)]
        rows.append([*cells, f"{row.inference_ratio:.3f}", f"{row.inference_ratio_with_adapters:.3f}"])
    note = (
        "Estimated from shapes, embeddings and heads included. State: float32 weights, gradients, AdamW moments, and "
        "the bits of the masks. Copies: the 16-bit operands of the products (dense: the casts; sparse: values and "
        "metadata of both weights). Inference: 16-bit weights, 9/16 of dense in a sparse layer."
    )
    return Table("Memory of whole models", columns, rows, note)


def _allocator(memory: MemoryResults) -> Table:
    columns = ("model", "blocks", "method", "estimated", "counted", "allocated", "allocated / estimated", REMARKS)
    rows = []
    for row in memory.allocator:
        share = row.allocated / row.estimated if row.allocated and row.estimated else None
        sizes = map(bytes_text, (row.estimated, row.counted, row.allocated))
        rows.append([row.case, str(row.depth), row.method, *sizes, number(share, ".4f"), row.error])
    note = "counted: bytes of the live tensors; allocated: the allocator's peak in the optimizer's first step."
    note = " ".join(filter(None, (note, memory.not_run)))
    return Table("Training state on the GPU", columns, rows, note, left=["method", REMARKS])


def _fastest(rows: Sequence[DecodeRow], side: str) -> float | None:
    """Tokens per second of softmax, or of the faster of linear and linear compiled."""
    return max((row.tokens_per_s for row in rows if row.side.startswith(side) and row.tokens_per_s), default=None)


def _speeds(rows: Sequence[DecodeRow]) -> list[str]:
    """The cells of SPEED_COLUMNS."""
    by_side = {row.side: row.tokens_per_s for row in rows}
    softmax, linear = _fastest(rows, "softmax"), _fastest(rows, "linear")
    cells = [number(by_side.get(side), ",.0f") for side in ("softmax", "linear", "linear compiled")]
    return [*cells, number(linear / softmax if softmax and linear else None)]


def largest_batches(entries: Sequence[ModelResult]) -> Table:
    """The largest batches of each model, and its speeds there."""
    columns = ["model", "tokens", "largest batch: softmax", "largest batch: linear", "ratio", "target: ratio", "batch"]
    columns += [*SPEED_COLUMNS, "target: speed-up", "linear at its largest, tokens/s", REMARKS]
    rows = []
    for entry in entries:
        name = entry.memory.model
        for length in _lengths(entry, "largest", "both", "own"):
            here = [row for row in entry.rows if row.length == length and row.part in ("largest", "both", "own")]
            sound = {part: [row for row in here if row.part == part and not row.error] for part in ("both", "own")}
            batches = {row.side: row.batch for row in here if row.part == "largest" and not row.error}
            softmax, linear = batches.get("softmax"), batches.get("linear")
            targets = [number(x if length >= TARGET_LENGTH else None, "g") for x in (BATCH_TARGET, SPEED_TARGET)]
            cells = [name, f"{length:,}", number(softmax, ","), number(linear, ",")]
            cells += [number(linear / softmax if softmax and linear is not None else None), targets[0]]
            cells += [number(next((row.batch for row in sound["both"]), None), ","), *_speeds(sound["both"])]
            own = number(_fastest(sound["own"], "linear"), ",.0f")
            rows.append([*cells, targets[1], own, _remarks(entry, here)])
        if entry.not_run:
            rows.append([name, *[""] * (len(columns) - 2), entry.not_run])
    note = (
        "Greedy decoding of one model with random weights, dense and 16-bit, in its two modes, in one loop; speed-up: "
        "of the faster of eager and compiled. Softmax: torch's fused attention over a preallocated cache that is full "
        "at this length. Largest batch: the largest whose steps run, to within 3 %, its prompts not counted."
    )
    return Table("Decoding at the largest batches", columns, rows, note, left=[REMARKS])


def _speed(entries: Sequence[ModelResult]) -> Table:
    columns = ("model", "batch", "tokens", *SPEED_COLUMNS, "remembered: softmax", "remembered: linear", REMARKS)
    rows = []
    for entry in entries:
        by_point: dict[tuple[int, int], list[DecodeRow]] = {}
        for row in entry.rows:
            if row.part == "speed" and row.batch is not None and row.length is not None:
                by_point.setdefault((row.batch, row.length), []).append(row)
        for (batch, length), alike in sorted(by_point.items()):
            sizes = {row.side: row.remembered_bytes for row in alike}
            cells = [entry.memory.model, f"{batch:,}", f"{length:,}", *_speeds(alike)]
            cells += [bytes_text(sizes.get(side)) for side in ("softmax", "linear")]
            rows.append([*cells, _remarks(entry, alike)])
    note = "As above; replayed from CUDA graphs unless a remark says otherwise."
    return Table("Decoding by length", columns, rows, note, left=[REMARKS])


def _remarks(entry: ModelResult, rows: Sequence[DecodeRow]) -> str:
    """The parts of the model that were not measured, and the errors of these rows."""
    texts = [(row.side, row.error or row.note or row.limit) for row in rows if row.side]
    faults = [f"{side}: {text}" for side, text in texts if text not in ("", "out of memory")]
    return "; ".join(filter(None, (entry.memory.note, *faults)))


def _remembered(entries: Sequence[ModelResult]) -> Table:
    columns = ["model", "linear layers", "window", "softmax bytes a token", "linear bytes at any length", "break-even"]
    columns += [*(f"softmax / linear at {length:,}" for length in SHOWN_LENGTHS), REMARKS]
    rows = []
    for m in (entry.memory for entry in entries):
        ratios = (softmax / linear for softmax, linear in map(m.remembered, SHOWN_LENGTHS))
        cells = [m.model, f"{m.linear_layers} of {m.layers}", f"{m.window}{' terrace' * (m.kind == 'terrace')}"]
        cells += [f"{m.softmax_bytes:,}", f"{m.linear_bytes:,}", f"{m.break_even:,} tokens"]
        rows.append([*cells, *(number(ratio, ".1f") for ratio in ratios), m.note])
    note = (
        "Estimated from shapes, for one sequence: 16-bit keys and values, of linearized layers those of the window and "
        "a float32 state. Ratios are of all layers, break-even is of the linearized ones."
    )
    return Table("Memory of a sequence", columns, rows, note, left=[REMARKS])


def _transfer(entries: Sequence[ModelResult]) -> Table:
    columns = ("model", "tokens", "step", "peak memory", "memory a token", REMARKS)
    rows = []
    for row in (row for entry in entries for row in entry.rows if row.part == "transfer"):
        each = row.peak_bytes / row.length if row.peak_bytes and row.length else None
        step = "compiled" if row.compiled else "eager"
        sizes = bytes_text(row.peak_bytes), bytes_text(each)
        rows.append([row.model, number(row.length, ","), step, *sizes, row.error])
    note = (
        "One sequence's step, each layer's backward pass within the forward pass; the allocator's peak above what is "
        "held between steps."
    )
    return Table("Memory of attention transfer", columns, rows, note, left=["step", REMARKS])


def _lengths(entry: ModelResult, *parts: str) -> list[int]:
    return sorted({row.length for row in entry.rows if row.part in parts and row.length is not None})


def _environments(results: BenchResults) -> list[str]:
    """The machine and versions, in one line for all parts with the same ones."""
    parts: dict[str, list[str]] = {}
    for name, part in vars(results).items():
        if isinstance(part, records.Results):
            environment = {**part.machine, **part.libraries}
            text = ", ".join(f"{key} {environment[key]}" for key in _ENVIRONMENT if environment.get(key))
            parts.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}." for text, names in parts.items()]


def show(results: BenchResults) -> None:
    """Print all tables to standard output."""
    Document(TITLE, tables(results), below=[f"written to {results.folder}"]).show()


def write(results: BenchResults, folder: Path) -> None:
    """Write bench.md, and speed.png and speed.svg if there is something to draw."""
    with atomic_file(folder / "bench.md") as file:
        file.write(Document(TITLE, tables(results), above=_environments(results)).markdown().encode())
    draw(results, folder / "speed")


def draw(results: BenchResults, out: Path) -> list[Path]:
    """Draw the speed-ups of whole models and of products, and decoding by length and batch; returns what it wrote."""
    panels: list[Callable[[Any], None]] = []
    if results.step and (cases := [case for case in results.step.cases if case.summary]):
        panels.append(partial(_draw_steps, cases=cases))
    if results.gemm and (products := break_even(results.gemm.rows)):
        panels.append(partial(_draw_products, products=products))
    if results.linearize:
        models = results.linearize.models
        panels += [partial(_draw_remembered, entries=models)] if models else []
        measured = any(row.part == "speed" for entry in models for row in entry.rows)
        panels += [partial(_draw_speed, entries=models)] if measured else []
    panels += generate_report.panels(results.generate.models) if results.generate else []
    if not panels:
        return []
    with picture(out, panels=len(panels)) as (all_axes, files):
        for axes, panel in zip(all_axes, panels, strict=True):
            panel(axes)
            axes.grid(alpha=0.3)
            axes.legend()
    return files


def _draw_steps(axes: Any, cases: Sequence[CaseResult]) -> None:
    places = range(len(cases))
    shown = [(case.name, case.summary.whole, case.summary.timed) for case in cases if case.summary]
    gains = [(whole or timed).ratio - 1 for _, whole, timed in shown]
    # Bars from 1: their length is the gain.
    axes.bar(places, gains, bottom=1, color="C0", width=0.6, label="this program")
    for key, marker, label in (("paper", "D", "paper (A100)"), ("target", "_", "target")):
        known = [(place, getattr(case, key)) for place, case in enumerate(cases) if getattr(case, key) is not None]
        axes.scatter([x for x, _ in known], [y for _, y in known], marker=marker, s=60, color="0.2", label=label)
    axes.axhline(1, color="0.4", linewidth=0.8)
    axes.set_xticks(places, [f"{name}{'*' if whole else ''}" for name, whole, _ in shown], rotation=30, ha="right")
    axes.set(title="Training step against the best dense one (* extrapolated)", ylabel="speed-up")


def _draw_products(axes: Any, products: dict[tuple[int, int], float]) -> None:
    for count in sorted({tokens for _, tokens in products}):
        points = sorted((width, ratio) for (width, tokens), ratio in products.items() if tokens == count)
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=f"{count:,} tokens")
    axes.axhline(1, color="0.4", linewidth=0.8)
    axes.set(title="Sparse products of a block against dense ones", xlabel="width", ylabel="speed-up")


def _draw_remembered(axes: Any, entries: Sequence[ModelResult]) -> None:
    lengths = [2**power for power in range(5, 15)]
    for place, m in enumerate(entry.memory for entry in entries):
        for index, (style, side) in enumerate((("--", "softmax"), ("-", "linear"))):
            sizes = [m.remembered(length)[index] / 2**20 for length in lengths]
            axes.plot(lengths, sizes, style, color=f"C{place}", label=f"{m.model}, {side}")
    axes.set(title="Memory of a sequence", xlabel="tokens", ylabel="MiB", xscale="log", yscale="log")


def _draw_speed(axes: Any, entries: Sequence[ModelResult]) -> None:
    for place, entry in enumerate(entries):
        rows = [row for row in entry.rows if row.part == "speed" and not row.error]
        batch, lengths = max((row.batch for row in rows if row.batch), default=0), _lengths(entry, "speed")
        for style, side in (("--", "softmax"), ("-", "linear")):
            points = {n: _fastest([r for r in rows if (r.batch, r.length) == (batch, n)], side) for n in lengths}
            known = [(length, speed) for length, speed in points.items() if speed is not None]
            label = f"{entry.memory.model}, {side}, batch {batch}"
            axes.plot([x for x, _ in known], [y for _, y in known], style, marker="o", color=f"C{place}", label=label)
    axes.set(title="Decoding", xlabel="tokens before", ylabel="tokens/s", xscale="log", yscale="log")
