"""Preparing data: every format, the split, restarts after any stop, and one clear line for each bad input."""

import bz2
import gzip
import json
import lzma
import math
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import wait_until
from tokenizers.processors import TemplateProcessing

import slope_cli
from slope_cli.data.dataset import Dataset, open_dataset, show
from slope_cli.data.prepare import is_held_out, prepare, prepare_shard
from slope_cli.data.sources import Chunking, HubInput, Input, cut, find_inputs, hub_texts, read_segments, source_name
from slope_cli.data.token_file import write_token_file
from slope_cli.data.tokenize import ChunkTokenizer, Target
from slope_cli.data.tokenizer import END_OF_TEXT, byte_characters, load_tokenizer, save_tokenizer
from slope_cli.errors import SlopeError, UsageError
from slope_cli.utils import files
from slope_cli.utils.files import held_folder, read_sealed

ROOT = str(Path(slope_cli.__file__).parents[1])
TEXTS = ["One é.\n", "Two\r\n\ttwo.", "Three 三 three 🦙", f"a {END_OF_TEXT} b"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :]),
}


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": at}) + "\n" for at, text in enumerate(texts)).encode()


def write_parquet(path: Path, columns: dict[str, list[object]]) -> None:
    pytest.importorskip("pyarrow")  # comes with `datasets`, which a machine that only trains may lack
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def prepared(inputs: list[Path | str | HubInput], out: Path, **options: object) -> Dataset:
    options = {"progress": False, "workers": 1} | options
    given: list[str | Input] = [str(item) if isinstance(item, Path) else item for item in inputs]
    return prepare(given, out, **options)  # type: ignore[arg-type]


def decoded(dataset: Dataset, split: str = "train") -> list[str]:
    """The documents of the first source, from bytes."""
    files = dataset.train if split == "train" else list(dataset.val.values())
    ids = files[0].tokens
    assert ids[-1] == 256
    ends = np.flatnonzero(ids == 256)
    return [bytes(part[part != 256].astype(np.uint8)).decode() for part in np.split(ids, ends[:-1] + 1)]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer in GPT-2's files: bytes, one merge, end of text."""
    folder = tmp_path_factory.mktemp("bpe")
    tokens = [*byte_characters(), "th", END_OF_TEXT]
    (folder / "vocab.json").write_text(json.dumps({token: at for at, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    return str(folder)


# ------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("packing", COMPRESS)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".txt"])
def test_every_format_in_every_compression(tmp_path: Path, ending: str, packing: str) -> None:
    if ending == ".parquet":
        write_parquet(tmp_path / "plain", {"text": list(TEXTS), "id": [0, 1, 2, 3]})
        content = (tmp_path / "plain").read_bytes()
    else:
        content = "".join(TEXTS).encode() if ending == ".txt" else lines(TEXTS)
    path = tmp_path / f"book{ending}{packing}"
    path.write_bytes(COMPRESS[packing](content))
    dataset = prepared([path], tmp_path / "out", val_fraction=0)
    assert decoded(dataset) == (["".join(TEXTS)] if ending == ".txt" else TEXTS)
    assert dataset.train[0].header.source == "book"
    assert dataset.train[0].header.text_bytes == len("".join(TEXTS).encode())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("austen.jsonl.xz", "austen"),
        ("part-00012-of-00100.parquet", "part"),
        ("train-00000-of-00002-a09b74b3ef9c3b56.parquet", "train"),
        ("c4_0003.json.gz", "c4"),
        ("wikitext2.txt", "wikitext2"),
        ("my notes.md", "my-notes"),
        ("README", "README"),
        ("00012.jsonl", "folder"),
    ],
)
def test_source_name(name: str, source: str) -> None:
    assert source_name(Path("folder") / name) == source


def test_a_folder_its_sources_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/part-1.txt").write_text("b")
    (folder / "part-0.txt").write_text("a")
    (folder / "part-1.txt").write_text("c")
    (folder / "other.jsonl").write_bytes(lines(["d"]))
    (folder / ".hidden").write_bytes(b"\0")
    (tmp_path / "x=y.txt").write_text("e")
    dataset = prepared([folder, f"named={tmp_path / 'x=y.txt'}"], tmp_path / "out", val_fraction=0)
    assert [file.header.source for file in dataset.train] == ["named", "other", "part"]
    assert bytes(dataset.train[2].tokens[::2].astype(np.uint8)) == b"bac"
    everything = prepared([f"all={folder}"], tmp_path / "out2", val_fraction=0).train
    assert [file.header.source for file in everything] == ["all"]
    assert bytes(everything[0].tokens[::2].astype(np.uint8)) == b"bdac"


def sources_of(folder: Path) -> set[str]:
    return {item.source for item in find_inputs([str(folder)])}


def test_a_folder_of_short_texts_can_be_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "my notes"
    folder.mkdir()
    for number in range(3):
        (folder / f"note {'abc'[number]}.txt").write_text(f"<{number}>")
    dataset = prepared([folder], tmp_path / "out", val_fraction=0.25)
    assert [file.header.source for file in dataset.train] == ["my-notes"]
    assert (decoded(dataset), decoded(dataset, "val")) == (["<0>", "<2>"], ["<1>"])
    assert {file.header.source for file in prepared([f"x={folder}"], tmp_path / "named").train} == {"x"}


def test_when_a_folder_is_one_source(tmp_path: Path) -> None:
    for number in range(16):
        (tmp_path / f"{'abcdefghijklmnop'[number]}.jsonl.xz").write_bytes(lzma.compress(lines(["x"])))
    assert sources_of(tmp_path) == set("abcdefghijklmnop")
    (tmp_path / "q.txt").write_text("x")
    assert sources_of(tmp_path) == {re.sub(r"[^\w.-]", "-", tmp_path.name)}
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.txt").write_text("a" * Chunking().short_segment)
    assert sources_of(few) == {"a"}
    (few / "b.md").write_text("b")
    assert sources_of(few) == {"few"}
    (few / "a.txt").write_text("a" * (Chunking().short_segment + 1))
    assert sources_of(few) == {"a", "b"}


def test_text_key_byte_order_mark_and_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"body": "\\ud83e\\udd99 \\ud800!"}\n\n{"body": null}\n{"body": ""}\n')
    assert decoded(prepared([path], tmp_path / "out", text_key="body")) == ["🦙 \N{REPLACEMENT CHARACTER}!"]


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.text("ab \n", max_size=40), max_size=12),
    size=st.integers(1, 30),
    before=st.integers(0, 50),
)
def test_cut_loses_nothing_and_keeps_the_limit(parts: list[str], size: int, before: int) -> None:
    text, chunking = "".join(parts), Chunking(short_segment=8, short_until=40, segment=16)
    segments = list(cut([text], before, chunking))
    assert segments == list(cut((text[at : at + size] for at in range(0, len(text), size)), before, chunking))
    assert "".join(segment for segment, _ in segments) == text
    assert [ends for _, ends in segments] == [False] * (len(segments) - 1) + [True] * bool(text)
    for segment, ends in segments:
        assert 0 < len(segment) <= (8 if before < 40 else 16)
        assert ends or "\n" not in segment or segment.endswith("\n")
        before += len(segment)


