"""llama2.c models: logits against a forward pass in numpy, ids against its greedy merging, and wrong files."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.processes import full_disk
from transformers import AutoTokenizer, LlamaForCausalLM

from slope_cli.benchmarks.llama2c import Header, convert, read_tokenizer
from slope_cli.checkpoint.load import load_model
from slope_cli.data.prepare import prepare
from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.errors import SlopeError, UsageError
from slope_cli.inference.engine import Engine
from slope_cli.inference.sampling import Sampling

Array = NDArray[np.float32]

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [" t", "he", " the", "aa", "in", "ing", " s", "aaa", "  ", "    ", "世界", ", ", " the ", "ba", "aba", "ababa"]
LETTERS = [*" abcdehginst,.\n<>s", "世", "界", "é", "🙂"]
TEXTS = [
    "the thing",
    "  the  things,  sing ",
    "aaaaaaaabaababa ababa",
    "\n\tthe\r\n",
    "世界 é e\u0301 🙂🙃 ﷽ ▁the",
    "<0x41> <unk",
    " ",
    "",
]
SIZES = (16, 24, 3, 4, 2)
"""Width, feed-forward, layers, heads, key-value heads."""


def pieces(words: list[str]) -> list[tuple[str, float]]:
    """A vocabulary in llama2.c's order: specials, bytes, merged pieces by falling score, then the letters."""
    letters = list(dict.fromkeys(LETTERS))
    special = ["<unk>", "\n<s>\n", "\n</s>\n", *BYTE_PIECES]
    return [(text, 0.0) for text in special] + [(text, -float(at)) for at, text in enumerate([*words, *letters])]


def tokenizer_bytes(vocabulary: list[tuple[str, float]]) -> bytes:
    encoded = [(text.encode(), score) for text, score in vocabulary]
    parts = [struct.pack("<fi", score, len(text)) + text for text, score in encoded]
    return struct.pack("<i", max(len(text) for text, _ in encoded)) + b"".join(parts)


def arrays(vocab_size: int, seq_len: int, *, tied: bool) -> dict[str, Array]:
    """Random weights in the order of the file, under the names of run.c."""
    D, F, L, heads, kv_heads = SIZES
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Array:
        return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    def norm(*shape: int) -> Array:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)

    KV = D // heads * kv_heads
    weights = {"embedding": draw(vocab_size, D), "rms_att": norm(L, D)}
    weights |= {"wq": draw(L, D, D), "wk": draw(L, KV, D), "wv": draw(L, KV, D), "wo": draw(L, D, D)}
    weights |= {"rms_ffn": norm(L, D), "w1": draw(L, F, D), "w2": draw(L, D, F), "w3": draw(L, F, D)}
    weights |= {"rms_final": norm(D), "rotary": np.zeros((2, seq_len, D // heads // 2), np.float32)}
    return weights if tied else weights | {"classifier": draw(vocab_size, D)}


def model_bytes(weights: dict[str, Array], seq_len: int) -> bytes:
    rows = len(weights["embedding"]) * (-1 if "classifier" in weights else 1)
    return struct.pack("<7i", *SIZES, rows, seq_len) + b"".join(array.tobytes() for array in weights.values())


def write(folder: Path, *, tied: bool = True, seq_len: int = 32) -> tuple[Path, Path, dict[str, Array]]:
    vocabulary = pieces(WORDS)
    weights = arrays(len(vocabulary), seq_len, tied=tied)
    model, tokenizer = folder / "model.bin", folder / "tok.bin"
    model.write_bytes(model_bytes(weights, seq_len))
    tokenizer.write_bytes(tokenizer_bytes(vocabulary))
    return model, tokenizer, weights


def rms_norm(x_TD: Array, weight_D: Array) -> Array:
    return weight_D * x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + 1e-5)


def rotate(x_THK: Array) -> Array:
    """Features 2i and 2i + 1 of each head as a complex number, turned by position * 10000^(-2i / head)."""
    T, _, K = x_THK.shape
    angles = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, K, 2) / K)
    turned = (x_THK[..., 0::2] + 1j * x_THK[..., 1::2]) * np.exp(1j * angles)[:, None, :]
    return np.stack([turned.real, turned.imag], -1).reshape(x_THK.shape)


