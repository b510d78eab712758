"""slope finetune MODEL SFT: the answers alone are learned, zeros and masks stay, every fault names its line."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.data import SENTENCES, scratch
from support.marks import slow
from support.models import tiny_model
from support.runs import slope, trained
from support.servers import TEMPLATE as WITHOUT_ENDS
from support.servers import serving
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from slope_cli.checkpoint.load import load_model, shape_of
from slope_cli.data.batches import IGNORED_LABEL
from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.errors import UsageError
from slope_cli.finetune import conversations, sft
from slope_cli.finetune.conversations import CausalExample
from slope_cli.inference.text import prompt_ids
from sparse_kernels import sparse_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks for it
]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is lost? é€𝄞"},
    {"role": "assistant", "content": "Nothing, naïvely."},
    {"role": "user", "content": "And won?"},
    {"role": "assistant", "content": "Nothing  at all"},
    {"role": "user", "content": "Thanks"},
]
QUICK = ("--lr", "1e-2", "--epochs", "12", "--batch", "8", "--seq-len", "48")


@cache
def bpe(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with merges: of bytes, or of words that begin with a mark, after a begin of text, as Llama's."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    core = Tokenizer(models.BPE(byte_fallback=kind == "marks", unk_token=None))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*special, *alphabet])
    core.train_from_iterator([*SENTENCES, "Nothing at all", "assistant user"] * 20, trainer)
    begin = {"bos_token": "<s>"} if kind == "marks" else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", **begin)
    if kind == "marks":
        from tokenizers.processors import TemplateProcessing

        one = TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = one
    return tokenizer


def with_template(kind: str, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer("bytes") if kind == "built-in" else bpe(kind)
    tokenizer.chat_template = template
    conversations.set_template(tokenizer)
    return tokenizer


def row(**record: Any) -> conversations.Row:
    return conversations._row(json.dumps(record), "rows.jsonl:1")


def learned(example: CausalExample) -> list[list[int]]:
    """The targets in runs without a gap."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORED_LABEL:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def one(record: conversations.Row, tokenizer: PreTrainedTokenizerFast, ends: set[int], length: int = 999) -> Any:
    (example,) = conversations.examples([record], tokenizer, ends, length).kept
    return example


# ------------------------------------------------------------------------------------------------ what is learned


@pytest.mark.parametrize("kind", ["built-in", "bytes", "marks"])
@pytest.mark.parametrize("template", [None, CHATML, WITHOUT_ENDS], ids=["ours", "chatml", "without ends"])
def test_the_targets_are_the_answers_and_their_ends(kind: str, template: str | None) -> None:
    tokenizer = with_template(kind, template)
    if template == CHATML and kind == "built-in":
        pytest.skip("its marks are no tokens there")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>") if template == CHATML else tokenizer.eos_token_id
    example = one(row(messages=CHAT), tokenizer, {end, tokenizer.eos_token_id})
    runs = learned(example)
    assert [run[-1] for run in runs] == [end, end]
    texts = [tokenizer.decode(run[:-1]).strip() for run in runs]
    assert texts == ["Nothing, naïvely.", "Nothing  at all"]
    if template != WITHOUT_ENDS:  # in which what the model is to stop at does not stand, nor is it one text
        whole = tokenizer.apply_chat_template(CHAT, return_dict=False)
        assert example.input_ids == whole[: len(example.input_ids)]
        shifted = zip(example.labels, whole[1:], strict=False)
        assert all(label in (IGNORED_LABEL, following) for label, following in shifted)


