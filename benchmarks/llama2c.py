"""Llama models in the format of llama2.c, converted into a folder that transformers loads.

The model file (version 0) is seven int32, then float32 arrays without names, each kind for all layers at once. The
tokenizer file is one int32, the length of the longest piece, then for each id a float32 score, an int32 length and that
many bytes; ids 0 to 2 are unknown, beginning and end of text, and 3 to 258 are the single bytes.

Shape suffixes: L layers, O out features, I in features.
"""

import math
import os
import struct
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from slope_cli.data.tokenizer import save_tokenizer
from slope_cli.errors import SlopeError, UsageError
from slope_cli.models.build import build_model
from slope_cli.utils.files import atomic_folder

Float32 = NDArray[np.float32]

HEADER = struct.Struct("<7i")
PIECE = struct.Struct("<fi")
VERSIONED = int.from_bytes(b"24ka", "little")
"""The first four bytes of later versions of the format, where this one has the width."""
ROTARY_TABLES = "rotary tables"
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class Header(NamedTuple):
    """The first seven numbers of a model file; a negative vocab_size says that the head is not tied."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.vocab_size > 0

    @property
    def rows(self) -> int:
        """Ids in the vocabulary."""
        return abs(self.vocab_size)

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.dim // self.n_heads


class Piece(NamedTuple):
    """A token's text, and its score: pairs that make the piece of the highest score are merged first."""

    text: str
    score: float


def convert(model_file: Path, tokenizer_file: Path, out: Path) -> dict[str, Any]:
    """Write a llama2.c model and its tokenizer to the folder `out`, which appears when it is complete.

    LlamaForCausalLM and AutoTokenizer load the folder. The float32 logits are those of llama2.c, and so are the ids of
    a text, with `<s>` before it unless `add_special_tokens=False`; but `<unk>`, `<s>` and `</s>` in a text are special
    ids here and plain text there. `<s>` also ends a text: in llama2.c's training it stands between texts, its sampling
    stops there, and `</s>` never occurs.

    Returns:
        The folder, and the numbers of parameters, layers, ids in the vocabulary, and positions.

    Raises:
        UsageError: `out` is not empty; a file is missing, of another format or of a wrong length; or the vocabularies
            of the two files differ.
        SlopeError: the folder cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is not an empty folder; choose another")
    out = out.resolve()
    logging.disable_progress_bar()  # it would be full at once
    header = _read_header(model_file)
    tokenizer = read_tokenizer(tokenizer_file)
    if len(tokenizer) != header.rows:
        raise UsageError(
            f"{tokenizer_file}: has {len(tokenizer)} pieces, and {model_file} a vocabulary of {header.rows}; "
            "give the model's own tokenizer"
        )
    tokenizer.model_max_length = header.seq_len
    model = build_model(_config(header))
    model.load_state_dict(_read_weights(model_file, header))
    try:
        with atomic_folder(out) as folder:
            model.save_pretrained(folder)
            save_tokenizer(tokenizer, folder)
    except SafetensorError as error:  # a full disk, for example
        raise SlopeError(f"{out}: cannot be written: {error}") from None
    return {
        "folder": str(out),
        "parameters": model.num_parameters(),
        "layers": header.n_layers,
        "vocabulary": header.rows,
        "positions": header.seq_len,
    }


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a llama2.c file, with llama2.c's ids for any text; its special tokens are SPECIAL.

    Pieces keep their spaces. With the usual ▁ instead, a ▁ in a text would become a space.

    Raises:
        UsageError: the file is missing, of another format or incomplete.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    unknown, begin, end = SPECIAL
    pieces = _read_pieces(path)
    vocabulary = {piece.text: token_id for token_id, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(pieces), unk_token=unknown, byte_fallback=True))
    core.normalizer = normalizers.Prepend(" ")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, vocabulary[begin])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=unknown,
        bos_token=begin,
        eos_token=begin,  # see `convert`
        extra_special_tokens=[end],
        clean_up_tokenization_spaces=False,
    )


def _read_header(path: Path) -> Header:
    """The header of a model file; UsageError if the file's length does not fit it."""
    try:
        with open(path, "rb") as file:
            start, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    if len(start) < HEADER.size:
        raise UsageError(f"{path}: not a llama2.c model: it is shorter than a header")
    header = Header._make(HEADER.unpack(start))
    if header.dim == VERSIONED:
        raise UsageError(f"{path}: a later version of llama2.c's format; export the model as version 0, float32")
    if min(*header._replace(vocab_size=header.rows)) < 1:
        raise UsageError(f"{path}: not a llama2.c model: its header holds {tuple(header)}")
    if header.dim % header.n_heads or header.head_dim % 2 or header.n_heads % header.n_kv_heads:
        sizes = f"width {header.dim}, {header.n_heads} heads and {header.n_kv_heads} key-value heads"
        raise UsageError(f"{path}: not a llama2.c model: {sizes} do not fit together")
    expected = HEADER.size + 4 * sum(math.prod(shape) for shape in _layout(header).values())
    if size != expected:
        raise UsageError(f"{path}: has {size} bytes, its header asks for {expected}; is it complete, and float32?")
    return header


