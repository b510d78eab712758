"""Recall tasks: how much of what a prompt says a model can repeat, by distance and by number of pairs.

An item (see `recall_items`) is scored twice, from one pass over its prompt. By generation: whether greedy decoding
gives the answer's tokens, all of them. Greedy decoding gives them if, and only if, after the prompt and any beginning
of the answer the most probable token is the answer's next one, so the answer is read as it is, and not sampled. By
likelihood: whether the answer is more probable than each of the other choices, so that a model that knows nothing has
1 / choices.

Shape suffixes: B items, T tokens of a prompt, C choices, W tokens of a choice, V vocabulary.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.checkpoint.load import Loaded
from slope_cli.data.dataset import NO_VALIDATION, Dataset
from slope_cli.data.token_file import TokenFile, TokenReader
from slope_cli.distributed.collectives import Group
from slope_cli.errors import UsageError
from slope_cli.evaluate.recall_items import GROUP, TASKS, Cell, Item, Material
from slope_cli.linearize.swap import linear_windows
from slope_cli.models.loss import autocast

ITEMS = 400
"""The items of a cell: a share of right answers is then known to 0.025 at worst, by its standard error."""
BATCH = 16
TEXT = 1 << 18
"""Tokens of each source's validation text that are read."""


class Scores(NamedTuple):
    """Of each item, whether greedy decoding gives its answer, and whether that is the most probable choice: (B,)."""

    exact_B: Tensor
    chosen_B: Tensor


