"""Render the result files into the marked places of README.md, so that no figure there is typed by hand.

    python -m slope_cli.benchmarks.render

A place is a pair of comments, `<!-- result: cpu -->` and `<!-- end -->`; what is between them is replaced.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slope_cli.benchmarks import report_generate
from slope_cli.benchmarks.machine import RESULTS
from slope_cli.benchmarks.report import whole_model
from slope_cli.benchmarks.tables import over_teacher
from slope_cli.compare import table

README = Path(__file__).parent.parent / "README.md"


def _cpu(result: dict[str, Any]) -> str:
    rows = ["| model | tokens a step | dense step | sparse step | ratio |", "|---|---|---|---|---|"]
    for r in result["steps"]:
        times = f"{r['dense_s'] * 1e3:,.0f} ms | {r['sparse_s'] * 1e3:,.0f} ms"
        rows.append(f"| {r['model']} | {r['tokens']:,} | {times} | {r['ratio']:.2f} |")
    rows += ["", "| checkpoint of | dense | sparse | ratio |", "|---|---|---|---|"]
    rows += [
        f"| {r['model']} | {r['dense_bytes'] / 1e6:,.1f} MB | {r['sparse_bytes'] / 1e6:,.1f} MB | {r['ratio']:.3f} |"
        for r in result["checkpoints"]
    ]
    m = result["machine"]
    return "\n".join([*rows, "", f"{m['processor']}, {m['cores']} cores, torch {m['torch']}, {m['date']}."])


def _demo(result: dict[str, Any]) -> str:
    m = result["machine"]
    where = f"{m['cores']} cores ({m['processor']}, torch {m['torch']})"
    losses = f"{result['loss']:.3f} nats a byte, where a bigram model of the same text has {result['bigram_loss']:.3f}"
    return f"It took {result['seconds']:.0f} s on {where} and ended with a validation loss of {losses}."


def _gemm(result: dict[str, Any]) -> str:
    """Dense over sparse time of single products, forward and input gradient, by width and matrix of a block."""
    matrices = ("qkv", "proj", "up", "down")
    rows = ["| width | qkv | proj | up | down |", "|---|---|---|---|---|"]
    for width in sorted({p["width"] for p in result["products"]}):
        cells = []
        for matrix in matrices:
            pair = [p for p in result["products"] if (p["width"], p["matrix"]) == (width, matrix)]
            cells.append(" / ".join(f"{p['dense_ms'] / p['sparse_ms']:.2f}" for p in pair))
        rows.append(f"| {width} | {' | '.join(cells)} |")
    v = result["versions"]
    tokens = result["products"][0]["tokens"]
    where = f"{v['gpu']}, torch {v['torch']}, cuSPARSELt {v['cusparselt']}, bf16, {tokens:,} tokens"
    return "\n".join([*rows, "", f"{where}; forward / input gradient."])


def _step(result: dict[str, Any]) -> str:
    """Whole-model speed-up of a training step, measured or extrapolated from two depths, beside the paper's."""
    rows = ["| shape | blocks timed | dense step | sparse step | speed-up | whole model | paper (A100) |"]
    rows.append("|---|---|---|---|---|---|---|")
    for case in result["cases"]:
        best = case["summary"]
        if best is None:
            continue
        times = f"{best['dense_ms']:.1f} ms | {best['sparse_ms']:.1f} ms | {best['ratio']:.2f}"
        whole, paper = whole_model(case) or "–", f"{case['paper']:.2f}" if case["paper"] else "–"
        rows.append(f"| {case['name']} | {best['depth']} of {case['blocks']} | {times} | {whole} | {paper} |")
    m, tokens = result["machine"], result["cases"][0]["tokens"]
    where = f"{m['gpu']}, torch {m['torch']}, cuSPARSELt {result['libraries']['cusparselt']}, {m['date']}"
    alone = [
        c["name"] for c in result["cases"] if len({r["variant"] for r in c["rows"] if r["method"] == "dense"}) == 1
    ]
    how = f"bf16, {tokens:,} tokens a step; dense is the fastest of three dense variants"
    how += f", for {' and '.join(alone)} the one replayed from CUDA graphs" * bool(alone)
    return "\n".join([*rows, "", f"{where}; {how}."])


def _memory(result: dict[str, Any]) -> str:
    """Training state and inference weights of whole models from their shapes; below, how the allocator agrees."""
    rows = ["| shape | training state: dense | sparse | ratio | inference weights: ratio |", "|---|---|---|---|---|"]
    for r in result["cases"]:
        sizes = " | ".join(f"{r[side]['state'] / 2**30:,.1f} GiB" for side in ("dense", "sparse"))
        rows.append(f"| {r['case']} | {sizes} | {r['state_ratio']:.3f} | {r['inference_ratio']:.3f} |")
    above = {(r["case"], r["method"]): r["allocated"] / r["reckoned"] - 1 for r in result["allocator"]}
    (case, method), most = max(above.items(), key=lambda item: item[1])
    within = sum(share <= 0.02 for share in above.values())
    told = f"the allocator's peak is within 2 % of what is reckoned in {within} of {len(above)} models cut to fit"
    worst = f"; the farthest is {case}, {'sparse' if method == 'slope' else 'dense'}: {most:.1%} above"
    m = result["machine"]
    return "\n".join([*rows, "", f"{m['gpu']}, torch {m['torch']}, {m['date']}: {told}{worst}."])


