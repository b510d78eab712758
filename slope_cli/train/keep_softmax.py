"""The choice of the layers, or KV heads, that keep softmax attention in a run that linearizes, by what others forget.

Each candidate set of them is judged by the divergence KL(teacher || student) of the predictions at places that need
recall: in validation text, where a token follows another one as it did before, and all that lies beyond the window; and
in items of recall tasks at such distances, where the answer is asked for. The teacher is the model with softmax
attention everywhere, the student has it in the set alone: no weight changes.

The search is greedy. First each layer alone; then, K - 1 times, those of the rest that came nearest before are tried
beside the chosen ones. Of L layers, or heads, it takes 1 + L + 3 (K - 1) evaluations and one of the teacher, where the
whole greedy search takes about K L: what one gains changes little by its company, so the best are among the first.

Shape suffixes: N sequences, T positions, P places, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.config.schema import Config
from slope_cli.data.batches import val_batches
from slope_cli.data.dataset import Dataset
from slope_cli.evaluate.recall import validation_material
from slope_cli.evaluate.recall_items import TASKS, Item
from slope_cli.linearize.linear_attention import Pattern
from slope_cli.linearize.swap import linear_windows, softmax_in, softmax_units, using

SEQUENCES = 16
"""Sequences of text, and as many of items."""
PLACES = 64
"""Places of a sequence of text, at most."""
TRIED_AGAIN = 3


class Trial(NamedTuple):
    """What has softmax attention, as in linearize.keep_softmax, and the divergence from the teacher with it, in nats.

    text, items: the mean over places of each; None without any. divergence: the mean of these two.
    """

    kept: tuple[int | str, ...]
    divergence: float
    text: float | None
    items: float | None


class Probe(NamedTuple):
    """Sequences and their places that need recall.

    Attributes:
        ids_NT: int64, on the CPU; an item is padded at its end, where nothing before sees it.
        places_P: (rows, positions), int64, ordered by rows: those whose next token is predicted from far away.
        items_P: bool, whether a place is of an item.
    """

    ids_NT: Tensor
    places_P: tuple[Tensor, Tensor]
    items_P: Tensor


def choose_kept(
    count: int, config: Config, dataset: Dataset, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> tuple[list[int | str], list[Trial]]:
    """As `choose`, of a model with all layers linearized, in evaluation mode: a function of weights, data and seed."""
    train, pattern = config.train, next(iter(linear_windows(model).values())).pattern
    probe = probe_of(dataset, tokenizer, pattern, seq_len=train.seq_len, seed=train.seed)
    units = softmax_units(model, heads=config.linearize.by_heads)
    return choose(units, count, Divergence(model, probe, train.micro_batch))


def choose(
    units: Sequence[int | str], count: int, trial_of: Callable[[Sequence[int | str]], Trial]
) -> tuple[list[int | str], list[Trial]]:
    """The `count` of some layers or heads that are chosen, in the order given, and all trials in theirs.

    The first trial is of none. Of equal divergences the one that comes first is chosen.
    """
    place = {unit: number for number, unit in enumerate(units)}
    alone = {unit: trial_of([unit]) for unit in units}
    trials = [trial_of([]), *alone.values()]
    ranking = sorted(alone, key=lambda unit: alone[unit].divergence)
    chosen = [ranking.pop(0)]
    while len(chosen) < count:
        tried = ranking[:TRIED_AGAIN]
        found = {unit: trial_of(sorted([*chosen, unit], key=place.__getitem__)) for unit in tried}
        trials += found.values()
        best = min(found, key=lambda unit: (found[unit].divergence, place[unit]))
        chosen.append(best)
        ranking.remove(best)
    return sorted(chosen, key=place.__getitem__), trials


def probe_of(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, pattern: Pattern, *, seq_len: int, seed: int
) -> Probe:
    """Sequences of `seq_len` tokens from the validation text of a data set, and items of recall tasks.

    Text in which nothing recurs at such a distance, without items that fit, counts at all places.

    Args:
        pattern: of the linearized layers: what lies within `lookback` needs no recall.
    """
    rows, texts, seen = _text_rows(dataset, seq_len), [], pattern.lookback
    for row in rows:
        texts.append(_evenly(recurring(row, seen), PLACES))
    items = _far_items(dataset, tokenizer, seen + 1, seq_len, seed)
    if not items and not any(map(len, texts)):
        texts = [_evenly(np.arange(len(row) - 1), PLACES) for row in rows]
    ids_NT = np.zeros((len(rows) + len(items), seq_len), np.int64)
    for number, row in enumerate([*rows, *(np.concatenate([item.prompt, item.answer]) for item in items)]):
        ids_NT[number, : len(row)] = row
    places = [*texts, *(len(item.prompt) - 1 + np.arange(len(item.answer)) for item in items)]
    numbers_P = torch.repeat_interleave(torch.arange(len(places)), torch.tensor([len(each) for each in places]))
    columns_P = torch.from_numpy(np.concatenate(places).astype(np.int64))
    return Probe(torch.from_numpy(ids_NT), (numbers_P, columns_P), numbers_P >= len(rows))


def recurring(ids_T: NDArray[np.int64], seen: int) -> NDArray[np.int64]:
    """The places whose next token followed this one before, and the last time more than `seen` tokens ago: (places,).

    Such places are those that induction predicts: for the query at t, the earlier next token is at j + 1, where the
    same two tokens were at j and j + 1.
    """
    last: dict[tuple[int, int], int] = {}
    found = []
    for place, pair in enumerate(itertools.pairwise(ids_T.tolist())):
        if pair in last and place - (last[pair] + 1) > seen:
            found.append(place)
        last[pair] = place
    return np.array(found, np.int64)


def _text_rows(dataset: Dataset, seq_len: int) -> list[NDArray[np.int64]]:
    """Evenly spaced blocks of all sources' validation text, SEQUENCES in all, and one of each source at least."""
    each = -(-SEQUENCES // max(1, len(dataset.val)))
    how: dict[str, Any] = {"seq_len": seq_len, "tokens": each * seq_len, "micro_batch": each}
    return [row for file in dataset.val.values() for batch in val_batches(file, **how) for row in batch["input_ids"]]


def _far_items(dataset: Dataset, tokenizer: PreTrainedTokenizerFast, near: int, seq_len: int, seed: int) -> list[Item]:
    """Items of all tasks with distances above `near`, of evenly chosen cells, SEQUENCES in all; [] if none fits."""
    material = validation_material(tokenizer, dataset)
    cells = [(task, cell) for task in TASKS.values() for cell in task.cells(seq_len, [near]) if cell.first > near]
    found = [task.items(material, cell, seq_len, 1, seed) for task, cell in cells]
    fitting = [cell for cell, items in zip(cells, found, strict=True) if items]
    chosen = [fitting[n] for n in _evenly(np.arange(len(fitting)), SEQUENCES)]
    each = -(-SEQUENCES // max(1, len(chosen)))
    items = [item for task, cell in chosen for item in task.items(material, cell, seq_len, each, seed)]
    return items[:SEQUENCES]


def _evenly(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most so many of some values, evenly spaced."""
    return values if len(values) <= count else values[np.arange(count) * len(values) // count]


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats of each row of log-probabilities, (..., V) -> (...), float64.

    Of p near q it is quadratic in their difference, so that it drowns in float32's rounding, and in the sum of
    p · (log p - log q), whose terms are linear in it. With q - p, which sums to 0, no term is negative.
    """
    log_p, log_q = log_p.double(), log_q.double()
    p, q = log_p.exp(), log_q.exp()
    return (p * (log_p - log_q) + (q - p)).sum(-1)


class Divergence:
    """Trials of a linearized model on a probe; calling it takes one evaluation."""

    def __init__(self, model: PreTrainedModel, probe: Probe, micro_batch: int) -> None:
        """Evaluate the teacher, whose predictions are kept: (P, V) in float32.

        Args:
            model: with all its layers linearized, in evaluation mode.
            micro_batch: sequences at a time.
        """
        self._model, self._probe, self._size = model, probe, micro_batch
        with using(model, mode="softmax"):
            self._teacher = list(self._log_p())

    def __call__(self, kept: Sequence[int | str]) -> Trial:
        """The trial of some layers or heads."""
        with softmax_in(self._model, kept):
            pairs = zip(self._teacher, self._log_p(), strict=True)
            kl_P = torch.cat([divergence(p, q) for p, q in pairs]).cpu()
        text, items = (
            float(kl_P[of_kind].mean()) if of_kind.any() else None
            for of_kind in (~self._probe.items_P, self._probe.items_P)
        )
        means = [mean for mean in (text, items) if mean is not None]
        return Trial(tuple(kept), sum(means) / len(means), text, items)

    @torch.no_grad()
    def _log_p(self) -> Iterator[Tensor]:
        """The log-probabilities at the places of each batch: (P of the batch, V), float32."""
        ids_NT, (rows_P, columns_P), device = self._probe.ids_NT, self._probe.places_P, self._model.device
        for start in range(0, len(ids_NT), self._size):
            own_P = (rows_P >= start) & (rows_P < start + self._size)
            ids_BT = ids_NT[start : start + self._size].to(device)
            logits_BTV = self._model(input_ids=ids_BT, use_cache=False).logits
            logits_PV = logits_BTV[(rows_P[own_P] - start).to(device), columns_P[own_P].to(device)]
            yield logits_PV.float().log_softmax(-1)


def trial_lines(setting: str, chosen: Sequence[int | str], trials: Sequence[Trial]) -> Iterator[str]:
    """The table that they were chosen by, for the terminal."""
    what = _units(setting)
    yield f"keep_softmax={setting}: divergence from the softmax model where it must recall, by the {what} with softmax"
    for trial in trials:
        parts = [
            f"{name} {mean:.4g}" for name, mean in (("text", trial.text), ("items", trial.items)) if mean is not None
        ]
        kept = "  kept" if list(trial.kept) == list(chosen) else ""
        yield f"  {_names(trial):12} {trial.divergence:<9.4g}  ({', '.join(parts)}){kept}"


def trial_warning(setting: str, chosen: Sequence[int | str], trials: Sequence[Trial]) -> str:
    """A line if fewer would have been as good; else ""."""
    (own,) = (trial for trial in trials if list(trial.kept) == list(chosen))
    best = min(trials, key=lambda trial: (trial.divergence, len(trial.kept)))
    if len(best.kept) >= len(chosen):
        return ""
    fewer = f"with softmax in fewer {_units(setting)} ({_names(best)})"
    return f"{fewer} the divergence is no larger than with {_names(own)}"


def _units(setting: str) -> str:
    return "KV heads" if setting.startswith("heads:") else "layers"


def _names(trial: Trial) -> str:
    return ", ".join(map(str, trial.kept)) or "none"
