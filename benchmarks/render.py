"""Render the result files into the marked places of README.md and docs/, so that no figure there is typed by hand.

    python -m slope_cli.benchmarks.render

A place is a pair of comments, `<!-- result: cpu -->` and `<!-- end -->`; the text between them is replaced.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slope_cli.compare import table
from slope_cli.compare.summary import Comparison
from slope_cli.report.tables import NONE, Table, bytes_text, counted, number, rows_in_markdown
from slope_cli.utils.typed_json import from_json

from . import RESULTS, generate_report, linearize_cpu, projection, quality, recall, report, scaling
from .records import (
    GemmRow,
    GenerateResults,
    LinearizeResults,
    MemoryResults,
    ProductResults,
    Projection,
    QualityResults,
    RecallResults,
    StepResults,
)

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
Json = dict[str, Any]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], *below: str) -> str:
    return "\n\n".join([rows_in_markdown(columns, rows), *below])


def _cells(whole: Table, *names: str) -> list[list[str]]:
    """The rows of a table, of some of its columns."""
    places = [whole.columns.index(name) for name in names]
    return [[row[place] for place in places] for row in whole.rows]


def _columns(whole: Table, *names: str) -> str:
    """Some columns of a table."""
    return rows_in_markdown(names, _cells(whole, *names))


def _where(machine: Json, libraries: Json | None = None) -> str:
    """GPU, or else the processor, versions and date of a result."""
    device = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    parts = [str(device), f"torch {machine['torch']}"]
    parts += [f"cuSPARSELt {libraries['cusparselt']}"] if libraries else []
    return ", ".join([*parts, machine["date"]] if "date" in machine else parts)


def _cpu(result: Json) -> str:
    steps, checkpoints = [], []
    for r in result["steps"]:
        times = (f"{r[side] * 1e3:,.0f} ms" for side in ("dense_s", "sparse_s"))
        steps.append([r["model"], f"{r['tokens']:,}", *times, number(r["ratio"])])
    for r in result["checkpoints"]:
        sizes = (f"{r[side] / 1e6:,.1f} MB" for side in ("dense_bytes", "sparse_bytes"))
        checkpoints.append([r["model"], *sizes, number(r["ratio"], ".3f")])
    below = _markdown(("checkpoint of", "dense", "sparse", "ratio"), checkpoints, f"{_where(result['machine'])}.")
    return _markdown(("model", "tokens a step", "dense step", "sparse step", "ratio"), steps, below)


def _demo(result: Json) -> str:
    m = result["machine"]
    where = f"{m['cores']} cores ({m['processor']}, torch {m['torch']})"
    bigram = f"a bigram model of the same text has {result['bigram_loss']:.3f}"
    losses = f"a validation loss of {result['loss']:.3f} nats per byte; {bigram}"
    return f"It took {result['seconds']:.0f} s on {where} and ended with {losses}."


def _gemm(result: Json) -> str:
    """Dense over sparse time of single products, forward and input gradient, by width and matrix of a block."""
    products = [from_json(GemmRow, row) for row in result["products"]]
    matrices = tuple(dict.fromkeys(row.matrix for row in products))
    ratios: dict[tuple[int, str], list[str]] = {}
    for row in products:
        if row.dense_ms is not None and row.sparse_ms is not None:
            ratios.setdefault((row.width, row.matrix), []).append(number(row.dense_ms / row.sparse_ms))
    widths = dict.fromkeys(row.width for row in products)
    rows = [[str(width), *(" / ".join(ratios[width, matrix]) for matrix in matrices)] for width in widths]
    where = f"{_where(result['machine'], result['libraries'])}, bf16, {products[0].tokens:,} tokens"
    return _markdown(("width", *matrices), rows, f"{where}; forward / input gradient.")


def _step(result: Json) -> str:
    """Speed-up of a training step, of a whole model measured or extrapolated, beside the paper's."""
    step = from_json(StepResults, result)
    cases = [case for case in step.cases if case.summary]
    names = ("model", "blocks timed", "dense ms", "sparse ms", "speed-up", "whole model", "paper (A100)")
    dense = {case.name: {row.variant for row in case.rows if row.dense} for case in cases}
    alone = [name for name, variants in dense.items() if len(variants) == 1]
    how = f"bf16, {cases[0].tokens:,} tokens a step; dense is the fastest of three dense variants"
    how += f", for {' and '.join(alone)} the one replayed from CUDA graphs" * bool(alone)
    return f"{_columns(report.steps(cases), *names)}\n\n{_where(step.machine, step.libraries)}; {how}."