def _training(result: dict[str, Any]) -> str:
    rows = ["| run | tokens a second | peak memory |", "|---|---|---|"]
    for run in result["runs"]:
        rows.append(f"| {run['run']} | {run['tokens_per_s']:,.0f} | {run['peak_bytes'] / 2**30:.1f} GiB |")
    first, *_, last = result["runs"]
    gaps = [abs(a - b) for a, b in zip(last["losses"], first["losses"], strict=False)]
    mean, most = sum(gaps) / len(gaps), max(gaps)
    told = f"the losses of {first['run']} and {last['run']} differ by {mean:.4f} in the mean and {most:.3f} at most"
    env = first["environment"]
    return "\n".join([*rows, "", f"{env['gpu']}, torch {env['torch']}; over {len(gaps)} steps {told}."])


def _quality(result: dict[str, Any]) -> str:
    """What each variant is, and its loss at its best rate."""
    (settings,) = (each for each in table.tables(result) if "settings" in each.columns)
    changed = dict(settings.rows)
    rates = "learning rate | " if result["rates"] else ""
    rows = [f"| variant | settings | {rates}validation loss | gap |", "|---|---|" + "---|" * (3 if rates else 2)]
    for v in sorted(result["variants"], key=lambda variant: float(variant["loss"]["mean"])):
        rate = f"{v['lr']:g} | " if rates else ""
        gap = table.spread(v["gap"], "+.3f") if v["variant"] != result["baseline"] else table.NONE
        loss = table.spread(v["loss"], ".3f")
        rows.append(f"| {v['variant']} | {changed[v['variant']]} | {rate}{loss} | {gap} |")
    env = result["runs"][0]["environment"][0]
    tokens = f"{result['variants'][0]['tokens'] / 1e6:.0f} million tokens"
    where = f"{env['gpu']}, torch {env['torch']}, slope {env['slope']}; {tokens}; mean ± standard error (seeds)"
    return "\n".join([*rows, "", f"{where}; gap to {result['baseline']}."])


def _zeroshot(result: dict[str, Any]) -> str:
    """Accuracy of each task, and a guess's."""
    runs = result["runs"]
    tasks: dict[str, Any] = next(iter(runs.values()))["tasks"]
    rows = [f"| zero-shot | a guess | {' | '.join(runs)} |", "|---|---|" + "---|" * len(runs)]
    for task, first in tasks.items():
        found = [run["tasks"][task] for run in runs.values()]
        cells = " | ".join(f"{one['acc']:.3f} ± {one['acc_stderr']:.3f}" for one in found)
        rows.append(f"| {task} | {first['chance']:.3f} | {cells} |")
    versions = next(iter(runs.values()))["versions"]
    how = f"{versions['gpu']}, torch {versions['torch']}, lm-eval {versions['lm_eval']}"
    return "\n".join([*rows, "", f"{how}; accuracy ± standard error over the rows of a task."])


def _glue(result: dict[str, Any]) -> str:
    """Both phases' losses and the metrics of the tasks, by method."""
    phases, glue = result["phases"], result["glue"]
    rows = [f"| BERT-base, short | {' | '.join(phases)} |", "|---|" + "---|" * len(phases)]
    for number in (0, 1):
        losses = " | ".join(f"{of[number]['validation_loss']:.3f}" for of in phases.values())
        rows.append(f"| phase {number + 1}, validation loss | {losses} |")
    for task in dict.fromkeys(task for tasks in glue.values() for task in tasks):
        cells = [_metrics(tasks[task]) if task in tasks else "not run" for tasks in glue.values()]
        rows.append(f"| {task} | {' | '.join(cells)} |")
    env = next(iter(phases.values()))[0]["environment"]
    return "\n".join([*rows, "", f"{env['gpu']}, torch {env['torch']}; one seed; on GLUE's dev sets."])


def _metrics(found: dict[str, Any]) -> str:
    """Each metric of a fine-tuning, with its standard error if it has one."""
    parts = []
    for name, value in found["metric"].items():
        error = found["stderr"].get(name)
        parts.append(f"{name} {value:.3f}" + ("" if error is None else f" ± {error:.3f}"))
    return ", ".join(parts)