def test_segments_are_short_at_the_beginning_of_a_source(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("0123456789abcde\n" * 100_000)
    (item,) = find_inputs([f"s={tmp_path / 'x.txt'}"])
    for before in (0, 300_000):
        sizes = [len(segment.text) for segment in read_segments(item, "text", before)]
        short = ((1 << 20) - before) // (1 << 14) + (before > 0)
        assert sizes[:short] == [1 << 14] * short
        assert set(sizes[short:-1]) == {1 << 16}


def test_huggingface_data_set_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "hub/data").mkdir(parents=True)
    for split, texts in (("train", TEXTS), ("test", ["t"])):
        write_parquet(tmp_path / f"hub/data/{split}-00000-of-00001.parquet", {"text": list(texts)})
    item = HubInput("hub", str(tmp_path / "hub"), None, "train")
    assert list(hub_texts(item, "text")) == TEXTS
    with pytest.raises(UsageError, match="no key 'body': known are text"):
        list(hub_texts(item, "body"))
    with pytest.raises(UsageError, match="no such file or folder, and it could not be downloaded"):
        list(hub_texts(HubInput("hub", str(tmp_path / "hub"), None, "nosplit"), "text"))
    (tmp_path / "hub/data/train-00001-of-00002.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SlopeError, match=r"the download stopped after row 4 .* run the same command again"):
        list(hub_texts(item, "text"))
    (tmp_path / "hub/data/train-00001-of-00002.parquet").unlink()
    dataset = prepared([item], tmp_path / "out", val_fraction=0)
    assert decoded(dataset) == TEXTS
    assert dataset.made_from["inputs"] == [
        {"source": "hub", "dataset": str(tmp_path / "hub"), "config": None, "split": "train"}
    ]


# ------------------------------------------------------------------------------------------------ what is made


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.4, 0.45, 0.5])
def test_the_share_that_is_kept_for_validation(fraction: float) -> None:
    share = Fraction(str(fraction))
    kept = [is_held_out(at, share) for at in range(1000)]
    assert kept[:2] == [False, True]
    assert [math.ceil(share * max(0, n - 1)) for n in range(1000)] == [sum(kept[:n]) for n in range(1000)]
    assert not any(is_held_out(at, Fraction(0)) for at in range(100))