def _step_precisions(result: Json) -> str:
    """Speed-ups over dense steps in bf16 of models cut to some blocks, with one micro-batch a step and with eight."""
    step = from_json(StepResults, result)
    rows = []
    for case in step.cases:
        for count in report.SHOWN_MICRO_BATCHES:
            timed = {kind: each.timed if each else None for kind, each in report.by_kind(case, count).items()}
            rows.append([case.name, f"{case.depths[-1]} of {case.blocks}", str(count), *report.ratios(timed)])
    columns = ("model", "blocks timed", "micro-batches", *report.KINDS, report.OVER_FP8)
    where = f"{_where(step.machine, step.libraries)}; {step.cases[0].tokens:,} tokens a micro-batch"
    return _markdown(columns, rows, f"{where}; over the dense step in bf16, in alternating rounds.")


def _fp8_losses(result: Json) -> str:
    """Losses in bf16 and in fp8, over the same seeds."""
    rows = []
    for name, each in result.items():
        comparison = from_json(Comparison, each)
        bf16, fp8 = comparison.variants
        cells = [table.spread(side.loss, ".3f") for side in (bf16, fp8)]
        tokens = f"{(bf16.tokens or 0) / 1e6:.0f} million"
        rows.append([name, tokens, *cells, table.spread(fp8.gap, "+.3f")])
    below = f"{_where(comparison.runs[0].environment[0])}; validation loss, mean ± standard error (seeds)."
    return _markdown(("model", "tokens", "bf16", "fp8", "difference"), rows, below)


def _memory(result: Json) -> str:
    """Training state and inference weights of whole models from their shapes, compared with the allocator."""
    memory = from_json(MemoryResults, result)
    names = ("model", "state: dense", "state: sparse", "state: ratio", "inference: ratio")
    over = {row: row.allocated / row.estimated - 1 for row in memory.allocator if row.allocated and row.estimated}
    row, most = max(over.items(), key=lambda item: item[1])
    within = sum(share <= 0.02 for share in over.values())
    agreement = f"the allocator's peak is within 2 % of the estimate in {within} of {len(over)} models cut to fit"
    worst = f"the largest is {most:.1%} above it ({row.case}, {'dense' if row.dense else 'sparse'})"
    return f"{_columns(report.whole_models(memory.cases), *names)}\n\n{_where(memory.machine)}: {agreement}; {worst}."


def _training(result: Json) -> str:
    runs = result["runs"]
    rows = [[run["run"], number(run["tokens_per_s"], ",.0f"), bytes_text(run["peak_bytes"])] for run in runs]
    first, *_, last = runs
    gaps = [abs(a - b) for a, b in zip(last["losses"], first["losses"], strict=False)]
    difference = f"the losses of {first['run']} and {last['run']} differ by {sum(gaps) / len(gaps):.4f} on average"
    where = f"{_where(first['environment'])}; over {len(gaps)} steps {difference} and by {max(gaps):.3f} at most."
    return _markdown(("run", "tokens/s", "peak memory"), rows, where)


def _quality(result: Json) -> str:
    """The settings of each variant, and its loss at its best rate."""
    comparison = from_json(Comparison, result)
    settings = {row[0]: row[1] for row in table.settings(comparison).rows}
    rows = []
    for each in sorted(comparison.variants, key=lambda each: each.loss.mean or 0.0):
        gap = NONE if each.variant == comparison.baseline else table.spread(each.gap, "+.3f")
        rows.append([each.variant, settings[each.variant], number(each.lr, "g"), table.spread(each.loss, ".3f"), gap])
    environment, tokens = comparison.runs[0].environment[0], comparison.runs[0].tokens
    where = f"{_where(environment)}, slope {environment['slope']}; {tokens / 1e6:.0f} million tokens"
    below = f"{where}; mean ± standard error (seeds); gap to {comparison.baseline}."
    return _markdown(("variant", "settings", "learning rate", "validation loss", "gap"), rows, below)


