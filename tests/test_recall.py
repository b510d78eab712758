"""Recall tasks: items are what they say they are, and are scored as greedy decoding and their likelihood have it."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.data import prepared
from support.models import VOCABULARY, copying_model, tiny_model
from support.models import linearized as tiny_linearized
from support.ranks import Ranks
from support.runs import slope, trained
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slope_cli.config.methods import LinearizeConfig
from slope_cli.data.dataset import open_dataset
from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.errors import UsageError
from slope_cli.evaluate.evaluate import evaluate
from slope_cli.evaluate.recall import score, split_names, validation_material
from slope_cli.evaluate.recall_items import TASKS, Item, Material, occurrences
from slope_cli.inference.engine import Engine
from slope_cli.inference.sampling import Sampling
from slope_cli.linearize.swap import linearize_attention

WORDS = 512


@cache
def bytes_material() -> Material:
    """Of the tests' text in bytes."""
    return validation_material(load_tokenizer("bytes"), open_dataset(prepared()))


@cache
def words_material() -> Material:
    """Of a tokenizer of whole words, which puts a token before every text; a colon is its unknown token."""
    vocabulary = {"<s>": 0, "<unk>": 1, **{f"w{n}": n + 2 for n in range(WORDS)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<s>")
    text = np.random.default_rng(0).integers(1, WORDS + 2, 1 << 14)
    return Material.of(tokenizer, text)


MATERIALS = {"bytes": bytes_material, "words": words_material}


def items_of(material: Material, name: str, length: int, count: int = 8, edges: Sequence[int] = ()) -> list[list[Item]]:
    task = TASKS[name]
    cells = [task.items(material, cell, length, count, 3) for cell in task.cells(length, edges)]
    return [items for items in cells if items]


# --------------------------------------------------------------------------------------------------------- items


@pytest.mark.parametrize("kind", MATERIALS)
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [200, 512])
def test_items_are_what_they_say(kind: str, name: str, length: int) -> None:
    material, task = MATERIALS[kind](), TASKS[name]
    found = 0
    for cell in task.cells(length, [48]):
        items = task.items(material, cell, length, 5, 0)
        found += len(items)
        for item in items:
            place, width = len(item.prompt) - item.distance, len(item.answer)
            assert cell.first <= item.distance <= cell.last
            assert np.array_equal(item.prompt[place : place + width], item.answer)
            assert np.array_equal(item.prompt[place - len(item.cue) : place], item.cue)
            assert np.array_equal(item.prompt[-len(item.cue) :], item.cue)
            assert (occurrences(item.prompt, item.answer), occurrences(item.prompt, item.cue)) == (1, 2)
            assert len(item.prompt) == len(items[0].prompt) <= length - width
            assert len(np.unique(item.choices, axis=0)) == len(item.choices)
            assert len(item.choices) == (cell.pairs if cell.pairs > 1 else 16)
            assert item.pairs == cell.pairs
            if cell.pairs > 1:
                assert all(occurrences(item.prompt, choice) >= 1 for choice in item.choices)
    assert found >= 15


def test_an_answer_is_at_any_place_of_the_choices_and_of_the_pairs() -> None:
    (items,) = [items for items in items_of(words_material(), "needle", 200, 60) if items[0].pairs == 4][-1:]
    assert set(np.bincount([item.right for item in items], minlength=4) > 4) == {True}
    asked = [
        sum(np.flatnonzero(item.prompt == item.choices[n][0])[0] < len(item.prompt) - item.distance for n in range(4))
        for item in items
    ]
    assert len(set(asked)) == 4


def test_questions_before_the_last_one_are_answered() -> None:
    """Multi-query: key, value, key, value …, then some of them again, and one key."""
    items = items_of(words_material(), "mqar", 200)[1]
    for item in items:
        (first, second, third) = item.prompt[-7:-1].reshape(3, 2)
        for pair in (first, second, third):
            assert occurrences(item.prompt, pair) == 2


@pytest.mark.parametrize("kind", MATERIALS)
@pytest.mark.parametrize("name", TASKS)
def test_the_rest_tells_once_more_what_the_prompt_tells(kind: str, name: str) -> None:
    for items in items_of(MATERIALS[kind](), name, 512):
        for item in items:
            place, told = len(item.prompt) - item.distance + len(item.answer), np.concatenate([item.answer, item.rest])
            if name == "copying":
                assert len(item.rest) > 0
                assert np.array_equal(item.prompt[place:][: len(item.rest)], item.rest)
            elif item.pairs > 1:
                assert all(occurrences(told, choice) >= 1 for choice in item.choices)


def test_a_seed_draws_the_same_items_and_another_one_others() -> None:
    task, material = TASKS["phonebook"], bytes_material()
    cell = [cell for cell in task.cells(512) if cell.pairs == 16][5]
    one, again, other = (task.items(material, cell, 512, 3, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a.prompt, b.prompt) and a.right == b.right for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0].prompt, other[0].prompt)
    more = task.items(material, cell, 512, 5, 0)
    assert np.array_equal(more[2].prompt, one[2].prompt), "a limit takes the first ones"