def _layout(header: Header) -> dict[str, tuple[int, ...]]:
    """transformers' names and the shapes of a model file's arrays, in order; {} stands for each layer."""
    L, D, F, KV = header.n_layers, header.dim, header.hidden_dim, header.n_kv_heads * header.head_dim
    layout: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (header.rows, D),
        "model.layers.{}.input_layernorm.weight": (L, D),
        "model.layers.{}.self_attn.q_proj.weight": (L, D, D),
        "model.layers.{}.self_attn.k_proj.weight": (L, KV, D),
        "model.layers.{}.self_attn.v_proj.weight": (L, KV, D),
        "model.layers.{}.self_attn.o_proj.weight": (L, D, D),
        "model.layers.{}.post_attention_layernorm.weight": (L, D),
        "model.layers.{}.mlp.gate_proj.weight": (L, F, D),
        "model.layers.{}.mlp.down_proj.weight": (L, D, F),
        "model.layers.{}.mlp.up_proj.weight": (L, F, D),
        "model.norm.weight": (D,),
        ROTARY_TABLES: (2, header.seq_len, header.head_dim // 2),
    }
    return layout if header.tied else {**layout, "lm_head.weight": (header.rows, D)}


def _read_weights(path: Path, header: Header) -> dict[str, Tensor]:
    """The state dict of transformers' LlamaForCausalLM, float32."""
    numbers = np.memmap(path, dtype="<f4", mode="r", offset=HEADER.size)
    weights: dict[str, Tensor] = {}
    start = 0
    for name, shape in _layout(header).items():
        array = numbers[start : start + math.prod(shape)].reshape(shape)
        start += array.size
        if name == ROTARY_TABLES:  # for the base in `_config`; newer versions of llama2.c compute them
            continue
        if not np.isfinite(array).all():
            raise UsageError(f"{path}: damaged: some weights are not finite numbers")
        if "q_proj" in name or "k_proj" in name:
            array = _pairs_to_halves(array, header.head_dim)
        whole = torch.from_numpy(np.array(array, dtype=np.float32))
        weights |= {name.format(layer): part for layer, part in enumerate(whole)} if "{}" in name else {name: whole}
    if header.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _pairs_to_halves(array_LOI: Float32, head_dim: int) -> Float32:
    """Rows of queries or keys, reordered within each head.

    Rotary positions rotate features 2i and 2i + 1 together in llama2.c, i and i + head_dim / 2 in transformers.
    """
    layers, rows, columns = array_LOI.shape
    pairs = array_LOI.reshape(layers, rows // head_dim, head_dim // 2, 2, columns)
    return pairs.swapaxes(2, 3).reshape(layers, rows, columns)


def _config(header: Header) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=header.rows,
        hidden_size=header.dim,
        intermediate_size=header.hidden_dim,
        num_hidden_layers=header.n_layers,
        num_attention_heads=header.n_heads,
        num_key_value_heads=header.n_kv_heads,
        max_position_embeddings=header.seq_len,
        tie_word_embeddings=header.tied,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("<s>"),
    )


def _read_pieces(path: Path) -> list[Piece]:
    """The pieces of a tokenizer file by id, the first three under their usual names in transformers."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) < 4:
        raise UsageError(f"{path}: not a llama2.c tokenizer: it is shorter than a header")
    longest = int.from_bytes(content[:4], "little", signed=True)
    pieces: list[Piece] = []
    at = 4
    while at < len(content):
        piece, at = _read_piece(path, content, at, longest, number=len(pieces))
        pieces.append(piece)
    if [piece.text for piece in pieces[len(SPECIAL) : len(SPECIAL) + len(BYTES)]] != BYTES:
        raise UsageError(f"{path}: not a llama2.c tokenizer: ids 3 to 258 are not the single bytes, <0x00> to <0xFF>")
    pieces[: len(SPECIAL)] = [Piece(name, 0.0) for name in SPECIAL]
    if twice := [text for text, count in Counter(piece.text for piece in pieces).items() if count > 1]:
        raise UsageError(f"{path}: has the piece {twice[0]!r} more than once; every piece must have one id")
    return pieces


def _read_piece(path: Path, content: bytes, at: int, longest: int, *, number: int) -> tuple[Piece, int]:
    """The piece at a byte of the file, and the first byte of the next one."""
    start = at + PIECE.size
    score, length = PIECE.unpack(content[at:start]) if start <= len(content) else (0.0, 0)
    if not 0 <= length <= longest or not math.isfinite(score):
        raise UsageError(f"{path}: not a llama2.c tokenizer: piece {number} has length {length} and score {score}")
    if start + length > len(content):
        raise UsageError(f"{path}: incomplete: it ends within piece {number}")
    try:
        return Piece(content[start : start + length].decode(), score), start + length
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a llama2.c tokenizer: piece {number} is not UTF-8") from None


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, by falling score of that piece, by which alone llama2.c merges.

    Scores from training are all different, and none is above those of a piece's parts: then the order of pairs that
    make the same piece does not matter.
    """
    texts = {piece.text for piece in pieces[len(SPECIAL) :]}
    merges: list[tuple[str, str]] = []
    for text, _ in sorted(pieces[len(SPECIAL) :], key=lambda piece: -piece.score):
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        merges += [(left, right) for left, right in pairs if left in texts and right in texts]
    return merges