def _equal_time(result: Json) -> str:
    """What variants learn in the time of dense, and where they were trained."""
    results = from_json(QualityResults, result)
    found, runs = quality.finals_table(results), results.finals.runs if results.finals else []
    places = ({key: value for key, value in env.items() if key != "date"} for run in runs for env in run.environment)
    where = "; ".join(dict.fromkeys(map(_where, places)))
    picture = f"[Picture](../benchmarks/results/equal-time-{results.scale}.png); {where}."
    return _markdown(found.columns, found.rows, found.note, picture)


def _projection(result: Json) -> str:
    """A small comparison's losses by a larger model's times."""
    found = projection.table(from_json(Projection, result))
    return f"{_columns(found, *found.columns)}\n\n{found.note}"


def _zeroshot(result: Json) -> str:
    """Accuracy of each task, and that of guessing."""
    runs = result["runs"].values()
    first = next(iter(runs))
    rows = []
    for task, score in first["tasks"].items():
        scores = (run["tasks"][task] for run in runs)
        rows.append([task, f"{score['chance']:.3f}", *(f"{x['acc']:.3f} ± {x['acc_stderr']:.3f}" for x in scores)])
    where = f"{_where(first['versions'])}, lm-eval {first['versions']['lm_eval']}"
    below = f"{where}; accuracy ± standard error over the rows of a task."
    return _markdown(("zero-shot", "guessing", *result["runs"]), rows, below)


def _glue(result: Json) -> str:
    """Both phases' losses and the metrics of the tasks, by method."""
    phases, glue = result["phases"], result["glue"]
    rows = [
        [f"phase {number + 1}, validation loss", *(f"{of[number]['validation_loss']:.3f}" for of in phases.values())]
        for number in (0, 1)
    ]
    for task in dict.fromkeys(task for tasks in glue.values() for task in tasks):
        rows.append([task, *(_metrics(tasks[task]) if task in tasks else "not run" for tasks in glue.values())])
    where = _where(next(iter(phases.values()))[0]["environment"])
    return _markdown(("BERT-base, short", *phases), rows, f"{where}; one seed; on GLUE's dev sets.")


def _metrics(result: Json) -> str:
    """Each metric of a fine-tuning, with its standard error if it has one."""
    errors = {name: "" if error is None else f" ± {error:.3f}" for name, error in result["stderr"].items()}
    return ", ".join(f"{name} {value:.3f}{errors.get(name, '')}" for name, value in result["metric"].items())


def _linearized(result: Json) -> str:
    columns = ("GPT-2 small", "window", "features", "tokens: teacher", "tokens: linearizing")
    rows, by_position = [], []
    for run in result["runs"]:
        names = [run["model"], str(run["window"])]
        tokens = [f"{run[key] / 1e6:.0f} M" for key in ("teacher_tokens", "tokens")]
        losses = [number(run["teacher"]), number(run["swapped"], ".0f"), number(run["transferred"])]
        rows.append(
            [*names, str(run["features"]), *tokens, *losses, number(run["adapted"]), linearize_cpu.over_teacher(run)]
        )
        for branch, perplexity in run["branches"].items():
            values = (number(at["perplexity"]) for at in perplexity["positions"])
            by_position.append([*names, branch, *values, number(perplexity["perplexity"])])
    places = [f"{at['first']}–{at['last']}" for at in result["runs"][0]["branches"]["both"]["positions"]]
    where = f"{_where(result['machine'])}; sequences of {result['length']:,} tokens; perplexity."
    below = _markdown(("by position", "window", "branch", *places, "all"), by_position, where)
    return _markdown((*columns, "teacher", "swap", "transfer", "adapters", "gap"), rows, below)


def _demo_linearized(r: Json) -> str:
    m, alone = r["machine"], {name: number(branch["perplexity"]) for name, branch in r["branches"].items()}
    return (
        f"The demonstration's byte model has a perplexity of {r['teacher']:.2f} with softmax attention, "
        f"{r['swapped']:.2f} after the swap, {r['transferred']:.2f} after transfer and {r['adapted']:.2f} with "
        f"adapters ({r['steps']} steps, {r['seconds']:.0f} s on {m['threads']} thread, torch {m['torch']}). On all of "
        f"the validation text it has {alone['both']}, with its window of {r['window']} bytes alone {alone['window']}, "
        f"and with the linear branch alone {alone['linear']}: it does not use the text beyond its window."
    )