def test_distances_are_split_at_the_window() -> None:
    cells = [cell for cell in TASKS["mqar"].cells(100, [48, 100]) if cell.pairs == 4]
    assert [(cell.first, cell.last) for cell in cells] == [(1, 16), (17, 32), (33, 48), (49, 64), (65, 100)]


def test_text_of_too_few_tokens_is_refused() -> None:
    tokenizer = load_tokenizer("bytes")
    with pytest.raises(UsageError, match="recall tasks need 16 different tokens, and the text has 3;"):
        Material.of(tokenizer, np.array([97, 98, 99] * 50))
    letters = Material.of(tokenizer, np.arange(97, 113))
    assert len(letters.words) == 16
    signs = Material.of(tokenizer, np.array([*range(33, 48), 97]))
    assert sorted(signs.words) == [*range(33, 48), 97], "with too few letters, all tokens are words"


def test_names_of_tasks() -> None:
    assert split_names(["recall", "piqa", "mqar"]) == (list(TASKS), ["piqa"])
    assert split_names(["needle", "copying", "needle"]) == (["needle", "copying"], [])


# -------------------------------------------------------------------------------------------------------- scores


def scores_of(model: Any, cells: list[list[Item]]) -> list[tuple[float, float]]:
    found = [score(model, items) for items in cells]
    return [(float(each.exact_B.double().mean()), float(each.chosen_B.double().mean())) for each in found]


def test_a_model_that_copies_recalls_and_one_of_random_weights_is_at_chance() -> None:
    """Keys of one token at all distances; values of two and more tokens by the memory of their prompt."""
    material = words_material()
    copies = copying_model(WORDS + 2)
    assert min(min(pair) for pair in scores_of(copies, items_of(material, "mqar", 120, 20))) >= 0.97
    for exact, chosen in scores_of(copies, items_of(material, "copying", 120, 20)):
        assert exact > 0.4, "a word that comes twice has two that follow"
        assert chosen > 0.7
    random = tiny_model("gpt2-nano", vocab_size=WORDS + 2)
    for name in ("mqar", "copying"):
        for items in items_of(material, name, 120, 150)[::2]:
            ((exact, chosen),) = scores_of(random, [items])
            chance = 1 / len(items[0].choices)
            assert exact <= 0.03
            assert abs(chosen - chance) < 4 * (chance * (1 - chance) / 150) ** 0.5


def test_beyond_its_window_a_linearized_model_does_not_copy() -> None:
    """Its maps are not trained, and the window alone reaches as far as the distances within it."""
    model = copying_model(WORDS + 2)
    linearize_attention(model, LinearizeConfig(window=32))
    cells = items_of(words_material(), "mqar", 120, 16, edges=[32])
    near = [items for items in cells if max(item.distance for item in items) <= 32]
    far = [items for items in cells if min(item.distance for item in items) > 32]
    assert len(near) >= 2
    assert len(far) >= 3
    assert min(exact for exact, _ in scores_of(model, near)) >= 0.97
    assert max(exact for exact, _ in scores_of(model, far)) < 0.6


def decided(model: PreTrainedModel, item: Item) -> bool:
    """Whether no token of the answer is as likely as another one, as after a word that came twice."""
    with torch.no_grad():
        ids = torch.from_numpy(np.concatenate([item.prompt, item.answer]).astype(np.int64))
        logits = model(ids[None]).logits[0, len(item.prompt) - 1 : -1]
    first, second = logits.topk(2).values.unbind(-1)
    return bool((first - second > 1e-2).all())


@pytest.mark.parametrize("window", [None, 32])
def test_exact_answers_are_those_that_the_engine_generates(window: int | None) -> None:
    model = copying_model(WORDS + 2)
    if window:
        linearize_attention(model, LinearizeConfig(window=window))
    cells = [[item for item in cell if decided(model, item)] for cell in items_of(words_material(), "copying", 120, 6)]
    items = [item for cell in cells for item in cell]
    engine = Engine(model, max_batch=16)
    width = len(items[0].answer)
    said = engine.generate([item.prompt.tolist() for item in items], Sampling(width, temperature=0))
    expected = [text.ids == item.answer.tolist() for text, item in zip(said, items, strict=True)]
    assert [bool(right) for cell in cells for right in score(model, cell).exact_B] == expected
    assert {True, False} == set(expected)