def attention(x_TD: Array, w: dict[str, Array], layer: int) -> Array:
    (T, D), (heads, kv_heads) = x_TD.shape, SIZES[3:]
    K = D // heads
    q, k, v = (
        (x_TD @ w[name][layer].T).reshape(T, -1, K).repeat(repeats, 1)
        for name, repeats in (("wq", 1), ("wk", heads // kv_heads), ("wv", heads // kv_heads))
    )
    scores_HTS = np.einsum("thk,shk->hts", rotate(q), rotate(k)) / np.sqrt(K)
    scores_HTS = np.where(np.tri(T, dtype=bool), scores_HTS, -np.inf)
    shares = np.exp(scores_HTS - scores_HTS.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("hts,shk->thk", shares, v).reshape(T, D) @ w["wo"][layer].T


def forward(w: dict[str, Array], ids: list[int]) -> Array:
    """What run.c computes, for all positions at once: logits (T, vocabulary)."""
    x_TD = w["embedding"][ids]
    for layer in range(SIZES[2]):
        x_TD = x_TD + attention(rms_norm(x_TD, w["rms_att"][layer]), w, layer)
        h_TD = rms_norm(x_TD, w["rms_ffn"][layer])
        gate = h_TD @ w["w1"][layer].T
        x_TD = x_TD + (gate / (1 + np.exp(-gate)) * (h_TD @ w["w3"][layer].T)) @ w["w2"][layer].T
    return rms_norm(x_TD, w["rms_final"]) @ w.get("classifier", w["embedding"]).T


def encode(vocabulary: list[tuple[str, float]], text: str) -> list[int]:
    """What run.c does: a space first, letters or else their bytes, then the best merge, the leftmost, over and over."""
    ids = {piece: at for at, (piece, _) in enumerate(vocabulary)}
    tokens: list[int] = []
    for letter in f" {text}" if text else "":
        tokens += [ids[letter]] if letter in ids else [byte + 3 for byte in letter.encode()]
    while True:
        best, where = -1e10, -1
        for at in range(len(tokens) - 1):
            made = ids.get(vocabulary[tokens[at]][0] + vocabulary[tokens[at + 1]][0])
            if made is not None and vocabulary[made][1] > best:
                best, where = vocabulary[made][1], at
        if where < 0:
            return tokens
        tokens[where : where + 2] = [ids[vocabulary[tokens[where]][0] + vocabulary[tokens[where + 1]][0]]]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama2c")
    model, tokenizer, _ = write(folder)
    convert(model, tokenizer, folder / "out")
    return folder / "out"


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_llama2c(tmp_path: Path, tied: bool) -> None:
    model_file, tokenizer_file, weights = write(tmp_path, tied=tied)
    before = torch.get_rng_state()
    report = convert(model_file, tokenizer_file, tmp_path / "out")
    assert torch.equal(before, torch.get_rng_state())
    model, loading = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    numbers = sum(array.size for name, array in weights.items() if name != "rotary")
    rows = len(weights["embedding"])
    assert report == {
        "folder": str(tmp_path / "out"),
        "parameters": numbers,
        "layers": 3,
        "vocabulary": rows,
        "positions": 32,
    }
    ids = np.random.default_rng(1).integers(0, rows, 32).tolist()
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    expected_TV = forward(weights, ids)
    assert np.abs(expected_TV).max() > 1
    np.testing.assert_allclose(logits_TV, expected_TV, atol=1e-4)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_config_and_special_ids(converted: Path) -> None:
    config = LlamaForCausalLM.from_pretrained(converted).config
    assert (config.bos_token_id, config.eos_token_id, config.max_position_embeddings) == (1, 1, 32)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 4)
    tok = AutoTokenizer.from_pretrained(converted)
    assert (tok.bos_token_id, tok.eos_token_id, tok.unk_token_id, tok.model_max_length) == (1, 1, 0, 32)
    assert tok("").input_ids == [1]
    assert tok("the </s>", add_special_tokens=False).input_ids[-1] == 2
    assert load_model(converted).objective == "causal"


def test_generation_begins_and_ends_as_in_llama2c(converted: Path) -> None:
    """run.c puts <s> before the prompt and stops at the next one, which is how these models' texts are told apart."""
    model, tokenizer = load_model(converted)[1:3]
    ids, shown = [1, *encode(pieces(WORDS), "the")], []
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:
            break
        shown.append(ids[-1])
    assert shown
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    first, second = Engine(model, tokenizer).generate(["the", ""], Sampling(tokens=12, temperature=0))
    assert "the" + first.text == expected
    assert second.ids


def test_documents_are_separated_as_the_model_was_trained(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "the thing"}\n{"text": "sing"}\n')
    dataset = prepare(
        [str(tmp_path / "x.jsonl")], tmp_path / "out", tokenizer=str(converted), val_fraction=0, workers=1
    )
    parts = [encode(pieces(WORDS), text) for text in ("the thing", "sing")]
    assert dataset.train[0].tokens.tolist() == [*parts[0], 1, *parts[1], 1]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_llama2c(converted: Path, text: str) -> None:
    expected = encode(pieces(WORDS), text)
    for tok in (AutoTokenizer.from_pretrained(converted), load_tokenizer(str(converted))):
        ids = tok(text).input_ids
        assert ids == [1, *expected]
        assert tok.decode(ids, skip_special_tokens=True) == text


@pytest.fixture(scope="module")
def core(converted: Path) -> Any:
    """The tokenizer without its special tokens, which llama2.c does not look for in a text."""
    backend = load_tokenizer(str(converted)).backend_tokenizer
    backend.encode_special_tokens = True
    return backend


@given(text=st.text(st.sampled_from(LETTERS) | st.characters(codec="utf-8", exclude_characters="\0")))
def test_ids_of_any_text(core: Any, text: str) -> None:
    ids = core.encode(text, add_special_tokens=False).ids
    assert ids == encode(pieces(WORDS), text)
    assert core.decode(ids) == text


@st.composite
def merged_words(draw: st.DrawFn) -> list[str]:
    """Pieces in the order in which training would find them: each made of two earlier ones."""
    words = ["a", "b"]
    for _ in range(draw(st.integers(1, 12))):
        word = draw(st.sampled_from(words)) + draw(st.sampled_from(words))
        if word not in words and len(word) <= 8:
            words.append(word)
    return words[2:]


@settings(deadline=None)
@given(words=merged_words(), text=st.text("ab", max_size=24))
def test_ids_with_any_pieces(tmp_path_factory: pytest.TempPathFactory, words: list[str], text: str) -> None:
    vocabulary = pieces(words)
    file = tmp_path_factory.getbasetemp() / "tok.bin"
    file.write_bytes(tokenizer_bytes(vocabulary))
    assert read_tokenizer(file)(text, add_special_tokens=False).input_ids == encode(vocabulary, text)


def test_only_an_empty_folder_is_written_to(tmp_path: Path) -> None:
    model, tokenizer, _ = write(tmp_path)
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="is not an empty folder"):
            convert(model, tokenizer, out)
    (tmp_path / "out").mkdir()
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "old").touch()  # as a killed conversion leaves it
    convert(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / ".tmp-out").exists()
    assert not (tmp_path / "out" / "old").exists()


