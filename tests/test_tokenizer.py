"""Tokenizers: the built-in bytes, the three kinds of folder, and what cannot be loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.marks import slow
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import slope_cli
from slope_cli.data.tokenizer import (
    END_OF_TEXT,
    byte_characters,
    load_tokenizer,
    masking_ids,
    save_tokenizer,
    separator_id,
    vocabulary_size,
)
from slope_cli.errors import UsageError

BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s"]


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer("bytes")


def gpt2_folder(folder: Path, *, end: str = END_OF_TEXT) -> Path:
    tokens = [*byte_characters(), "he", end]
    (folder / "vocab.json").write_text(json.dumps({token: at for at, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    return folder


def test_bytes_are_their_own_ids(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    assert byte_tokenizer("héllo\r\n").input_ids == list("héllo\r\n".encode())
    assert vocabulary_size(byte_tokenizer) == 257
    assert separator_id(byte_tokenizer) == byte_tokenizer.bos_token_id == 256
    assert byte_tokenizer(END_OF_TEXT).input_ids == [256]


@given(st.text())
def test_bytes_of_any_text_come_back(text: str) -> None:
    core = load_tokenizer("bytes").backend_tokenizer
    core.encode_special_tokens = True
    ids = core.encode(text, add_special_tokens=False).ids
    assert ids == list(text.encode())
    assert core.decode(ids) == text


def test_bytes_save_and_load(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(byte_tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (len(again), again.eos_token_id) == (257, 256)
    assert again.decode(again("naïve — ok").input_ids) == "naïve — ok"
    assert load_tokenizer(str(tmp_path))("é").input_ids == [195, 169]


def test_saved_files_do_not_tell_how_the_tokenizer_was_loaded(tmp_path: Path) -> None:
    """As with HF_HUB_OFFLINE, which would give one tokenizer two hashes."""
    source = tmp_path / "source"
    save_tokenizer(load_tokenizer("bytes"), source)
    saved = set()
    for name, offline in (("a", False), ("b", True)):
        save_tokenizer(AutoTokenizer.from_pretrained(str(source), local_files_only=offline), tmp_path / name)
        saved.add(tuple((path.name, path.read_bytes()) for path in sorted((tmp_path / name).iterdir())))
    assert len(saved) == 1


def test_gpt2_folder(tmp_path: Path) -> None:
    tok = load_tokenizer(str(gpt2_folder(tmp_path)))
    assert tok("he").input_ids == [256]
    assert (separator_id(tok), vocabulary_size(tok)) == (257, 258)


def test_bert_folder(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    tok = load_tokenizer(str(tmp_path))
    assert tok("Hello worlds", add_special_tokens=False).input_ids == [5, 6, 7]
    assert separator_id(tok) == 3
    ids = masking_ids(tok)
    assert (ids.cls, ids.sep, ids.mask, ids.pad, ids.vocab_size) == (2, 3, 4, 0, 8)
    assert ids.never_mask == (0, 1, 2, 3, 4)


def test_masked_objective_needs_its_tokens(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="cls, sep, mask, pad"):
        masking_ids(byte_tokenizer)


def test_no_separator() -> None:
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")))
    assert vocabulary_size(tok) == 8  # a hole in the vocabulary does not lower the largest id
    with pytest.raises(UsageError, match="eos_token"):
        separator_id(tok)


def test_folders_that_hold_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"contains no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UsageError, match="no such folder"):
        load_tokenizer("./nowhere")
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(UsageError, match="is a file"):
        load_tokenizer(str(file))
    with pytest.raises(UsageError, match="cannot be read"):
        load_tokenizer(str(tmp_path))


def test_gpt2_folder_without_end_of_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="endoftext"):
        load_tokenizer(str(gpt2_folder(tmp_path, end="</s>")))


@pytest.mark.parametrize("network", [slow({"HF_HUB_OFFLINE": "1"}), {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_hub_name_offline_is_one_clear_error_at_once(network: dict[str, str], tmp_path: Path) -> None:
    code = "from slope_cli.data.tokenizer import load_tokenizer; load_tokenizer('nobody/nothing')"
    env = os.environ | network | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(slope_cli.__file__).parents[1])}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=45)
    last = done.stderr.strip().splitlines()[-1]
    assert "UsageError: tokenizer nobody/nothing: no such folder, and it could not be downloaded" in last
    assert "give `bytes` or a local folder" in last


@pytest.mark.slow
def test_no_code_of_a_tokenizer_is_run_and_nobody_is_asked(tmp_path: Path) -> None:
    """A question at a terminal would hang a job; a folder of somebody else's may name a class of its own."""
    save_tokenizer(load_tokenizer("bytes"), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    custom = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | custom))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Evil: pass\n")
    code = f"""
from slope_cli.data.tokenizer import load_tokenizer
from slope_cli.errors import SlopeError
try:
    load_tokenizer({str(tmp_path)!r})
except SlopeError as error:
    print(error)
"""
    env = os.environ | {"PYTHONPATH": str(Path(slope_cli.__file__).parents[1]), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, input="y\ny\n", capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert len(done.stdout.splitlines()) <= 1
    assert not (tmp_path / "executed").exists()
