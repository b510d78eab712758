"""The commands of `slope data`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from slope_cli.commands.options import AsJson
from slope_cli.distributed import launch
from slope_cli.errors import UsageError


def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT", help="Files, folders, or a Hugging Face data set's name; NAME=INPUT: as the source NAME."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, a folder, or a Hugging Face name.")] = "bytes",
    text_key: Annotated[str, typer.Option(help="Field of JSON, CSV and parquet rows that holds the text.")] = "text",
    encoding: Annotated[str, typer.Option(help="Of text, JSON and CSV files, such as latin-1 or utf-16.")] = "utf-8",
    val: Annotated[
        list[str] | None, typer.Option(metavar="INPUT", help="A file or folder of validation text; may be repeated.")
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Share of each source that is held out for validation; default: 0.01, or 0 with --val."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hugging Face data set.")] = "train",
    config_name: Annotated[
        str | None, typer.Option("--config", help="Configuration of a Hugging Face data set.")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="I/N, I from 1: prepare only this share of the text.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn files of text, or a Hub data set, into token files.

    The files: text, JSON, CSV, parquet (.gz .bz2 .xz .zst), and folders of these. Run the same command again to resume
    after a stop. With --shard 1/N to N/N (sbatch --array=1-N: $SLURM_ARRAY_TASK_ID of N) several machines share the
    work in one folder; then the same command without --shard joins it.
    """
    launch.require_one_process()
    from slope_cli.data import prepare as preparing
    from slope_cli.data.dataset import show

    how: dict[str, Any] = {"tokenizer": tokenizer, "text_key": text_key, "encoding": encoding}
    how |= {"val": val or (), "val_fraction": val_fraction}
    how |= {"workers": workers, "split": split, "config_name": config_name}
    if shard is None:
        show(preparing.prepare(inputs, out, **how), as_json=as_json)
    else:
        preparing.prepare_shard(shard, inputs, out, **how)


def info(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A prepared folder.")], as_json: AsJson = False
) -> None:
    """Show what a prepared folder holds, and check its bytes."""
    from slope_cli.data.dataset import open_dataset, show

    show(open_dataset(folder), as_json=as_json)


def recall(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A prepared folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    share: Annotated[
        float | None, typer.Option(help="Of the training tokens, those of recall items.", show_default="0.05")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="In place of a share: so many tokens of items, and no training text.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of an item, at most: no more than a run's sequences.")] = 1024,
    tasks: Annotated[str, typer.Option(help="Recall tasks with commas between them.")] = "recall",
    seed: Annotated[int, typer.Option(min=0, help="Of the items.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Copy a prepared folder, adding recall items to train on.

    They are one more source, made of the training text; `slope eval --tasks recall` draws others.
    """
    launch.require_one_process()
    from slope_cli.data.dataset import show
    from slope_cli.evaluate.recall import split_names
    from slope_cli.evaluate.recall_source import SHARE, add_recall

    if share is not None and tokens is not None:
        raise UsageError("--share and --tokens exclude each other")
    names, others = split_names(tasks.split(","))
    names, share = [*names, *others], SHARE if share is None else share
    show(add_recall(folder, out, length=seq_len, share=share, tokens=tokens, names=names, seed=seed), as_json=as_json)