def test_the_share_of_a_small_source(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("0123456789abcde\n" * 25_000)  # 400 kB
    dataset = prepared([tmp_path / "x.txt"], tmp_path / "out", val_fraction=0.1)
    train, val = dataset.train[0].header.text_bytes, dataset.val["x"].header.text_bytes
    assert 0.08 < val / (train + val) < 0.13


def test_every_kth_document_is_kept_for_validation(tmp_path: Path) -> None:
    texts = [f"<{number}>" for number in range(10)]
    (tmp_path / "x.jsonl").write_bytes(lines(texts))
    dataset = prepared([tmp_path / "x.jsonl"], tmp_path / "out", val_fraction=0.25)
    assert decoded(dataset, "val") == ["<1>", "<5>", "<9>"]
    assert decoded(dataset) == [text for text in texts if text not in ("<1>", "<5>", "<9>")]
    assert dataset.train[0].header.documents == 7


def test_segments_of_a_long_document_stay_together(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("".join(f"{number}ab\n" for number in range(8)))
    dataset = prepared([tmp_path / "x.txt"], tmp_path / "out", val_fraction=0.2, chunking=Chunking(short_segment=4))
    # The texts before and after a segment that is taken out do not become one text.
    assert decoded(dataset) == ["0ab\n", "2ab\n3ab\n4ab\n5ab\n", "7ab\n"]
    assert decoded(dataset, "val") == ["1ab\n", "6ab\n"]


def test_one_segment_has_no_validation_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text("only")
    dataset = prepared([tmp_path / "x.txt"], tmp_path / "out", progress=True)
    assert "no validation text; only a source of two documents, or of one with more than" in capfd.readouterr().err
    assert dataset.val == {}
    header = dataset.train[0].header
    assert (header.source, header.documents, header.tokens, header.text_bytes) == ("x", 1, 5, 4)


def test_validation_text_that_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, texts in {"train": ["<0>", "<1>", "<2>"], "val": ["<a>", "<b>b\n<c>"]}.items():
        (tmp_path / split).mkdir()
        (tmp_path / split / "web-00000.jsonl.gz").write_bytes(gzip.compress(lines(texts)))
    (tmp_path / "val/code.txt").write_text("x = 1\n")
    given, val = str(tmp_path / "train"), [str(tmp_path / "val")]
    chunking = Chunking(short_segment=5)
    dataset = prepared([given], tmp_path / "out", val=val, chunking=chunking)
    assert decoded(dataset) == ["<0>", "<1>", "<2>"]
    assert sorted(dataset.val) == ["code", "web"]
    assert bytes(dataset.val["web"].tokens[:-1].astype(np.uint8)) == b"<a>\x00<b>b\n<c>"
    show(dataset)
    assert "| code | 0 | 0 | 0 | 7 | 6 |" in capsys.readouterr().out
    assert prepared([given], tmp_path / "out", val=val, chunking=chunking).fingerprint == dataset.fingerprint
    with pytest.raises(UsageError, match="made with other inputs"):
        prepared([given, *val], tmp_path / "out", val_fraction=0, chunking=chunking)
    with pytest.raises(UsageError, match="--val and --val-fraction: give one of them"):
        prepared([given], tmp_path / "out", val=val, val_fraction=0.1)
    with pytest.raises(UsageError, match=r"web-00000\.jsonl\.gz: given twice"):
        prepared([given], tmp_path / "new", val=[given])
    with pytest.raises(UsageError, match="some/data: no such file or folder"):
        prepared([given], tmp_path / "new", val=["some/data"])


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(), min_size=1, max_size=4))
def test_the_fast_way_to_bytes_gives_what_the_library_gives(bytes_folder: Path, texts: list[str]) -> None:
    fast, slow = (ChunkTokenizer(Target(bytes_folder, "bytes", byte_level, 257, 256)) for byte_level in (True, False))
    for text in (*texts, f"x{END_OF_TEXT}y"):
        assert fast.encode([text])[0].tolist() == slow.encode([text])[0].tolist() == list(text.encode())


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    save_tokenizer(load_tokenizer("bytes"), folder / "tokenizer")
    return folder


def test_special_tokens_in_the_text_are_text(tmp_path: Path, bpe_folder: str) -> None:
    (tmp_path / "x.txt").write_text(f"th{END_OF_TEXT}")
    dataset = prepared([tmp_path / "x.txt"], tmp_path / "out", tokenizer=bpe_folder)
    assert dataset.train[0].tokens.tolist() == [256, *END_OF_TEXT.encode(), 257]
    assert (dataset.vocab_size, dataset.separator_id) == (258, 257)
    assert dataset.tokenizer_name == Path(bpe_folder).name


