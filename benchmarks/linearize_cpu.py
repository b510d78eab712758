"""What linearizing costs in perplexity, and what each branch carries: a llama2.c model on text of its own making.

    python -m slope_cli.benchmarks.linearize_cpu MODEL.bin TOKENIZER.bin WORK

Converts the model into the folder WORK, lets it write stories, and linearizes it on them in each way of VARIANTS; what
is in WORK already is not made again. Writes benchmarks/results/linearize-cpu.json and .md.

The stories are drawn from the model itself at temperature 1, so they are distillation data: their perplexity says how
near the linearized model comes to its teacher, not how well either knows stories that people wrote. Those that did not
end within the model's positions are left out.
"""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from slope_cli.benchmarks import llama2c
from slope_cli.benchmarks.machine import RESULTS, machine
from slope_cli.benchmarks.tables import over_teacher
from slope_cli.checkpoint import load
from slope_cli.config import load as configs
from slope_cli.data.prepare import prepare
from slope_cli.distributed.signals import StopFlag
from slope_cli.evaluate.perplexity import evaluate
from slope_cli.linearize.settings import BRANCHES
from slope_cli.report import metrics
from slope_cli.train import dry_run_linearize
from slope_cli.train.loop import pretrain

BATCH, BATCHES = 128, 16
LENGTH, WINDOW = 512, 16
WORDS = [
    f"train.seq_len={LENGTH}",
    f"linearize.window={WINDOW}",
    "train.micro_batch=4",
    "train.tokens_per_step=2048",
    "train.steps=600",
    "linearize.transfer=0.6",
    "log.sample_every=0",
    "log.val_tokens=65536",
    "log.save_every=0",
    "log.tensorboard=false",
    "log.sample_prompt='Once upon a time'",
]
LONG = [
    "linearize.features=32",
    "linearize.adjust_maps=true",
    "linearize.transfer=0.5",
    "optim.lr=3e-3",
    "train.steps=1500",
]
VARIANTS: dict[str, list[str]] = {
    "the recipe's settings": [],
    "32 columns, 70 % transfer": ["linearize.features=32", "linearize.transfer=0.7"],
    "maps trained on": ["linearize.adjust_maps=true", "linearize.transfer=0.4", "optim.lr=3e-3"],
    "4 columns": ["linearize.features=4"],
    "4 columns, window dropout 0.25": ["linearize.features=4", "linearize.window_dropout=0.25"],
    "t2r": ["linearize.map=t2r"],
    "1,500 steps, 32 columns, maps trained on": LONG,
    "1,500 steps, 32 columns, maps trained on, distilled": [*LONG, "linearize.distill=1"],
    "1,500 steps, 64 columns, maps trained on, distilled": [*LONG, "linearize.features=64", "linearize.distill=1"],
    "window 64": ["linearize.window=64"],
    "window 64, 1,500 steps, 32 columns, maps trained on": ["linearize.window=64", *LONG],
    "window 32, 1,500 steps, 32 columns, maps trained on": ["linearize.window=32", *LONG],
}


def write_stories(model_folder: Path, path: Path) -> None:
    """Sample whole stories from a model, a line of JSON each; each ends with the token that the next begins with."""
    found = load.load(model_folder)
    begin, model = found.tokenizer.bos_token_id, found.model
    model.generation_config.eos_token_id = None  # a story is followed by another, as in training
    torch.manual_seed(0)
    stories = []
    for _ in range(BATCHES):
        ids_BT = torch.full((BATCH, 1), begin)
        how: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 1.0, "pad_token_id": begin}
        out_BT = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=model.config.max_position_embeddings - 1,
            **how,
        )
        for ids in out_BT.tolist():
            starts = [at for at, token_id in enumerate(ids) if token_id == begin]
            stories += [ids[start + 1 : end] for start, end in itertools.pairwise(starts) if end > start + 1]
    lines = [json.dumps({"text": found.tokenizer.decode(story, skip_special_tokens=True)}) for story in stories]
    path.write_text("\n".join(lines) + "\n")


def measure(run: Path) -> dict[str, Any]:
    """The perplexities of a finished run, and of its branches alone."""
    records = metrics.read(run)
    of = {
        kind: [r for r in records if r["kind"] == kind] for kind in ("teacher", "swapped", "val", "train", "transfer")
    }
    found = {kind: of[kind][0]["perplexity"] for kind in ("teacher", "swapped")}
    found["transferred"] = of["val"][0]["perplexity"] if of["transfer"] else None
    found["adapted"] = of["val"][-1]["perplexity"]
    branches = {name: evaluate(run, branch=name, tokens=65536)["perplexity"]["perplexity"] for name in BRANCHES}
    steps = [*of["transfer"], *of["train"]]
    seconds = sum(record["tokens"] / record["step"] / record["tokens_per_s"] for record in steps)
    return {**found, "branches": branches, "seconds": round(seconds, 1), "tokens": steps[-1]["tokens"]}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        "| | after the swap | transfer | adapters | to the teacher | window alone | linear alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["variants"].items():
        transferred = "" if row["transferred"] is None else f"{row['transferred']:.3f}"
        alone = " | ".join(f"{row['branches'][branch]:.2f}" for branch in ("window", "linear"))
        cells = f"{row['swapped']:.3f} | {transferred} | {row['adapted']:.3f} | {over_teacher(row)} | {alone}"
        rows.append(f"| {name} | {cells} |")
    teacher, m = next(iter(result["variants"].values()))["teacher"], result["machine"]
    return "\n".join(
        [
            f"# A llama2.c model of {result['parameters']:,} parameters, linearized",
            "",
            f"Perplexity on held-out text that the model itself wrote, in blocks of {LENGTH} tokens with a window of "
            f"{WINDOW} where no other is named; the model with softmax attention has {teacher:.3f}.",
            "",
            *rows,
            "",
            f"{m['processor']}, {m['threads']} thread, torch {m['torch']}, {m['date']}; "
            "`python -m slope_cli.benchmarks.linearize_cpu`.",
            "",
        ]
    )


def write(result: dict[str, Any]) -> None:
    """Put the result, and the table of it, where results are."""
    (RESULTS / "linearize-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "linearize-cpu.md").write_text(table(result))


def main() -> None:
    """Do all of it."""
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    model_file, tokenizer_file, work = map(Path, sys.argv[1:4])
    base, stories = work / "model", work / "stories.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    if not base.is_dir():
        llama2c.convert(model_file, tokenizer_file, base)
    if not stories.is_file():
        write_stories(base, stories)
    dataset = prepare([str(stories)], work / "data", tokenizer=str(base), val_fraction=0.1, workers=1, progress=False)
    result: dict[str, Any] = {"machine": machine(), "parameters": load.load(base).model.num_parameters()}
    result |= {"stories": stories.read_text().count("\n"), "tokens": sum(f.header.tokens for f in dataset.train)}
    result["variants"] = {}
    for name, words in VARIANTS.items():
        run = work / "runs" / re.sub(r"\W+", "-", name).strip("-")
        config = configs.load(
            "linearize", [*dry_run_linearize.words(base), f"data.path={work / 'data'}", *WORDS, *words]
        )
        with StopFlag() as stop:
            pretrain(config, run, stop=stop)
        result["variants"][name] = {"words": words, **measure(run)}
        print(name, result["variants"][name], file=sys.stderr)
    write(result)


if __name__ == "__main__":
    main()
