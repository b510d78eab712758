"""A source of recall items: what it holds, that it is the same each time, and that the evaluation has other items."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.data import prepared
from support.runs import slope
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from slope_cli.data.dataset import Dataset, open_dataset
from slope_cli.data.prepare import prepare
from slope_cli.data.token_file import TokenReader
from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.evaluate.recall import material_of
from slope_cli.evaluate.recall_items import TASKS, occurrences
from slope_cli.evaluate.recall_source import TEXT, add_recall, recall_items

LENGTH = 200
SHARE = 0.3


def with_recall(out: Path, **more: Any) -> Dataset:
    return add_recall(prepared(), out, **{"share": SHARE, "length": LENGTH, **more})


def ids_of(dataset: Dataset, source: str = "recall") -> NDArray[np.int64]:
    """All training tokens of a source."""
    (file,) = [file for file in dataset.train if file.header.source == source]
    return TokenReader(file).read(0, file.header.tokens).astype(np.int64)


def test_the_source_is_items_with_their_answers_and_a_share_of_the_mix(tmp_path: Path) -> None:
    before, dataset = open_dataset(prepared()), with_recall(tmp_path / "data")
    assert abs(len(ids_of(dataset)) - SHARE * dataset.train_tokens) <= LENGTH + 1
    material = material_of(load_tokenizer("bytes"), before.train, TEXT)
    ids, at = ids_of(dataset), 0
    for item in recall_items(material, list(TASKS.values()), LENGTH, 0):
        if at == len(ids):
            break
        assert ids[at : at + len(item) + 1].tolist() == [*item, dataset.separator_id]
        assert len(item) <= LENGTH
        assert occurrences(item, item[-2:]) >= 2
        at += len(item) + 1
    whole = open_dataset(dataset.folder, verify=True)
    assert np.array_equal(ids_of(whole, "text"), ids_of(before, "text"))
    assert {name: file.header for name, file in whole.val.items()} == {n: f.header for n, f in before.val.items()}
    assert whole.made_from == before.made_from | {
        "recall": {"share": SHARE, "seq_len": LENGTH, "tasks": list(TASKS), "seed": 0}
    }


def test_so_many_tokens_of_items_stand_alone(tmp_path: Path) -> None:
    dataset = with_recall(tmp_path / "data", tokens=5000)
    assert 5000 <= dataset.train_tokens == len(ids_of(dataset)) <= 5000 + LENGTH
    begins = ids_of(with_recall(tmp_path / "share"))
    assert np.array_equal(ids_of(dataset)[: len(begins)], begins)
    assert dataset.val.keys() == open_dataset(prepared()).val.keys()
    assert dataset.made_from["recall"]["tokens"] == 5000


def test_the_same_arguments_give_the_same_tokens_and_another_seed_others(tmp_path: Path) -> None:
    one, again, other = (with_recall(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert not np.array_equal(ids_of(one)[:50], ids_of(other)[:50])


def test_the_evaluation_draws_none_of_the_items() -> None:
    """Not even from the same words and the same text, and with any seed."""
    material = material_of(load_tokenizer("bytes"), open_dataset(prepared()).train, TEXT)
    task = TASKS["passkey"]
    trained = {item.tobytes() for seed in range(3) for item in islice(recall_items(material, [task], 64, seed), 200)}
    assert len(trained) == 600
    for seed in range(3):
        for cell in task.cells(64):
            for item in task.items(material, cell, 64, 200, seed):
                assert np.concatenate([item.prompt, item.answer]).tobytes() not in trained


def test_short_items_have_as_many_tokens_as_long_ones() -> None:
    material = material_of(load_tokenizer("bytes"), open_dataset(prepared()).train, TEXT)
    sizes = np.array([len(item) for item in islice(recall_items(material, [TASKS["copying"]], 512, 0), 2000)])
    shares = [sizes[(sizes > low) & (sizes <= 2 * low)].sum() / sizes.sum() for low in (64, 128, 256)]
    assert max(shares) < 2 * min(shares)
    assert sum(shares) > 0.8


def test_tasks_without_an_item_that_fits_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    material = material_of(load_tokenizer("bytes"), open_dataset(prepared()).train, TEXT)
    for item in islice(recall_items(material, [TASKS["mqar"], TASKS["needle"]], 40, 0), 20):
        assert len(item) <= 40
    assert capsys.readouterr().err == "needle: none fits 40 tokens\n"


def test_a_tokenizer_that_begins_texts(tmp_path: Path) -> None:
    """Between two items are the separator and what begins a text, as between documents; none is begun twice."""
    vocabulary = {"</s>": 0, "<s>": 1, "<unk>": 2, **{f"w{n}": n + 3 for n in range(300)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text, words = tmp_path / "text.jsonl", np.random.default_rng(0).integers(300, size=(60, 100))
    text.write_text("".join(json.dumps({"text": " ".join(f"w{n}" for n in row)}) + "\n" for row in words))
    data = tmp_path / "data"
    prepare([str(text)], data, tokenizer=str(tmp_path / "tokenizer"), workers=1, progress=False)
    ids = ids_of(add_recall(data, tmp_path / "out", share=0.5, length=80, names=["mqar"]))
    assert (np.flatnonzero(ids == 1) - np.flatnonzero(ids == 0) == 1).all()
    assert (ids == 1).sum() == (ids == 0).sum() > 20
    assert ids[-2:].tolist() == [0, 1]


def test_the_command_prints_the_sources(tmp_path: Path) -> None:
    out = tmp_path / "data"
    words = ("--share", SHARE, "--seq-len", LENGTH, "--tasks", "mqar,needle", "--seed", 3)
    done = slope("data", "recall", prepared(), *map(str, words), "--out", out, "--json")
    assert done.code == 0, done.err
    by_source = {row["source"]: row for row in json.loads(done.out)["sources"]}
    tokens = {source: row["training_tokens"] for source, row in by_source.items()}
    assert tokens["recall"] / tokens["all"] == pytest.approx(SHARE, abs=0.02)
    assert by_source["recall"]["validation_tokens"] == 0
    assert slope("data", "info", out).code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--share", "0"), "--share 0: is a share of the training tokens, which must lie between 0 and 1"),
        (("--share", "1"), "--share 1: is a share of the training tokens, which must lie between 0 and 1"),
        (("--tokens", "0"), "--tokens 0: must be positive"),
        (("--tokens", "99", "--share", "0.1"), "--share and --tokens exclude each other"),
        (("--tasks", "mqar,piqa"), "--tasks piqa: choose some of mqar, passkey, needle, phonebook, copying"),
        (("--seq-len", "3"), "--seq-len 3: no item fits so few tokens; give more"),
        (("--out", "full"), "full: is not empty; choose another folder"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: tuple[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    done = slope("data", "recall", prepared(), "--out", "new", *words)
    assert (done.code, done.err.strip().splitlines()[-1]) == (2, f"error: {message}")
    assert not (tmp_path / "new").exists()


def test_a_second_source_of_items_is_refused(tmp_path: Path) -> None:
    dataset = with_recall(tmp_path / "data")
    done = slope("data", "recall", dataset.folder, "--out", tmp_path / "again")
    assert (done.code, "has a source recall already" in done.err) == (2, True)
