"""Commands that measure: a model's quality, a machine's speed."""

from pathlib import Path
from typing import Annotated

import typer

from slope_cli.commands.options import AsJson, Model, one_of_several, print_result
from slope_cli.distributed import launch
from slope_cli.errors import SlopeError, UsageError


def evaluate(
    folder: Model,
    data: Annotated[Path | None, typer.Option(help="Prepared data; default: the run's own.")] = None,
    perplexity: Annotated[bool, typer.Option(help="Measure the loss on validation text.")] = True,
    tokens: Annotated[int | None, typer.Option(min=1, help="Maximum tokens of each source; default: all.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens of a block; default: the run's.")] = None,
    tasks: Annotated[
        str, typer.Option(help="Comma-separated: recall; tasks, groups, tags of lm-eval; YAML files of tasks.")
    ] = "",
    task_data: Annotated[Path | None, typer.Option(help="Folder with TASK/SPLIT.jsonl[.gz]; default: the hub.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in a prompt; default: the task's.")] = None,
    samples: Annotated[
        Path | None, typer.Option("--log-samples", help="Folder for what each row asked and got, TASK.jsonl.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum rows of each task, also of each in a group; items of a cell.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences at a time.")] = None,
    branch: Annotated[str | None, typer.Option(help="The one active, if linearized: both, window or linear.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="That of the items of recall tasks.")] = 0,
    positions: Annotated[bool, typer.Option("--positions", help="Also show the loss by position in a block.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the result to this file as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, recall, and tasks of lm-eval.

    Perplexity is that of validation text; recall is by distance; other tasks are scored by lm-eval.

    As several tasks of srun, or under torchrun, each has the whole model and does its share.
    """
    ranks = one_of_several()
    from slope_cli.evaluate import evaluate as evaluating

    result = evaluating.evaluate(
        folder,
        data_folder=data,
        perplexity=perplexity,
        tokens=tokens,
        seq_len=seq_len,
        task_names=[name for name in tasks.split(",") if name],
        task_data=task_data,
        fewshot=fewshot,
        samples=samples,
        limit=limit,
        batch=batch,
        branch=branch,
        seed=seed,
        out=out,
    )
    if ranks.first:
        print_result(result, evaluating.report_lines(result, positions=positions), as_json)
    if failed := result.get("failed"):
        raise SlopeError(f"{', '.join(failed)}: could not be scored; see above, and --debug for a traceback")


def bench(
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="step, gemm, memory, generate, products, linearize, or all.")
    ] = "all",
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Models, as --cases; for generate, linearize also folders."),
    ] = None,
    cases: Annotated[list[str] | None, typer.Option(help="Models, repeated or comma-separated; default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; default: bench-GPU-DATE.")] = None,
    budget: Annotated[float | None, typer.Option(min=1, help="Seconds; the rest is listed as not run.")] = None,
    batches: Annotated[str, typer.Option(help="generate: batch sizes, comma-separated.")] = "1,2,4,8,16,32,64",
    context: Annotated[int, typer.Option(help="generate: tokens of each text.")] = 1024,
    prompt: Annotated[int, typer.Option(min=1, help="generate: tokens before the first one, at most.")] = 2048,
    variants: Annotated[
        str, typer.Option(help="generate: such as dense,sparse,sparse-r1.56; step: as it names them; default: all.")
    ] = "",
    against: Annotated[str, typer.Option(help="generate: also transformers, semi_structured, int8.")] = "",
    depth: Annotated[int | None, typer.Option(min=1, help="generate: only so many blocks.")] = None,
    tokens: Annotated[str, typer.Option(help="products: numbers of tokens, comma-separated.")] = "1,2,4,8,16,32,64",
    device: Annotated[str, typer.Option(help="generate, products: cpu; default: the GPU.")] = "",
    as_json: AsJson = False,
) -> None:
    """Benchmark sparse against dense on this machine.

    Training steps, products, memory, generating, and linearized decoding. Without a GPU: the memory, from the shapes,
    and with --device cpu generating and products, in plain torch.
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
        print_result(result.to_json(), [], as_json)
    else:
        report.show(result)


def _parts(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _counts(option: str, text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers of at least 1; UsageError for anything else."""
    if not all(part.isascii() and part.isdigit() and int(part) for part in _parts(text) or [""]):
        raise UsageError(f"{option} {text}: must be whole numbers of at least 1, comma-separated")
    return tuple(sorted({int(part) for part in _parts(text)}))
