"""Perplexity is that of training and of formulas by hand; tasks are lm-eval's own; exports are worth what runs are."""

import gzip
import importlib.util
import itertools
import json
import math
import os
import shutil
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.data import SENTENCES, prepared, scratch, texts
from support.marks import slow
from support.ranks import Ranks
from support.runs import RECIPE, copied, slope, small, trained
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, MistralConfig

from slope_cli.checkpoint.load import Loaded, load_model
from slope_cli.config import configs
from slope_cli.data.dataset import TokenFile, open_dataset
from slope_cli.data.prepare import prepare
from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.errors import SlopeError, UsageError
from slope_cli.evaluate import lm_tasks
from slope_cli.evaluate.evaluate import evaluate, report_lines
from slope_cli.evaluate.perplexity import measure
from slope_cli.report import metrics
from slope_cli.train.loop import pretrain
from slope_cli.utils.environment import environment
from sparse_kernels import sparse_layers

NEEDS_LM_EVAL = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "mmlu")
WIDE = "model.overrides.n_positions=512"
WORDS = [word.strip('.,:"').lower() for sentence in SENTENCES for word in sentence.split()]


# ---------------------------------------------------------------------------------------------------- made-up rows


def some(count: int, start: int) -> str:
    """So many words."""
    return " ".join(itertools.islice(itertools.cycle(WORDS), start, start + count))


def lettered(number: int, question: str) -> dict[str, Any]:
    letters = ["ABCD", "123", "ABCDE"][number % 3]
    choices = {"text": [some(1 + place, number + place) for place in range(len(letters))], "label": list(letters)}
    return {"id": str(number), question: f"Which {some(3, number)}?", "choices": choices, "answerKey": letters[1]}


def row(task: str, n: int) -> dict[str, Any]:
    """Row `n` in the format of the published files."""
    if task == "hellaswag":
        texts = {"activity_label": "Sailing", "ctx_a": f"The {some(4, n)}.", "ctx_b": some(n % 2, n), "ctx": "unused"}
        return {"ind": n, **texts, "endings": [f"{some(3, n + k)} [cut]." for k in range(4)], "label": str(n % 4)}
    if task == "piqa":
        return {"goal": f"to {some(3, n)}", "sol1": some(4, n), "sol2": some(5, n + 3), "label": n % 2}
    if task == "winogrande":
        sentence = f"The {some(2, n)} was colder than _ and {some(3, n)}."
        return {"sentence": sentence, "option1": "north", "option2": "the hills", "answer": str(1 + n % 2)}
    if task == "mmlu":
        subject = ("anatomy", "philosophy", "astronomy")[n % 3]
        choices = [some(2, n + k) for k in range(4)]
        return {"question": f" {some(5, n)}: ", "subject": subject, "choices": choices, "answer": n % 4}
    return lettered(n, "question_stem" if task == "openbookqa" else "question")


def rows_of(task: str, count: int = 7) -> list[dict[str, Any]]:
    return [row(task, number) for number in range(count)]


def write(folder: Path, task: str, rows: list[dict[str, Any]], split: str = "") -> Path:
    """The rows as the one file of a task."""
    path = folder / task / f"{split or ('test' if task == 'mmlu' else 'validation')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(found) + "\n" for found in rows))
    return path


@cache
def task_data() -> Path:
    folder = scratch() / "task-data"
    for task in TASKS:
        write(folder, task, rows_of(task))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's hub holds the made-up rows, in all splits that its own tasks ask for."""
    from datasets import Dataset, DatasetDict
    from datasets import load_dataset as load_files

    sources = {"Rowan/hellaswag": "hellaswag", "baber/piqa": "piqa", "allenai/openbookqa": "openbookqa"}
    sources |= {"allenai/winogrande": "winogrande", "cais/mmlu": "mmlu"}

    def load_dataset(path: str, name: str | None = None, **how: Any) -> Any:
        if path == "json":
            return load_files(path, name, **how)
        task = sources.get(path) or {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"}[str(name)]
        found = [r for r in rows_of(task) if task != "mmlu" or r["subject"] == name]
        found = found or [dict(row("mmlu", 0), subject=name)]  # lm-eval refuses a subject without rows
        return DatasetDict({split: Dataset.from_list(found) for split in ("train", "validation", "test", "dev")})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)


def loaded_task(name: str, folder: Path | None = None, fewshot: int | None = None) -> lm_tasks.LoadedTask:
    registry = lm_tasks.Registry()
    (found,) = registry.find([name])
    return registry.load(found, folder, fewshot)


def requests(loaded: lm_tasks.LoadedTask) -> dict[str, list[tuple[int, int, tuple[str, str]]]]:
    """Every request of every leaf: row, choice, (context, continuation)."""
    found = {}
    with lm_tasks.quiet():
        for name, leaf in loaded.leaves.items():
            leaf.build_all_requests(rank=0, world_size=1)
            found[name] = [(i.doc_id, i.idx, i.args) for i in leaf.instances]
    return found


# ------------------------------------------------------------------------------------------------------ perplexity


@pytest.mark.parametrize("model", ["gpt2-nano", "opt-125m", "bert-base"])
def test_the_loss_is_that_of_the_last_validation(model: str) -> None:
    run = trained(model)
    last = [record for record in metrics.read(run) if record["kind"] == "val"][-1]
    result = evaluate(run, tokens=128)
    found = result["perplexity"]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(last["perplexity"], rel=1e-6)
    assert found["sources"]["text"]["loss"] == pytest.approx(last["by_source"]["text"], rel=1e-6)
    assert (found["blocks"], found["seq_len"], result["step"]) == (4, 32, 6)
    assert result["objective"] == ("masked" if model == "bert-base" else "causal")
    assert ("bits_per_byte" in found) == (model != "bert-base")


