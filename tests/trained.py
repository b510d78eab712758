"""Runs of tiny models, each made once in a session, and the command line in this process."""

import atexit
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from slope_cli import cli
from slope_cli.data.prepare import prepare

SENTENCES = (
    "It is a truth universally acknowledged that a small model knows little.",
    "The weights were sparse, and the wind was cold over the hills of the north.",
    'She said: "Nothing is lost, and nothing is won, until the last step is taken."',
)
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *'abcdefghijklmnopqrstuvwxyz.,:"')
VOCABULARY = [*WORDS, *(f"##{word}" for word in WORDS[5:])]

STEPS = 6
SMALL = (
    "adapters.rank=4",
    "adapters.start=0.5",
    "adapters.warmup=1",
    "train.seq_len=32",
    "train.micro_batch=2",
    "train.tokens_per_step=64",
    f"train.steps={STEPS}",
    "optim.lr=0.01",
    "optim.warmup=1",
    "log.tensorboard=false",
    "log.sample_tokens=4",
    "log.sample_prompt='The '",
    "log.sample_every=0",
    "log.save_every=0",
    "log.val_every=0",
    "log.val_tokens=128",
)
LLAMA_LIKE = (
    "hidden_size=32",
    "num_hidden_layers=2",
    "num_attention_heads=2",
    "vocab_size=272",
    "max_position_embeddings=64",
)
OVERRIDES: dict[str, Sequence[str]] = {
    "gpt2-nano": ("n_layer=2", "n_embd=32", "n_head=2", "n_positions=64"),
    "opt-125m": (*LLAMA_LIKE, "ffn_dim=64"),
    "llama3-8b": (*LLAMA_LIKE, "intermediate_size=64", "num_key_value_heads=1"),
    "bert-base": (*LLAMA_LIKE, "intermediate_size=64"),
}


class Result(NamedTuple):
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str


def slope(*words: str | Path) -> Result:
    """Run `slope WORDS…` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["slope", *map(str, words)])
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        finally:
            os.environ.pop("SLOPE_DEBUG", None)  # what --debug leaves
    return Result(code, out.getvalue(), err.getvalue())


@cache
def defaults() -> Path:
    """A recipe of these runs alone, so that they do not depend on one in the package."""
    recipe = scratch() / "defaults.yaml"
    recipe.write_text("slope: {mask_update_interval: 2}\n")
    return recipe


def small(model: str) -> list[str]:
    """The overrides that make a model and its run tiny."""
    return [f"model.name={model}", *(f"model.overrides.{word}" for word in OVERRIDES[model]), *SMALL]


@cache
def scratch() -> Path:
    """A folder that goes when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="slope-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def texts() -> Path:
    """A few KB of JSONL; beside it the folder `wordpiece`, a tokenizer with BERT's special tokens."""
    tokenizer, text = scratch() / "wordpiece", scratch() / "text.jsonl"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    text.write_text("".join(json.dumps({"text": SENTENCES[i % 3]}) + "\n" for i in range(120)))
    return text


def prepared(kind: str = "bytes") -> Path:
    """That text as tokens: "bytes" or "wordpiece"."""
    out, tokenizer = scratch() / f"data-{kind}", {"bytes": "bytes", "wordpiece": str(texts().parent / "wordpiece")}
    prepare([str(texts())], out, tokenizer=tokenizer[kind], val_fraction=0.2, workers=1, progress=False)
    return out


@cache
def trained(model: str = "gpt2-nano", *more: str) -> Path:
    """A finished run; adapters joined half-way unless `more` says otherwise. Copy it before you alter it."""
    run = scratch() / "-".join(["run", model, *more]).replace("/", "_")
    data = prepared("wordpiece" if model.startswith("bert") else "bytes")
    result = slope("pretrain", defaults(), *small(model), f"data.path={data}", *more, "--out", run)
    if result.code:
        raise RuntimeError(result.err)
    return run


def copied(run: Path, folder: Path) -> Path:
    """A copy of a run that may be altered."""
    return Path(shutil.copytree(run, folder / "copy"))