def header_with(**changes: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        header = Header._make(struct.unpack("<7i", content[:28]))._replace(**changes)
        return struct.pack("<7i", *header) + content[28:]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-4], "its header asks for"),
        (lambda content: content + b"\0", "its header asks for"),
        (lambda content: content[:20], "shorter than a header"),
        (lambda content: b"", "shorter than a header"),
        (lambda content: content[:-4] + struct.pack("<f", np.nan), "not finite numbers"),
        (lambda content: b"24ka" + content[4:], "later version"),
        (header_with(n_layers=0), "its header holds"),
        (header_with(vocab_size=0), "its header holds"),
        (header_with(seq_len=-1), "its header holds"),
        (header_with(n_heads=3), "do not fit together"),
        (header_with(n_heads=16), "do not fit together"),
        (header_with(n_kv_heads=3), "do not fit together"),
        (header_with(hidden_dim=2**31 - 1), "its header asks for"),
    ],
)
def test_wrong_models(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    model, tokenizer, _ = write(tmp_path, tied=False)
    model.write_bytes(change(model.read_bytes()))
    expect_one_line(model, tokenizer, model, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "ends within piece"),
        (lambda content: content[:-8], "ends within piece"),
        (lambda content: content + b"\0\0", "ends within piece"),
        (lambda content: b"", "shorter than a header"),
        (lambda content: b"some text", "ends within piece 0"),
        (lambda content: struct.pack("<i", 3) + content[4:], "piece 0 has length 5"),
        (lambda content: content.replace(b"<0x07>", b"<0x70>"), "ids 3 to 258"),
        (lambda content: content.replace("世界".encode(), b"\xff" * 6), "not UTF-8"),
        (lambda content: content.replace(b"aba", b"aaa", 1), "'aaa' more than once"),
        (lambda content: content + struct.pack("<fi", -99.0, 1) + b"!", "and {model} a vocabulary of"),
        (lambda content: content + struct.pack("<fi", np.nan, 1) + b"!", "score nan"),
    ],
)
def test_wrong_tokenizers(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    model, tokenizer, _ = write(tmp_path)
    tokenizer.write_bytes(change(tokenizer.read_bytes()))
    expect_one_line(model, tokenizer, tokenizer, message.format(model=model))


def test_missing_files(tmp_path: Path) -> None:
    model, tokenizer, _ = write(tmp_path)
    expect_one_line(tmp_path / "none.bin", tokenizer, tmp_path / "none.bin", "No such file")
    expect_one_line(model, tmp_path / "none.bin", tmp_path / "none.bin", "No such file")


def expect_one_line(model: Path, tokenizer: Path, named: Path, message: str) -> None:
    """The error is one line that names the file, and nothing is written."""
    with pytest.raises(UsageError) as caught:
        convert(model, tokenizer, named.parent / "out")
    line = str(caught.value)
    assert line.startswith(f"{named}: ")
    assert message in line
    assert "\n" not in line
    assert not list(named.parent.glob("*out*"))


@pytest.mark.parametrize("size", [1000, 25_000])
def test_full_disk_leaves_nothing(tmp_path: Path, size: int) -> None:
    model, tokenizer, _ = write(tmp_path)
    with full_disk(size), pytest.raises(SlopeError, match="cannot") as caught:
        convert(model, tokenizer, tmp_path / "out")
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.glob("*out*"))