def block_losses(loaded: Loaded, file: TokenFile, length: int) -> np.ndarray:
    """Nats of every predicted token, (blocks, length), computed in another way than the program does."""
    found = []
    for start in range(0, (file.header.tokens - 1) // length * length, length):
        ids = torch.tensor(file.tokens[start : start + length + 1].astype(np.int64))
        with torch.no_grad():
            logs = loaded.model(input_ids=ids[None, :-1]).logits[0].double().log_softmax(-1)
        found.append(-logs[torch.arange(length), ids[1:]].numpy())
    return np.stack(found)


@cache
def two_sources() -> Path:
    """Prepared bytes of two sources, one of them with characters of several bytes."""
    folder = scratch() / "two"
    folder.mkdir()
    plain = [SENTENCES[n % 3] for n in range(60)]
    accents = [f"Über die Häuser wehte — naïve — ein Wind, Nr. {n}: ∑ → ∞." for n in range(90)]
    for name, found in (("plain", plain), ("accents", accents)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    out, files = folder / "data", [str(folder / f"{name}.jsonl") for name in ("plain", "accents")]
    prepare(files, out, tokenizer="bytes", val_fraction=0.3, workers=1, progress=False)
    return out


def test_loss_error_and_bytes_are_those_worked_by_hand() -> None:
    run, dataset = trained(), open_dataset(two_sources())
    loaded = load_model(run)
    found = evaluate(run, data_folder=two_sources())["perplexity"]
    nats, count, variance, size = 0.0, 0, 0.0, 0.0
    for source, file in dataset.val.items():
        losses = block_losses(loaded, file, 32)
        own, blocks = found["sources"][source], len(losses)
        assert (own["blocks"], own["tokens"]) == (blocks, losses.size)
        assert own["loss"] == pytest.approx(losses.mean(), rel=1e-6)
        assert own["stderr"] == pytest.approx(losses.mean(1).std(ddof=1) / math.sqrt(blocks), rel=1e-5)
        bits = losses.mean() * file.header.tokens / file.header.text_bytes / math.log(2)
        assert own["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
        assert own["nats_per_byte"] == pytest.approx(bits * math.log(2), rel=1e-6)
        nats, count = nats + losses.sum(), count + losses.size
        variance += losses.sum(1).var(ddof=1) * blocks
        size += losses.size * file.header.text_bytes / file.header.tokens
    assert set(found["sources"]) == {"plain", "accents"}
    assert found["loss"] == pytest.approx(nats / count, rel=1e-6)
    assert found["stderr"] == pytest.approx(math.sqrt(variance) / count, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-6)
    assert found["data"] == dataset.fingerprint


@pytest.mark.parametrize("family", ["mistral", "gpt_neox"])
def test_a_model_attends_as_its_own_config_says(family: str, tmp_path: Path) -> None:
    """Within its sliding window, here a quarter of a block; and one of a family that slope cannot build."""
    sizes: dict[str, Any] = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256}
    kind, more = {
        "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 8}),
        "gpt_neox": (GPTNeoXConfig, {}),
    }[family]
    model = AutoModelForCausalLM.from_config(kind(**sizes, **more))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    found = evaluate(tmp_path, data_folder=two_sources(), seq_len=32)["perplexity"]["sources"]
    for source, file in open_dataset(two_sources()).val.items():
        losses = block_losses(load_model(tmp_path), file, 32)
        assert found[source]["loss"] == pytest.approx(losses.mean(), rel=1e-6)


def test_the_batch_does_not_matter_and_one_block_has_no_error() -> None:
    one, three = (evaluate(trained(), batch=batch)["perplexity"] for batch in (1, 3))
    assert one["loss"] == pytest.approx(three["loss"], rel=1e-6)
    assert one["stderr"] == pytest.approx(three["stderr"], rel=1e-4)
    single = evaluate(trained(), tokens=32, seq_len=64)["perplexity"]
    assert (single["stderr"], single["blocks"], single["tokens"]) == (None, 1, 64)


def test_the_loss_by_position_is_that_worked_by_hand() -> None:
    run, dataset = trained(), open_dataset(two_sources())
    loaded = load_model(run)
    by_source = {source: block_losses(loaded, file, 48) for source, file in dataset.val.items()}
    found = measure(loaded, dataset, seq_len=48, first_bucket=8)
    usual = evaluate(run, data_folder=two_sources(), seq_len=48)
    result = usual | {"perplexity": found}
    assert [(bucket["first"], bucket["last"]) for bucket in usual["perplexity"]["positions"]] == [(0, 47)]
    assert usual["perplexity"] == found | {key: usual["perplexity"][key] for key in ("positions", "sources")}
    for losses, row in [(by_source[name], found["sources"][name]) for name in by_source] + [
        (np.concatenate(list(by_source.values())), found)
    ]:
        edges = [(bucket["first"], bucket["last"]) for bucket in row["positions"]]
        assert edges == [(0, 7), (8, 15), (16, 31), (32, 47)]
        for bucket in row["positions"]:
            own = losses[:, bucket["first"] : bucket["last"] + 1]
            assert bucket["tokens"] == own.size
            assert bucket["loss"] == pytest.approx(own.mean(), rel=1e-6)
            assert bucket["perplexity"] == pytest.approx(math.exp(own.mean()), rel=1e-5)
        assert sum(bucket["tokens"] for bucket in row["positions"]) == row["tokens"]
    text = report_lines(result, positions=True)
    assert len(text) == len(report_lines(result)) + 4
    assert text[-1].startswith("  32-47            loss ")


def test_a_source_shorter_than_a_block_counts_with_its_positions(tmp_path: Path) -> None:
    for name, texts_of in (("long", [SENTENCES[n % 3] for n in range(60)]), ("short", ["abc", "defgh", "ij", "kl"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_of))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("long", "short")]
    dataset = prepare(files, tmp_path / "data", tokenizer="bytes", val_fraction=0.3, workers=1, progress=False)
    length = dataset.val["short"].header.tokens - 1
    assert 1 <= length < 8
    found = measure(load_model(trained()), dataset, seq_len=32, first_bucket=8)
    long, short = (found["sources"][name] for name in ("long", "short"))
    assert (short["blocks"], short["tokens"]) == (1, length)
    assert [(row["first"], row["last"]) for row in short["positions"]] == [(0, length - 1)]
    tokens = [row["tokens"] for row in long["positions"]]
    assert [row["tokens"] for row in found["positions"]] == [tokens[0] + length, *tokens[1:]]
    nats = long["positions"][0]["loss"] * tokens[0] + short["loss"] * length
    assert found["positions"][0]["loss"] == pytest.approx(nats / (tokens[0] + length), rel=1e-9)


def test_the_loss_by_position_of_a_masked_model_counts_masked_tokens() -> None:
    found = evaluate(trained("bert-base"), tokens=128)["perplexity"]
    assert [(row["first"], row["last"], row["tokens"]) for row in found["positions"]] == [(0, 31, found["tokens"])]
    assert found["positions"][0]["loss"] == pytest.approx(found["loss"], rel=1e-9)


def test_a_uniform_model_costs_the_bits_of_its_vocabulary(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=272, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    model.save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    found = evaluate(tmp_path, data_folder=prepared())["perplexity"]
    assert found["loss"] == pytest.approx(math.log(272), rel=1e-6)
    assert found["perplexity"] == pytest.approx(272, rel=1e-5)
    assert found["stderr"] == pytest.approx(0, abs=1e-6)
    assert found["seq_len"] == 64
    file = open_dataset(prepared()).val["text"].header  # a byte a token, but for the ends of documents
    assert file.tokens > file.text_bytes > 0
    assert found["bits_per_byte"] == pytest.approx(math.log2(272) * file.tokens / file.text_bytes, rel=1e-6)


@NEEDS_LM_EVAL
@pytest.mark.parametrize("family", ["gpt2-nano", *map(slow, ("llama3-8b", "bert-base"))])
def test_an_export_is_worth_what_its_run_is(family: str, tmp_path: Path) -> None:
    run, out = trained(family, "adapters.lr=0.05"), tmp_path / "out"
    assert slope("export", run, out).code == 0
    adapters = [layer.adapter for _, layer in sparse_layers(load_model(run).model)]
    assert adapters
    assert all(adapter is not None and adapter.lora_B.abs().max() > 0 for adapter in adapters)
    causal = family != "bert-base"
    words: dict[str, Any] = {"task_names": ["piqa", "winogrande"], "task_data": task_data()} if causal else {}
    folder = prepared("bytes" if causal else "wordpiece")
    ours, theirs = evaluate(run, **words), evaluate(out, data_folder=folder, seq_len=32, **words)
    for key in ("loss", "stderr", "perplexity", "tokens", *(("bits_per_byte", "nats_per_byte") if causal else ())):
        assert ours["perplexity"][key] == pytest.approx(theirs["perplexity"][key], rel=1e-5)
    assert ours["tasks"] == theirs["tasks"]
    assert len(ours["tasks"]) == 2 * causal
    assert (theirs["folder"], theirs["step"]) == ("out", None)
    without = copied(out, tmp_path)
    shutil.rmtree(without / "adapter")
    loss = evaluate(without, data_folder=folder, seq_len=32)["perplexity"]["loss"]
    assert abs(loss - ours["perplexity"]["loss"]) > 1e-4


def test_an_exported_masked_model_predicts_the_tokens_that_its_run_does(tmp_path: Path) -> None:
    """Which tokens are masked is drawn from train.seed."""
    run, out, data = tmp_path / "run", tmp_path / "out", prepared("wordpiece")
    pretrain(configs.load(str(RECIPE), [*small("bert-base"), f"data.path={data}", "train.seed=7"]), run)
    assert slope("export", run, out).code == 0
    ours, theirs = (evaluate(each, data_folder=data, seq_len=32)["perplexity"] for each in (run, out))
    assert (theirs["tokens"], theirs["loss"]) == (ours["tokens"], pytest.approx(ours["loss"], rel=1e-5))


# ----------------------------------------------------------------------------------------------------------- tasks


@NEEDS_LM_EVAL
@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("task", TASKS)
def test_a_local_task_asks_what_lm_evals_own_asks(task: str) -> None:
    local, own = loaded_task(task, task_data()), loaded_task(task)
    ours, theirs = requests(local), requests(own)
    if task == "mmlu":
        assert set(ours) == {"mmlu_anatomy", "mmlu_philosophy", "mmlu_astronomy"}
        assert len(theirs) == 57
    assert sum(map(len, ours.values())) >= 14
    assert ours == {name: theirs[name] for name in ours}
    for name, leaf in local.leaves.items():
        answers = [leaf.doc_to_target(doc) for doc in leaf.eval_docs]
        assert answers == [own.leaves[name].doc_to_target(doc) for doc in own.leaves[name].eval_docs]
        assert leaf.config.metric_list == own.leaves[name].config.metric_list


@NEEDS_LM_EVAL
@pytest.mark.usefixtures("hub")
def test_the_scores_are_those_of_lm_evals_own_program() -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = [name for name in TASKS if name != "mmlu"]  # there its own wants rows of every subject
    run = trained("gpt2-nano", WIDE)
    ours = evaluate(run, perplexity=False, task_names=names, task_data=task_data())["tasks"]
    from_hub = evaluate(run, perplexity=False, task_names=names)["tasks"]
    loaded = load_model(run)
    places = [Path(lm_eval.__file__).parent / "tasks" / name.partition("_")[0] for name in names]
    with lm_tasks.quiet():
        lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer)
        manager = TaskManager(include_defaults=False, include_path=sorted(set(places)))
        theirs = lm_eval.evaluate(lm, manager.load(names))["results"]
    for name in names:
        for metric in ("acc", "acc_norm"):
            if (key := f"{metric},none") in theirs[name]:
                error = theirs[name][f"{metric}_stderr,none"]
                assert (ours[name][metric], ours[name][f"{metric}_stderr"]) == (theirs[name][key], error)
        assert ("acc_norm" in ours[name]) == ("acc_norm,none" in theirs[name]) == (name != "winogrande")
        assert ours[name]["n"] == 7
        assert from_hub[name] | {"split": ""} == ours[name] | {"split": ""}
    assert from_hub["arc_easy"]["split"] == "test"
    assert ours["arc_easy"]["split"] == "validation"


@NEEDS_LM_EVAL
def test_mmlu_is_the_mean_over_the_rows_of_all_subjects() -> None:
    run = trained("gpt2-nano", WIDE)
    found = evaluate(run, perplexity=False, task_names=["mmlu"], task_data=task_data())["tasks"]["mmlu"]
    sizes = {"anatomy": 3, "philosophy": 2, "astronomy": 2}
    subjects = found["subtasks"]
    assert {name: scores["n"] for name, scores in subjects.items()} == sizes
    mean = sum(subjects[name]["acc"] * n for name, n in sizes.items()) / 7
    assert found["acc"] == pytest.approx(mean)
    assert set(found["groups"]) == {"mmlu_stem", "mmlu_humanities"}
    assert found["groups"]["mmlu_humanities"]["acc"] == subjects["philosophy"]["acc"]
    assert (found["n"], found["chance"], found["split"]) == (7, 0.25, "test")
    few = evaluate(run, perplexity=False, task_names=["mmlu"], task_data=task_data(), limit=1)["tasks"]["mmlu"]
    assert (few["n"], few["acc_stderr"]) == (3, None)


@NEEDS_LM_EVAL
def test_chance_is_that_of_the_choices_of_each_row() -> None:
    run = trained("gpt2-nano", WIDE)
    words: dict[str, Any] = {"perplexity": False, "task_names": ["arc_easy"], "task_data": task_data()}
    found = evaluate(run, **words)["tasks"]["arc_easy"]
    guesses = [(1 / 4, 1 / 3, 1 / 5)[number % 3] for number in range(7)]
    assert found["chance"] == pytest.approx(np.mean(guesses))
    error = math.sqrt(sum(p * (1 - p) for p in guesses)) / 7
    assert found["above_chance"] == (found["acc"] > np.mean(guesses) + 2 * error)
    assert found["below_chance"] == (found["acc"] < np.mean(guesses) - 2 * error)
    one = evaluate(run, limit=1, **words)["tasks"]["arc_easy"]
    assert (one["n"], one["chance"], one["acc_stderr"]) == (1, 0.25, None)


@NEEDS_LM_EVAL
def test_accuracy_is_above_near_or_below_chance(tmp_path: Path) -> None:
    right = SENTENCES[1][-20:]
    rows = [{"goal": "g", "sol1": right, "sol2": "ξ" * 20, "label": 0} for _ in range(40)]
    write(tmp_path, "piqa", rows)
    result = evaluate(trained(), perplexity=False, task_names=["piqa"], task_data=tmp_path)
    found = result["tasks"]["piqa"]
    assert (found["acc"], found["above_chance"]) == (1.0, True)
    assert not any("chance (" in line for line in report_lines(result))
    write(tmp_path, "piqa", [dict(found, label=number % 2) for number, found in enumerate(rows)])
    result = evaluate(trained(), perplexity=False, task_names=["piqa"], task_data=tmp_path)
    assert (result["tasks"]["piqa"]["acc"], result["tasks"]["piqa"]["above_chance"]) == (0.5, False)
    assert report_lines(result)[-1].endswith("of it), as is usual for small models: piqa")
    write(tmp_path, "piqa", [dict(found, label=1) for found in rows[:12]])
    result = evaluate(trained(), perplexity=False, task_names=["piqa"], task_data=tmp_path)
    found = result["tasks"]["piqa"]
    assert (found["acc"], found["above_chance"], found["below_chance"]) == (0.0, False, True)
    assert report_lines(result)[-1] == "below chance (by more than two standard errors): piqa"


@NEEDS_LM_EVAL
def test_prompts_beyond_the_positions_are_counted_and_choices_beyond_them_refused(tmp_path: Path) -> None:
    rows = rows_of("piqa", 4)
    rows[1]["goal"] = rows[3]["goal"] = "to " + "wait " * 20
    write(tmp_path, "piqa", rows)
    words: dict[str, Any] = {"perplexity": False, "task_names": ["piqa"], "task_data": tmp_path}
    result = evaluate(trained(), **words)
    long = sum(len(f"Question: {r['goal']}\nAnswer: {max(r['sol1'], r['sol2'], key=len)}") > 65 for r in rows)
    assert 2 <= long == result["tasks"]["piqa"]["truncated"]
    assert any(line.startswith(f"piqa: {long} of 4 rows are longer") for line in report_lines(result))
    rows[2]["sol2"] = "x" * 70
    write(tmp_path, "piqa", rows)
    with pytest.raises(UsageError, match=r"^piqa: a choice has 71 tokens, but the model only 64 positions$"):
        evaluate(trained(), **words)


@NEEDS_LM_EVAL
def test_compressed_rows_and_the_split_that_lm_eval_would_take(tmp_path: Path) -> None:
    write(tmp_path, "openbookqa", rows_of("openbookqa", 5), "validation")
    loaded = loaded_task("openbookqa", tmp_path)
    assert (loaded.split, len(requests(loaded)["openbookqa"])) == ("validation", 4 + 3 + 5 + 4 + 3)
    path = tmp_path / "openbookqa" / "test.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(row("openbookqa", 0)) + "\n\n").encode()))
    loaded = loaded_task("openbookqa", tmp_path)
    assert (loaded.split, len(requests(loaded)["openbookqa"])) == ("test", 4)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match=r"openbookqa: cannot be used as rows \(EOFError: "):
        loaded_task("openbookqa", tmp_path)


# ------------------------------------------------------------------------------------------------- report and files


@NEEDS_LM_EVAL
def test_only_the_file_has_the_result_and_it_names_no_path(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = trained()
    result = evaluate(run, task_names=["piqa", "piqa"], task_data=task_data(), out=tmp_path / "eval.json")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith("text: 1,792 tokens, loss ")
    assert err.splitlines()[1].startswith("piqa: 7 rows in ")
    assert len(err.splitlines()) == 2
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []
    written = (tmp_path / "eval.json").read_text()
    assert json.loads(written) == result
    assert str(scratch()) not in written
    assert result["run"] == run.name
    assert result["versions"] == environment() | {"device": "cpu"}
    assert {"slope", "source", "torch", "transformers", "lm_eval"} <= set(result["versions"])
    text = report_lines(result)
    assert text[0] == f"{run.name}, step 6"
    assert f"perplexity {result['perplexity']['perplexity']:.2f}" in text[2]
    assert f"acc {result['tasks']['piqa']['acc']:.4f} ± " in text[4]
    assert result["tasks"]["piqa"]["above_chance"] == ("chance (" not in "".join(text))


@NEEDS_LM_EVAL
def test_evaluation_leaves_the_model_sparse_and_as_it_was() -> None:
    loaded = load_model(trained())
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    task = loaded_task("piqa", task_data())
    lm = lm_tasks.harness(loaded.model, loaded.tokenizer, 4)
    lm_tasks.answers_of(lm, lm_tasks.requests_of(lm, task).asked)
    after = loaded.model.state_dict()
    assert list(sparse_layers(loaded.model))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------------------------------------------- bad input


@NEEDS_LM_EVAL
@pytest.mark.parametrize(
    ("task", "change", "fault"),
    [
        ("piqa", {"sol2": None}, "row 2 of piqa: has no two choices that are texts"),
        ("piqa", {"label": -1}, "row 2 of piqa: the answer -1 is not one of its 2 choices"),
        ("hellaswag", {"label": ""}, r"hellaswag: cannot be used as rows \(ValueError: invalid literal"),
        ("arc_easy", {"choices": {"text": ["a", "b"]}}, r"arc_easy: cannot be used as rows .*no attribute 'label'"),
        ("openbookqa", {"answerKey": "E"}, r"openbookqa: cannot be used as rows .*'E' is not in list"),
        ("winogrande", {"sentence": "no gap"}, r"winogrande: cannot be used as rows .*substring not found"),
        ("mmlu", {"subject": "sailing"}, "test.jsonl: the subject 'sailing' of a row is that of no task of mmlu"),
    ],
)
def test_a_row_that_does_not_fit_is_named(task: str, change: dict[str, Any], fault: str, tmp_path: Path) -> None:
    rows = rows_of(task, 3)
    changed = {key: value for key, value in (rows[1] | change).items() if value is not None}
    write(tmp_path, task, [rows[0], changed, rows[2]])
    with pytest.raises(UsageError, match=f"^{tmp_path}.*{fault}"):
        loaded_task(task, tmp_path)


@NEEDS_LM_EVAL
def test_files_that_are_no_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: no such folder"):
        evaluate(trained(), task_names=["piqa"], task_data=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"^--task-data: no rows of arc_easy in .*arc_easy/SPLIT\.jsonl \(\.gz\)$"):
        loaded_task("arc_easy", tmp_path)
    write(tmp_path, "arc_easy", rows_of("arc_easy"), "dev")
    with pytest.raises(UsageError, match=r"^--task-data: no .*arc_easy/test\.jsonl or validation\.jsonl \(\.gz\)$"):
        loaded_task("arc_easy", tmp_path)
    path = write(tmp_path, "piqa", [])
    for content, fault in (
        (b"{'not': 'JSON'}\n", "JSON parse error"),
        (b"[1, 2]\n", "'goal' is undefined"),
        (b"\n", "no data"),
        (b"\xff\xfe\n", "JSON parse error"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=rf"piqa: cannot be used as rows .*{fault}"):
            loaded_task("piqa", tmp_path)


@NEEDS_LM_EVAL
def test_an_unknown_task_and_a_missing_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    everything = ["hellaswag", "piqa"]
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: SimpleNamespace(task_index={}, all_tasks=everything))
    with pytest.raises(UsageError, match=r"^--tasks helaswag: unknown task; did you mean hellaswag\?$"):
        evaluate(trained(), task_names=["helaswag"])
    with pytest.raises(UsageError, match=r"^--tasks recal: unknown task; did you mean recall\?$"):
        evaluate(trained(), task_names=["recal"])
    with pytest.raises(UsageError, match=r"^--tasks xyzzy: unknown task; `lm-eval ls tasks` lists them$"):
        evaluate(trained(), task_names=["xyzzy"])
    with pytest.raises(UsageError, match=r"^--tasks no\.yaml: is no task \(.*No such file"):
        evaluate(trained(), task_names=["no.yaml"])
    (tmp_path / "list.yaml").write_text("- task: x\n")
    with pytest.raises(UsageError, match=r"list\.yaml: is no task \("):
        evaluate(trained(), task_names=[str(tmp_path / "list.yaml")])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"is missing; install the extra eval \(docs/start\.md#install\)$"):
        evaluate(trained(), task_names=["piqa"], task_data=task_data())


# ------------------------------------------------------------------------------------ other tasks than those by choice


def sums(folder: Path) -> Path:
    """A group of a user's own: a task that generates, one that scores a text's last word, and one of whole texts."""
    head = "dataset_path: json\ntest_split: test\nfewshot_split: train\ntraining_split: train\n"
    tasks = {
        "sums_written": "output_type: generate_until\ndoc_to_text: '{{a}} + {{b}} ='\ndoc_to_target: '{{c}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
        "filter_list: [{name: first, filter: [{function: take_first}]}]\n",
        "sums_last": "output_type: loglikelihood\ndoc_to_text: '{{a}} + {{b}} ='\ndoc_to_target: ' {{c}}'\n"
        "metric_list: [{metric: acc}]\n",
        "sums_whole": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{a}} + {{b}} = {{c}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n",
    }
    folder.mkdir()
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{text}")
        rows = [{"a": n, "b": n % 3, "c": n + n % 3} for n in range(12)]
        write(folder / "rows", name, rows[:7], "test")
        write(folder / "rows", name, rows[7:], "train")
    (folder / "all.yaml").write_text(f"group: sums\ntask: [{', '.join(tasks)}, sums_absent]\n")
    return folder


@pytest.mark.slow
@NEEDS_LM_EVAL
def test_a_users_own_group_of_every_kind_of_task(tmp_path: Path) -> None:
    folder, run = sums(tmp_path / "own"), trained("gpt2-nano", WIDE)
    words: list[str | Path] = ["eval", run, "--no-perplexity", "--tasks", folder / "all.yaml", "--fewshot", "2"]
    words += ["--task-data", folder / "rows", "--log-samples", tmp_path / "samples", "--json"]
    done = slope(*words)
    assert done.code == 0, done.err
    assert done.err.startswith("sums: 21 rows in")
    found = json.loads(done.out)["tasks"]["sums"]
    assert (found["n"], found["fewshot"], found["split"]) == (21, 2, "test")
    assert found["subtasks"].keys() == {"written", "last", "whole"}
    assert found["subtasks"]["whole"]["bits_per_byte"] > 0
    assert "exact_match,first" in found["subtasks"]["written"]
    samples = [json.loads(line) for line in (tmp_path / "samples" / "sums.jsonl").read_text().splitlines()]
    assert len(samples) == 21
    prompts = {sample["arguments"][0][0] for sample in samples if sample["task"] == "sums_written"}
    assert all(prompt.count(" = ") == 2 and prompt.endswith(" =") for prompt in prompts)
    text = report_lines(json.loads(done.out))
    assert text[1:3] == ["by lm-eval", "  sums              (21 rows, test, 2-shot)"]
    assert text[-1].startswith("    whole          bits_per_byte ")


@pytest.mark.slow
@NEEDS_LM_EVAL
def test_every_kind_of_request_is_dealt_to_two_processes(tmp_path: Path) -> None:
    folder, run = sums(tmp_path / "own"), trained("gpt2-nano", WIDE)
    how: dict[str, Any] = {"perplexity": False, "task_names": [str(folder / "all.yaml")], "task_data": folder / "rows"}
    words = ["eval", str(run), "--no-perplexity", "--tasks", str(folder / "all.yaml")]
    words += ["--task-data", str(folder / "rows"), "--out", str(tmp_path / "eval.json")]
    ranks = Ranks(2, words, tmp_path / "logs")
    assert ranks.finish() == [0, 0], ranks.printed()
    written = json.loads((tmp_path / "eval.json").read_text())
    alone, shared = (result["tasks"]["sums"] for result in (evaluate(run, **how), written))
    for name in ("written", "last"):
        assert shared["subtasks"][name] == alone["subtasks"][name]
    bits = [found["subtasks"]["whole"]["bits_per_byte"] for found in (alone, shared)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)


@pytest.mark.slow
@NEEDS_LM_EVAL
def test_lm_evals_own_command_line_scores_a_run_as_slope_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from slope_cli.evaluate import harness

    folder, run = sums(tmp_path / "own"), trained("gpt2-nano", WIDE)
    rows = folder / "rows" / "sums_last"
    files = f"dataset_kwargs: {{data_files: {{test: {rows}/test.jsonl, train: {rows}/train.jsonl}}}}\n"
    with open(folder / "sums_last.yaml", "a") as task:
        task.write(files)
    words = ["run", "--model", "slope", "--model_args", f"pretrained={run}", "--device", "cpu", "--num_fewshot", "2"]
    words += ["--tasks", str(folder / "sums_last.yaml"), "--output_path", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", ["lm-eval", *words])
    with lm_tasks.quiet():
        harness.cli_evaluate()
    (written,) = (tmp_path / "results").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]["sums_last"]
    how: dict[str, Any] = {"perplexity": False, "task_names": [str(folder / "sums_last.yaml")], "fewshot": 2}
    ours = evaluate(run, **how)["tasks"]["sums_last"]
    assert (ours["acc"], ours["acc_stderr"]) == (theirs["acc,none"], theirs["acc_stderr,none"])
    assert ours["fewshot"] == 2


@NEEDS_LM_EVAL
def test_without_a_network_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(**_: object) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub\nmore of it")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(SlopeError, match=r"^piqa: could not .*Couldn't reach .*Hub\); connect to a network") as caught:
        evaluate(trained(), task_names=["piqa"])
    assert "\n" not in str(caught.value)


def test_a_masked_model_has_no_tasks() -> None:
    with pytest.raises(UsageError, match=r"predicts masked tokens, not the next one; --tasks needs a causal model$"):
        evaluate(trained("bert-base"), task_names=["piqa"], task_data=task_data())


def test_other_data_than_the_models_is_refused(tmp_path: Path) -> None:
    run = trained()
    with pytest.raises(UsageError, match=r"was prepared with another tokenizer than that of .*run-gpt2-nano"):
        evaluate(run, data_folder=prepared("wordpiece"))
    out, none = tmp_path / "odd", tmp_path / "none"
    prepare([str(texts())], out, tokenizer=str(odd_tokenizer(tmp_path)), workers=1, progress=False)
    with pytest.raises(UsageError, match=r"token id 300 is above the model's vocabulary of 272$"):
        evaluate(run, data_folder=out)
    prepare([str(texts())], none, val_fraction=0.0, workers=1, progress=False)
    with pytest.raises(UsageError, match=r"none: has no validation text"):
        evaluate(run, data_folder=none)
    with pytest.raises(UsageError, match=r"^--seq-len 65: the model has only 64 positions$"):
        evaluate(run, seq_len=65)


def odd_tokenizer(folder: Path) -> Path:
    """The bytes with another id at the end of a document."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_tokens([f"<{number}>" for number in range(43)])
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    assert tokenizer.eos_token_id == 300
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"is neither a run \(no config\.yaml\) nor a model folder \(no config\.json\)"
    ):
        evaluate(tmp_path)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=272, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    model.transformer.save_pretrained(tmp_path)  # GPT-2's head is its embedding, so that nothing is missing
    load_tokenizer("bytes").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no data of its own; give --data, or --no-perplexity with --tasks that"):
        evaluate(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(SlopeError, match=r"cannot be loaded as a model"):
        evaluate(tmp_path, data_folder=prepared())
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["RobertaForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlopeError, match=r"of such models only BERT is supported"):
        evaluate(tmp_path, data_folder=prepared())


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = GPT2LMHeadModel(GPT2Config(vocab_size=272, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    model.save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"holds no weights for transformer\.ln_f\.weight"):
        evaluate(tmp_path, data_folder=prepared())


def test_a_loss_that_is_not_finite_is_no_result(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=272, n_positions=64, n_embd=8, n_layer=1, n_head=1))
    with torch.no_grad():
        model.transformer.wte.weight[5] = math.nan
    model.save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    with pytest.raises(SlopeError, match=r"the loss is not finite$"):
        evaluate(tmp_path, data_folder=prepared())


def test_wrong_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^nothing to evaluate: give --tasks, or leave out --no-perplexity$"):
        evaluate(trained(), perplexity=False)
    with pytest.raises(UsageError, match=r"is a folder; name a file$"):
        evaluate(trained(), out=tmp_path)
    with pytest.raises(UsageError, match=r"its folder is missing$"):
        evaluate(trained(), out=tmp_path / "no" / "eval.json")


@NEEDS_LM_EVAL
def test_what_was_scored_before_a_task_fails_is_kept_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = lm_tasks.score

    def failing(task: lm_tasks.LoadedTask, *args: Any) -> dict[str, Any]:
        if task.name == "winogrande":
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return score(task, *args)

    monkeypatch.setattr(lm_tasks, "score", failing)
    out = tmp_path / "eval.json"
    words = ("--no-perplexity", "--tasks", "piqa,winogrande,openbookqa", "--task-data", task_data(), "--out", out)
    result = slope("eval", trained("gpt2-nano", WIDE), *words)
    assert result.code == 1
    assert "winogrande: failed: out of memory (CUDA out of memory)" in result.out
    assert "piqa             acc" in result.out
    assert "openbookqa       acc" in result.out
    assert result.err.splitlines()[-1].startswith("error: winogrande: could not be scored")
    kept = json.loads(out.read_text())
    assert (set(kept["tasks"]), set(kept["failed"])) == ({"piqa", "openbookqa"}, {"winogrande"})


@NEEDS_LM_EVAL
def test_the_lengths_of_all_tasks_are_checked_before_any_is_scored(tmp_path: Path) -> None:
    write(tmp_path, "piqa", rows_of("piqa"))
    choices = {"text": [some(900, 0)] * 4, "label": [*"ABCD"]}
    write(tmp_path, "openbookqa", [lettered(0, "question_stem") | {"choices": choices}])
    words = ("--no-perplexity", "--tasks", "piqa,openbookqa", "--task-data", tmp_path)
    result = slope("eval", trained(), *words)
    assert (result.code, result.out) == (2, "")
    assert "piqa" not in result.err
    assert result.err.startswith("error: openbookqa: a choice has ")


def test_a_model_folder_with_code_of_its_own_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "theirs"
    assert slope("export", trained(), folder).code == 0
    settings = json.loads((folder / "config.json").read_text())
    theirs = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "own.py").write_text("raise SystemExit('executed')\n")
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "own", "auto_map": theirs}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for words in (("eval", folder), ("generate", folder, "The "), ("linearize", folder, "--dry-run")):
        result = slope(*words)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith(f"error: {folder}: cannot be loaded as a model (")


# -------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
@NEEDS_LM_EVAL
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    run, tasks = trained("gpt2-nano", WIDE), ["piqa", "winogrande", "mmlu"]
    words = ["eval", str(run), "--data", str(two_sources()), "--tasks", ",".join(tasks), "--batch", "3"]
    words += ["--task-data", str(task_data())]
    ranks = Ranks(2, [*words, "--out", str(tmp_path / "eval.json")], tmp_path / "logs")
    assert ranks.finish() == [0, 0], ranks.printed()
    assert ranks.printed(1) == "", "only rank 0 speaks"
    two = json.loads((tmp_path / "eval.json").read_text())
    one = evaluate(run, data_folder=two_sources(), task_names=tasks, task_data=task_data(), batch=3)
    assert two["tasks"] == one["tasks"]
    assert ranks.printed(0).splitlines()[-len(report_lines(two)) :] == report_lines(two)
    assert same(two["perplexity"], one["perplexity"])


def same(one: Any, other: Any) -> bool:
    """Whether two results agree but for the rounding of floats."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == (pytest.approx(other, rel=1e-6) if isinstance(other, float) else other))


def test_masked_tokens_are_those_of_one_process(tmp_path: Path) -> None:
    out, run = tmp_path / "eval.json", trained("bert-base")
    ranks = Ranks(2, ["eval", str(run), "--out", str(out)], tmp_path / "logs")
    assert ranks.finish() == [0, 0], ranks.printed()
    found = json.loads(out.read_text())["perplexity"]
    assert same(found, evaluate(run)["perplexity"])


def test_more_processes_than_batches(tmp_path: Path) -> None:
    words = ["eval", str(trained()), "--tokens", "64", "--batch", "2", "--json"]
    ranks = Ranks(2, words, tmp_path / "logs")
    assert ranks.finish() == [0, 0], ranks.printed()
    printed = ranks.printed(0)
    found = json.loads(printed[printed.index("{") :])["perplexity"]
    assert same(found, evaluate(trained(), tokens=64, batch=2)["perplexity"])


def _forward_fails(rank: int) -> None:
    """Let rank 1 run out of memory in its first forward pass."""
    if rank == 1:
        nn.LayerNorm.forward = lambda *_: _raise(MemoryError("out of memory"))  # type: ignore[method-assign]


def _raise(error: Exception) -> Any:
    raise error


def test_a_process_that_fails_ends_all(tmp_path: Path) -> None:
    ranks = Ranks(2, ["eval", str(trained())], tmp_path / "logs", prepare_child=_forward_fails)
    assert ranks.finish(60) == [1, 1]
    (line,) = ranks.printed().splitlines()
    assert line.startswith("error: out of memory (rank 1 on ")


@NEEDS_LM_EVAL
def test_a_task_that_fails_on_one_process_fails_on_all_and_the_others_are_scored(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    words = ["eval", str(trained("gpt2-nano", WIDE)), "--no-perplexity", "--tasks", "piqa,openbookqa"]
    words += ["--task-data", str(task_data()), "--out", str(out)]
    ranks = Ranks(2, words, tmp_path / "logs", prepare_child=_first_task_fails)
    assert ranks.finish(60) == [1, 1]
    kept = json.loads(out.read_text())
    assert (set(kept["tasks"]), set(kept["failed"])) == ({"openbookqa"}, {"piqa"})
    assert kept["failed"]["piqa"].startswith("out of memory (rank 1 on ")
    assert ranks.printed(1) == ""


def _first_task_fails(rank: int) -> None:
    from lm_eval.models.huggingface import HFLM

    answer, calls = HFLM.loglikelihood, itertools.count()
    if rank == 1:
        HFLM.loglikelihood = lambda *words: _raise(MemoryError("out of memory")) if not next(calls) else answer(*words)


@NEEDS_LM_EVAL
def test_a_process_that_dies_in_a_task_ends_the_others_which_say_so(tmp_path: Path) -> None:
    words = ["eval", str(trained("gpt2-nano", WIDE)), "--no-perplexity", "--tasks", "piqa"]
    ranks = Ranks(2, [*words, "--task-data", str(task_data())], tmp_path / "logs", prepare_child=_dies_in_a_task)
    assert ranks.finish(60) == [1, 9]
    assert ranks.printed() == "error: rank 1 died; all processes end\n"


def _dies_in_a_task(rank: int) -> None:
    from lm_eval.models.huggingface import HFLM

    # Rank 0 is then in lm-eval, with the streams that silence it.
    HFLM.loglikelihood = lambda *_: os._exit(9) if rank == 1 else time.sleep(60)


@pytest.mark.slow
def test_wrong_words_to_several_processes_are_one_line(tmp_path: Path) -> None:
    for number, (words, end) in enumerate(
        (
            ([str(trained()), "--out", str(tmp_path)], "is a folder; name a file"),
            ([str(trained()), "--tasks", "helaswag"], "did you mean hellaswag?"),
            ([str(tmp_path)], "nor a model folder (no config.json)"),
        )
    ):
        ranks = Ranks(2, ["eval", *words], tmp_path / f"logs-{number}")
        assert ranks.finish(60) == [2, 2]
        (line,) = ranks.printed().splitlines()
        assert line.endswith(end)
