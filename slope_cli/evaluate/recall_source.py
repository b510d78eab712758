"""`slope data recall`: a data set with one more source, items of recall tasks to be learned from.

The items are those of `recall_items`, of all numbers of pairs and ranges of distances that fit, and of fewer pairs,
each with its answer, the answers to its other questions, and a separator behind it. They are made of the training text,
where the evaluation has validation text, and drawn by random numbers that no seed of the evaluation gives: training
sees none of its items, but by chance.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slope_cli.data.dataset import Dataset, open_dataset, write_manifest
from slope_cli.data.token_file import TokenFile, Tokens, write_token_file
from slope_cli.data.tokenizer import load_tokenizer, save_tokenizer
from slope_cli.errors import UsageError
from slope_cli.evaluate.recall import material_of
from slope_cli.evaluate.recall_items import GROUP, TASKS, Cell, Material, Task
from slope_cli.report.progress import Progress
from slope_cli.utils.files import atomic_folder

SHARE = 0.05
"""Of the training tokens, those of the source, where nothing else is asked for."""
TEXT = 1 << 22
"""Tokens of each source's training text that are read for words and filling."""
FEW = (1, 2)
"""Numbers of pairs that are trained on beside those of the evaluation: recall is learned from the easiest items on."""
TRAINING = 1
"""Which of a seed's sequences of random numbers; the evaluation's have no such key."""


def add_recall(
    folder: Path,
    out: Path,
    *,
    length: int,
    share: float = SHARE,
    tokens: int | None = None,
    names: Sequence[str] = tuple(TASKS),
    seed: int = 0,
) -> Dataset:
    """Write a copy of a data set with the training source "recall", the same one for the same arguments.

    Args:
        folder: the data set, which stays as it is.
        share: of the new training tokens, those of the source.
        tokens: so many of the source, at least, and no other training text, whatever the share; None for the share.
        length: tokens of an item with its answer, at most.
        names: of TASKS; the items of each are about as many.
        seed: of the items.

    Raises:
        UsageError: an argument is out of range, the data set has such a source or too few different tokens, no item
            fits, or `out` is not empty.
        SlopeError: a file of the data set is damaged, or the disk is full.
    """
    out = Path(out).expanduser()
    if unknown := [name for name in names if name not in TASKS]:
        raise UsageError(f"--tasks {unknown[0]}: choose some of {', '.join(TASKS)}")
    if tokens is not None and tokens < 1:
        raise UsageError(f"--tokens {tokens}: must be positive")
    if not 0 < share < 1:
        raise UsageError(f"--share {share:g}: is a share of the training tokens, which must lie between 0 and 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is not empty; choose another folder")
    dataset = open_dataset(folder, verify=False)
    if any(file.header.source == GROUP for file in dataset.train):
        raise UsageError(f"{folder}: has a source {GROUP} already; give the data set without it")
    tokenizer = load_tokenizer(str(dataset.folder / "tokenizer"))
    material = material_of(tokenizer, dataset.train, TEXT)
    items = recall_items(material, [TASKS[name] for name in names], length, seed)
    amount = {"share": share} if tokens is None else {"tokens": tokens}
    made_from = {**amount, "seq_len": length, "tasks": list(names), "seed": seed}
    with atomic_folder(out) as new:
        text = dataset.train if tokens is None else []
        files = [_copied(file, new) for file in (*text, *dataset.val.values())]
        save_tokenizer(tokenizer, new / "tokenizer")
        wanted = round(dataset.train_tokens * share / (1 - share)) if tokens is None else tokens
        files.append(_written(dataset, material, items, wanted, new))
        write_manifest(new, sorted(files, key=lambda file: file.path), dataset.made_from | {GROUP: made_from})
    return open_dataset(out, verify=False)


def recall_items(material: Material, tasks: Sequence[Task], length: int, seed: int) -> Iterator[Tokens]:
    """Items without end, without what begins a text, (tokens,), int64: a prompt, its answer, and the item's rest.

    So all pairs of a prompt are asked, as far as `length` reaches: a model learns from answers, and other tokens of an
    item are random words or known text. Tasks of which an item fits take turns. Of those of a task a cell is the more
    likely the shorter its distances are, so that all have about as many tokens: what is near is learned first, and
    what is far with it.

    Raises:
        UsageError: no item fits, or the words are too few.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(TRAINING,)))
    fitting: list[tuple[Task, list[Cell], NDArray[np.float64]]] = []
    for named in tasks:
        task = named if 1 in named.pairs else replace(named, pairs=(*FEW, *named.pairs))
        if cells := [cell for cell in task.cells(length) if task.item(material, cell, length, rng)]:
            weights = 1 / np.array([cell.last for cell in cells])
            fitting.append((task, cells, weights / weights.sum()))
        else:
            print(f"{task.name}: none fits {length} tokens", file=sys.stderr)
    if not fitting:
        raise UsageError(f"--seq-len {length}: no item fits so few tokens; give more")
    while True:
        for task, cells, shares in fitting:
            item = task.item(material, cells[rng.choice(len(cells), p=shares)], length, rng)
            assert item is not None
            yield np.concatenate([item.prompt, item.answer, item.rest])[len(material.begin) : length]


def _written(dataset: Dataset, material: Material, items: Iterator[Tokens], wanted: int, out: Path) -> TokenFile:
    """The token file of the first items that have so many tokens together."""
    begin = material.begin[material.begin != dataset.separator_id]
    end = np.concatenate([[dataset.separator_id], begin])

    def documents() -> Iterator[Tokens]:
        tokens = 0
        with closing(Progress(wanted)) as display:
            while tokens < wanted:
                yield (document := np.concatenate([next(items), end]))
                tokens += len(document)
                display.update(tokens, f"{tokens:,} tokens of recall items")

    path = out / "train" / f"{GROUP}.tok"
    path.parent.mkdir(exist_ok=True)
    return write_token_file(
        path,
        documents(),
        source=GROUP,
        split="train",
        vocab_size=dataset.vocab_size,
        separator_id=dataset.separator_id,
        tokenizer=dataset.tokenizer_name,
    )


def _copied(file: TokenFile, folder: Path) -> TokenFile:
    """A copy of a token file in another data set, checked as it is read."""
    copy = folder / file.header.split / file.path.name
    copy.parent.mkdir(exist_ok=True)
    with open(copy, "wb") as target:
        target.writelines(file.verified())
    return TokenFile.open(copy)