def split_names(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of recall tasks among `words`, those of their group for "recall"; and the other words."""
    names = [name for word in words for name in (TASKS if word == GROUP else [word] if word in TASKS else [])]
    return list(dict.fromkeys(names)), [word for word in words if word != GROUP and word not in TASKS]


def validation_material(tokenizer: PreTrainedTokenizerFast, dataset: Dataset) -> Material:
    """What items are made of, from the validation text of a data set.

    Raises:
        UsageError: it has none, or too few different tokens.
    """
    if not dataset.val:
        raise UsageError(f"{dataset.folder}: has no validation text, {NO_VALIDATION}")
    return material_of(tokenizer, dataset.val.values(), TEXT)


def material_of(tokenizer: PreTrainedTokenizerFast, files: Iterable[TokenFile], tokens: int) -> Material:
    """What items are made of, from so many tokens of each file; UsageError if too few are different."""
    texts = [TokenReader(file).read(0, min(file.header.tokens, tokens)).astype(np.int64) for file in files]
    return Material.of(tokenizer, np.concatenate(texts))


def measure_recall(
    loaded: Loaded,
    dataset: Dataset,
    names: Sequence[str],
    *,
    length: int,
    limit: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    group: Group | None = None,
) -> dict[str, Any]:
    """Score recall tasks in cells of one number of pairs and a range of distances.

    Args:
        dataset: whose validation text gives words and filling.
        names: of TASKS.
        length: tokens of a prompt with its answer, at most; no more than the model's positions.
        limit: items of a cell; None for 400.
        batch: sequences at a time; None for 16.
        seed: of the items.
        group: the ranks to which batches are dealt; every rank calls this with the same model and gets the result.

    Returns:
        seed, length, window (that of the linearized layers; None without), and `rows`, one for each cell that fits into
        the length: task, pairs, first and last (of the distances), place ("within" the window, "beyond", "partly" of a
        terrace; None without a window), n, exact and choice (shares of right answers by generation and by likelihood)
        with their standard errors as exact_stderr and choice_stderr, chance (of choice).

    Raises:
        UsageError: text of too few different tokens, or no cell of any task fits.
    """
    group, patterns = group or Group(), [linear.pattern for linear in linear_windows(loaded.model).values()]
    # A distance counts from the place of the answer: the query is one token before it.
    near, far = (patterns[0].always_near + 1, patterns[0].lookback + 1) if patterns else (length, length)
    material, count = validation_material(loaded.tokenizer, dataset), limit or ITEMS
    rows: list[dict[str, Any]] = []
    for name in names:
        task, before = TASKS[name], len(rows)
        for cell in task.cells(length, [near, far]):
            items = task.items(material, cell, length, count, seed)
            if not items:
                continue
            scores = _scores(loaded.model, items, batch or BATCH, group)
            where = "within" if cell.last <= near else "beyond" if cell.first > far else "partly"
            rows.append({"task": name, **_row(cell, items, scores), "place": where if patterns else None})
        if group.ranks.first:
            found = f"{(len(rows) - before) * count:,} items" if len(rows) > before else f"none fits {length} tokens"
            print(f"{name}: {found}", file=sys.stderr)
    if not rows:
        raise UsageError(f"--tasks {','.join(names)}: no item fits {length} tokens; give a longer --seq-len")
    return {"seed": seed, "length": length, "window": patterns[0].window if patterns else None, "rows": rows}


def _row(cell: Cell, items: Sequence[Item], scores: Scores) -> dict[str, Any]:
    row: dict[str, Any] = {**cell._asdict(), "n": (n := len(items))}
    for name, right in (("exact", scores.exact_B), ("choice", scores.chosen_B)):
        share = float(right.double().mean())
        row |= {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / n)}
    return row | {"chance": 1 / len(items[0].choices)}


def _scores(model: PreTrainedModel, items: Sequence[Item], batch: int, group: Group) -> Scores:
    """Those of all items, of one shape, on the CPU."""
    # The memory of a prompt is repeated for its choices, unless they are of one token.
    choices, width = items[0].choices.shape
    size = batch if width == 1 else max(1, batch // choices)
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    own = batches[group.ranks.rank :: group.ranks.world]
    found = group.gather(group.agreed(lambda: [score(model, part) for part in own]))
    parts = [found[number % group.ranks.world][number // group.ranks.world] for number in range(len(batches))]
    return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def score(model: PreTrainedModel, items: Sequence[Item]) -> Scores:
    """The scores of items whose prompts, choices and answers have the same numbers of tokens; on the CPU."""
    device, rows_B = model.device, torch.arange(len(items), device=model.device)
    prompt_BT = torch.from_numpy(np.stack([item.prompt for item in items])).to(device)
    choices_BCW = torch.from_numpy(np.stack([item.choices for item in items])).to(device)
    right_B = torch.tensor([item.right for item in items], device=device)
    (B, C, W), answer_BW = choices_BCW.shape, choices_BCW[rows_B, right_B]
    with autocast(device):
        read = model(input_ids=prompt_BT, use_cache=W > 1, logits_to_keep=1)
        log_p_B1V = read.logits.float().log_softmax(-1)
        log_p_BC = log_p_B1V[:, 0].gather(1, choices_BCW[:, :, 0])
        exact_B = log_p_B1V[:, 0].argmax(-1) == answer_BW[:, 0]
        if W > 1:
            cache = read.past_key_values
            cache.batch_repeat_interleave(C)
            rest_NW = choices_BCW.flatten(0, 1)
            logits_NWV = model(input_ids=rest_NW[:, :-1], past_key_values=cache, use_cache=True).logits.float()
            log_p_BC += logits_NWV.log_softmax(-1).gather(2, rest_NW[:, 1:, None]).sum((1, 2)).view(B, C)
            best_BW = logits_NWV.argmax(-1).view(B, C, -1)[rows_B, right_B]
            exact_B &= (best_BW == answer_BW[:, 1:]).all(1)
    return Scores(exact_B.cpu(), (log_p_BC.argmax(1) == right_B).cpu())


# ------------------------------------------------------------------------------------------------------- the report


def recall_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A result of `measure_recall` as a table: a line for each task and number of pairs, a column for distances."""
    rows, window = result["rows"], result["window"]
    spans = sorted({(row["first"], row["last"], row["place"]) for row in rows})
    yield "recall: exact answers of greedy decoding / most probable choice, by the distance of the answer in tokens"
    titles = [f"{first}-{last}" for first, last, _ in spans]
    yield f"  {'task':9} {'pairs':>5} {'chance':>6}  " + "  ".join(f"{title:>11}" for title in titles)
    if window is not None:
        places = "  ".join(f"{place:>11}" for *_, place in spans)
        yield f"  {f'the window of {window} tokens':22}  {places}"
    for task, pairs in dict.fromkeys((row["task"], row["pairs"]) for row in rows):
        own = {row["first"]: row for row in rows if (row["task"], row["pairs"]) == (task, pairs)}
        cells = [own.get(first) for first, *_ in spans]
        shares = [f"{cell['exact']:.3f}/{cell['choice']:.3f}" if cell else "" for cell in cells]
        chance = next(iter(own.values()))["chance"]
        yield f"  {task:9} {pairs:>5} {chance:>6.3f}  " + "  ".join(f"{share:>11}" for share in shares).rstrip()
    yield f"  {max(row['n'] for row in rows)} items a cell; standard errors are at most {_worst(rows):.3f}"


def _worst(rows: Sequence[Mapping[str, Any]]) -> float:
    return max(float(row[key]) for row in rows for key in ("exact_stderr", "choice_stderr"))
