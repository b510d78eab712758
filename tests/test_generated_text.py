"""The text of new tokens: whole characters, ends at stop strings across tokens, pieces that add up to the text."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.inference.engine import Engine
from slope_cli.inference.sampling import Sampling
from slope_cli.inference.text import TextStream
from slope_cli.models.build import build_model, model_config

BYTES = load_tokenizer("bytes")
END = 256


def pieces(text: str | bytes, *stop: str, prompt: str = "Say ") -> tuple[list[str], TextStream]:
    """What each byte of a text brings, then its end."""
    stream = TextStream(BYTES, list(prompt.encode()), stop)
    found = []
    for byte in text.encode() if isinstance(text, str) else text:
        if not stream.stopped:
            found.append(stream.push(byte))
    found.append(stream.end())
    assert stream.text == "".join(found)
    return found, stream


def test_a_character_comes_when_its_last_byte_does() -> None:
    found, stream = pieces("aé€😀z", prompt="€")
    assert found == ["a", "", "é", "", "", "€", "", "", "", "😀", "z", ""]
    assert not stream.stopped


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    assert "".join(pieces(b"a\xffb\xe2\x82")[0]) == "a\ufffdb\ufffd"
    found, _ = pieces(b"\x80" * 5 + b"ok")
    assert found[5:] == ["\ufffd" * 5 + "o", "k", ""]


def test_what_may_begin_a_stop_string_waits() -> None:
    found, stream = pieces("so en ende\n\nmore", "end.", "\n\n")
    assert found == ["s", "o", " ", "", "", "en ", "", "", "", "end", "e", "", ""]
    assert stream.stopped
    found, stream = pieces("the en", "end")
    assert (stream.text, found[-1], stream.stopped) == ("the en", "en", False)


@given(st.text("ab€", max_size=12), st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    _, stream = pieces(text, *stops)
    # The first to be complete ends the text; of several, the one that begins first.
    complete = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    seen = text[: complete[0]] if complete else text
    assert stream.stopped == bool(complete)
    assert stream.text == seen[: min((seen.find(stop) for stop in stops if stop in seen), default=len(seen))]


def test_a_tokenizer_that_drops_the_first_space_keeps_that_of_a_continuation() -> None:
    core = Tokenizer(models.WordLevel({"▁the": 0, "▁sea": 1, "s": 2, "<s>": 3}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    stream = TextStream(tokenizer, [3, 0])
    assert [stream.push(token) for token in (1, 2, 3, 0)] == [" sea", "s", "", " the"]
    assert TextStream(tokenizer, [3]).push(1) == "sea"


# ------------------------------------------------------------------------------------------------------ by the engine


def speaking(*ids: int, prompt: int = 4) -> Any:
    """A GPT-2 that continues every prompt of so many tokens with these ids, over and over."""
    overrides = {"vocab_size": 272, "n_positions": 64, "n_layer": 1, "n_embd": 272, "n_head": 4}
    model = build_model(model_config("gpt2-nano", overrides=overrides, dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wte.weight.copy_(torch.eye(272))
        for place in range(prompt - 1, 64):  # a position's vector points to the next token
            model.transformer.wpe.weight[place, ids[(place - prompt + 1) % len(ids)]] = 100.0
    return model


def said(text: str, **settings: Any) -> Any:
    """How the prompt "Say " is continued by a model that says this text, with its end where it has a bar."""
    ids = [END if byte == ord("|") else byte for byte in text.encode()]
    engine = Engine(speaking(*ids), BYTES, max_batch=2)
    return engine.generate(["Say "], Sampling(temperature=0, **settings))[0]


def test_why_a_text_ends() -> None:
    found = said("no € here|", tokens=50)
    assert (found.text, found.finish_reason, len(found.ids)) == ("no € here", "stop", 11)
    found = said("no € here|", tokens=5)
    assert (found.text, found.finish_reason, len(found.ids)) == ("no \ufffd", "length", 5)
    found = said("one\ntwo\n\nthree|", tokens=50, stop=("\n\n", "four"))
    assert (found.text, found.finish_reason) == ("one\ntwo", "stop")
    found = said("on and ", tokens=99)
    assert (found.text, found.finish_reason, len(found.ids)) == (("on and " * 9)[:60], "length", 60)
    assert said("|", tokens=9).text == ""


def test_several_ends_that_a_model_names() -> None:
    model = speaking(*b"abc")
    model.generation_config.eos_token_id = [END, ord("c")]
    assert Engine(model, BYTES).generate(["Say "], Sampling(temperature=0))[0].text == "ab"
    model.generation_config.eos_token_id = ord("c")  # a shape's published one, which is not the tokenizer's
    assert len(Engine(model, BYTES).generate(["Say "], Sampling(tokens=9, temperature=0))[0].ids) == 9


def test_pieces_come_as_they_are_certain() -> None:
    engine = Engine(speaking(*"a€b.|".encode(), *[END]), BYTES, max_batch=2)
    texts = [engine.submit("Say ", Sampling(temperature=0, stop=stop)) for stop in ((), (".",), ("€x",))]
    found: dict[int, list[str]] = {}
    for text, piece in engine.stream():
        found.setdefault(texts.index(text), []).append(piece)
    shown = [[piece for piece in found[index] if piece] for index in range(3)]
    assert shown == [["a", "€", "b", ".", "|"], ["a", "€", "b"], ["a", "€b", ".", "|"]]
    assert [text.text for text in texts] == ["a€b.|", "a€b", "a€b.|"]