def _small_llama(result: Json) -> str:
    """The variants of the longest training."""
    whole = linearize_cpu.table(result)
    rows = [row for row in whole.rows if "1,500 steps" in row[0]]
    return _markdown(whole.columns, rows, f"{whole.note} ([More settings](../benchmarks/results/linearize-cpu.md).)")


def _decoding(results: LinearizeResults) -> Table:
    """The speeds at the largest batches, of what was run."""
    return report.largest_batches([replace(entry, not_run="") for entry in results.models])


def _linearized_decoding(result: Json) -> str:
    results = from_json(LinearizeResults, result)
    names = ("model", "tokens", "largest batch: softmax", "largest batch: linear", *report.SPEED_COLUMNS)
    return f"{_columns(_decoding(results), *names)}\n\n{_where(results.machine)}; bf16, window 64, random weights."


def _generating(result: Json) -> str:
    """Tokens per second of the engine's variants by batch, and the time to a first token."""
    results = from_json(GenerateResults, result)
    tables = generate_report.by_batch(results), generate_report.first_tokens(results)
    notes = "", f" {_where(results.machine)}."
    parts = zip(tables, notes, strict=True)
    return "\n\n".join(_markdown(t.columns[:-1], [row[:-1] for row in t.rows], t.note + note) for t, note in parts)


def _generating_kinds(result: Json) -> str:
    """All variants of one model in the engine: first token, speed by batch, memory of a text."""
    results = from_json(GenerateResults, result)
    speeds = generate_report.by_batch(results)
    model, batches = results.models[0], speeds.columns[2:-1]
    first = {row.variant: row for row in model.rows if row.part == "prefill"}
    text = {row.variant: row.remembered_bytes for row in model.rows if row.part == "decode" and row.batch == 1}
    rows = []
    for _, variant, *cells, _ in speeds.rows:
        ms = first[variant].step_ms if variant in first else None
        rows.append([variant, number(ms), *cells, bytes_text(text[variant])])
    prompt = next(row.tokens for row in first.values())
    below = f"{model.model}, prompt of {prompt:,} tokens. {speeds.note} {_where(results.machine)}."
    return _markdown(("variant", "first token ms", *batches, "memory of a text"), rows, below)


def _few_tokens(result: Json) -> str:
    """Speed-ups of single products by tokens."""
    results = from_json(ProductResults, result)
    found = generate_report.products(results)[0]
    rows = [row[:-1] for row in found.rows]
    return _markdown(found.columns[:-1], rows, f"{found.note} {_where(results.machine)}.")


def _cluster(result: Json) -> str:
    """The fastest dense and sparse layout on many GPUs, by the arithmetic of benchmarks/cluster.py."""
    fast, slow = result["networks"]
    speedups = {(row["model"], row["gpus"], row["network"]): row["speedup"] for row in result["rows"]}
    rows = []
    for row in result["rows"]:
        if row["network"] == fast:
            cells = [cell for side in ("dense", "sparse") for cell in _on_gpus(row[side])]
            ratios = (number(speedups[row["model"], row["gpus"], network]) for network in (fast, slow))
            rows.append([row["model"], str(row["gpus"]), *cells, *ratios])
    sides = [f"{side}{what}" for side in ("dense", "sparse") for what in ("", ": GiB", ": sent", ": step")]
    below = (
        f"H100s of 80 GB, 8 in a node; {result['tokens_per_step']:,} tokens a step, {result['tokens']:,} in a micro-"
    )
    below += f"batch; without adapters. Last column: with {slow} a node. – fits nowhere. Computed {result['date']}."
    return _markdown(("model", "GPUs", *sides, "speed-up", "slow network"), rows, below)


def _on_gpus(side: Json | None) -> list[str]:
    """A layout with its checkpointing, the GiB of a GPU, what one sends for a step, and how long that takes."""
    if side is None:
        return [NONE] * 4
    layout = f"{side['layout']}; {side['checkpointing']}".replace(", gather=", " by ")
    memory, sent = side["memory"]["total"] / 2**30, side["sent"]["of_step"] / 1e9
    return [layout, f"{memory:.0f}", f"{sent:,.0f} GB", f"{side['step_s']:.2f} s"]


