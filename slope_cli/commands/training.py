"""Commands that train."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slope_cli.commands.options import AsJson, Model, one_of_several, print_result, recipes_with
from slope_cli.config import configs
from slope_cli.config.schema import Config
from slope_cli.config.section import MAX_WHOLE
from slope_cli.distributed.signals import StopFlag
from slope_cli.errors import SlopeError, UsageError
from slope_cli.report import warned

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from slope_cli.checkpoint.run_folder import Existing

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Config keys to change; `slope config` lists them.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, without GPU, data or weights.")]
New = Annotated[bool, typer.Option("--new", help="Fail if the folder already contains a run.")]
Fresh = Annotated[bool, typer.Option("--fresh", hidden=True)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that the folder contains by a new one.")]


def pretrain(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe (see `slope recipes`) or YAML file; default: gpt2-nano.",
            autocompletion=recipes_with,
        ),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default runs/RECIPE.")] = None,
    dry_run: DryRun = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="With --dry-run: also memory and traffic on N GPUs.")] = None,
    gpu_memory: Annotated[float, typer.Option(min=1, help="With --gpus: GiB of a GPU.")] = 80,
    new: New = False,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    source: Annotated[
        str | None, typer.Option("--from", metavar="RUN[@STEP]", help="Begin with the model and config of this run.")
    ] = None,
    with_optimizer: Annotated[
        bool, typer.Option("--with-optimizer", help="With --from: the optimizer's state, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model. To resume after a stop, run the same command again.

    Without arguments: a small GPT-2, double-pruned 2:4 with adapters at the end, on the novels in the package.
    """
    overrides = list(overrides or [])
    if recipe and "=" in recipe and not Path(recipe).is_file():  # `slope pretrain train.steps=10`: the default recipe
        overrides, recipe = [recipe, *overrides], None
    if source and (recipe or not (out or dry_run)):
        raise UsageError("--from takes the config of its run: give no recipe, but --out, the folder of the new run")
    if with_optimizer and not source:
        raise UsageError("--with-optimizer: is for --from")
    recipe = recipe or "gpt2-nano"
    # Path.stem would cut the name opt-1.3b to opt-1.
    run = out or Path("runs") / Path(recipe).name.removesuffix(".yml").removesuffix(".yaml")
    if gpus and not dry_run:
        raise UsageError(f"--gpus={gpus}: is for --dry-run; a run uses the GPUs of the tasks that srun starts")
    how: dict[str, Any] = {"dry_run": dry_run, "gpus": (gpus, gpu_memory) if gpus else None, "as_json": as_json}
    how["existing"] = _existing(new, overwrite, fresh)
    with contextlib.nullcontext() if dry_run else StopFlag() as stop:  # before torch is imported, which takes seconds
        if source:
            from slope_cli.train.branch import branch
            from slope_cli.train.starts import goes_on

            begun = run if out and goes_on(run, how["existing"]) else None
            recipe, how["implied"] = branch(source, begun, with_optimizer=with_optimizer)
        _train(recipe, overrides, run, stop, **how)


