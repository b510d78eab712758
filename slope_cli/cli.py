"""The command line. Each command parses its arguments and calls one function; nothing heavy is imported before.

Results go to standard output, the log to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage or config,
75 stopped by a signal, with a checkpoint or finished parts saved: the same command resumes.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import slope_cli
from slope_cli.config import configs, schema
from slope_cli.config.command import KeyCommand
from slope_cli.distributed import launch, peers
from slope_cli.distributed.caches import node_caches
from slope_cli.distributed.signals import STOPPED, StopFlag
from slope_cli.errors import SlopeError, UsageError, one_line
from slope_cli.report.terminal import escaped_streams, flushed_output

# Without rich markup, Typer's own errors are plain lines, not boxes.
PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=slope_cli.__doc__, **PLAIN)
data_app = typer.Typer(help="Prepare text for training.", **PLAIN)
app.add_typer(data_app, name="data")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config keys to change.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, without GPU, data or weights.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Fail if the folder already contains a run.")]
Run = Annotated[Path, typer.Argument(help="The folder of a run.")]
ExportFormat = Literal["dense", "packed"]
PackedDtype = Literal["bfloat16", "float16", "float32"]


@app.callback(invoke_without_command=True)
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for every error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if debug:
        os.environ["SLOPE_DEBUG"] = "1"
    if version:
        print(slope_cli.__version__)
        raise typer.Exit


@app.command(cls=KeyCommand)
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `slope recipes`) or YAML file.")] = "gpt2-nano",
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default runs/RECIPE.")] = None,
    dry_run: DryRun = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="With --dry-run: also memory and traffic on N GPUs.")] = None,
    gpu_memory: Annotated[float, typer.Option(min=1, help="With --gpus: GiB of a GPU.")] = 80,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Train a model. To resume after a stop, run the same command again.

    Without arguments: a small GPT-2, double-pruned 2:4 with adapters at the end, on the novels in the package.
    """
    overrides = list(overrides or [])
    if "=" in recipe and not Path(recipe).is_file():  # `slope pretrain train.steps=10` means the default recipe
        recipe, overrides = "gpt2-nano", [recipe, *overrides]
    # Path.stem would cut the name opt-1.3b to opt-1.
    run = out or Path("runs") / Path(recipe).name.removesuffix(".yml").removesuffix(".yaml")
    if gpus and not dry_run:
        raise UsageError(f"--gpus={gpus}: is for --dry-run; a run uses the GPUs of the tasks that srun starts")
    how: dict[str, Any] = {"dry_run": dry_run, "gpus": (gpus, gpu_memory) if gpus else None}
    with contextlib.nullcontext() if dry_run else StopFlag() as stop:  # before torch is imported, which takes seconds
        _train(recipe, overrides, run, stop, **how, fresh=fresh, as_json=as_json)