def _scaling(result: Json) -> str:
    """Weak scaling over the GPUs of a node."""
    found = scaling.document(from_json(scaling.ScalingResults, result)).tables[0]
    where = f"Weak scaling: {_where(result['machine'], result['libraries'])}."
    picture = "[Picture](../benchmarks/results/scaling-2xh200.png)."
    return _markdown(found.columns, found.rows, f"{where} {picture}")


def _recall(result: Json) -> str:
    """What a teacher and its linearized variants recall, and what they cost."""
    results = from_json(RecallResults, result)
    tables = recall.costs(results), recall.by_task(results), recall.distances(results)
    parts = [_markdown(found.columns, found.rows, found.note) for found in tables]
    picture = f"[Picture](../benchmarks/results/recall-{results.scale}-{results.model}.png); {_where(results.machine)}."
    return "\n\n".join([*parts, picture])


def _kills(*results: Json) -> str:
    """Random kills and how the commands ended."""
    rows = [row for result in results for row in result["rows"]]
    cells = [
        [r["command"], str(r["ranks"]), str(r["kills"]), str(r["lives"]), str(len(r["lost"]) + len(r["unequal"]))]
        for r in rows
    ]
    where = "; ".join(dict.fromkeys(f"{r['machine']['processor']}, torch {r['machine']['torch']}" for r in results))
    return _markdown(("command", "processes", "kills", "lives", "lost or unequal"), cells, f"{where}.")


def _cluster_fits(result: Json) -> str:
    """The fewest GPUs on which a model fits."""
    sizes = [name for name in result["fits"][0] if name != "model"]
    rows = [
        [row["model"], *(" / ".join(NONE if n is None else str(n) for n in row[size]) for size in sizes)]
        for row in result["fits"]
    ]
    below = f"Fewest GPUs, dense / sparse; one sequence of {result['length']:,} tokens at a time, blocks checkpointed."
    return _markdown(("model", *(f"GPUs of {size}" for size in sizes)), rows, below)


def _cluster_assumed(result: Json) -> str:
    """What the simulation takes for granted."""
    rows = [[name, f"{value:.3g}"] for name, value in result["assumed"].items()]
    rows += [[f"bytes per second of a node, {name}", f"{value:.3g}"] for name, value in result["networks"].items()]
    times = ", ".join(f"{model} {x['dense']:.2f} / {x['sparse']:.2f} s" for model, x in result["micro_batch_s"].items())
    files = ", ".join(f"{model}: {file}" for model, file in result["measured"].items())
    below = (
        f"A micro-batch on one GPU, dense / sparse, without the optimizer: {times}; from results of one GPU ({files})."
    )
    return _markdown(("assumed", "value"), rows, below)


def _headline(
    step: Json, medium: Json, memory: Json, quality: Json, linearized: Json, generation: Json, serving: Json
) -> str:
    """Gains and costs of sparse and linearized models against dense and softmax ones."""
    rows: list[list[str]] = []
    for result in (step, medium):
        for case in from_json(StepResults, result).cases:
            if case.summary and case.summary.depth == case.blocks:
                speedup = case.summary.timed
                name = f"training step, {case.name}, {result['machine']['gpu'][:11]}"
                times = (f"{x:.1f} ms" for x in (speedup.dense_ms, speedup.sparse_ms))
                rows.append([name, *times, number(speedup.ratio)])
    for row in from_json(MemoryResults, memory).cases:
        if row.case == "opt-13b":
            sizes = map(bytes_text, (row.dense.state, row.sparse.state))
            rows.append([f"weights, gradients, moments: {row.case}", *sizes, number(row.state_ratio)])
    comparison = from_json(Comparison, quality)
    losses = {each.variant: each.loss.mean for each in comparison.variants}
    tokens = (comparison.variants[0].tokens or 0) / 1e6
    name = f"validation loss, gpt2-small, {tokens:.0f} M tokens"
    rows.append([name, *(number(losses[variant], ".3f") for variant in ("dense", "ours")), NONE])
    for run in linearized["runs"][:2]:
        name = f"perplexity, {run['model']} gpt2-small, linearized"
        perplexities = run["teacher"], run["adapted"], run["adapted"] / run["teacher"]
        rows.append([name, *map(number, perplexities)])
    names = ("model", "tokens", "softmax tokens/s", "compiled tokens/s", "speed-up")
    for model, length, softmax, linear, ratio in _cells(_decoding(from_json(LinearizeResults, generation)), *names):
        if (model, length) == ("llama3-8b", "16,384"):
            name = f"decoding, linearized {model}, {length} tokens, largest batches"
            rows.append([name, f"{softmax} tokens/s", f"{linear} tokens/s", ratio])
    (served,) = (each.rows for each in from_json(GenerateResults, serving).models if each.model == "llama3-8b")
    for point in (each for each in served if (each.part, each.variant) == ("decode", "sparse") and each.batch <= 16):
        speeds = (f"{1e3 * point.batch / ms:,.0f} tokens/s" for ms in (point.dense_ms, point.step_ms) if ms)
        rows.append([f"decoding, sparse llama3-8b, {counted(point.batch, 'text')}", *speeds, number(point.ratio)])
    where = "; ".join(dict.fromkeys(_where(result["machine"]) for result in (step, medium)))
    below = f"Steps: {where}. Sparse decoding: {_where(serving['machine'])}."
    below += " Loss and perplexities were validated on different texts, and are of different models."
    return _markdown(("", "dense, or softmax", "sparse, or linear", "ratio"), rows, below)


