"""Text from a run: repeatable, greedy without temperature, within the positions, with adapters if it has them."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import copied, slope, trained
from support.servers import greedy, loaded_model, served_model
from torch.utils._python_dispatch import TorchDispatchMode

from slope_cli.checkpoint.load import load_model
from slope_cli.data.tokenizer import load_tokenizer, save_tokenizer
from slope_cli.inference.engine import Engine
from slope_cli.inference.generate import generate
from slope_cli.inference.sampling import Sampling
from slope_cli.train.sample import sample_text
from sparse_kernels import sparse_layers

POSITIONS = 64
GREEDY = Sampling(tokens=5, temperature=0)


def generated(*words: str, run: Path | None = None) -> str:
    result = slope("generate", run or trained(), *words)
    assert (result.code, result.err) == (0, ""), result
    return result.out


def test_the_seed_decides() -> None:
    first = generated("The ", "--seed", "1", "--tokens", "40", "--temperature", "2")
    assert first.startswith("The ")
    assert generated("The ", "--seed", "1", "--tokens", "40", "--temperature", "2") == first
    assert generated("The ", "--seed", "2", "--tokens", "40", "--temperature", "2") != first


@pytest.mark.parametrize("model", ["gpt2-nano", "opt-125m", "llama3-8b"])
def test_without_temperature_the_likeliest_token_each_time(model: str) -> None:
    _, net, tokenizer, *_ = load_model(trained(model))
    ids = tokenizer("The wind ", return_tensors="pt").input_ids
    for _ in range(8):
        with torch.no_grad():
            best = net(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], dim=1)
        if best.item() == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    for seed in ("0", "7"):
        words = ("The wind ", "--temperature", "0", "--tokens", "8", "--seed", seed)
        assert generated(*words, run=trained(model)) == expected + "\n"


def test_one_likely_token_is_greedy_too() -> None:
    greedy = generated("The ", "--temperature", "0", "--tokens", "20")
    assert generated("The ", "--top-k", "1", "--tokens", "20") == greedy


def test_it_stops_at_the_end_of_text_of_the_tokenizer_used() -> None:
    """OPT's shape says that id 2 ends a text, in bytes an unprintable character; the run's tokenizer says 256."""
    _, net, tokenizer, *_ = load_model(trained("opt-125m"))
    assert net.generation_config.eos_token_id == net.config.eos_token_id == tokenizer.eos_token_id == 256
    for end, expected in [(256, "The "), (2, "The " + "\x02" * 5)]:
        with torch.no_grad():
            net.get_input_embeddings().weight.zero_()
            net.model.decoder.final_layer_norm.weight.zero_()
            net.model.decoder.final_layer_norm.bias.fill_(1.0)
            net.lm_head.weight[end] = 1.0
        assert sample_text(net, tokenizer, "The ", GREEDY, torch.float32) == expected
        assert "The " + Engine(net, tokenizer).generate(["The "], GREEDY)[0].text == expected


def test_adapters_take_part() -> None:
    _, net, tokenizer, *_ = load_model(trained())
    with_adapters = Engine(net, tokenizer).generate(["The "], GREEDY)[0].text
    assert generated("The ", "--temperature", "0", "--tokens", "5") == f"The {with_adapters}\n"
    ids = tokenizer("The ", return_tensors="pt").input_ids
    before = net(input_ids=ids).logits
    for _, layer in sparse_layers(net):
        assert layer.adapter is not None
        layer.adapter = None
    assert not torch.allclose(before, net(input_ids=ids).logits, atol=1e-3)


def test_a_run_that_stopped_before_its_adapters(tmp_path: Path) -> None:
    """Of the checkpoints at 2, 4 and 6, the last two are kept; without the last, none has adapters (they join at 4)."""
    whole = trained("gpt2-nano", "log.save_every=2", "adapters.start=0.67")
    run = copied(whole, tmp_path)
    newest = sorted(run.glob("checkpoints/step-*"))[-1]
    newest.rename(tmp_path / "aside")
    _, net, _, _, manifest, phase = load_model(run)
    assert manifest is not None
    assert phase is not None
    assert (manifest["step"], phase.adapters) == (4, False)
    assert all(layer.adapter is None for _, layer in sparse_layers(net))
    assert generated("The ", run=run).startswith("The ")
    assert generated("The ", run=whole).startswith("The ")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: is empty; give some text to continue"),
        ("x" * POSITIONS, "prompt: has 64 tokens and the model only 64 positions; shorten it"),
        ("x" * 1000, "prompt: has 1000 tokens and the model only 64 positions; shorten it"),
    ],
)
def test_a_prompt_that_cannot_be_continued(prompt: str, message: str) -> None:
    assert slope("generate", trained(), prompt) == (2, "", f"error: {message}\n")


def test_a_masked_model_does_not_continue_text() -> None:
    message = "error: BertForPreTraining: predicts masked tokens and cannot continue text; use a causal model\n"
    assert slope("generate", trained("bert-base"), "the") == (2, "", message)


def test_a_model_of_another_family(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=32)).save_pretrained(tmp_path)
    save_tokenizer(load_tokenizer("bytes"), tmp_path)
    result = slope("generate", tmp_path, "The ")
    message = "model type 'gpt_neox': text is generated by gpt2, opt, llama, mistral only; use one of these"
    assert (result.code, result.err) == (2, f"error: {message}\n")


# ------------------------------------------------------------------------------------------------ many prompts, forms


def test_a_file_of_prompts(tmp_path: Path) -> None:
    prompts = [f"The {word} " for word in ("sea", "wind", "rain", "house", "long road")] * 4
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\n".join(prompts[:3]) + "\r\n\n" + "\n".join(prompts[3:]) + "\n")
    lines.write_text("".join(json.dumps({"prompt": prompt, "id": 7}) + "\n" for prompt in prompts))
    words = ("--tokens", "6", "--seed", "3", "--top-p", "0.9")
    alone = {prompt: generated(prompt, *words) for prompt in prompts[:5]}
    assert generated("--batch", str(text), *words) == "".join(alone[prompt] for prompt in prompts)
    results = [json.loads(line) for line in generated("--batch", str(lines), "--json", *words).splitlines()]
    assert [result["prompt"] for result in results] == prompts
    for result in results:
        assert list(result) == ["prompt", "text", "tokens", "finish_reason", "tokens_per_second"]
        assert result["prompt"] + result["text"] + "\n" == alone[result["prompt"]]
        assert result["finish_reason"] == "length" if result["tokens"] == 6 else "stop"
        assert result["tokens_per_second"] > 0


def test_it_ends_before_a_stop_string() -> None:
    whole = generated("The ", "--temperature", "0", "--tokens", "20")
    stop = whole.removeprefix("The ")[2:4]
    result = json.loads(generated("The ", "--temperature", "0", "--tokens", "20", "--stop", stop, "--json"))
    assert result["text"] == whole.removeprefix("The ").partition(stop)[0]
    assert result["finish_reason"] == "stop"


def test_a_terminal_shows_the_text_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def flush(self) -> None:
            shown.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    how: dict[str, Any] = {"prompt": "The ", "file": None, "device": torch.device("cpu")}
    generate(trained(), **how, sampling=Sampling(tokens=20, temperature=0, top_k=50))
    expected = generated("The ", "--temperature", "0", "--tokens", "20")
    assert shown[0] == "The "
    assert expected.startswith(shown[-1])
    assert len(set(shown)) > 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"The \n" + b"x" * 70, "a.txt, line 2: has 70 tokens and the model only 64 positions; shorten it"),
        ("a.jsonl", b'{"prompt": "The "}\n\n{"prompt": ""}', "a.jsonl, line 3: is empty; give some text to continue"),
        ("a.jsonl", b'{"text": "The "}', 'a.jsonl, line 1: is not a JSON object with "prompt", a text'),
        ("a.jsonl", b"The ", 'a.jsonl, line 1: is not a JSON object with "prompt", a text'),
        ("a.txt", b"\xff", "a.txt: is not text in UTF-8"),
        ("none.txt", None, "none.txt: No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_used(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = slope("generate", trained(), "--batch", tmp_path / name)
    assert result.code == 2
    assert message in result.err
    assert result.out == ""


def test_a_file_without_prompts_and_words_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assert slope("generate", trained(), "--batch", tmp_path / "empty.txt") == (0, "", "")
    result = slope("generate", trained(), "The ", "--batch", tmp_path / "empty.txt")
    assert (result.code, "give either a prompt or --batch FILE" in result.err) == (2, True)
    result = slope("generate", trained(), "The ", "--temperature", "0", "--samples", "2")
    assert result == (2, "", "error: --samples 2: with --temperature 0 all texts are the same\n")


class Input(io.TextIOWrapper):
    """A standard input with this text."""

    def __init__(self, text: str, *, terminal: bool) -> None:
        super().__init__(io.BytesIO(text.encode()))
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_prompts_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Input("The sea \n\nThe wind \r\n", terminal=False))
    both = generated("--tokens", "6")
    assert both == "".join(generated(prompt, "--tokens", "6") for prompt in ("The sea ", "The wind "))
    monkeypatch.setattr(sys, "stdin", Input("\n", terminal=False))
    assert slope("generate", trained()).err.startswith("error: standard input: has no prompt; ")


def test_a_terminal_is_asked_until_its_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "x" * POSITIONS
    monkeypatch.setattr(sys, "stdin", Input(f"The sea \n\n{long}\nThe wind \n", terminal=True))
    result = slope("generate", trained(), "--tokens", "6", "--samples", "2")
    expected = [generated(prompt, "--tokens", "6", "--samples", "2") for prompt in ("The sea ", "The wind ")]
    assert (result.code, result.out) == (0, "".join(expected))
    assert result.err.count("> ") == 5
    assert "error: prompt: has 64 tokens and the model only 64 positions" in result.err


# --------------------------------------------------------------------------------------------------------------- chats

CHAT = ("--temperature", "0", "--tokens", "12")


def answer(*messages: tuple[str, str]) -> str:
    """The likeliest answer to a conversation."""
    said = [{"role": role, "content": content} for role, content in messages]
    ids = loaded_model().tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    return greedy(ids, 12)


def test_a_chat_on_a_terminal_goes_on_until_an_empty_line(monkeypatch: pytest.MonkeyPatch) -> None:
    first = answer(("system", "Be brief."), ("user", "Hello"))
    second = answer(("system", "Be brief."), ("user", "Hello"), ("assistant", first), ("user", "And now?"))
    assert second != answer(("system", "Be brief."), ("user", "And now?"))
    lines = f"Hello\n{'x' * 20_000}\nAnd now?\n\nHello\n"
    monkeypatch.setattr(sys, "stdin", Input(lines, terminal=True))
    result = slope("generate", served_model(chat=True), "--chat", "--system", "Be brief.", *CHAT)
    assert (result.code, result.out) == (0, f"{first}\n{second}\n{first}\n")
    assert result.err.startswith("An empty line begins a new conversation; Ctrl-D ends.\n> ")
    assert "only 20000 positions; shorten it; an empty line begins anew\n" in result.err
    assert result.err.count("(a new conversation)") == 1


def test_answers_are_streamed_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    sampling = Sampling(12, temperature=0)
    generate(served_model(chat=True), "Hello", None, sampling, torch.device("cpu"), chat=True)
    assert capsys.readouterr().out == answer(("user", "Hello")) + "\n"


def test_each_prompt_and_line_begins_a_chat_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    words, hello, other = (served_model(chat=True), *CHAT), answer(("user", "Hello")), answer(("user", "And now?"))
    assert slope("generate", *words, "--chat", "Hello") == (0, hello + "\n", "")
    monkeypatch.setattr(sys, "stdin", Input("Hello\nAnd now?\n", terminal=False))
    result = slope("generate", *words, "--chat", "--json")
    texts = [json.loads(line) for line in result.out.splitlines()]
    assert [(text["prompt"], text["text"]) for text in texts] == [("Hello", hello), ("And now?", other)]
    plain = slope("generate", *words, "Hello")
    assert plain == (0, f"Hello{greedy('Hello', 12)}\n", "note: this model has a chat template; --chat applies it\n")


def test_a_chat_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    result = slope("generate", trained(), "--chat", "Hello")
    message = "--chat: the tokenizer of this model has no chat template; leave out --chat"
    assert result == (2, "", f"error: {message}\n")
    assert slope("generate", trained(), "Hello", "--system", "x") == (2, "", "error: --system: is for --chat\n")
    monkeypatch.setattr(sys, "stdin", Input("", terminal=True))
    result = slope("generate", served_model(chat=True), "--chat", "--samples", "2")
    assert (result.code, "--samples 2: a conversation goes on after one answer" in result.err) == (2, True)


def test_samples_have_consecutive_seeds() -> None:
    three = generated("The ", "--tokens", "6", "--seed", "4", "--samples", "3")
    assert three == "".join(generated("The ", "--tokens", "6", "--seed", str(seed)) for seed in (4, 5, 6))


# ------------------------------------------------------------------------------------------------ samples in training


def test_a_sample_of_training_is_the_text_of_the_engine() -> None:
    for model in ("gpt2-nano", "opt-125m", "llama3-8b"):
        _, net, tokenizer, *_ = load_model(trained(model))
        for sampling in (GREEDY, Sampling(tokens=99, temperature=0.8, top_k=50, seed=3)):
            expected = "The " + Engine(net, tokenizer).generate(["The "], sampling)[0].text
            assert sample_text(net, tokenizer, "The ", sampling, torch.float32) == expected


class _Counted(TorchDispatchMode):
    """Counts the operations that make dense weights of kept values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "scatter" in str(operation) or "index_put" in str(operation)
        return operation(*args, **(kwargs or {}))


def test_dense_weights_are_made_once_for_a_sample_not_for_each_token() -> None:
    _, net, tokenizer, *_ = load_model(trained())
    counts = []
    for tokens in (4, 40):
        with _Counted() as counted:
            sample_text(net, tokenizer, "The ", Sampling(tokens, temperature=0), torch.float32)
        counts.append(counted.count)
    assert counts[0] == counts[1] > 0
    assert all(layer.dense_weight is None for _, layer in sparse_layers(net))


def test_a_sample_leaves_mode_and_random_state_and_has_the_precision_of_training() -> None:
    _, net, tokenizer, *_ = load_model(trained())
    dtypes: dict[str, torch.dtype] = {}
    _, layer = next(iter(sparse_layers(net)))
    layer.register_forward_hook(lambda _, inputs, output: dtypes.update({"layer": output.dtype}))
    before = torch.get_rng_state()
    for training, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        net.train(training)
        sample_text(net, tokenizer, "The ", Sampling(tokens=2), dtype)
        assert (net.training, dtypes["layer"]) == (training, dtype)
    assert torch.equal(torch.get_rng_state(), before)
