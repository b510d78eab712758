"""What linearized models recall of their context: a teacher that recalls, and what it becomes in several ways.

    python -m slope_cli.benchmarks.recall --data DIR --work DIR --out FILE [--model gpt2] [--only STAGE,...] [--gpu N]

--data is a folder of `slope data prepare`. The stages, each of a few commands of `slope`: `data` adds recall items to
the text; `teacher` trains a model with softmax attention on it, after first steps on nothing but short sequences to be
copied, without which small models take long to recall anything; each variant linearizes the teacher on the same text,
all for the same number of tokens. Models are evaluated by recall and perplexity, and their decoding is timed.

What a command prints is kept in the folder of --work, and a command that is there is not run again; one that was
stopped resumes. So stages can be run one by one, `data` and `teacher` first, and variants side by side on several GPUs.
Each start collects in FILE what is there by then.

A teacher that answers fewer than GOOD of the questions about 4 pairs would make all else meaningless, and the start
ends with an error. KEY=VALUE... change the teacher's training; more steps (train.steps=N) extend it.
What was made of an earlier teacher stays what it is: remove it, or take another folder.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from slope_cli.checkpoint.load import shape_of
from slope_cli.data.dataset import open_dataset
from slope_cli.models.build import build_model
from slope_cli.report import metrics
from slope_cli.report.plots import picture
from slope_cli.report.tables import NONE, Document, Table, bytes_text, number
from slope_cli.utils.files import write_json
from slope_cli.utils.typed_json import from_json
from sparse_kernels import children

from .linearize_decoding import memory_row, subject
from .records import GenerateRow, RecallResults, RecallRow

GOOD = 0.9
"""The share of right answers about 4 pairs, over all distances, that a teacher needs."""
TRAINED = ("mqar", "needle", "copying")
"""The tasks that are trained on; the others are evaluated alone."""
VARIANTS: dict[str, tuple[str, ...]] = {
    "additive": (),
    "gated": ("linearize.state=gated",),
    "delta": ("linearize.state=delta",),
    "cache-16": ("linearize.cache=16",),
    "cache-64": ("linearize.cache=64",),
    "cache-256": ("linearize.cache=256",),
    "auto": ("linearize.keep_softmax=auto:{layers}",),
    "heads": ("linearize.keep_softmax=heads:{heads}",),
}
"""Their own settings by name; {layers} is a quarter of the layers, and {heads} an eighth of all KV heads."""
ALONE = "window"
"""The additive variant with its window alone, which is evaluated beside it."""
TEACHER = "teacher"
STAGES = ("data", TEACHER, *VARIANTS)
MODELS = ("llama", "gpt2")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of a model and of its training.

    length, short: tokens of a sequence, and of one of the teacher's first steps, whose items have half as many. share:
    of the training tokens, those of recall items. step: tokens of a step. teacher, first, linear: steps of the teacher,
    of those before them, and of a variant. lr: of the teacher, and twice that of its matrices, which Muon trains.
    items: of a cell. text: validation tokens of each source. micro: sequences at a time. batches: of texts that are
    decoded. words: of all runs.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    length: int
    short: int
    share: float
    step: int
    teacher: int
    first: int
    linear: int
    window: int
    lr: float
    items: int
    text: int
    micro: int
    batches: str
    variants: tuple[str, ...] = ("additive", "gated", "delta", "cache-64", "cache-256", "auto", "heads")
    words: tuple[str, ...] = ()


_SMALL: dict[str, Any] = {"layers": 8, "width": 512, "heads": 8, "kv_heads": 4, "window": 64, "lr": 2e-3}
_CPU: dict[str, Any] = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "window": 16, "lr": 3e-3}
_TINY: dict[str, Any] = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "window": 4, "lr": 5e-3}
SCALES = {
    "small": Scale(
        **_SMALL,
        length=2048,
        short=256,
        share=0.2,
        step=32_768,
        teacher=4000,
        first=600,
        linear=400,
        items=400,
        text=1 << 20,
        micro=16,
        batches="1,64",
    ),
    "cpu": Scale(
        **_CPU,
        length=256,
        short=128,
        share=0.5,
        step=4096,
        teacher=700,
        first=600,
        linear=200,
        items=200,
        text=1 << 16,
        micro=16,
        batches="1,16",
        variants=("additive", "cache-64", "auto", "heads", "delta", "gated", "cache-16"),
        words=("train.device=cpu",),
    ),
    "tiny": Scale(
        **_TINY,
        length=128,
        short=128,
        share=0.2,
        step=512,
        teacher=20,
        first=10,
        linear=10,
        items=4,
        text=1024,
        micro=4,
        batches="2",
        variants=("additive", "cache-64", "heads"),
        words=("train.device=cpu",),
    ),
}


@dataclass(frozen=True)
class Bench:
    """The stages of one model, in a folder."""

    model: str
    scale: Scale
    data: Path
    work: Path
    words: Sequence[str]

    @property
    def mix(self) -> Path:
        """The text with recall items."""
        return self.work / "data"

    @property
    def copying(self) -> Path:
        """What the teacher's first steps learn."""
        return self.work / "copying"

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.work / self.model / name

    def kept(self, name: str, what: str) -> Path:
        """Where it is kept what a command about a run printed."""
        return self.work / self.model / f"{name}.{what}.json"

    def stage(self, name: str) -> None:
        """Run the commands of a stage that were not run."""
        if name == "data":
            s, words = self.scale, ["data", "recall", str(self.data)]
            first = ["--tokens", str(s.first * s.step), "--seq-len", str(s.short // 2), "--tasks", "copying"]
            mixed = ["--share", f"{s.share:g}", "--seq-len", str(s.length), "--tasks", ",".join(TRAINED)]
            self._printed(self.work / "copying.json", [*words, *first, "--out", str(self.copying)])
            self._printed(self.work / "data.json", [*words, *mixed, "--out", str(self.mix)])
        elif name == TEACHER:
            self._teach()
        else:
            words = ["linearize", str(self.run(TEACHER)), *linear_words(self.scale), *self._own(name), *_logged()]
            self._printed(self.kept(name, "train"), [*words, "--out", str(self.run(name))])
            self._evaluate(name, [])
            if name == "additive":
                self._evaluate(name, [], branch=ALONE)
            self._time(name)

    def _teach(self) -> None:
        s = self.scale
        model = ["pretrain", "gpt2-nano", f"model.name={'gpt2-small' if self.model == 'gpt2' else 'llama3-8b'}"]
        model += [f"model.overrides={json.dumps(self._sizes())}", "model.dropout=0", "method=dense", *_logged()]
        model += ["optim.name=muon", f"optim.lr={s.lr:g}", f"optim.muon_lr={2 * s.lr:g}"]
        model += ["optim.schedule=cosine", f"train.tokens_per_step={s.step}"]
        first = [f"data.path={self.copying}", *_sequences(s.first, s.short, s.step // s.short)]
        first += ["optim.warmup=0.2", "optim.min_lr=1", *s.words]
        whole = [f"data.path={self.mix}", *_sequences(s.teacher, s.length, s.micro)]
        whole += ["optim.warmup=0.02", "optim.min_lr=0.1", f"model.init={self.run('first')}", *s.words, *self.words]
        self._printed(self.kept("first", "train"), [*model, *self.words, *first, "--out", str(self.run("first"))])
        self._printed(self.kept(TEACHER, "train"), [*model, *whole, "--out", str(self.run(TEACHER))])
        self._evaluate(TEACHER, whole)
        self._time(TEACHER)
        cells = self._read(TEACHER, "recall")["recall"]["rows"]
        found = fmean(cell["exact"] for cell in cells if (cell["task"], cell["pairs"]) == ("mqar", 4))
        line = f"the {self.model} teacher answers {found:.1%} of the questions about 4 pairs"
        print(line, file=sys.stderr)
        if found < GOOD and s is not SCALES["tiny"]:
            raise SystemExit(f"{line}, and needs {GOOD:.0%}: give it more steps (train.steps=N)")

    def _sizes(self) -> dict[str, int | bool]:
        """The fields of the model's config: its vocabulary is the tokenizer's, in a multiple of 64 rows."""
        s, dataset = self.scale, open_dataset(self.mix, verify=False)
        end = dataset.separator_id
        both = {"vocab_size": -(-dataset.vocab_size // 64) * 64, "bos_token_id": end, "eos_token_id": end}
        if self.model == "gpt2":
            return {**both, "n_embd": s.width, "n_layer": s.layers, "n_head": s.heads, "n_positions": s.length}
        sizes = {"hidden_size": s.width, "intermediate_size": 3 * s.width, "num_hidden_layers": s.layers}
        sizes |= {"num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads}
        return {**both, **sizes, "max_position_embeddings": 2 * s.length, "tie_word_embeddings": True}

    def _evaluate(self, name: str, trained: Sequence[str], branch: str = "") -> None:
        """Perplexity and recall; anew if the run was trained with other words."""
        s, out, words = self.scale, branch or name, ["eval", str(self.run(name)), "--branch", branch or "both"]
        words = words if name != TEACHER else words[:2]
        self._printed(self.kept(out, "perplexity"), [*words, "--tokens", str(s.text)], trained)
        # The prompts of an item's choices count as so many sequences.
        recall = ["--no-perplexity", "--tasks", "recall", "--limit", str(s.items), "--batch", "128"]
        self._printed(self.kept(out, "recall"), [*words, *recall], trained)

    def _time(self, name: str) -> None:
        for length in lengths(self.model, self.scale):
            words = ["bench", "generate", str(self.run(name)), "--variants", "trained", "--batches", self.scale.batches]
            words += ["--context", str(length), "--prompt", str(length), "--out", str(self.run(f"{name}.bench"))]
            words += ["--device", "cpu"] if "train.device=cpu" in self.scale.words else []
            self._printed(self.kept(name, f"decode-{length}"), words)

    def _printed(self, file: Path, words: Sequence[str], trained: Sequence[str] = ()) -> None:
        """Keep what `slope WORDS --json` prints, unless the same command's output is there.

        Raises:
            SystemExit: the command failed or was stopped, with its code.
        """
        key = [*words, *trained]
        if file.is_file() and json.loads(file.read_text())["words"] == key:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        command, environment = children.python("from slope_cli.cli import main; main()", [*words, "--json"])
        print(f"slope {' '.join(words)}", file=sys.stderr, flush=True)
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        write_json(file, {"words": key, "printed": json.loads(done.stdout)})

    # ------------------------------------------------------------------------------------------------------ the rows

    def rows(self) -> Iterator[RecallRow]:
        """Those of all models that were evaluated."""
        for name in (TEACHER, *VARIANTS, ALONE):
            if self.kept(name, "recall").is_file():
                yield self._row(name)

    def _row(self, name: str) -> RecallRow:
        run = "additive" if name == ALONE else name
        records, perplexity = metrics.read(self.run(run)), self._read(name, "perplexity")["perplexity"]
        steps = [record for record in records if record["kind"] in metrics.STEPS]
        if name == TEACHER:
            steps += [record for record in metrics.read(self.run("first")) if record["kind"] in metrics.STEPS]
        memory = memory_row(subject(str(self.run(run))))
        # The teacher has no linearized layers: what it would remember there, it remembers with softmax attention.
        sizes = {length: memory.remembered(length)[name != TEACHER] for length in lengths(self.model, self.scale)}
        decode = [
            row
            for length in sizes
            if self.kept(name, f"decode-{length}").is_file()
            for row in self._decoding(name, length)
        ]
        sources = {source: found["perplexity"] for source, found in perplexity["sources"].items()}
        return RecallRow(
            variant=name,
            words=list(self.words) if run == TEACHER else self._own(run),
            tokens=sum(_step_tokens(record) for record in steps),
            seconds=sum(_step_tokens(record) / record["tokens_per_s"] for record in steps),
            kept=next((record["kept"] for record in records if record["kind"] == "keep_softmax"), []),
            perplexity=perplexity["perplexity"],
            sources=sources,
            cells=self._read(name, "recall")["recall"]["rows"],
            remembered=sizes,
            decode=decode,
        )

    def _own(self, name: str) -> list[str]:
        s = self.scale
        heads = s.layers * (s.heads if self.model == "gpt2" else s.kv_heads)
        return [word.format(layers=s.layers // 4, heads=heads // 8) for word in VARIANTS[name]]

    def _decoding(self, name: str, length: int) -> list[GenerateRow]:
        (entry,) = self._read(name, f"decode-{length}")["generate"]["models"]
        rows = (from_json(GenerateRow, row) for row in entry["rows"])
        return [row for row in rows if (row.part, row.variant) == ("decode", "trained")]

    def _read(self, name: str, what: str) -> Any:
        return json.loads(self.kept(name, what).read_text())["printed"]


def _step_tokens(record: dict[str, Any]) -> int:
    tokens: int = record["tokens"] // record["step"]  # all steps of a run have as many
    return tokens


def lengths(model: str, scale: Scale) -> list[int]:
    """The lengths at which decoding is measured: rotary positions reach beyond those that were trained."""
    return [scale.length, *([2 * scale.length] if model == "llama" else [])]


def linear_words(scale: Scale) -> list[str]:
    """The settings of all variants."""
    own = [f"linearize.window={scale.window}", "linearize.transfer=0.3", "linearize.adjust_maps=true"]
    own += ["adapters.rank=0.0625", "optim.lr=2e-3", f"train.tokens_per_step={scale.step}"]
    return [*own, *_sequences(scale.linear, scale.length, scale.micro), *scale.words]


def _sequences(steps: int, length: int, micro: int) -> list[str]:
    """So many steps on sequences of so many tokens, some at a time."""
    return [f"train.steps={steps}", f"train.seq_len={length}", f"train.micro_batch={micro}"]


def _logged() -> list[str]:
    rare = ["log.val_every=0", "log.val_tokens=65536", "log.sample_every=0", "log.sample_tokens=8"]
    return [*rare, "log.save_every=250", "log.tensorboard=false"]


# ------------------------------------------------------------------------------------------------------- the report


def beyond(results: RecallResults, row: RecallRow) -> list[dict[str, Any]]:
    """The cells of a row at distances beyond the window of each variant, at its largest."""
    return [cell for cell in row.cells if cell["first"] > 2 * results.window]


def costs(results: RecallResults) -> Table:
    """Perplexity, memory and speed."""
    places = list(dict.fromkeys(length for row in results.rows for length in row.remembered))
    points = list(dict.fromkeys((step.tokens, step.batch) for row in results.rows for step in row.decode))
    columns = ["attention", "perplexity", "softmax in", *(f"memory at {length:,}" for length in places)]
    columns += [f"tokens/s at {length:,}, batch {batch}" for length, batch in points]
    cells = []
    for row in results.rows:
        kept = f"{results.layers} layers" if row.variant == TEACHER else ", ".join(map(str, row.kept)) or NONE
        speeds = {(step.tokens, step.batch): step.tokens_per_s for step in row.decode}
        own = [row.variant, number(row.perplexity), kept, *(bytes_text(row.remembered[at]) for at in places)]
        cells.append([*own, *(number(speeds.get(point), ",.0f") for point in points)])
    trained = {row.variant == TEACHER: row.tokens for row in results.rows}
    tokens = [f"the teacher had {trained[True] / 1e6:,.1f} million tokens"] if True in trained else []
    tokens += [f"each variant {trained[False] / 1e6:,.1f} million"] if False in trained else []
    note = f"A {results.model} of {results.parameters / 1e6:.1f} million parameters; {', '.join(tokens)}, "
    note += f"{results.share:.0%} of them recall items; window {results.window}. Memory is of one sequence. "
    note += f"{ALONE}: additive without its linear branch."
    return Table("Costs", columns, cells, note=note)


def by_task(results: RecallResults) -> Table:
    """Exact answers at the distances beyond the window, by task and number of pairs."""
    kinds = list(dict.fromkeys((c["task"], c["pairs"]) for row in results.rows for c in beyond(results, row)))
    cells = []
    for row in results.rows:
        found = beyond(results, row)
        own = {kind: [c["exact"] for c in found if (c["task"], c["pairs"]) == kind] for kind in kinds}
        cells.append([row.variant, *(number(fmean(shares), ".3f") if shares else NONE for shares in own.values())])
    every = [cell for row in results.rows for cell in beyond(results, row)]
    worst = max((cell["exact_stderr"] for cell in every), default=0.0)
    count = max((cell["n"] for cell in every), default=0)
    note = (
        f"Shares of exact answers at distances above {2 * results.window} tokens, the mean over ranges of distances of "
    )
    note += f"{count} items, whose standard errors are at most {worst:.3f}; passkey and phonebook were not trained on."
    return Table("By task", ["attention", *(f"{task} {pairs}" for task, pairs in kinds)], cells, note=note)


def by_distance(results: RecallResults) -> dict[str, dict[tuple[int, int], float]]:
    """Of each variant the mean over tasks of the exact answers, by range of distances beyond the window."""
    found: dict[str, dict[tuple[int, int], list[float]]] = {}
    for row in results.rows:
        for cell in beyond(results, row):
            found.setdefault(row.variant, {}).setdefault((cell["first"], cell["last"]), []).append(cell["exact"])
    return {name: {span: fmean(shares) for span, shares in sorted(spans.items())} for name, spans in found.items()}


def distances(results: RecallResults) -> Table:
    """`by_distance` as a table."""
    found = by_distance(results)
    spans = sorted({span for own in found.values() for span in own})
    cells = [[name, *(number(own.get(span), ".3f") for span in spans)] for name, own in found.items()]
    note = "The mean over all tasks and numbers of pairs that such distances have."
    return Table("By distance", ["attention", *(f"{first}-{last}" for first, last in spans)], cells, note=note)


def draw(results: RecallResults, out: Path) -> None:
    """Exact answers by distance, and against the memory of a sequence."""
    found = by_distance(results)
    with picture(out, panels=2) as ((left, right), _):
        for place, row in enumerate(results.rows):
            own, how = found.get(row.variant, {}), {"color": f"C{place}", "label": row.variant}
            left.plot([last for _, last in own], list(own.values()), marker="o", markersize=4, **how)
            shares = [cell["exact"] for cell in beyond(results, row)]
            if shares:
                right.scatter([row.remembered[results.length] / 2**20], [fmean(shares)], **how)
        left.set(xlabel="distance in tokens, at most", ylabel="exact answers", xscale="log", ylim=(-0.03, 1.03))
        lasts = sorted({last for own in found.values() for _, last in own})
        left.set_xticks(lasts, [f"{last:,}" for last in lasts], minor=False)
        left.set_xticks([], minor=True)
        right.set(xlabel=f"MiB of a sequence of {results.length:,} tokens", ylabel="exact answers", ylim=(-0.03, 1.03))
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend()


def collect(bench: Bench, scale: str, out: Path) -> RecallResults:
    """Write what is there: the file, and its picture."""
    model = build_model(shape_of(bench.run(TEACHER)), device="meta")
    results = RecallResults(
        model=bench.model,
        scale=scale,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=model.config.num_hidden_layers,
        length=bench.scale.length,
        window=bench.scale.window,
        share=bench.scale.share,
        words=linear_words(bench.scale),
        rows=list(bench.rows()),
    )
    write_json(out, asdict(results))
    draw(results, out.with_suffix(".png"))
    return results


def main() -> None:
    """Run stages, and write, show and draw what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder of `slope data prepare`")
    parser.add_argument("--work", type=Path, required=True, help="a folder for all that is made; one for each scale")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--only", help=f"stages, comma-separated, of {', '.join(STAGES)}")
    parser.add_argument("--gpu", help="the number of the GPU")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings of the teacher")
    given = parser.parse_args()
    scale = SCALES[given.scale]
    usual = ["data", TEACHER, *scale.variants]
    stages = given.only.split(",") if given.only else usual
    if unknown := [name for name in stages if name not in usual]:
        parser.error(f"--only {unknown[0]}: choose some of {', '.join(usual)}")
    if given.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = given.gpu  # before anything looks for one
    bench = Bench(given.model, scale, given.data, given.work, given.words)
    for name in stages:
        bench.stage(name)
    if bench.kept(TEACHER, "recall").is_file():
        results = collect(bench, given.scale, given.out)
        Document("Recall", [costs(results), by_task(results), distances(results)]).show()


if __name__ == "__main__":
    main()