def test_a_tokenizer_that_begins_texts_begins_documents(tmp_path: Path, bpe_folder: str) -> None:
    """As Llama's: what is generated after its first token is then what was trained on after it."""
    tok = load_tokenizer(bpe_folder)
    tok.add_special_tokens({"bos_token": "<s>"})
    begin = tok.convert_tokens_to_ids("<s>")
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    save_tokenizer(tok, tmp_path / "tok")
    (tmp_path / "x.jsonl").write_bytes(lines(["ab", "k"]))
    dataset = prepared([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=str(tmp_path / "tok"), val_fraction=0)
    assert dataset.train[0].tokens.tolist() == [*b"ab", 257, begin, *b"k", 257, begin]
    assert (dataset.separator_id, dataset.train[0].header.documents) == (257, 2)


def test_a_tokenizer_that_truncates_loses_nothing(tmp_path: Path, bpe_folder: str) -> None:
    tok = load_tokenizer(bpe_folder)
    tok.backend_tokenizer.enable_truncation(5)
    tok.backend_tokenizer.enable_padding(length=9)
    save_tokenizer(tok, tmp_path / "tok")
    (tmp_path / "x.jsonl").write_bytes(lines(["abcdefghij", "k"]))
    dataset = prepared([tmp_path / "x.jsonl"], tmp_path / "out", tokenizer=str(tmp_path / "tok"), val_fraction=0)
    assert dataset.train[0].tokens.tolist() == [*b"abcdefghij", 257, *b"k", 257]


def test_any_number_of_workers_makes_the_same_bytes(tmp_path: Path, bpe_folder: str) -> None:
    chunking = Chunking(chunk=500)
    (tmp_path / "x.jsonl").write_bytes(lines([f"the {number} " * (number % 40) for number in range(200)]))
    (tmp_path / "y.txt").write_text("other thoughts\n" * 50)
    inputs: list[Path | str | HubInput] = [tmp_path / "x.jsonl", tmp_path / "y.txt"]
    one = prepared(inputs, tmp_path / "one", tokenizer=bpe_folder, chunking=chunking)
    prepared(inputs, tmp_path / "two", tokenizer=bpe_folder, chunking=chunking, workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert {path.split("/")[0] for path in tree(tmp_path / "one")} == {"dataset.json", "tokenizer", "train", "val"}
    assert open_dataset(tmp_path / "two").fingerprint == one.fingerprint


def test_progress_is_lines_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text("text")
    prepared([tmp_path / "x.txt"], tmp_path / "out", progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "x: 0.0 of 0.0 MB read" in shown.err
    assert shown.err.splitlines()[-1].startswith("prepared: 5 tokens in")
    prepared([tmp_path / "x.txt"], tmp_path / "out", progress=True)
    assert "already prepared" in capfd.readouterr().err


@pytest.mark.parametrize(("large_input", "chunk", "train_parts"), [(1 << 30, 50, 20), (1000, 500, 2)])
def test_chunks_grow_with_the_input_and_leave_no_empty_parts(
    tmp_path: Path, large_input: int, chunk: int, train_parts: int
) -> None:
    chunking = Chunking(chunk=50, large_chunk=500, large_input=large_input)
    whole, broken = tmp_path / "x.jsonl", tmp_path / "broken/x.jsonl"
    whole.write_bytes(lines(["0123456789"] * 100))
    broken.parent.mkdir()
    broken.write_bytes(whole.read_bytes() + b"{")
    with pytest.raises(UsageError, match="not a JSON line"):  # so that the parts stay
        prepared([broken], tmp_path / "out", chunking=chunking)
    parts = {path.name for path in tmp_path.glob("out/.parts/*.tok")}
    assert parts == {"x-000000.val.tok", *(f"x-{number:06d}.train.tok" for number in range(train_parts))}
    dataset = prepared([whole], tmp_path / "whole", chunking=chunking)
    assert dataset.made_from["cut"] == [1 << 14, 1 << 20, 1 << 16, chunk]
    assert dataset.fingerprint == prepared([whole], tmp_path / "one").fingerprint


def test_parts_may_be_more_than_the_files_that_a_process_may_open(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines(["0123456789"] * 200))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
    try:
        dataset = prepared([tmp_path / "x.jsonl"], tmp_path / "out", val_fraction=0, chunking=Chunking(chunk=10))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert dataset.train_tokens == 200 * 11


def test_the_files_say_what_they_are_made_from(tmp_path: Path) -> None:
    """As version 0.1 wrote it: its data sets open, and its unfinished ones resume."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(["good", "fine"]) + b"{")
    with pytest.raises(UsageError, match="not a JSON line"):
        prepared([path], tmp_path / "out", chunking=Chunking(chunk=4))
    unfinished = read_sealed(tmp_path / "out/.parts/plan.json")
    path.write_bytes(lines(["good", "fine"]))
    prepared([path], tmp_path / "whole")
    finished = read_sealed(tmp_path / "whole/dataset.json")["plan"]
    expected = {
        "inputs": [
            {"source": "x", "path": str(path), "size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
        ],
        "tokenizer": "bytes",
        "tokenizer_sha256": finished["tokenizer_sha256"],
        "text_key": "text",
        "val_fraction": 0.01,
        "cut": [16384, 1048576, 65536, 4_000_000],
    }
    assert finished == expected
    assert unfinished == expected | {"inputs": unfinished["inputs"], "cut": [16384, 1048576, 65536, 4]}


# -------------------------------------------------------------------------------------------- stops and restarts

SMALL = Chunking(chunk=2000)
# A slow disk: a busy machine does not finish before the signal is sent, and workers are nearly always at a write.
SCRIPT = """
import os
import sys
import time
from pathlib import Path
from slope_cli.data.prepare import prepare
from slope_cli.data.sources import Chunking
from slope_cli.distributed.signals import Stopped

if __name__ == "__mp_main__":
    os.replace = lambda *given, replace=os.replace: (time.sleep(0.2), replace(*given))
if __name__ == "__main__":
    try:
        prepare([sys.argv[1]], Path(sys.argv[2]), tokenizer=sys.argv[3], workers=2, chunking=Chunking(chunk=2000))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
"""


def preparing(text: Path, out: Path, tokenizer: str, script: str, parts: int) -> subprocess.Popen[bytes]:
    """A process, leader of a session, that is at work on a long text and has made as many parts."""
    text.write_text("".join(f"the line {number}\n" for number in range(120_000)))
    file = text.with_name("script.py")
    file.write_text(script)
    child = subprocess.Popen(
        [sys.executable, str(file), str(text), str(out), tokenizer],
        env=os.environ | {"PYTHONPATH": ROOT},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_until(lambda: len(list(out.glob(".parts/*.train.tok"))) >= parts)
    return child


def session_members(session: int) -> int:
    count = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        count += fields[3] == str(session) and fields[0] != "Z"
    return count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "to_group", "code"),
    [
        (signal.SIGKILL, False, -9),
        (signal.SIGTERM, False, 75),
        (signal.SIGTERM, True, 75),  # scancel
        (signal.SIGUSR2, True, 75),  # sbatch --signal
        (signal.SIGINT, True, 75),  # Ctrl-C
    ],
)
def test_stopped_in_the_middle_and_run_again(
    tmp_path: Path,
    bpe_folder: str,
    capfd: pytest.CaptureFixture[str],
    sent: signal.Signals,
    to_group: bool,
    code: int,
) -> None:
    text, out = tmp_path / "x.txt", tmp_path / "out"
    child = preparing(text, out, bpe_folder, SCRIPT, parts=5)
    (os.killpg if to_group else os.kill)(child.pid, sent)
    errors = child.communicate(timeout=60)[1].decode()
    assert child.returncode == code, errors
    assert not (out / "dataset.json").exists()
    wait_until(lambda: session_members(child.pid) == 0)
    assert session_members(child.pid) == 0
    if code == 75:
        assert errors.splitlines()[-1] == f"{out}: stopped by {sent.name}; run the same command again to resume"
        assert not any("Traceback" in line or "rror" in line for line in errors.splitlines())
    if code == 75 and (sent, to_group) != (signal.SIGTERM, True):  # which ends the workers, too
        assert not list(out.glob(".parts/.*.tmp"))
    with pytest.raises(SlopeError, match="unfinished preparation"):
        open_dataset(out)

    parts = sorted(out.glob(".parts/*.tok"))
    parts[2].write_bytes(parts[2].read_bytes()[:-1])
    prepared([text], out, tokenizer=bpe_folder, chunking=SMALL, progress=True)
    assert f"chunks kept from an earlier start: {len(parts) - 1}\n" in capfd.readouterr().err
    prepared([text], tmp_path / "whole", tokenizer=bpe_folder, chunking=SMALL)
    assert tree(out) == tree(tmp_path / "whole")


SLOW_START = """
import os
import time
if __name__ == "__mp_main__":
    try:
        os.close(os.open(os.path.dirname(__file__) + "/first", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        time.sleep(4)  # the second worker
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGUSR2])
def test_a_signal_to_the_group_spares_a_worker_that_starts(
    tmp_path: Path, bpe_folder: str, sent: signal.Signals
) -> None:
    out = tmp_path / "out"
    child = preparing(tmp_path / "x.txt", out, bpe_folder, SLOW_START + SCRIPT, parts=2)
    os.killpg(child.pid, sent)
    errors = child.communicate(timeout=60)[1].decode()
    assert child.returncode == 75, errors
    assert not list(out.glob(".parts/.*.tmp"))


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_workers(tmp_path: Path, bpe_folder: str) -> None:
    out = tmp_path / "out"
    child = preparing(tmp_path / "x.txt", out, bpe_folder, SCRIPT.replace("sleep(0.2)", "sleep(600)"), parts=0)
    wait_until(lambda: len(list(out.glob(".parts/.*.tmp"))) == 2)
    os.killpg(child.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):  # the workers are at a write
        child.wait(timeout=1)
    os.killpg(child.pid, signal.SIGINT)
    child.communicate(timeout=20)
    assert child.returncode == -signal.SIGINT
    wait_until(lambda: session_members(child.pid) == 0)
    assert session_members(child.pid) == 0


def test_whole_parts_of_an_earlier_start_are_used(tmp_path: Path) -> None:
    path, out = tmp_path / "x.jsonl", tmp_path / "out"
    path.write_bytes(lines(["good", "fine"]) + b"{")
    mtime = path.stat().st_mtime_ns
    options = {"val_fraction": 0, "chunking": Chunking(chunk=4)}
    with pytest.raises(UsageError, match="not a JSON line"):
        prepared([path], out, **options)
    other = [np.frombuffer(b"GOOD", np.uint8), np.array([256])]
    write_token_file(
        out / ".parts/x-000000.train.tok", other, source="x", split="train", vocab_size=257, separator_id=256,
        tokenizer="bytes",
    )  # fmt: skip
    path.write_bytes(lines(["good", "fine"]) + b" ")
    os.utime(path, ns=(mtime, mtime))
    assert decoded(prepared([path], out, **options)) == ["GOOD", "fine"]


def test_a_full_disk_leaves_a_restartable_folder(tmp_path: Path) -> None:
    text, out = tmp_path / "x.txt", tmp_path / "out"
    text.write_text("0123456789\n" * 20_000)
    code = f"""
import resource
from pathlib import Path
from slope_cli.data.prepare import prepare
from slope_cli.errors import SlopeError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    prepare([{str(text)!r}], Path({str(out)!r}), progress=False)
except SlopeError as error:
    print(error)
"""
    env = os.environ | {"PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "disk (or quota) is full" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert not list(out.glob(".parts/*.tok*"))
    assert not list(out.glob(".parts/.*tok*"))
    assert prepared([text], out).train_tokens > 150_000


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    text, out = tmp_path / "x.txt", tmp_path / "out"
    text.write_text("some text")
    first = prepared([text], out)
    before = tree(out)
    (out / ".parts").mkdir()  # as after a kill between the manifest and the clearing up
    assert prepared([text], out).fingerprint == first.fingerprint
    assert tree(out) == before
    assert not (out / ".parts").exists()
    with pytest.raises(UsageError, match="a finished data set made with another --val-fraction"):
        prepared([text], out, val_fraction=0.1)
    os.utime(text, (1, 1))
    with pytest.raises(UsageError, match="a finished data set made with other inputs"):
        prepared([text], out)
    assert tree(out) == before


def test_an_unfinished_folder_that_is_made_from_something_else(tmp_path: Path, bpe_folder: str) -> None:
    chunking = Chunking(chunk=4)
    (tmp_path / "bad.jsonl").write_bytes(lines(["good"]) + b"{")
    with pytest.raises(UsageError, match=r"bad\.jsonl:2: not a JSON line"):
        prepared([tmp_path / "bad.jsonl"], tmp_path / "out", chunking=chunking)
    with pytest.raises(UsageError, match="an unfinished preparation made with another --tokenizer;"):
        prepared([tmp_path / "bad.jsonl"], tmp_path / "out", chunking=chunking, tokenizer=bpe_folder)
    (tmp_path / "out/.parts/plan.json").write_text("{")
    with pytest.raises(SlopeError, match=r"damaged.*delete the folder"):
        prepared([tmp_path / "bad.jsonl"], tmp_path / "out", chunking=chunking)


def test_a_start_that_wrote_no_part_binds_nobody(tmp_path: Path, bpe_folder: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines(["a", "b"]))
    with pytest.raises(UsageError, match=r"no key 'body'.*--text-key"):
        prepared([tmp_path / "x.jsonl"], tmp_path / "out", text_key="body", tokenizer=bpe_folder)
    (tmp_path / "out/tokenizer/left.txt").write_text("of the other tokenizer")
    prepared([tmp_path / "x.jsonl"], tmp_path / "out")
    prepared([tmp_path / "x.jsonl"], tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_two_runs_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOCK_WAIT", 0.3)
    (tmp_path / "x.txt").write_text("text")
    (tmp_path / "out").mkdir()
    with held_folder(tmp_path / "out"), pytest.raises(UsageError, match="another process is at work"):
        prepared([tmp_path / "x.txt"], tmp_path / "out")
    prepared([tmp_path / "x.txt"], tmp_path / "out")


# Waits where another process overtakes it: before it removes the parts, or before it claims the folder.
OVERTAKEN = """
import shutil
import sys
import time
from pathlib import Path
from slope_cli.data.prepare import prepare

text, out, where = sys.argv[1:]

def late(call):
    def wait(path, *args, **options):
        if Path(path).name == where:
            Path(out + ".waits").touch()
            while not Path(out + ".goes").exists():
                time.sleep(0.01)
        return call(path, *args, **options)
    return wait

if where == ".parts":
    shutil.rmtree = late(shutil.rmtree)
else:
    Path.mkdir = late(Path.mkdir)
prepare([text], Path(out), workers=1)
"""


@pytest.mark.parametrize(("where", "says"), [(".parts", "prepared: 5 tokens"), ("out", "already prepared")])
def test_a_process_that_is_overtaken_at_its_end_or_start_succeeds(tmp_path: Path, where: str, says: str) -> None:
    text, out = tmp_path / "x.txt", tmp_path / "out"
    text.write_text("text")
    other = subprocess.Popen(
        [sys.executable, "-P", "-c", OVERTAKEN, str(text), str(out), where],
        env=os.environ | {"PYTHONPATH": ROOT},
        stderr=subprocess.PIPE,
    )
    wait_until((tmp_path / "out.waits").exists)
    prepared([text], out)
    (tmp_path / "out.goes").touch()
    errors = other.communicate(timeout=60)[1].decode()
    assert (other.returncode, says in errors) == (0, True), errors
    assert sorted(path.name for path in out.iterdir()) == ["dataset.json", "tokenizer", "train", "val"]
    open_dataset(out)


def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(UsageError, match="is not empty and holds no data set"):
        prepared([tmp_path / "x.txt"], tmp_path)
    with pytest.raises(UsageError, match="out: cannot be made or read"):
        prepared([tmp_path / "x.txt"], tmp_path / "x.txt" / "out")


# -------------------------------------------------------------------------------------------------- several machines

# Tasks in one folder, each slow enough to be killed halfway. Locks do nothing, as where each machine has its own.
SHARD = """
import fcntl
import os
import sys
import time
from pathlib import Path
from slope_cli.data.prepare import prepare_shard
from slope_cli.data.sources import Chunking

os.replace = lambda *given, replace=os.replace: (time.sleep(0.05), replace(*given))
fcntl.flock = lambda *given: None
shard, out, tokenizer, *inputs = sys.argv[1:]
prepare_shard(shard, inputs, Path(out), tokenizer=tokenizer, workers=1, chunking=Chunking(chunk=500), val_fraction=0.1)
"""


def sharded(shard: str, inputs: list[Path | str | HubInput], out: Path, **options: object) -> None:
    prepare_shard(shard, [str(item) for item in inputs], out, **{"progress": False, "workers": 1} | options)


@pytest.fixture
def many_inputs(tmp_path: Path) -> list[Path | str | HubInput]:
    """Three sources in four formats; one input of the first contains no text."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(2):
        text = lines([f"the {number} {line} " * (line % 30) for line in range(60)])
        (folder / f"web-{number}.jsonl.gz").write_bytes(gzip.compress(text))
    (folder / "web-2.jsonl").write_bytes(lines(["", "the last"]))
    (folder / "web-3.jsonl.gz").write_bytes(gzip.compress(b"\n"))
    (folder / "book.txt.xz").write_bytes(lzma.compress(b"the thought that they think\n" * 400))
    (folder / "cards.csv").write_text("text,n\n" + "".join(f"the card {n},{n}\n" for n in range(90)))
    return [folder]


@pytest.mark.slow
def test_shards_that_are_killed_and_resumed_join_to_the_bytes_of_one_preparation(
    tmp_path: Path, bpe_folder: str, many_inputs: list[Path | str | HubInput], capfd: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"

    def start(shard: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-c", SHARD, shard, str(out), bpe_folder, *map(str, many_inputs)]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ROOT}, stderr=subprocess.PIPE, text=True)

    shards = ["1/3", "2/3", "3/3"]
    for number, killed in enumerate(map(start, shards)):
        wait_until(lambda least=4 * number + 2: len(list(out.glob(".parts/*.tok"))) >= least)  # type: ignore[misc]
        killed.kill()
        killed.communicate()
    assert not (out / "dataset.json").exists()
    kept = len(list(out.glob(".parts/*.tok")))
    tasks = [start(shard) for shard in shards]
    for shard, task in zip(shards, tasks, strict=True):
        errors = task.communicate(timeout=120)[1]
        assert (task.returncode, f"{out}: shard {shard} is prepared; after all shards" in errors) == (0, True), errors
    assert kept > 6
    assert {path.name for path in out.iterdir()} == {".lock", ".parts", "tokenizer"}
    with pytest.raises(SlopeError, match="unfinished preparation"):
        open_dataset(out)
    options = {"tokenizer": bpe_folder, "chunking": Chunking(chunk=500), "val_fraction": 0.1}
    parts = [path.name for path in out.glob(".parts/*.tok")]
    capfd.readouterr()
    joined = prepared(many_inputs, out, progress=True, **options)
    one = prepared(many_inputs, whole, **options)
    assert len(one.train) == 3
    assert (joined.fingerprint, joined.made_from) == (one.fingerprint, one.made_from)
    assert tree(out) == tree(whole)
    kept_chunks = re.search(r"chunks kept from an earlier start: (\d+)", capfd.readouterr().err)
    assert kept_chunks
    assert int(kept_chunks[1]) == len({name.rsplit(".", 2)[0] for name in parts})
    sharded("2/3", many_inputs, out, **options)  # a task that starts late has nothing to do
    assert tree(out) == tree(whole)


def test_joining_does_what_shards_have_not_done(tmp_path: Path, many_inputs: list[Path | str | HubInput]) -> None:
    """A shard that never ran, another N, a shard with no chunk, a part that is no part of this: all give one result."""
    options = {"chunking": Chunking(chunk=3000)}
    sharded("2/2", many_inputs, tmp_path / "out", **options)
    parts = tree(tmp_path / "out/.parts").keys()
    sharded("1/3", many_inputs, tmp_path / "out", **options)
    assert tree(tmp_path / "out/.parts").keys() > parts
    sharded("900/900", many_inputs, tmp_path / "out", **options)
    one = tmp_path / "out/.parts" / min(path for path in parts if path.endswith("train.tok"))
    one.with_name("web-000999.train.tok").write_bytes(one.read_bytes())
    prepared(many_inputs, tmp_path / "out", **options)
    prepared(many_inputs, tmp_path / "whole", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "1/0", "-1/3", "a/b", "1/3/5", "", "1.5/3", "٣/٣"])
def test_a_shard_that_is_none(tmp_path: Path, shard: str) -> None:
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(UsageError, match=r"^--shard .*: must be I/N with I from 1 to N"):
        sharded(shard, [tmp_path / "x.txt"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("taken", "says"), [("2/3", "shard-2-of-3"), ("1/2", "shard-1-of-2"), ("1/3", ""), ("", "in it")]
)
def test_which_shards_may_work_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str, says: str) -> None:
    """Others of the same N may, but not the same one twice, another N, or the whole."""
    monkeypatch.setattr(files, "LOCK_WAIT", 0.3)
    path, out = tmp_path / "x.jsonl", tmp_path / "out"
    path.write_bytes(lines(["one", "two", "three"]))
    sharded("3/3", [path], out)
    part = f"shard-{taken.replace('/', '-of-')}"
    with held_folder(out / ".parts", part) if taken else held_folder(out):
        if says:
            with pytest.raises(UsageError, match=f"another process is at work (on )?{says}"):
                sharded("2/3", [path], out)
        else:
            sharded("2/3", [path], out)
    with held_folder(out, shared=True), pytest.raises(UsageError, match="another process is at work in it"):
        prepared([path], out)
    sharded("2/3", [path], out)
    assert prepared([path], out).train_tokens > 0


def test_shards_of_other_settings_are_refused_before_there_is_a_part(tmp_path: Path, bpe_folder: str) -> None:
    """Another task may be about to write one."""
    (tmp_path / "x.txt").write_text("text")
    sharded("2/2", [tmp_path / "x.txt"], tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(UsageError, match="an unfinished preparation made with another --tokenizer;"):
        sharded("1/2", [tmp_path / "x.txt"], tmp_path / "out", tokenizer=bpe_folder)
    assert tree(tmp_path / "out").items() >= before.items()
    prepared([tmp_path / "x.txt"], tmp_path / "out", tokenizer=bpe_folder)
    with pytest.raises(UsageError, match="a finished data set made with another --tokenizer"):
        sharded("1/2", [tmp_path / "x.txt"], tmp_path / "out")


# --------------------------------------------------------------------------------------------------- bad inputs

WHOLE = "".join(f"line {number}\n" for number in range(5000)).encode()
PARQUET_ENDS = b"PAR1"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", r"x\.txt: is empty"),
        ("x.txt.gz", gzip.compress(b"", mtime=0), "contains no text"),
        ("x.jsonl", b"\n\n", "contains no text"),
        ("x.txt", b"caf\xe9 au lait", r"x\.txt: not UTF-8 text"),
        ("x.txt", b"end\xc3", "not UTF-8 text"),
        ("x.bin", b"a\0b", "a binary file"),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"body": "b", "n": 1}',
            r"x\.jsonl:2: no key 'text': known are body, n; .* --text-key",
        ),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', r"x\.jsonl:2: not a JSON line"),
        ("x.jsonl", b'{"text": "\xff"}', r"x\.jsonl:1: not UTF-8"),
        ("x.json", b'["a"]', r"x\.json: record 1: a str instead of an object"),
        ("x.jsonl", b'{"text": 3}', r"x\.jsonl:1: 'text' is a int, not text"),
        ("x.txt.gz", gzip.compress(WHOLE, mtime=0)[:-50], r"x\.txt\.gz: truncated"),
        ("x.txt.xz", lzma.compress(WHOLE)[:-50], r"x\.txt\.xz: truncated"),
        ("x.txt.zst", zstandard.compress(WHOLE)[:-50], r"x\.txt\.zst: truncated"),
        ("x.txt.gz", WHOLE, r"damaged \.gz data"),
        ("x.txt.xz", WHOLE, r"damaged \.xz data"),
        ("x.txt.zst", WHOLE, r"damaged \.zst data"),
        ("x.parquet", PARQUET_ENDS + WHOLE, "not a whole parquet file"),
        ("x.parquet", PARQUET_ENDS, "not a whole parquet file"),
    ],
)
def test_bad_inputs_are_one_clear_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        prepared([tmp_path / name], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_bad_parquet_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", {"body": ["a"], "text": [3]})
    with pytest.raises(UsageError, match=r"no column 'txt': did you mean text\?; .* --text-key"):
        prepared([tmp_path / "x.parquet"], tmp_path / "out", text_key="txt")
    with pytest.raises(UsageError, match="the column 'text' is int64, not text"):
        prepared([tmp_path / "x.parquet"], tmp_path / "out2")


def test_a_misspelt_path_is_answered_with_the_nearest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the Hub is asked, if it has a folder that is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/emma.txt").write_text("text")
    wrong = {"copus/": "corpus", "corpus/ema.txt": "corpus/emma.txt", "corpus/emma.tx": "corpus/emma.txt"}
    for word, right in wrong.items():
        with pytest.raises(UsageError, match=rf"^{word}: no such file or folder; did you mean {right}\?$"):
            prepared([word], tmp_path / "out")
    with pytest.raises(UsageError, match=r"datasets is needed to read the data set corpus/persuasion"):
        prepared(["corpus/persuasion"], tmp_path / "out")


def test_inputs_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("text")
    missing: list[tuple[Path | str, str]] = [
        ("none.txt", r"none\.txt: no such file or folder"),
        ("", r"'': names no file, folder or data set; write \. for this folder"),
        ("./none", r"\./none: no such file"),
        ("no thing", "no such file"),
        (tmp_path / "empty", "contains no files"),
        ("/dev/null", "is neither a file nor a folder"),
        ("bad name=x.txt", "name a source with letters"),
    ]
    for word, message in missing:
        with pytest.raises(UsageError, match=message):
            prepared([word], tmp_path / "out")
    with pytest.raises(UsageError, match="'': names no file"):
        prepared([tmp_path / "x.txt"], tmp_path / "out", val=[""])
    with pytest.raises(UsageError, match="no inputs"):
        prepared([], tmp_path / "out")
    with pytest.raises(UsageError, match="given twice"):
        prepared([tmp_path / "x.txt", f"x={tmp_path / 'x.txt'}"], tmp_path / "out")
    with pytest.raises(UsageError, match=r"--val-fraction 0\.6"):
        prepared([tmp_path / "x.txt"], tmp_path / "out", val_fraction=0.6)
    with pytest.raises(UsageError, match="--workers 0"):
        prepared([tmp_path / "x.txt"], tmp_path / "out", workers=0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="datasets is needed to read the data set some/name"):
        prepared(["some/name"], tmp_path / "out3")
    assert not (tmp_path / "out").exists()