def linearize(
    init: Model,
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option(help="The recipe of the settings.", autocompletion=recipes_with)] = "linearize",
    out: Annotated[Path | None, typer.Option(help="The new run's folder; default runs/NAME-linear.")] = None,
    dry_run: DryRun = False,
    new: New = False,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Turn a trained model's attention into linear attention.

    It becomes window softmax plus linear attention with a state of fixed size. Each layer first learns its own softmax
    attention's output; then low-rank adapters are trained on text. Weights, dense or sparse, stay as they are. To
    resume after a stop, run the same command again.
    """
    existing = _existing(new, overwrite, fresh)
    with StopFlag() as stop:
        from slope_cli.checkpoint.hf_folder import model_name
        from slope_cli.train.init import linearize_overrides
        from slope_cli.train.starts import goes_on

        run = out or Path("runs") / f"{model_name(init)}-linear"
        implied = linearize_overrides(init, recipe, run if goes_on(run, existing) else None)
        _train(recipe, overrides or [], run, stop, implied, dry_run=dry_run, existing=existing, as_json=as_json)


def _existing(new: bool, overwrite: bool, fresh: bool) -> "Existing":
    """What a start does with a run in its folder."""
    if fresh:
        warned.warn("--fresh is now --new; until version 0.3 it still works")
    if (new or fresh) and overwrite:
        raise UsageError("--new and --overwrite: choose one; --new refuses a run that --overwrite replaces")
    return "replace" if overwrite else "refuse" if new or fresh else "resume"


def _train(
    recipe: str,
    overrides: list[str],
    run: Path,
    stop: StopFlag | None,
    implied: Sequence[str] = (),
    *,
    dry_run: bool,
    gpus: tuple[int, float] | None = None,
    existing: "Existing",
    as_json: bool,
) -> None:
    """Train, or describe, a recipe with the overrides that the command implies and those of the user."""
    ranks = one_of_several()
    config = configs.load(recipe, [*implied, *overrides])
    if ranks.first:
        for line in configs.without_effect(config, overrides):
            warned.warn(line)
    usual = configs.load_with_usual_rates(recipe, [*implied, *overrides])
    from slope_cli.data.dataset import WrongDataError

    try:
        if dry_run:
            _describe(config, usual, gpus, as_json)
            return
        from slope_cli.train import loop
        from slope_cli.train.summary import report_lines

        summary = loop.pretrain(config, run, existing=existing, stop=stop, usual=usual)
    except WrongDataError as error:
        known = configs.recipe_data(recipe)
        raise WrongDataError(f"{error}; the data of {recipe}: {known}" if known else str(error)) from error
    if summary:  # empty on ranks other than 0
        print_result(summary | {"run": str(run)}, report_lines(summary, run), as_json)


def _describe(config: Config, usual: Config, gpus: tuple[int, float] | None, as_json: bool) -> None:
    """Print what a run would do; refuse data that do not fit its model, as the run does."""
    from slope_cli.train import advice
    from slope_cli.train.dry_run import describe
    from slope_cli.train.init import run_shape

    if (data := advice.prepared_data(config)) is not None:
        data.check_model(run_shape(config).vocab_size, config.train.seq_len)
    advice.warn(config, data, usual)
    print_result(*describe(config, gpus), as_json)


def finetune(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN[@STEP]|DIR", help="A run, or a folder that transformers reads.")
    ],
    task: Annotated[str, typer.Argument(metavar="TASK", help="CoLA, SST-2, MRPC, STS-B, RTE, SQuAD: a BERT; SFT.")],
    data: Annotated[Path | None, typer.Option(help="Official files' folder (default: the hub); SFT: JSONL.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: RUN/finetune/TASK-SEED.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the rows; default: 3 (CoLA 5, SQuAD 2).")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: 3e-5 (SFT 2e-5, --lora 2e-4).")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a step; default: 32 (SQuAD 24).")] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row; default: 128 (SQuAD 384; SFT as the run).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_WHOLE, help="Of order, dropout, new weights.")] = 1,
    val: Annotated[str | None, typer.Option(help="SFT: JSONL, or the share of rows held out; default: 0.05.")] = None,
    lora: Annotated[
        int | None, typer.Option(min=1, metavar="RANK", help="SFT: train LoRA adapters of this rank alone.")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="SFT: rows read at once; default: 8.")] = None,
    as_json: AsJson = False,
) -> None:
    """Supervised fine-tuning on answers (SFT), GLUE, SQuAD.

    Masks stay fixed. A BERT is evaluated on dev. SFT learns the answers in rows of {"messages": [{"role", "content"}]}
    or {"prompt", "completion"}, and writes OUT/model, a folder that transformers, slope generate and slope serve load.
    """
    how: dict[str, Any] = {"out": out, "epochs": epochs, "batch": batch, "seq_len": seq_len, "seed": seed}
    if task.lower() == "sft":
        from slope_cli.finetune import loop, sft

        how |= {"val": val or "0.05", "lora": lora or 0, "micro_batch": micro_batch, "lr": lr}
        result = sft.finetune(folder, data, **how)
        lines = sft.report_lines(result, out or loop.default_folder(folder, loop.SFT, seed))
    else:
        from slope_cli.finetune import train as tuning

        for name, value in (("val", val), ("lora", lora), ("micro-batch", micro_batch)):
            if value is not None:
                raise UsageError(f"--{name}: is for the task SFT")
        result = tuning.finetune(folder, task, data=data, lr=3e-5 if lr is None else lr, **how)
        lines = tuning.report_lines(result)
    print_result(result, lines, as_json)


def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [KEY=VALUE]...",
            help="Or, with --runs, folders of runs or of comparisons.",
            autocompletion=recipes_with,
        ),
    ],
    runs: Annotated[
        bool, typer.Option("--runs", help="Compare existing runs, also those of earlier comparisons.")
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, slope-r0, or dense models: half-depth, dense-0.87 (or another share of the weights), "
            "same-active, same-bytes (as the sparse one takes when it is served); comma-separated."
        ),
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="'NAME: KEY=VALUE KEY=VALUE'; may be repeated.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated numbers; default: 1.")] = None,
    lrs: Annotated[
        str | None, typer.Option(help="Comma-separated learning rates; each variant shows its best.")
    ] = None,
    equal: Annotated[
        str | None, typer.Option(help="tokens (default), or time: the steps that the first variant's time buys.")
    ] = None,
    exchange: Annotated[
        float | None, typer.Option(help="Also train the first variant with this share of its steps: gaps in steps.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the result.")] = Path("compare"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Concurrent runs; default: 1.")] = None,
    shard: Annotated[str | None, typer.Option(help="I/N, I from 1: only this share of the runs; no files.")] = None,
    allow_different: Annotated[bool, typer.Option("--allow-different", help="Despite other data or budgets.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare variants of a recipe at equal tokens or time.

    All are trained on the same data.

    To resume after a stop, run the same command again; finished runs are not trained again. With --shard 1/N to N/N
    the tasks of a job array train them; then the same command without --shard compares them.
    """
    with StopFlag() as stop:
        from slope_cli.compare import results as comparing
        from slope_cli.compare import table
        from slope_cli.compare.variants import numbers

        if runs:
            own: dict[str, Any] = {"methods": methods, "variant": variant, "seeds": seeds, "lrs": lrs, "equal": equal}
            own |= {"exchange": exchange, "jobs": jobs, "shard": shard}
            if given := next((name for name, value in own.items() if value not in (None, [])), None):
                raise UsageError(f"--{given}: is for runs that are still to be trained; leave it out with --runs")
            result = comparing.compare_runs(list(map(Path, arguments)), out=out, allow_different=allow_different)
        else:
            names = [name for name in (methods or "").split(",") if name]
            how: dict[str, Any] = {"out": out, "methods": names, "extra": variant or [], "shard": shard, "stop": stop}
            how |= {"seeds": numbers("--seeds", "1" if seeds is None else seeds, int), "jobs": jobs or 1}
            how |= {"lrs": numbers("--lrs", lrs or "", float)}
            how |= {"equal": equal or "tokens", "exchange": exchange}
            result = comparing.compare(arguments[0], arguments[1:], **how, allow_different=allow_different)
    if as_json:
        print_result(asdict(result), [], as_json)
    else:
        table.document(result).show()
    if failed := len(result.failures):
        raise SlopeError(f"{failed} of {failed + len(result.runs)} runs failed; see the table")