@pytest.mark.parametrize("kind", ["built-in", "bytes", "marks"])
@pytest.mark.parametrize(("template", "places"), [(None, (2, 4)), (WITHOUT_ENDS, (2,))], ids=["ours", "without ends"])
def test_before_answers_stands_what_a_server_gives_the_model(
    kind: str, template: str | None, places: tuple[int, ...]
) -> None:
    tokenizer = with_template(kind, template)
    example = one(row(messages=CHAT), tokenizer, {tokenizer.eos_token_id})
    for place in places:
        asked = tokenizer.apply_chat_template(CHAT[:place], add_generation_prompt=True, return_dict=False)
        assert example.input_ids[: len(asked)] == asked
        assert example.labels[len(asked) - 1] != IGNORED_LABEL  # the first token of the answer
        assert example.labels[len(asked) - 2] == IGNORED_LABEL


@pytest.mark.parametrize("kind", ["built-in", "bytes", "marks"])
def test_a_completion_follows_the_prompt_as_generate_reads_it(kind: str) -> None:
    """Also where text would give one token for the end of the one and the begin of the other."""
    tokenizer = with_template(kind, None)
    for prompt, completion in (("Nothing is", " lost"), ("Nothing is ", "lost"), ("Nothing is lo", "st")):
        example = one(row(prompt=prompt, completion=completion), tokenizer, {tokenizer.eos_token_id})
        asked = prompt_ids(tokenizer, prompt)
        assert example.input_ids[: len(asked)] == asked
        assert learned(example) == [[*example.input_ids[len(asked) :], tokenizer.eos_token_id]]
        assert tokenizer.decode(example.input_ids[len(asked) :]).strip() == completion.strip()
    nothing = one(row(prompt="a", completion=""), tokenizer, {tokenizer.eos_token_id})
    assert learned(nothing) == [[tokenizer.eos_token_id]]


def test_long_rows_are_cut_and_those_without_an_answer_left_are_dropped() -> None:
    tokenizer = load_tokenizer("bytes")
    rows = [row(prompt="ab", completion="c" * 10), row(prompt="a" * 9, completion="b"), row(prompt="a", completion="b")]
    made = conversations.examples(rows, tokenizer, {256}, 8)
    assert (made.cut, made.dropped, [len(x.input_ids) for x in made.kept]) == (2, 1, [8, 2])
    assert learned(made.kept[0]) == [[ord("c")] * 7]
    assert learned(made.kept[1]) == [[ord("b"), 256]]


