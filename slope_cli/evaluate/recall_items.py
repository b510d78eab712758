"""Recall tasks, each a generator of items: a prompt that says something once, and a question whose answer repeats it.

An item is made of tokens, not of text, so every tokenizer serves. Keys and values are random words, tokens of a
text in random order, which no text has together: only the prompt tells which value a key has.

Shape suffixes: T tokens of a prompt, C choices, W tokens of a choice.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slope_cli.data.tokenizer import begin_id
from slope_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = NDArray[np.int64]

WORDS = 1024
"""The words are at most so many, the most frequent ones: a model has learned what they are."""
FEWEST_WORDS = 16
RARE = 1_000_000
"""Keys and values in running text are so long that there are so many of them."""
CHOICES = 16
"""The choices where a prompt has no other values."""
FIRST_EDGE = 16
TRIES = 100


class Item(NamedTuple):
    """A question, its choices, and where the prompt has the answer.

    Attributes:
        prompt: (T,), int64.
        cue: what the prompt ends with, and has once before, where the answer follows.
        choices: (C, W), int64, in random order; one of them is the answer, which the prompt has once.
        right: the row of the answer.
        distance: tokens from the first of the answer in the prompt to the place where it is to be repeated.
        pairs: of keys and values in the prompt.
        rest: int64, how a text to learn from goes on after the answer: all else that the prompt tells, asked and
            answered.
    """

    prompt: Ids
    cue: Ids
    choices: Ids
    right: int
    distance: int
    pairs: int
    rest: Ids

    @property
    def answer(self) -> Ids:
        """The right choice, (W,)."""
        answer: Ids = self.choices[self.right]
        return answer

    @property
    def is_sound(self) -> bool:
        """Whether the prompt tells one answer, once: what fills it is drawn, and may repeat cue or answer by chance."""
        return occurrences(self.prompt, self.answer) == 1 and occurrences(self.prompt, self.cue) == 2


class Cell(NamedTuple):
    """The items that are scored together: `pairs` in a prompt, and a distance from `first` to `last`."""

    pairs: int
    first: int
    last: int


@dataclass(frozen=True)
class Material:
    """What items are made of.

    words: (words,), int64, the tokens of keys and values. text: int64, running text. begin: what begins every prompt.
    encode: the tokens of a text.
    """

    words: Ids
    text: Ids
    begin: Ids
    encode: Callable[[str], Ids]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, text: Ids) -> Material:
        """Words are tokens of letters and digits alone, unless there are fewer than 16 of them.

        Args:
            text: int64, in tokens of the tokenizer.

        Raises:
            UsageError: it has fewer than 16 different tokens that are not special.
        """
        ids, counts = np.unique(text, return_counts=True)
        common = ids[np.argsort(-counts, kind="stable")]
        common = common[~np.isin(common, tokenizer.all_special_ids)]
        plain = np.array([tokenizer.decode([int(token)]).strip().isalnum() for token in common], dtype=bool)
        words = common[plain] if plain.sum() >= FEWEST_WORDS else common
        if len(words) < FEWEST_WORDS:
            rule = f"recall tasks need {FEWEST_WORDS} different tokens, and the text has {len(words)}"
            raise UsageError(f"{rule}; prepare more text")
        begin = begin_id(tokenizer)

        @cache  # an item has the same few strings as the one before
        def encode(string: str) -> Ids:
            return np.array(tokenizer(string, add_special_tokens=False).input_ids, dtype=np.int64)

        return cls(words[:WORDS], text, np.array([] if begin is None else [begin], dtype=np.int64), encode)

    def width(self, count: int) -> int:
        """The fewest words that make `count` different sequences."""
        width = 1
        while len(self.words) ** width < count:
            width += 1
        return width

    def codes(self, rng: np.random.Generator, count: int, width: int) -> Ids:
        """So many random sequences of words, no two alike: (count, width)."""
        numbers = rng.choice(len(self.words) ** width, count, replace=False)
        return self.words[np.stack(np.unravel_index(numbers, (len(self.words),) * width), axis=1)]

    def running_text(self, rng: np.random.Generator, tokens: int) -> Ids:
        """So many tokens of text from a random place on."""
        return np.take(self.text, np.arange(tokens) + rng.integers(len(self.text)), mode="wrap")


@dataclass(frozen=True)
class Task:
    """A kind of items.

    pairs: the numbers of pairs that it is scored with.
    make: an item of a cell of at most so many tokens, drawn; None if the cell has none, whatever is drawn.
    """

    name: str
    pairs: tuple[int, ...]
    make: Callable[[Material, Cell, int, np.random.Generator], Item | None]

    def cells(self, length: int, edges: Sequence[int] = ()) -> Iterator[Cell]:
        """All that may have items: distances up to 16, then up to twice the last ones, split after `edges`, too.

        Args:
            length: tokens of a prompt with its answer, at most.
        """
        ends = {edge for edge in edges if 0 < edge < length} | {length}
        end = FIRST_EDGE
        while end < length:
            ends.add(end)
            end *= 2
        for pairs in self.pairs:
            first = 1
            for last in sorted(ends):
                yield Cell(pairs, first, last)
                first = last + 1

    def items(self, material: Material, cell: Cell, length: int, count: int, seed: int) -> list[Item]:
        """So many items of a cell, the same ones for a seed, with prompts of one length; [] if it has none.

        Args:
            length: tokens of a prompt with its answer, at most.

        Raises:
            UsageError: the words are too few for a prompt that has its answer once.
        """
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode()), *cell])
        items: list[Item] = []
        while len(items) < count:
            if (item := self.item(material, cell, length, rng)) is None:
                return []
            items.append(item)
        return items

    def item(self, material: Material, cell: Cell, length: int, rng: np.random.Generator) -> Item | None:
        """A sound item of a cell, drawn; None if it has none, whatever is drawn. Otherwise as `items`."""
        for _ in range(TRIES):
            item = self.make(material, cell, length, rng)
            if item is None or item.is_sound:
                return item
        words = f"the {len(material.words)} different words of the text are too few"
        raise UsageError(f"{self.name}: {words} for {cell.pairs} pairs; leave it out, or prepare more text")


def occurrences(text: Ids, part: Ids) -> int:
    """How often a text has a part; both (tokens,), the part not empty."""
    if len(text) < len(part):
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(text, len(part))
    return int((windows == part).all(axis=1).sum())


# -------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Pairs:
    """How keys and values are written, and what is around them.

    before, between, after: what each pair has before its key, between key and value, and after the value; a question
    is a pair up to its value.
    scattered: in running text, at random places; else one after another.
    in_text: what fills a prompt is running text; else it is other words.
    keys: whether pairs have keys; without them a prompt has one pair.
    answered: questions with their answers before the last one, about other pairs, at most.
    """

    before: str = ""
    between: str = ""
    after: str = ""
    scattered: bool = False
    in_text: bool = True
    keys: bool = True
    answered: int = 0


def pairs_item(form: Pairs, material: Material, cell: Cell, length: int, rng: np.random.Generator) -> Item | None:
    """An item about one of the pairs in a prompt; None if the cell has none.

    The prompt is: filling with pairs up to the value that is asked for; the `distance`: the value, other pairs and
    filling, answered questions, and the question. Its length is the same for all items of a cell.
    """
    n, (before, between, after) = cell.pairs, map(material.encode, (form.before, form.between, form.after))
    width = material.width(RARE if form.in_text else 3 * n)
    codes = material.codes(rng, n + (CHOICES if n == 1 else n), width)
    keys, values = codes[:n, : width if form.keys else 0], codes[n:]
    questions = [np.concatenate([before, key, between]) for key in keys]
    pairs = [np.concatenate([question, value, after]) for question, value in zip(questions, values, strict=False)]
    size, ahead, answered = len(pairs[0]), len(questions[0]), min(form.answered, n - 1)
    # The distance that is not for other pairs and filling, and what comes before it in the same way:
    fixed, begun = width + len(after) + answered * (size - len(after)) + ahead, len(material.begin) + ahead
    total = min(length - width, begun + (n - 1) * size + cell.last)
    distances = np.arange(cell.first, cell.last + 1)
    most_after, most_before = (distances - fixed) // size, (total - begun - distances) // size
    fits = (distances >= fixed) & (most_before >= 0) & (most_after + most_before >= n - 1)
    if not fits.any():
        return None
    place = rng.choice(np.flatnonzero(fits))
    distance = int(distances[place])
    pairs_after = int(rng.integers(max(0, n - 1 - most_before[place]), min(n - 1, most_after[place]) + 1))
    asked = n - 1 - pairs_after
    free_before = total - begun - distance - asked * size
    free_after = distance - fixed - pairs_after * size
    if form.in_text:
        filling = material.running_text(rng, free_before + free_after)
    else:
        unused = np.setdiff1d(material.words, codes) if width == 1 else material.words
        filling = rng.choice(unused, free_before + free_after)
    answered_ones = rng.permutation(np.delete(np.arange(n), asked))[:answered]
    prompt = np.concatenate(
        [
            material.begin,
            *_mixed(filling[:free_before], pairs[:asked], form.scattered, rng, pairs_last=True),
            pairs[asked],
            *_mixed(filling[free_before:], pairs[asked + 1 :], form.scattered, rng, pairs_last=False),
            *(part for other in answered_ones for part in (questions[other], values[other])),
            questions[asked],
        ]
    )
    order = rng.permutation(len(values))
    right = int(np.flatnonzero(order == asked)[0])
    # In the choices' order, so that items are drawn by the same random numbers with a rest as without.
    rest = np.concatenate([after, *(pairs[other] for other in order if other < n and other != asked)])
    return Item(prompt, questions[asked], values[order], right, distance, n, rest)


def _mixed(
    filling: Ids, pairs: Sequence[Ids], scattered: bool, rng: np.random.Generator, *, pairs_last: bool
) -> list[Ids]:
    """Filling and pairs, in their order: one after the other, or pairs at random places of the filling."""
    if scattered:
        places = np.sort(rng.integers(len(filling) + 1, size=len(pairs)))
        gaps = np.split(filling, places)
        return [gaps[0], *(part for pair, gap in zip(pairs, gaps[1:], strict=True) for part in (pair, gap))]
    return [filling, *pairs] if pairs_last else [*pairs, filling]


# ------------------------------------------------------------------------------------------------------ copying


def copying_item(material: Material, cell: Cell, length: int, rng: np.random.Generator) -> Item | None:
    """Random words, and after a line break their beginning again, to go on with; None if the cell has no item.

    The other choices are other parts of the words.
    """
    width, end = material.width(RARE), material.encode("\n")
    total = min(length - width, len(material.begin) + cell.last + 4 * width)
    distance_least = max(cell.first, CHOICES + 2 * width + len(end))
    distance_most = min(cell.last, total - len(material.begin) - width)
    if distance_most < distance_least:
        return None
    distance = int(rng.integers(distance_least, distance_most + 1))
    count = distance - len(end)
    words = rng.choice(material.words, count)
    repeated = int(rng.integers(width, min(count - width, total - len(material.begin) - distance, 4 * width) + 1))
    filling = material.running_text(rng, total - len(material.begin) - distance - repeated)
    prompt = np.concatenate([material.begin, filling, words, end, words[:repeated]])
    others = np.setdiff1d(np.arange(width, count - width + 1), [repeated])
    starts = rng.permutation([repeated, *rng.choice(others, CHOICES - 1, replace=False)])
    choices = np.stack([words[start : start + width] for start in starts])
    right = int(np.flatnonzero(starts == repeated)[0])
    cue, rest = words[repeated - width : repeated], words[repeated + width :]
    return Item(prompt, cue, choices, right, distance, 1, rest)


_MADE = {
    "mqar": ((4, 16, 64), Pairs(in_text=False, answered=3)),
    "passkey": ((1,), Pairs("\nThe pass key is:", "", ". Remember it.\n", keys=False)),
    "needle": ((4, 16), Pairs("\nThe number of:", " is:", ".\n", scattered=True)),
    "phonebook": ((4, 16, 64), Pairs("\n", ":")),
}
TASKS: Mapping[str, Task] = {
    **{name: Task(name, pairs, partial(pairs_item, form)) for name, (pairs, form) in _MADE.items()},
    "copying": Task("copying", (1,), copying_item),
}
"""By name: multi-query associative recall; a passkey, and needles, in running text; a phone book; copying."""
GROUP = "recall"
"""The name of all of them."""