@app.command(cls=KeyCommand)
def linearize(
    init: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run, or a folder that transformers reads.")],
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option(help="The recipe of the settings.")] = "linearize",
    out: Annotated[Path | None, typer.Option(help="The new run's folder; default runs/NAME-linear.")] = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Turn a trained model's attention into window softmax plus linear attention with a state of fixed size.

    Each layer first learns its own softmax attention's output; then low-rank adapters are trained on text. Weights,
    dense or sparse, stay as they are. To resume after a stop, run the same command again.
    """
    with StopFlag() as stop:
        from slope_cli.train.init import linearize_overrides

        run = out or Path("runs") / f"{init.resolve().name}-linear"
        implied = linearize_overrides(init, recipe, run)
        _train(recipe, overrides or [], run, stop, implied, dry_run=dry_run, fresh=fresh, as_json=as_json)


def _train(
    recipe: str,
    overrides: list[str],
    run: Path,
    stop: StopFlag | None,
    implied: Sequence[str] = (),
    *,
    dry_run: bool,
    gpus: tuple[int, float] | None = None,
    fresh: bool,
    as_json: bool,
) -> None:
    """Train, or describe, a recipe with the overrides that the command implies and those of the user."""
    ranks = _one_of_several()
    config = configs.load(recipe, [*implied, *overrides])
    if ranks.first:
        for line in configs.without_effect(config, overrides):
            print(f"warning: {line}", file=sys.stderr)
    usual = configs.load_with_usual_rates(recipe, [*implied, *overrides])
    if dry_run:
        from slope_cli.train import advice
        from slope_cli.train.dry_run import describe

        advice.warn(config, advice.prepared_data(config), usual)
        _print(*describe(config, gpus), as_json)
        return
    from slope_cli.train import loop
    from slope_cli.train.summary import report_lines

    if summary := loop.pretrain(config, run, fresh=fresh, stop=stop, usual=usual):  # empty on ranks other than 0
        _print(summary | {"run": str(run)}, report_lines(summary, run), as_json)


@data_app.command("prepare")
def prepare(
    inputs: Annotated[
        list[str], typer.Argument(help="Files, folders, NAME=PATH, or the name of a Hugging Face data set.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, a folder, or a Hugging Face name.")] = "bytes",
    text_key: Annotated[str, typer.Option(help="Field of JSON, CSV and parquet rows that holds the text.")] = "text",
    val_fraction: Annotated[float, typer.Option(help="Share of each source's segments that is held out.")] = 0.01,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face data set.")] = "train",
    config_name: Annotated[
        str | None, typer.Option("--config", help="Configuration of a Hugging Face data set.")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="I/N, I from 1: prepare only this share of the text.")] = None,
) -> None:
    """Turn text, JSON, CSV, parquet (.gz .bz2 .xz .zst), folders of these, or a Hub data set into token files.

    Run the same command again to resume after a stop. With --shard 1/N to N/N (sbatch --array=1-N: $SLURM_ARRAY_TASK_ID
    of N) several machines share the work in one folder; then the same command without --shard joins it.
    """
    launch.require_one_process()
    from slope_cli.data import prepare as preparing
    from slope_cli.data.dataset import show

    how: dict[str, Any] = {"tokenizer": tokenizer, "text_key": text_key, "val_fraction": val_fraction}
    how |= {"workers": workers, "split": split, "config_name": config_name}
    if shard is None:
        show(preparing.prepare(inputs, out, **how))
    else:
        preparing.prepare_shard(shard, inputs, out, **how)


@data_app.command("info")
def info(folder: Annotated[Path, typer.Argument(help="A prepared folder.")]) -> None:
    """Show the sources of a prepared folder and check every byte of it."""
    from slope_cli.data.dataset import open_dataset, show

    show(open_dataset(folder))


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run, or a folder that transformers reads.")],
    prompt: Annotated[str | None, typer.Argument(help="The prompt.")] = None,
    batch: Annotated[Path | None, typer.Option(help='Prompts: one a line, or .jsonl with {"prompt": …}.')] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Only the k likeliest tokens; 0: all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Only the likeliest that reach this probability.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=schema.MAX_SEED)] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile linearized attention; for a GPU.")] = False,
    as_json: AsJson = False,
) -> None:
    """Generate text from a trained model: the continuation of a prompt, or of each in a file."""
    launch.require_one_process()
    from slope_cli.inference import generate as generating
    from slope_cli.inference.sampling import Sampling

    sampling = Sampling(tokens, temperature, top_k, top_p, seed, tuple(stop or ()))
    device = launch.pick_device("auto")
    generating.generate(model, prompt, batch, sampling, device, compiled=compiled, as_json=as_json)


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run, or a folder that transformers reads.")],
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one, which the log names.")] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Texts that are continued at once.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that wait besides; more are refused.")] = 256,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a text and its prompt; default: the model's positions.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    grace: Annotated[float, typer.Option(min=0, help="Seconds that running texts have when a signal comes.")] = 30.0,
) -> None:
    """Answer OpenAI's completions and chat over HTTP until SIGINT or SIGTERM; $SLOPE_API_KEY: a key to ask for."""
    launch.require_one_process()
    try:
        from slope_cli.serving import server
    except ModuleNotFoundError as error:
        raise UsageError(f"slope serve: {error.name} is missing; pip install slope-cli[serve]") from None

    limits = server.Limits(max_batch, max_queue, max_length, grace)
    server.serve(model, host, port, dtype, launch.pick_device("auto"), limits)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run; packed also a folder of any 2:4 model.")],
    folder: Annotated[Path, typer.Argument(help="An empty or new folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapters into weights, now dense.")] = False,
    form: Annotated[ExportFormat, typer.Option("--format", help="dense: with zeros; packed: for inference.")] = "dense",
    dtype: Annotated[PackedDtype | None, typer.Option(help="Of packed weights; default: bfloat16.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a folder that transformers' from_pretrained loads, and check its logits.

    Adapters are a folder for PEFT beside dense weights. For a linearized run only slope loads the feature maps, and the
    check uses slope; from_pretrained gives plain softmax attention. With --format packed 2:4 layers are kept values and
    metadata, with their adapters, for inference: loaded by slope, or after import sparse_kernels.transformers.
    """
    launch.require_one_process()
    if form == "packed":
        if merge:
            raise UsageError("--merge: packed layers are 2:4, and merged ones are not; leave it out")
        from slope_cli.inference.export_packed import export_packed, report_lines

        result = export_packed(run, folder, dtype or "bfloat16")
        _print(result, report_lines(result), as_json)
        return
    if dtype is not None:
        raise UsageError("--dtype: is for --format packed; a dense export is in float32")
    from slope_cli.inference.export import export as write

    result = write(run, folder, merge=merge)
    text = f"{folder}: step {result['step']}, reloaded logits differ by {result['logits_difference']:.1e} of their size"
    _print(result, [text], as_json)


@app.command("convert-llama2c")
def convert_llama2c(
    model: Annotated[Path, typer.Argument(help="A llama2.c checkpoint, version 0.")],
    tokenizer: Annotated[Path, typer.Argument(help="Its tokenizer's .bin file.")],
    out: Annotated[Path, typer.Option(help="An empty or new folder.")],
    as_json: AsJson = False,
) -> None:
    """Convert a llama2.c model into a folder that transformers loads."""
    from slope_cli.benchmarks.llama2c import convert

    sizes = convert(model, tokenizer, out)
    text = f"{sizes['parameters']:,} parameters, {sizes['layers']} layers, {sizes['vocabulary']} ids"
    _print(sizes, [f"{out}: {text}, {sizes['positions']} positions"], as_json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
    file: Annotated[Path | None, typer.Argument(help="With --copy: the new file.")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Write recipe NAME to FILE, to start one of your own.")] = False,
) -> None:
    """List the recipes, print one, or copy one: slope recipes --copy NAME FILE."""
    if copy != (file is not None):
        raise UsageError("to copy a recipe: slope recipes --copy NAME FILE, such as --copy gpt2-small mine.yaml")
    if name is None:
        for recipe in configs.recipe_names():
            print(f"{recipe:24}{configs.recipe_text(recipe).splitlines()[0].lstrip('# ')}")
        return
    text = configs.recipe_text(name)
    if file is None:
        print(text, end="")
    elif file.exists():
        raise UsageError(f"{file}: already exists; choose another file")
    else:
        file.write_text(text, encoding="utf-8")


@app.command()
def config(
    key: Annotated[str | None, typer.Argument(help="A key, such as optim.lr, or a section.")] = None,
) -> None:
    """Explain the configuration: all sections, the keys of one, or one key."""
    from slope_cli.config.reference import explain

    print("\n".join(explain(key)))


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[Path, typer.Option(help="Path of the plot, without suffix.")] = Path("loss"),
) -> None:
    """Plot the loss of one or more runs as PNG and SVG."""
    from slope_cli.report.plots import draw_loss

    for file in draw_loss(runs, out):
        print(file)


@app.command()
def check(run: Run, as_json: AsJson = False) -> None:
    """Verify a run: config, log, every byte of its checkpoints, and the sparse layers of the newest one."""
    from slope_cli.checkpoint.verify import check as verify

    result = verify(run)
    _print(result, result["lines"], as_json)
    if result["faults"]:
        raise SlopeError(f"{run}: {len(result['faults'])} fault(s), the first in {result['faults'][0]}")


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="step, gemm, memory, generate, products, linearize, or all.")] = "all",
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Models, as --cases; for generate, linearize also folders."),
    ] = None,
    cases: Annotated[list[str] | None, typer.Option(help="Models, repeated or comma-separated; default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default: bench-GPU-DATE.")] = None,
    budget: Annotated[float | None, typer.Option(min=1, help="Seconds; the rest is listed as not run.")] = None,
    batches: Annotated[str, typer.Option(help="generate: numbers of texts, comma-separated.")] = "1,2,4,8,16,32,64",
    context: Annotated[int, typer.Option(help="generate: tokens of each text.")] = 1024,
    prompt: Annotated[int, typer.Option(min=1, help="generate: tokens before the first one, at most.")] = 2048,
    variants: Annotated[str, typer.Option(help="generate: such as dense,sparse,sparse-r1.56; default: all.")] = "",
    against: Annotated[str, typer.Option(help="generate: also transformers, semi_structured, int8.")] = "",
    depth: Annotated[int | None, typer.Option(min=1, help="generate: only so many blocks.")] = None,
    tokens: Annotated[str, typer.Option(help="products: numbers of tokens, comma-separated.")] = "1,2,4,8,16,32,64",
    device: Annotated[str, typer.Option(help="generate, products: cpu; default: the GPU.")] = "",
    as_json: AsJson = False,
) -> None:
    """Benchmark training steps, products and memory, sparse against dense; generating; and linearized decoding.

    Without a GPU: only the memory, from the shapes.
    """
    launch.require_one_process()
    from slope_cli.benchmarks import bench, records, report

    given = [*(models or ()), *(cases or ())]  # a folder's name may contain commas
    names = [name for text in given for name in ([text] if Path(text).exists() else _parts(text))]
    if device not in ("", "cpu"):
        raise UsageError(f"--device {device}: must be cpu, or be left out for the GPU")
    plan = records.Plan(
        batches=_counts("--batches", batches),
        context=context,
        prompt=prompt,
        variants=tuple(_parts(variants)),
        against=tuple(_parts(against)),
        depth=depth,
        tokens=_counts("--tokens", tokens),
        device=device,
    )
    result = bench.run(what, names, out, budget, plan)
    if as_json:
        _print(result.to_json(), [], as_json)
    else:
        report.show(result)


def _parts(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _counts(option: str, text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers of at least 1; UsageError for anything else."""
    if not all(part.isascii() and part.isdigit() and int(part) for part in _parts(text) or [""]):
        raise UsageError(f"{option} {text}: must be whole numbers of at least 1, comma-separated")
    return tuple(sorted({int(part) for part in _parts(text)}))


@app.command(cls=KeyCommand)
def compare(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RECIPE [KEY=VALUE]...", help="Or, with --runs, folders of runs.")
    ],
    runs: Annotated[bool, typer.Option("--runs", help="Compare existing runs, or compare.json files.")] = False,
    methods: Annotated[str, typer.Option(help="Methods, half-depth, same-active, slope-r0; comma-separated.")] = "",
    variant: Annotated[list[str] | None, typer.Option(help="'NAME: KEY=VALUE KEY=VALUE'; may be repeated.")] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated numbers.")] = "1",
    lrs: Annotated[str, typer.Option(help="Comma-separated learning rates; each variant shows its best.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the runs and the result.")] = Path("compare"),
    jobs: Annotated[int, typer.Option(min=1, help="Concurrent runs.")] = 1,
    shard: Annotated[str | None, typer.Option(help="I/N, I from 1: only this share of the runs; no files.")] = None,
    allow_different: Annotated[bool, typer.Option("--allow-different", help="Despite other data or budgets.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train variants of a recipe on the same data and compare them.

    To resume after a stop, run the same command again; finished runs are not trained again. With --shard 1/N to N/N
    the tasks of a job array train them; then the same command without --shard compares them.
    """
    with StopFlag() as stop:
        from slope_cli.compare import results as comparing
        from slope_cli.compare import table
        from slope_cli.compare.variants import numbers

        if runs:
            result = comparing.compare_runs(list(map(Path, arguments)), out=out, allow_different=allow_different)
        else:
            names = [name for name in methods.split(",") if name]
            how: dict[str, Any] = {"out": out, "methods": names, "extra": variant or [], "jobs": jobs, "shard": shard}
            how |= {"seeds": numbers("--seeds", seeds, int), "lrs": numbers("--lrs", lrs, float), "stop": stop}
            result = comparing.compare(arguments[0], arguments[1:], **how, allow_different=allow_different)
    if as_json:
        _print(asdict(result), [], as_json)
    else:
        table.document(result).show()
    if failed := len(result.failures):
        raise SlopeError(f"{failed} of {failed + len(result.runs)} runs failed; see the table")


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run, or a folder that transformers reads.")],
    data: Annotated[Path | None, typer.Option(help="Prepared data; default: the run's own.")] = None,
    perplexity: Annotated[bool, typer.Option(help="Measure the loss on validation text.")] = True,
    tokens: Annotated[int | None, typer.Option(min=1, help="Maximum tokens of each source; default: all.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens of a block; default: the run's.")] = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated: hellaswag, piqa, arc_easy, …; scored by lm-eval.")] = "",
    task_data: Annotated[Path | None, typer.Option(help="Folder with TASK/SPLIT.jsonl[.gz]; default: the hub.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum rows of each task (MMLU: of each subject).")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences at a time.")] = None,
    branch: Annotated[str | None, typer.Option(help="The one active, if linearized: both, window or linear.")] = None,
    positions: Annotated[bool, typer.Option("--positions", help="Also show the loss by position in a block.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the result to this file as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model: perplexity on validation text, and zero-shot tasks scored by lm-eval.

    As several tasks of srun, or under torchrun, each has the whole model and does its share.
    """
    ranks = _one_of_several()
    from slope_cli.evaluate import evaluate as evaluating

    result = evaluating.evaluate(
        folder,
        data_folder=data,
        perplexity=perplexity,
        tokens=tokens,
        seq_len=seq_len,
        task_names=[name for name in tasks.split(",") if name],
        task_data=task_data,
        limit=limit,
        batch=batch,
        branch=branch,
        out=out,
    )
    if ranks.first:
        _print(result, evaluating.report_lines(result, positions=positions), as_json)
    if failed := result.get("failed"):
        raise SlopeError(f"{', '.join(failed)}: could not be scored; see above, and --debug for a traceback")


@app.command()
def finetune(
    folder: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A BERT run, or an exported one.")],
    task: Annotated[str, typer.Argument(help="CoLA, SST-2, MRPC, STS-B, RTE or SQuAD.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the official files; default: the hub.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: RUN/finetune/TASK-SEED.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 3 (CoLA 5, SQuAD 2).")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-5,
    batch: Annotated[int | None, typer.Option(min=1, help="Default: 32 (SQuAD 24).")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Default: 128 (SQuAD 384).")] = None,
    seed: Annotated[int, typer.Option(min=0, max=schema.MAX_SEED)] = 1,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a BERT on a GLUE task or on SQuAD v1.1 and evaluate it on dev; masks stay fixed."""
    from slope_cli.finetune import train as tuning

    result = tuning.finetune(
        folder, task, data=data, out=out, epochs=epochs, lr=lr, batch=batch, seq_len=seq_len, seed=seed
    )
    _print(result, tuning.report_lines(result), as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: what is installed, what is missing, and how to fix it."""
    from slope_cli.doctor import examine

    result, lines = examine()
    _print(result, lines, as_json)
    if not result["training"]:
        raise SlopeError("training cannot work here; see above")


def _one_of_several() -> launch.Ranks:
    """Set up this process as one that srun or torchrun may have started with others; before torch is imported."""
    launch.use_granted_cores()
    ranks = launch.ranks()
    node_caches(ranks)
    return ranks


def _print(result: dict[str, Any], lines: list[str], as_json: bool) -> None:
    print(json.dumps(result, indent=1) if as_json else "\n".join(lines))


def main() -> None:
    """Run the command line; known errors become one line and an exit code."""
    os.environ["PYTHONSAFEPATH"] = "1"  # no child process imports from the working folder
    with escaped_streams():
        try:
            with flushed_output():
                app(prog_name="slope")
        except SystemExit as end:
            peers.leave(end.code if isinstance(end.code, int) else 0, "")
            raise
        except Exception as error:
            known = isinstance(error, SlopeError | OSError | MemoryError | RuntimeError)
            reason = one_line(error) if known and "SLOPE_DEBUG" not in os.environ else ""
            code = getattr(error, "exit_code", 1)
            text = (reason if code == STOPPED else f"error: {reason}") if reason else traceback.format_exc().rstrip()
            peers.leave(code, text)
            print(text, file=sys.stderr)
            raise SystemExit(code) from None