def test_the_gradient_is_the_same_in_any_micro_batches_and_weighs_every_target_alike() -> None:
    model = tiny_model("gpt2-nano")
    ids = torch.randint(3, 96, (5, 20), generator=torch.Generator().manual_seed(0)).tolist()
    batch = [
        CausalExample(x[:n], [IGNORED_LABEL] * 2 + x[3 : n + 1]) for x, n in zip(ids, (4, 19, 9, 5, 12), strict=True)
    ]

    def found(micro_batch: int) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        s = sft.SftSettings("SFT", 1, 1e-3, 8, 32, 1, micro_batch, 0)
        loss, _ = sft.gradient(model, batch, s)
        return loss, [p.grad.clone() for p in model.parameters()]

    whole, gradients = found(8)
    for size in (1, 2, 3):
        loss, other = found(size)
        assert loss == pytest.approx(whole, rel=1e-6)
        for ours, theirs in zip(other, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    nats = [  # of each row by itself, without padding
        torch.nn.functional.cross_entropy(
            model(input_ids=torch.tensor([x.input_ids])).logits[0], torch.tensor(x.labels), reduction="sum"
        ).item()
        for x in batch
    ]
    assert whole == pytest.approx(sum(nats) / (2 + 17 + 7 + 3 + 10), rel=1e-5)


# ------------------------------------------------------------------------------------------------ the command

ANSWERS = {"a": "Yes", "b": "No"}


@cache
def rows() -> Path:
    """Two questions, each with its answer, many times; every third row as prompt and completion."""
    path = scratch() / "rows.jsonl"
    lines = []
    for number in range(48):
        ask = "ab"[number % 2]
        chat = [{"role": "user", "content": ask}, {"role": "assistant", "content": ANSWERS[ask]}]
        plain = {"prompt": f"{ask} ", "completion": ANSWERS[ask]}
        lines.append(json.dumps(plain if number % 3 == 0 else {"messages": chat}))
    path.write_text("\n".join(lines) + "\n")
    return path


@cache
def tuned(model: str, *more: str) -> Path:
    """The folder of a finished fine-tuning."""
    out = scratch() / f"sft-{'-'.join([model, *more])}"
    own = [word for word in more if "=" in word]
    words = [word for word in more if "=" not in word]
    read = ("--data", rows(), "--val", rows())
    result = slope("finetune", trained(model, *own), "sft", *read, "--out", out, *QUICK, *words)
    assert result.code == 0, result.err
    return out


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize("model", ["gpt2-nano", slow("llama3-8b")])
def test_answers_are_learned_and_the_masks_are_those_of_the_run(model: str) -> None:
    out = tuned(model)
    result = json.loads((out / "result.json").read_text())
    assert result["rows"] == {name: {"rows": 48, "cut": 0, "dropped": 0} for name in ("train", "val")}
    assert result["before"]["loss"] > 2
    assert result["after"]["loss"] < 0.2
    run, saved = load_model(trained(model)).model, load_file(out / "model" / "model.safetensors")
    layers = dict(sparse_layers(run))
    assert len(layers) == result["sparse_layers"] >= 7
    for name, layer in layers.items():
        weight = saved[f"{name}.weight"].t() if layer.conv1d else saved[f"{name}.weight"]
        assert (bits(weight)[~layer.row_mask()] == 0).all()  # +0.0, not -0.0
        assert not torch.equal(weight, layer.weight)
    again = dict(sparse_layers(load_model(out / "model").model))
    assert all(torch.equal(again[name].row_mask_bits, layer.row_mask_bits) for name, layer in layers.items())
    assert all(layer.adapter is not None for layer in again.values())  # the run's own, which were trained too


def test_what_is_written_loads_everywhere() -> None:
    model = tuned("gpt2-nano") / "model"
    peft = pytest.importorskip("peft")
    ours, tokenizer = load_model(model).model, AutoTokenizer.from_pretrained(model)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), model / "adapter").eval()
    ids = torch.arange(64, 96)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "b"}], tokenize=False, add_generation_prompt=True
    )
    for prompt, answer in ((asked, "No"), ("a ", "Yes")):
        said = slope("generate", model, prompt, "--temperature", "0", "--json")
        assert json.loads(said.out) | {"tokens_per_second": 0} == {
            "prompt": prompt,
            "text": answer,
            "tokens": len(answer),
            "finish_reason": "stop",
            "tokens_per_second": 0,
        }


@pytest.mark.slow
def test_the_server_answers_chats(tmp_path: Path) -> None:
    with serving(tmp_path, model=tuned("gpt2-nano") / "model") as server:
        for ask, answer in ANSWERS.items():
            body = {"messages": [{"role": "user", "content": ask}], "temperature": 0}
            status, said = server.ask("/v1/chat/completions", body)
            assert (status, said["choices"][0]["message"]["content"]) == (200, answer)
            assert said["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "more",
    [
        (),
        slow(("method=dense",)),
        slow(("method=sr_ste",)),
    ],
    ids=["slope", "dense", "sr_ste"],
)
def test_lora_leaves_the_weights_alone(more: tuple[str, ...], tmp_path: Path) -> None:
    out = tuned("gpt2-nano", "--lora", "8", *more)
    result = json.loads((out / "result.json").read_text())
    assert result["after"]["loss"] < result["before"]["loss"] - 0.2  # embedding and head are frozen, too
    assert slope("export", trained("gpt2-nano", *more), tmp_path / "run").code == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", out / "model"))
    assert before.keys() == after.keys()
    assert all(torch.equal(bits(tensor), bits(after[name])) for name, tensor in before.items())
    assert (out / "model" / "adapter" / "adapter_model.safetensors").is_file()
    loaded = load_model(out / "model")
    made = sft._examples(conversations.read(rows()), loaded.tokenizer, loaded.model, 48, "val").kept
    s = sft.SftSettings("SFT", 1, 1e-3, 8, 48, 1, 8, 0)
    assert sft.measure(loaded.model, made, s)["loss"] == pytest.approx(result["after"]["loss"], rel=1e-5)