def _linearized(result: dict[str, Any]) -> str:
    columns = (
        "GPT-2 small",
        "window",
        "features",
        "tokens: teacher",
        "linearizing",
        "teacher",
        "swap",
        "transfer",
        "adapters",
        "gap",
    )
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for run in result["runs"]:
        millions = f"{run['teacher_tokens'] / 1e6:.0f} M | {run['tokens'] / 1e6:.0f} M"
        losses = f"{run['teacher']:.2f} | {run['swapped']:.0f} | {run['transferred']:.2f}"
        adapted = f"{run['adapted']:.2f} | {over_teacher(run)}"
        rows.append(f"| {run['model']} | {run['window']} | {run['features']} | {millions} | {losses} | {adapted} |")
    places = [f"{at['first']}–{at['last']}" for at in result["runs"][0]["branches"]["both"]["positions"]]
    rows += [
        "",
        f"| by position | window | branch | {' | '.join(places)} | all |",
        "|---|---|---|" + "---|" * (len(places) + 1),
    ]
    for run in result["runs"]:
        for branch, found in run["branches"].items():
            values = " | ".join(f"{at['perplexity']:.2f}" for at in found["positions"])
            rows.append(f"| {run['model']} | {run['window']} | {branch} | {values} | {found['perplexity']:.2f} |")
    m = result["machine"]
    return "\n".join(
        [*rows, "", f"{m['gpu']}, torch {m['torch']}; sequences of {result['length']:,} tokens; perplexity."]
    )


def _demo_linearized(r: dict[str, Any]) -> str:
    m, alone = r["machine"], {name: f"{branch['perplexity']:.2f}" for name, branch in r["branches"].items()}
    return (
        f"The demonstration's byte model has a perplexity of {r['teacher']:.2f} with softmax attention, "
        f"{r['swapped']:.2f} after the swap, {r['transferred']:.2f} after transfer and {r['adapted']:.2f} with "
        f"adapters ({r['steps']} steps, {r['seconds']:.0f} s on {m['threads']} thread, torch {m['torch']}); on all of "
        f"the validation text {alone['both']}, with its window of {r['window']} bytes alone {alone['window']}, and "
        f"with the linear branch alone {alone['linear']}. It looks no farther than its window."
    )


def _small_llama(r: dict[str, Any]) -> str:
    found = [(_settings(row["words"]), row) for row in r["variants"].values()]
    longest = max(int(words.get("train.steps", 0)) for words, _ in found)
    long = [(s, row) for s, row in found if s.get("train.steps") == str(longest)]
    rows = {int(s.get("linearize.window", 16)): row for s, row in long if "linearize.distill" not in s}
    parts = [
        f"{row['adapted']:.2f} with a window of {window} ({over_teacher(row)}; the window alone "
        f"{row['branches']['window']:.2f})"
        for window, row in sorted(rows.items())
    ]
    distilled = next(row for s, row in long if "linearize.distill" in s)
    return (
        f"A Llama of {r['parameters']:,} parameters, on stories of its own making and in 512 tokens, does look "
        f"farther: of {next(iter(rows.values()))['teacher']:.2f} it has, after {longest:,} steps, "
        f"{', '.join(parts[:-1])} and {parts[-1]}; the first of these, with `linearize.distill=1`, "
        f"{distilled['adapted']:.2f} ({over_teacher(distilled)}) "
        "([more settings](benchmarks/results/linearize-cpu.md))."
    )


def _settings(words: list[str]) -> dict[str, str]:
    """KEY=VALUE words as a mapping."""
    return dict(word.split("=", 1) for word in words)


def _generation(result: dict[str, Any]) -> str:
    speeds = "tokens/s at softmax's largest: softmax | linear | compiled"
    rows = [f"| shape | tokens | largest batch: softmax | linear | {speeds} |", "|---|---|---|---|---|---|---|"]
    for entry in result["models"]:
        for length in report_generate.SHOWN_LENGTHS:
            s = report_generate.summary(entry, length)
            found = {
                row["side"]: f"{row['tokens_per_s']:,.0f}"
                for row in entry["rows"]
                if (row["part"], row.get("length"), row["error"]) == ("both", length, "")
            }
            if len(found) == 3:
                batches = f"{s['softmax_batch']:,} | {s['linear_batch']:,}"
                rows.append(f"| {entry['memory']['model']} | {length:,} | {batches} | {' | '.join(found.values())} |")
    m = result["machine"]
    return "\n".join([*rows, "", f"{m['gpu']}, torch {m['torch']}, {m['date']}; bf16, window 64, random weights."])


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "cpu": _cpu,
    "demo": _demo,
    "kernels-h100": _gemm,
    "memory-h100": _memory,
    "step-h100": _step,
    "step-h100-renewed": _step,
    "step-h200": _step,
    "training-h100": _training,
    "generate-h100": _generation,
    "linearize-cpu": _small_llama,
    "linearize-demo": _demo_linearized,
    "linearize-gpt2-small": _linearized,
    "glue-bert-short": _glue,
    "quality-gpt2-small": _quality,
    "quality-mini": _quality,
    "zeroshot-gpt2-small": _zeroshot,
}


def render(text: str) -> str:
    """README's text with every marked place filled from its result file."""

    def fill(place: re.Match[str]) -> str:
        name = place.group(1)
        body = TABLES[name](json.loads((RESULTS / f"{name}.json").read_text()))
        return f"<!-- result: {name} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- result: ([\w-]+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite README.md; with --check, fail where it is not what the result files say."""
    old = README.read_text()
    new = render(old)
    if "--check" in sys.argv and new != old:
        raise SystemExit("README.md is not what benchmarks/results say: run make render")
    README.write_text(new)


if __name__ == "__main__":
    main()
