"""The perplexity cost of linearizing, and the share of each branch: a llama2.c model on text that it wrote itself.

    python -m slope_cli.benchmarks.linearize_cpu MODEL.bin TOKENIZER.bin WORK

Converts the model into the folder WORK, samples stories from it, and linearizes it on them in each way of VARIANTS;
finished parts in WORK are used again. Writes benchmarks/results/linearize-cpu.json and .md.

The stories are drawn from the model itself at temperature 1, so they are distillation data: their perplexity says how
close the linearized model comes to its teacher, not how well either knows stories that people wrote. Stories that did
not end within the model's positions are left out.
"""

import itertools
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from slope_cli.checkpoint.load import load_model
from slope_cli.config import configs
from slope_cli.data.prepare import prepare
from slope_cli.distributed.signals import StopFlag
from slope_cli.evaluate.evaluate import evaluate
from slope_cli.linearize.linear_attention import BRANCHES
from slope_cli.report import metrics
from slope_cli.report.tables import Document, Table, number
from slope_cli.train.init import linearize_overrides
from slope_cli.train.loop import pretrain
from slope_cli.utils.environment import environment
from slope_cli.utils.files import write_json

from . import RESULTS, llama2c

BATCH, BATCHES = 128, 16
LENGTH, WINDOW = 512, 16
SHARED = (
    f"train.seq_len={LENGTH} train.micro_batch=4 train.tokens_per_step=2048 train.steps=600 linearize.transfer=0.6 "
    f"linearize.window={WINDOW} log.sample_every=0 log.save_every=0 log.val_tokens=65536 log.tensorboard=false "
    "log.sample_prompt='Once upon a time'"
)
LONG = "linearize.features=32 linearize.adjust_maps=true linearize.transfer=0.5 optim.lr=3e-3 train.steps=1500"
VARIANTS = {
    "the recipe's settings": "",
    "32 columns, 70 % transfer": "linearize.features=32 linearize.transfer=0.7",
    "maps trained on": "linearize.adjust_maps=true linearize.transfer=0.4 optim.lr=3e-3",
    "4 columns": "linearize.features=4",
    "4 columns, window dropout 0.25": "linearize.features=4 linearize.window_dropout=0.25",
    "t2r": "linearize.feature_map=t2r",
    "1,500 steps, 32 columns, maps trained on": LONG,
    "1,500 steps, 32 columns, maps trained on, distilled": f"{LONG} distill.share=1",
    "1,500 steps, 64 columns, maps trained on, distilled": f"{LONG} linearize.features=64 distill.share=1",
    "window 64": "linearize.window=64",
    "window 64, 1,500 steps, 32 columns, maps trained on": f"linearize.window=64 {LONG}",
    "window 32, 1,500 steps, 32 columns, maps trained on": f"linearize.window=32 {LONG}",
}
"""Overrides on top of SHARED, by the name of the variant."""


def write_stories(model_folder: Path, path: Path) -> None:
    """Sample whole stories from a model into a file of JSON lines."""
    loaded = load_model(model_folder)
    begin, model = loaded.tokenizer.bos_token_id, loaded.model
    # In the model's training the token that ends a story begins the next one.
    model.generation_config.eos_token_id = None
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
    lines = [json.dumps({"text": loaded.tokenizer.decode(story, skip_special_tokens=True)}) for story in stories]
    path.write_text("\n".join(lines) + "\n")


def measure(run: Path) -> dict[str, Any]:
    """The perplexities of a finished run, and of its branches alone."""
    records = metrics.read(run)
    kinds = ("teacher", "swapped", "val", "train", "transfer")
    of = {kind: [record for record in records if record["kind"] == kind] for kind in kinds}
    steps = [*of["transfer"], *of["train"]]
    seconds = sum(record["tokens"] / record["step"] / record["tokens_per_s"] for record in steps)
    return {
        "teacher": of["teacher"][0]["perplexity"],
        "swapped": of["swapped"][0]["perplexity"],
        "transferred": of["val"][0]["perplexity"] if of["transfer"] else None,
        "adapted": of["val"][-1]["perplexity"],
        "branches": {name: evaluate(run, branch=name, tokens=65536)["perplexity"]["perplexity"] for name in BRANCHES},
        "seconds": round(seconds, 1),
        "tokens": steps[-1]["tokens"],
    }


def over_teacher(row: dict[str, Any]) -> str:
    """How far a linearized model's perplexity is above its teacher's."""
    return f"{100 * (row['adapted'] / row['teacher'] - 1):+.1f} %"


def table(result: dict[str, Any]) -> Table:
    """The perplexities of all variants."""
    rows = [
        [name, *(number(row[key], ".3f") for key in ("swapped", "transferred", "adapted")), over_teacher(row)]
        + [number(row["branches"][branch]) for branch in ("window", "linear")]
        for name, row in result["variants"].items()
    ]
    note = (
        f"A llama2.c model of {result['parameters']:,} parameters on held-out stories that it wrote itself, in blocks "
        f"of {LENGTH} tokens with a window of {WINDOW} unless another is named; with softmax attention it has "
        f"{next(iter(result['variants'].values()))['teacher']:.3f}."
    )
    columns = ("variant", "swap", "transfer", "adapters", "gap", "window alone", "linear alone")
    return Table("Perplexity", columns, rows, note)


def main() -> None:
    """Measure, and write the result with its table."""
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
    result: dict[str, Any] = {"machine": environment(), "parameters": load_model(base).model.num_parameters()}
    result |= {"stories": stories.read_text().count("\n"), "tokens": sum(f.header.tokens for f in dataset.train)}
    result["variants"] = {}
    for name, text in VARIANTS.items():
        run = work / "runs" / re.sub(r"\W+", "-", name).strip("-")
        overrides = [*linearize_overrides(base), f"data.path={work / 'data'}", *shlex.split(SHARED), *text.split()]
        with StopFlag() as stop:
            pretrain(configs.load("linearize", overrides), run, stop=stop)
        result["variants"][name] = {"words": text.split(), **measure(run)}
        print(name, result["variants"][name], file=sys.stderr)
    write_json(RESULTS / "linearize-cpu.json", result)
    m = result["machine"]
    where = f"{m['processor']}, {m['threads']} thread, torch {m['torch']}, {m['date']}"
    document = Document("A llama2.c model, linearized", [table(result)], below=[where])
    (RESULTS / "linearize-cpu.md").write_text(document.markdown())


if __name__ == "__main__":
    main()