def test_an_export_is_fine_tuned_as_its_run(tmp_path: Path) -> None:
    run, export = trained("llama3-8b"), tmp_path / "export"
    assert slope("export", run, export).code == 0
    words = ("--data", rows(), "--epochs", "1", "--batch", "16", "--seq-len", "48", "--json")
    ours, theirs = (
        json.loads(slope("finetune", path, "SFT", *words, "--out", tmp_path / f"to-{path.name}").out)
        for path in (run, export)
    )
    assert [counted["rows"] for counted in ours["rows"].values()] == [2, 46]
    assert ours["before"]["loss"] == pytest.approx(theirs["before"]["loss"], rel=1e-5)
    assert ours["after"]["loss"] == pytest.approx(theirs["after"]["loss"], rel=1e-3)


def test_its_folder_is_a_model_with_its_name(tmp_path: Path) -> None:
    run, out = trained(), tmp_path / "small-chat"
    assert slope("finetune", run, "SFT", "--data", rows(), "--out", out, "--epochs", "1", "--seq-len", "48").code == 0
    assert (out / "model" / "README.md").read_text().count("\n# small-chat\n\n- Fine-tuned from: ") == 1
    for folder in (out, out / "model"):
        assert (load_model(folder).name, load_model(folder).folder) == ("small-chat", out / "model")
        assert shape_of(folder).vocab_size == 272
        packed = tmp_path / f"packed-{folder.name}"
        assert slope("export", folder, packed, "--format", "packed").code == 0
        assert "\n# small-chat\n" in (packed / "README.md").read_text()
        again = slope(
            "finetune",
            folder,
            "SFT",
            "--data",
            rows(),
            "--out",
            tmp_path / f"to-{folder.name}",
            "--epochs",
            "1",
            "--seq-len",
            "48",
            "--json",
        )
        assert json.loads(again.out)["run"] == "small-chat"
    one, other = (slope("generate", folder, "--chat", "a", "--temperature", "0") for folder in (out, out / "model"))
    assert one == other
    assert one.code == 0
    (out / "result.json").unlink()  # unfinished
    assert load_model(out / "model").name == "model"
    result = slope("generate", out, "a")
    assert (result.code, "is neither a run" in result.err) == (2, True)


def test_a_finished_one_is_returned_and_an_interrupted_one_starts_again(tmp_path: Path) -> None:
    words = ("--data", rows(), "--out", tmp_path / "out", "--epochs", "1", "--val", rows())
    first = slope("finetune", trained(), "SFT", *words)
    assert first.code == 0
    lines = first.out.splitlines()
    assert re.fullmatch(r"SFT after 1 epoch \(2 steps\) of 48 rows; 48 held-out rows, \d+ answer tokens:", lines[0])
    assert lines[-1] == f"  model: {tmp_path / 'out' / 'model'}"
    warnings = [line.partition(", fewer")[0] for line in first.err.splitlines() if line.startswith("warning: ")]
    assert warnings == ["warning: 2 steps in all", "warning: 48 held-out rows"]
    weights = tmp_path / "out" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns, weights.read_bytes()
    assert slope("finetune", trained(), "SFT", *words).out == first.out
    assert weights.stat().st_mtime_ns == written[0]
    other = slope("finetune", trained(), "SFT", *words, "--lora", "2")
    assert (other.code, "settings.lora: 0 -> 2" in other.err) == (2, True)
    (tmp_path / "out" / "result.json").unlink()
    (tmp_path / "out" / "model" / "README.md").unlink()
    assert slope("finetune", trained(), "SFT", *words).out == first.out
    assert weights.read_bytes() == written[1]