@pytest.mark.parametrize("name", ["gpt2-nano", "opt-125m", "llama3-8b", "mistral-7b", "linearized"])
def test_likelihoods_are_those_of_whole_sequences(name: str) -> None:
    """The choices are read after the memory of their prompt; here each is read with its prompt."""
    model = tiny_linearized("llama3-8b", window=5, keep_softmax=[1]) if name == "linearized" else tiny_model(name)
    rng = np.random.default_rng(0)
    prompts, choices = rng.integers(3, VOCABULARY, (6, 40)), rng.integers(3, VOCABULARY, (6, 5, 3))
    items = [Item(p, p[-1:], c, n % 5, 1, 1, p[:0]) for n, (p, c) in enumerate(zip(prompts, choices, strict=True))]
    got = score(model, items)
    for n, item in enumerate(items):
        rows = torch.from_numpy(np.stack([np.concatenate([item.prompt, choice]) for choice in item.choices]))
        with torch.no_grad():
            logits = model(input_ids=rows).logits[:, 39:-1].log_softmax(-1)
        likelihoods = logits.gather(2, rows[:, 40:, None]).sum((1, 2))
        assert bool(got.chosen_B[n]) == (int(likelihoods.argmax()) == item.right)
        assert bool(got.exact_B[n]) == bool((logits[item.right].argmax(-1) == rows[item.right, 40:]).all())
    best = [i._replace(right=int(r)) for i, r in zip(items, _best(model, items), strict=True)]
    assert score(model, best).chosen_B.all()


def _best(model: Any, items: list[Item]) -> list[int]:
    """The choice that is the most probable, by trying each as the right one."""
    found = [score(model, [item._replace(right=n) for item in items]).chosen_B for n in range(5)]
    return [int(column.int().argmax()) for column in torch.stack(found).T]


# -------------------------------------------------------------------------------------------------------- commands


def linear_run() -> Path:
    run = trained("gpt2-nano", "method=dense")
    out = run.parent / f"{run.name}-recall-linear"
    if not out.exists():
        words = ("linearize.window=20", "train.steps=2", "adapters.rank=4", "log.sample_tokens=4")
        done = slope("linearize", run, *words, "log.sample_prompt='The '", "log.tensorboard=false", "--out", out)
        assert done.code == 0, done.err
    return out


def test_the_command_shows_a_table_and_gives_rows() -> None:
    words = ("eval", linear_run(), "--no-perplexity", "--tasks", "recall", "--limit", "6", "--seq-len", "64")
    shown = slope(*words)
    assert shown.code == 0, shown.err
    assert "needle: none fits 64 tokens" in shown.err
    lines = shown.out.splitlines()
    assert lines[1].startswith("recall: exact answers of greedy decoding / most probable choice")
    assert lines[2].split() == ["task", "pairs", "chance", "1-16", "17-20", "21-32", "33-64"]
    assert lines[3].split()[-4:] == ["within", "within", "beyond", "beyond"]
    assert {tuple(line.split()[:3]) for line in lines[4:-1]} >= {("mqar", "4", "0.250"), ("copying", "1", "0.062")}
    result = json.loads(slope(*words, "--json").out)["recall"]
    again = json.loads(slope(*words, "--json", "--batch", "3").out)["recall"]
    assert result == again
    assert (result["window"], result["length"], result["seed"]) == (20, 64, 0)
    for row in result["rows"]:
        assert row["n"] == 6
        assert row["place"] == ("within" if row["last"] <= 20 else "beyond")
        assert row["chance"] == (1 / row["pairs"] if row["pairs"] > 1 else 1 / 16)
        assert row["exact_stderr"] == pytest.approx((row["exact"] * (1 - row["exact"]) / 6) ** 0.5)
    assert [row for row in result["rows"] if row["task"] == "mqar"]


def test_wrong_words() -> None:
    run = trained("gpt2-nano", "method=dense")
    with pytest.raises(UsageError, match=r"--tasks needle,phonebook: no item fits 24 tokens; give a longer --seq-len$"):
        evaluate(run, perplexity=False, task_names=["needle", "phonebook"], seq_len=24)
    with pytest.raises(UsageError, match="--seq-len 4096: the model has only"):
        evaluate(run, perplexity=False, task_names=["mqar"], seq_len=4096)
    with pytest.raises(UsageError, match="predicts masked tokens, not the next one; --tasks needs a causal model"):
        evaluate(trained("bert-base", "method=dense"), perplexity=False, task_names=["recall"])


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    run, out = trained("gpt2-nano", "method=dense"), tmp_path / "eval.json"
    words = ["eval", str(run), "--no-perplexity", "--tasks", "mqar,copying", "--limit", "7", "--batch", "4"]
    ranks = Ranks(2, [*words, "--seq-len", "64", "--out", str(out)], tmp_path / "logs")
    assert ranks.finish() == [0, 0], ranks.printed()
    alone = evaluate(run, perplexity=False, task_names=["mqar", "copying"], limit=7, batch=4, seq_len=64)
    assert json.loads(out.read_text())["recall"] == alone["recall"]