PLACES: dict[str, Callable[..., str]] = {
    "cluster": _cluster,
    "cluster-assumed": _cluster_assumed,
    "cluster-fits": _cluster_fits,
    "cpu": _cpu,
    "kills": _kills,
    "recall-cpu-llama": _recall,
    "recall-small-gpt2": _recall,
    "recall-small-llama": _recall,
    "scaling-2xh200": _scaling,
    "demo": _demo,
    "equal-time-mini": _equal_time,
    "equal-time-small": _equal_time,
    "headline": _headline,
    "kernels-h100": _gemm,
    "memory-h100": _memory,
    "step-h100": _step,
    "step-h100-renewed": _step,
    "step-h200": _step,
    "training-h100": _training,
    "generate-h200": _generating,
    "generate-gpt2-small-h200": _generating_kinds,
    "step-h200-fp8": _step_precisions,
    "fp8-losses-h200": _fp8_losses,
    "products-h200": _few_tokens,
    "linearize-decoding-h100": _linearized_decoding,
    "linearize-cpu": _small_llama,
    "linearize-demo": _demo_linearized,
    "linearize-gpt2-small": _linearized,
    "glue-bert-short": _glue,
    "quality-gpt2-small": _quality,
    "quality-mini": _quality,
    "projection-opt-2.7b": _projection,
    "zeroshot-gpt2-small": _zeroshot,
}


# The result files of a place that is not named after a single file.
FILES = {
    "cluster-assumed": ("cluster",),
    "cluster-fits": ("cluster",),
    "kills": (
        "kills-pretrain",
        "kills-2-ranks",
        "kills-2-ranks-2",
        "kills-4-ranks",
        "kills-prepare",
        "kills-linearize",
        "kills-linearize-2",
    ),
    "headline": (
        *("step-h200", "step-h100-renewed", "memory-h100"),
        *("quality-gpt2-small", "linearize-gpt2-small", "linearize-decoding-h100", "generate-h200"),
    ),
}


def render(text: str) -> str:
    """A document's text with every marked place filled from its result files; an empty one may still lack these."""

    def fill(place: re.Match[str]) -> str:
        name = place.group(1)
        files = [RESULTS / f"{file}.json" for file in FILES.get(name, (name,))]
        empty = f"<!-- result: {name} -->\n<!-- end -->"
        if place.group(0) == empty and not any(file.exists() for file in files):
            return empty
        results = [json.loads(file.read_text()) for file in files]
        return f"<!-- result: {name} -->\n{PLACES[name](*results)}\n<!-- end -->"

    return re.sub(r"<!-- result: ([\w-]+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the documents; with --check, fail if one of them is out of date."""
    for path in DOCUMENTS:
        old = path.read_text()
        new = render(old)
        if "--check" in sys.argv and new != old:
            raise SystemExit(f"{path.relative_to(ROOT)} differs from benchmarks/results: run make render")
        path.write_text(new)


if __name__ == "__main__":
    main()