@pytest.mark.parametrize(
    ("trained_rows", "held_out", "few"),
    [
        (1569, 100, []),
        (1568, 100, ["49 steps in all"]),
        (1569, 99, ["99 held-out rows"]),
        (1, 1, ["1 step in all", "1 held-out row"]),
    ],
)
def test_too_few_steps_and_held_out_rows_are_warned_of(trained_rows: int, held_out: int, few: list[str]) -> None:
    found = sft._warnings(trained_rows, held_out, sft.SftSettings("SFT", 1, 1e-3, 32, 48, 1, 8, 0))
    assert [line.partition(", fewer")[0] for line in found] == few


# ------------------------------------------------------------------------------------------------ faults in one line

MESSAGE = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("{}", "has neither messages nor a prompt that is text"),
        ('{"prompt": "a"}', "has neither messages nor a completion that is text"),
        ('{"messages": []}', "messages must be a list of objects with role and content"),
        (json.dumps({"messages": [MESSAGE, {"role": "assistant", "content": None}]}), "message 2 must be an object"),
        (json.dumps({"messages": [MESSAGE]}), "no message has the role assistant, so there is nothing to learn"),
    ],
)
def test_a_bad_row_is_named_by_its_line(line: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n\n" + line + "\n")
    result = slope("finetune", trained(), "SFT", "--data", path, "--out", tmp_path / "out")
    assert result.code == 2
    assert result.err.startswith(f"error: {path}:3: {fault}")
    assert not (tmp_path / "out").exists()


def test_what_a_template_refuses_or_rewrites_is_named() -> None:
    def refused(template: str, messages: Sequence[Any]) -> str:
        tokenizer = with_template("built-in", template)
        with pytest.raises(UsageError) as error:
            conversations.examples([row(messages=messages)], tokenizer, {256}, 99)
        return str(error.value)

    tool = {"role": "tool", "content": "x"}
    assert "rows.jsonl:1: the chat template refuses the messages: no tool here" in refused(WITHOUT_ENDS, [tool, ANSWER])
    only_last = "{% for m in messages %}{{ m.content if loop.last else '…' }}{% endfor %}"
    assert "rows.jsonl:1: the chat template writes message 2 otherwise" in refused(
        only_last, [MESSAGE, ANSWER, MESSAGE]
    )


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ([], "SFT: give the rows with --data FILE"),
        (["--data", "nothing.jsonl"], "nothing.jsonl: cannot be read: No such file"),
        (["--val", "0.999"], "--val 0.999: must be a file, or a share of the 48 rows that leaves some"),
        (["--val", "nothing.jsonl"], "nothing.jsonl: cannot be read"),
        (["--seq-len", "65"], "--seq-len 65: the model has only 64 positions"),
        (["--seq-len", "8"], "no val row has a part of its answer in the first 8 tokens"),
        (["--lora", "64"], "--lora 64: must be at most 28: transformer.h.0."),
    ],
)
def test_wrong_words(words: list[str], fault: str, tmp_path: Path) -> None:
    chat = tmp_path / "long.jsonl"
    chat.write_text((json.dumps({"messages": [MESSAGE, ANSWER]}) + "\n") * 4)
    data = [] if not words or "--data" in words else ["--data", chat if words == ["--seq-len", "8"] else rows()]
    result = slope("finetune", trained(), "SFT", *data, *words, "--out", tmp_path / "out")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {fault}")


def test_models_that_are_not_for_it(tmp_path: Path) -> None:
    result = slope("finetune", trained("bert-base"), "SFT", "--data", rows(), "--out", tmp_path / "out")
    assert "contains a bert model; SFT is for models that predict the next token" in result.err
    for word in ("--lora", "--val", "--micro-batch"):
        result = slope("finetune", trained("bert-base"), "SST-2", word, "1")
        assert result.err == f"error: {word}: is for the task SFT\n"
    result = slope("finetune", trained(), "STF", "--data", rows())
    assert "did you mean" in result.err
    assert "SFT" in result.err
