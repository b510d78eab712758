"""Fast tokenizers: built-in bytes, from a folder, or from the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope_cli.data.batches import MaskingIds
from slope_cli.errors import SlopeError, UsageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"
CONNECT_SECONDS = 10


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerFast:
    """Load the built-in tokenizer `bytes`, or the one in a folder or on the Hugging Face Hub.

    A folder contains `tokenizer.json`, or GPT-2's `vocab.json` + `merges.txt`, or BERT's `vocab.txt` (uncased unless a
    `tokenizer_config.json` beside it says otherwise). UsageError if there is none, or it has no fast backend.
    """
    folder = Path(name_or_folder).expanduser()
    if name_or_folder == BYTES:
        return _byte_tokenizer()
    if folder.is_dir():
        tok = _from_folder(folder)
    elif folder.exists():
        raise UsageError(f"tokenizer {name_or_folder}: is a file; give the folder that contains it")
    elif name_or_folder.startswith((".", "/", "~")):
        raise UsageError(f"tokenizer {name_or_folder}: no such folder")
    else:
        tok = _from_hub(name_or_folder)
    if not tok.is_fast:
        raise UsageError(f"tokenizer {name_or_folder}: has no fast backend (no tokenizer.json); use another one")
    return tok


def separator_id(tok: PreTrainedTokenizerFast) -> int:
    """The id that ends a document: that of the end-of-text token, else of [SEP]; UsageError if there is neither."""
    for token_id in (tok.eos_token_id, tok.sep_token_id):
        if token_id is not None:
            return int(token_id)
    what = "has neither an end-of-text nor a separator token; set eos_token in its tokenizer_config.json"
    raise UsageError(f"the tokenizer {tok.name_or_path}".rstrip() + f": {what}")


def begin_id(tok: PreTrainedTokenizerFast) -> int | None:
    """The beginning-of-text id if the tokenizer itself puts it before a text, as Llama's do; else None."""
    begin = tok.bos_token_id
    return int(begin) if begin is not None and tok("").input_ids[:1] == [begin] else None


def vocabulary_size(tok: PreTrainedTokenizerFast) -> int:
    """The largest id of the tokenizer plus one, which exceeds the number of tokens if the vocabulary has holes."""
    return max(len(tok), *(int(token_id) + 1 for token_id in tok.get_vocab().values()))


def masking_ids(tok: PreTrainedTokenizerFast) -> MaskingIds:
    """The ids that BERT's objective needs; UsageError if the tokenizer lacks [CLS], [SEP], [MASK] or [PAD]."""
    ids = {"cls": tok.cls_token_id, "sep": tok.sep_token_id, "mask": tok.mask_token_id, "pad": tok.pad_token_id}
    missing = [name for name, token_id in ids.items() if token_id is None]
    if missing:
        raise UsageError(f"the masked objective needs a tokenizer with {', '.join(missing)} tokens, such as BERT's")
    return MaskingIds(**ids, vocab_size=vocabulary_size(tok), never_mask=tuple(sorted(tok.all_special_ids)))


def save_tokenizer(tok: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json` and its config into the folder.

    UsageError if the tokenizer has no fast backend, SlopeError if the files cannot be written.
    """
    # transformers would save how the tokenizer was loaded, which would change its hash on an offline node.
    for name in ("is_local", "local_files_only"):
        tok.init_kwargs.pop(name, None)
    try:
        tok.save_pretrained(folder)
    except Exception as error:  # the Rust half raises a bare Exception on a full disk
        raise SlopeError(f"{folder}: cannot save the tokenizer: {error}") from error
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"{folder}: this tokenizer writes no tokenizer.json; use one with a fast backend")
    for path in folder.iterdir():  # transformers does not sync them, and a manifest may be written next
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def byte_characters() -> list[str]:
    """The character that byte-level tokenizers use for each byte: itself if printable, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(byte_characters())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, BertTokenizerFast, GPT2TokenizerFast

    names = {path.name for path in folder.iterdir()}
    try:
        if "tokenizer.json" in names:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        if {"vocab.json", "merges.txt"} <= names:
            if END_OF_TEXT not in json.loads((folder / "vocab.json").read_text(encoding="utf-8")):
                raise UsageError(
                    f"tokenizer {folder}: vocab.json has no {END_OF_TEXT}; train it with that special token"
                )
            return GPT2TokenizerFast.from_pretrained(str(folder), eos_token=END_OF_TEXT)
        if "vocab.txt" in names:
            return BertTokenizerFast.from_pretrained(str(folder))
    except UsageError:
        raise
    except Exception as error:  # parser errors of transformers and tokenizers share no base class
        raise UsageError(f"tokenizer {folder}: cannot be read: {first_line(error)}") from error
    raise UsageError(f"tokenizer {folder}: contains no tokenizer.json, vocab.json + merges.txt, or vocab.txt")


def _from_hub(name: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        # Without a network transformers tries again for a minute or more, for each of its files.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=not hub_answers())
    except Exception as error:  # hub, HTTP and parser errors share no base class
        raise UsageError(
            f"tokenizer {name}: no such folder, and it could not be downloaded from the Hugging Face Hub "
            f"({first_line(error)}); give `bytes` or a local folder"
        ) from error


def hub_answers() -> bool:
    """Whether the Hugging Face Hub, or the mirror that $HF_ENDPOINT names, can be reached."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except Exception:  # HTTP, proxy, DNS and offline errors share no base class
        return False
    return True


def require_same_tokens(text: str, tok: PreTrainedTokenizerFast, model: str, other: PreTrainedTokenizerFast) -> None:
    """UsageError unless the tokenizers of a prepared text and a model give the same ids; text, model: their names."""
    if tok.get_vocab() != other.get_vocab() or _rules(tok) != _rules(other):
        raise UsageError(
            f"{text}: was prepared with another tokenizer than that of {model}; "
            f"prepare the text with it (slope data prepare --tokenizer FOLDER)"
        )


def _rules(tok: PreTrainedTokenizerFast) -> list[Any]:
    """The parts of a tokenizer that determine its ids; others may differ."""
    parts = json.loads(tok.backend_tokenizer.to_str())
    return [parts[key] for key in ("normalizer", "model")]
