"""One text that a tiny model learns, as bytes and as WordPiece, and another of random words."""

import atexit
import json
import random
import shutil
import string
import tempfile
from functools import cache
from pathlib import Path

from slope_cli.data.prepare import prepare

SENTENCES = (
    "It is a truth universally acknowledged that a small model knows little.",
    "The weights were sparse, and the wind was cold over the hills of the north.",
    'She said: "Nothing is lost, and nothing is won, until the last step is taken."',
)
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = [*string.ascii_lowercase, *'.,:"']
VOCABULARY = [*_SPECIAL, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
_WORDS = "the a cat dog saw took small green house river and then but never morning light with under walked slowly"


@cache
def scratch() -> Path:
    """A folder that goes when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="slope-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def texts() -> Path:
    """120 documents of SENTENCES as JSONL."""
    path = scratch() / "text.jsonl"
    path.write_text("".join(json.dumps({"text": SENTENCES[i % 3]}) + "\n" for i in range(120)))
    return path


@cache
def wordpiece() -> Path:
    """A tokenizer with BERT's special tokens and the letters."""
    folder = scratch() / "wordpiece"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


@cache
def prepared(kind: str = "bytes") -> Path:
    """`texts()` as tokens: "bytes" or "wordpiece"."""
    tokenizer = {"bytes": "bytes", "wordpiece": str(wordpiece())}[kind]
    out = scratch() / f"data-{kind}"
    prepare([f"text={texts()}"], out, tokenizer=tokenizer, val_fraction=0.2, workers=1, progress=False)
    return out


def write_data(folder: Path, seed: int = 0) -> Path:
    """12 KB of random words in 60 documents, as bytes, with a tenth for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, words, path = random.Random(seed), _WORDS.split(), folder / "text.jsonl"
    documents = (" ".join(rng.choices(words, k=40)) + "." for _ in range(60))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepare([f"text={path}"], folder / "data", val_fraction=0.1, workers=1, progress=False)
    return folder / "data"
