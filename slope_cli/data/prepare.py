"""`slope data prepare`: text in, a folder of token files out; parallel, restartable after any kind of stop.

The parent reads and cuts the text into chunks, workers tokenise them and write a part file for each split, and at the
end the parts become one file per source. What a run left behind is checked and used by the next one.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from slope_cli.data.dataset import MANIFEST, NO_VALIDATION, UNFINISHED, Dataset, open_dataset, write_manifest
from slope_cli.data.sources import CUT, Input, find_inputs, read_passages
from slope_cli.data.token_file import TokenFile, Tokens, write_token_file
from slope_cli.data.tokenizer import BYTES, begin_id, load_tokenizer, save_tokenizer, separator_id, vocabulary_size
from slope_cli.distributed.signals import STOPPED
from slope_cli.errors import SlopeError, UsageError
from slope_cli.utils.files import held_folder, read_sealed, write_sealed

# What a chunk holds: little, so that a stop costs little; but of a large input more, or the part files were too many.
CHUNK_CHARS = 4_000_000
LARGE_CHUNK_CHARS = 32_000_000
LARGE_INPUT = 1 << 30
BATCH_TEXTS = 32
SPLITS = ("train", "val")
LINE_SECONDS = 10.0
GROUP_SIGNALS = (signal.SIGINT, signal.SIGUSR2)
"""What a terminal and SLURM send to all of a process group."""
Parts = dict[tuple[str, str], list[Path]]
"""The part files of each (split, source), in order."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive passages of a source, each with the split it goes to and whether a separator follows it."""

    source: str
    number: int
    texts: list[str] = field(default_factory=list)
    to_val: list[bool] = field(default_factory=list)
    separated: list[bool] = field(default_factory=list)

    @property
    def splits(self) -> list[str]:
        """The splits that any of it goes to; only these get a part file."""
        return [split for split in SPLITS if (split == "val") in self.to_val]


@dataclass(frozen=True)
class Work:
    """What a worker has to know besides its chunk."""

    out: Path
    tokenizer: str
    byte_level: bool
    vocab_size: int
    separator_id: int
    begin_id: int | None = None
    """What the tokenizer begins a text with, where that is not the separator."""

    def part(self, source: str, number: int, split: str) -> Path:
        """Where the tokens of a chunk go."""
        return self.out / UNFINISHED / f"{source}-{number:06d}.{split}.tok"


def prepare(
    inputs: list[str],
    out: Path,
    *,
    tokenizer: str = BYTES,
    text_key: str = "text",
    val_fraction: float = 0.01,
    workers: int | None = None,
    split: str = "train",
    config_name: str | None = None,
    progress: bool = True,
) -> Dataset:
    """Tokenises text, JSONL and parquet files, folders of these, or Hugging Face data sets into the folder `out`.

    Sources are what `find_inputs` says. Of the n passages of a source (documents, or the parts that `cut` makes of long
    ones) ceil((n - 1) * val_fraction), evenly spaced from the second on, go to its validation file: none of one, at
    least one of two. The share of the text is val_fraction where passages are many and alike; 0 keeps none back.
    The result does not depend on `workers` (default: the cores; 1 runs in this process). Run again after a stop, it
    goes on where it stopped; on a finished folder of the same plan it returns at once. Needs twice the space of the
    result. UsageError for bad inputs or a folder that holds something else; SlopeError on a full disk. SIGTERM and
    SIGUSR2 exit with 75.
    With workers above 1, a script that calls this needs an `if __name__ == "__main__"` guard, as processes are spawned.
    """
    out = Path(out).expanduser()
    if not 0 <= val_fraction <= 0.5:
        raise UsageError(f"--val-fraction {val_fraction}: must be from 0 (no validation text) to 0.5")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: must be 1 or more")
    items = find_inputs(inputs, split=split, config_name=config_name)
    tok = load_tokenizer(tokenizer)
    byte_level = tokenizer == BYTES
    name = Path(tokenizer).expanduser().resolve().name if Path(tokenizer).expanduser().is_dir() else tokenizer
    chunk_chars = _chunk_chars(items)
    separator, begin = separator_id(tok), begin_id(tok)
    begin = None if begin == separator else begin
    plan = {
        "inputs": [item.plan() for item in items],
        "tokenizer": name,
        "tokenizer_sha256": hashlib.sha256(tok.backend_tokenizer.to_str().encode()).hexdigest(),
        "text_key": text_key,
        "val_fraction": val_fraction,
        "cut": [*CUT, chunk_chars],
        **({} if begin is None else {"begin": begin}),
    }
    report = Report(sum(item.size for item in items), progress)
    if (out / MANIFEST).exists():
        return _finished(out, plan, report)
    work = Work(out, name, byte_level, vocabulary_size(tok), separator, begin)
    # Bytes need no thought: the reading takes longer than the tokenising, and more processes only slow it down.
    count = workers or (1 if byte_level else len(os.sched_getaffinity(0)))
    with _claimed(out, plan), _terminable(), report:
        save_tokenizer(tok, out / "tokenizer")
        chunks = _chunks(items, text_key, Fraction(str(val_fraction)), chunk_chars, report)
        files = _merge(_tokenise(chunks, work, count, report), work)
        write_manifest(out, files, name, work.vocab_size, work.separator_id, plan)
        if val_fraction and all(file.header.split == "train" for file in files):
            report.say(f"{out}: has no validation text, {NO_VALIDATION}")
    shutil.rmtree(out / UNFINISHED)
    return open_dataset(out, verify=False)


# ------------------------------------------------------------------------------------------------ the folder


def _finished(out: Path, plan: dict[str, Any], report: Report) -> Dataset:
    dataset = open_dataset(out, verify=False)
    _check_same(out, dataset.plan, plan, "a finished data set")
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    report.say(f"{out}: already prepared from the same inputs, nothing to do")
    return dataset


def _check_same(out: Path, old: dict[str, Any], new: dict[str, Any], what: str) -> None:
    differing = [key for key in new if old.get(key) != new[key]]
    if differing:
        raise UsageError(
            f"{out}: holds {what} made with other {', '.join(differing)}; "
            f"give the same command as then, or another folder, or delete this one"
        )


@contextmanager
def _claimed(out: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Makes the folder, or takes up an unfinished one of the same plan, for this process alone."""
    parts = out / UNFINISHED
    try:
        if out.is_dir() and not parts.is_dir() and any(out.iterdir()):
            raise UsageError(f"{out}: is not empty and holds no data set; give another folder")
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: cannot be made or written: {error.strerror}") from error
    with held_folder(parts):
        if any(parts.glob("*.tok")):
            _check_same(out, _read_plan(parts / "plan.json"), plan, "an unfinished preparation")
        else:  # an earlier run may have failed before its first part: its plan binds nobody
            shutil.rmtree(out / "tokenizer", ignore_errors=True)
            write_sealed(parts / "plan.json", plan)
        yield


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path)
    except SlopeError as error:
        raise SlopeError(f"{error}; delete the folder {path.parent.parent} and prepare again") from None


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM and SIGUSR2 unwind like Ctrl-C does, so that workers and temporary files go; exit code 75."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(STOPPED)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ the parent


def is_held_out(number: int, share: Fraction) -> bool:
    """Whether passage `number`, from 0, of a source is for validation: of the first n, ceil((n - 1) * share) are."""
    return number > 0 and math.ceil(number * share) > math.ceil((number - 1) * share)


def _chunk_chars(items: list[Input]) -> int:
    sizes = [item.size for item in items]
    return CHUNK_CHARS if all(sizes) and sum(sizes) <= LARGE_INPUT else LARGE_CHUNK_CHARS


def _chunks(items: list[Input], text_key: str, share: Fraction, chunk_chars: int, report: Report) -> Iterator[Chunk]:
    done = 0
    for source, group in groupby(items, key=lambda item: item.source):
        passages, chars, size, held = 0, 0, 0, Chunk(source, 0)
        for item in group:
            for text, ends_document, position in read_passages(item, text_key, chars):
                to_val, passages = is_held_out(passages, share), passages + 1
                # What follows in the same stream is not what followed in the text: that is an end, too.
                cut_off = to_val or is_held_out(passages, share)
                held.texts.append(text)
                held.to_val.append(to_val)
                held.separated.append(ends_document or cut_off)
                chars, size = chars + len(text), size + len(text)
                if size >= chunk_chars:
                    report.read(source, done + position if item.size else position)
                    yield held
                    size, held = 0, Chunk(source, held.number + 1)
            done += item.size
            report.read(source, done)
        if held.texts:
            yield held


def _tokenise(chunks: Iterator[Chunk], work: Work, workers: int, report: Report) -> Parts:
    """Has every chunk tokenised that has no good parts yet; gives the part files."""
    parts: Parts = {}
    count, kept = 0, 0

    def missing() -> Iterator[Chunk]:
        nonlocal count, kept
        for chunk in chunks:
            count += 1
            paths = {split: work.part(chunk.source, chunk.number, split) for split in chunk.splits}
            for split, path in paths.items():
                parts.setdefault((split, chunk.source), []).append(path)
            if all(map(_is_whole, paths.values())):
                kept += 1
            else:
                yield chunk

    if workers == 1:
        tokeniser = Tokeniser(work)
        for chunk in missing():
            report.tokens(tokeniser(chunk))
    else:
        _in_pool(missing(), work, workers, report)
    if kept:
        report.say(f"{kept} of {count} chunks were there from an earlier run")
    return parts


def _in_pool(chunks: Iterator[Chunk], work: Work, workers: int, report: Report) -> None:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (work,))
    running: set[Future[int]] = set()
    try:
        for chunk in chunks:
            with _held_back():
                running.add(pool.submit(_run_in_worker, chunk))  # starts a worker, if there are too few
            if len(running) >= 2 * workers:  # bounds the memory: the reader waits for the workers
                running = _collect(running, report)
        while running:
            running = _collect(running, report)
    except BrokenProcessPool as error:
        raise SlopeError(
            "a tokenising process was killed (out of memory?); run the same command again, with fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _held_back() -> Iterator[None]:
    """Has signals wait that may reach the whole group: one would kill a worker that starts and cannot ignore it yet.

    A worker begins with what is blocked here blocked.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(running: set[Future[int]], report: Report) -> set[Future[int]]:
    done, rest = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        report.tokens(future.result())
    return rest


def _is_whole(path: Path) -> bool:
    try:
        TokenFile.open(path).verify()
    except SlopeError:
        return False
    return True


def _merge(parts: Parts, work: Work) -> list[TokenFile]:
    files = []
    for split in SPLITS:
        (work.out / split).mkdir(exist_ok=True)
    for (split, source), paths in sorted(parts.items()):
        opened = [TokenFile.open(path) for path in paths]
        if any(part.header.tokens for part in opened):
            path = work.out / split / f"{source}.tok"
            files.append(_write(path, (part.tokens for part in opened), work, source, split, _text_bytes(opened)))
    return files


def _text_bytes(parts: list[TokenFile]) -> int:
    return sum(part.header.text_bytes for part in parts)


def _write(path: Path, ids: Iterator[Tokens], work: Work, source: str, split: str, text_bytes: int) -> TokenFile:
    return write_token_file(
        path,
        ids,
        source=source,
        split=split,
        vocab_size=work.vocab_size,
        separator_id=work.separator_id,
        tokenizer=work.tokenizer,
        text_bytes=text_bytes,
    )


# ----------------------------------------------------------------------------------------------- the workers


class Tokeniser:
    """Turns chunks into part files; one lives in each worker."""

    def __init__(self, work: Work) -> None:
        # The processes are the parallelism; the library's own threads would only fight over the same cores.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from tokenizers import Tokenizer

        self.work = work
        self._core = Tokenizer.from_file(str(work.out / "tokenizer" / "tokenizer.json"))
        self._core.encode_special_tokens = True  # "<|endoftext|>" in a text is text (the setting is not saved)
        self._core.no_truncation()
        self._core.no_padding()

    def encode(self, texts: list[str]) -> list[Tokens]:
        """The ids of each text, without special tokens, one-dimensional unsigned integers."""
        if self.work.byte_level:  # the same ids as through the library, ten times as fast
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]
        ids: list[Tokens] = []
        for at in range(0, len(texts), BATCH_TEXTS):
            encodings = self._core.encode_batch_fast(texts[at : at + BATCH_TEXTS], add_special_tokens=False)
            ids += [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return ids

    def __call__(self, chunk: Chunk) -> int:
        """Writes the parts of a chunk, atomically, and gives the number of tokens in them."""
        ids = (self.work.separator_id, self.work.begin_id)
        separator = np.array([token_id for token_id in ids if token_id is not None], np.uint32)
        written = 0
        encoded = self.encode(chunk.texts)
        for split in chunk.splits:
            chosen = [at for at, to_val in enumerate(chunk.to_val) if to_val == (split == "val")]
            pieces = ([encoded[at], separator] if chunk.separated[at] else [encoded[at]] for at in chosen)
            size = sum(len(chunk.texts[at].encode()) for at in chosen)
            path = self.work.part(chunk.source, chunk.number, split)
            part = _write(path, (piece for pair in pieces for piece in pair), self.work, chunk.source, split, size)
            written += part.header.tokens
        return written


_worker: Tokeniser | None = None


def _start_worker(work: Work) -> None:
    global _worker
    for number in GROUP_SIGNALS:  # the parent alone decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = Tokeniser(work)


def _die_with_parent() -> None:
    """Without this, the workers of a parent that was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_end([parent.sentinel])
        os._exit(1)


def _run_in_worker(chunk: Chunk) -> int:
    if _worker is None:
        raise RuntimeError("the worker was not started")
    return _worker(chunk)


# ---------------------------------------------------------------------------------------------- what is seen


class Report:
    """Progress on stderr: a bar on a terminal, else a line every ten seconds; nothing at all if not wanted."""

    def __init__(self, total: int, wanted: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True, quiet=not wanted, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal or not wanted)
        self._task = self._bar.add_task("reading", total=total or None)
        self._total, self._position, self._tokens = total, 0, 0
        self._source = ""
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._bar.stop()
        seconds = time.monotonic() - self._started
        if kind is None:
            self.say(f"prepared: {self._tokens:,} tokens in {seconds:.1f} s")
        elif issubclass(kind, (KeyboardInterrupt, SystemExit)):
            self.say("stopped: run the same command again to go on from here")

    def read(self, source: str, position: int) -> None:
        """So many bytes of the inputs (rows, of a data set without a size) are read."""
        self._source, self._position = source, max(self._position, position)
        self._show()

    def tokens(self, count: int) -> None:
        """So many more tokens are written."""
        self._tokens += count
        self._show()

    def say(self, line: str) -> None:
        """One line, above the bar if there is one."""
        self._console.print(line, markup=False)

    def _show(self) -> None:
        text = f"{self._source}: {_amount(self._position, self._total)} read, {self._tokens / 1e6:.1f} M tokens"
        self._bar.update(self._task, completed=self._position, description=text)
        if self._bar.disable and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(text)


def _amount(position: int, total: int) -> str:
    return f"{position / 1e6:.1f} of {total / 1e6:.1f} MB" if total else f"{position:,} rows"


def summary(dataset: Dataset) -> list[dict[str, str | int]]:
    """One row for each source: documents, tokens and text bytes to train on, tokens and text bytes to validate on."""
    rows: list[dict[str, str | int]] = []
    for train in dataset.train:
        val = dataset.val.get(train.header.source)
        rows.append(
            {
                "source": train.header.source,
                "documents": train.header.documents,
                "tokens": train.header.tokens,
                "bytes": train.header.text_bytes,
                "val_tokens": val.header.tokens if val else 0,
                "val_bytes": val.header.text_bytes if val else 0,
            }
        )
    return rows


def describe(dataset: Dataset) -> str:
    """The summary as a table of plain text with a line of sums, for `slope data info`."""
    rows = summary(dataset)
    sums = {key: sum(int(row[key]) for row in rows) for key in list(rows[0])[1:]} if rows else {}
    header = ["source", "documents", "tokens", "bytes", "val tokens", "val bytes"]
    lines = [header] + [[str(row["source"]), *(f"{row[key]:,}" for key in sums)] for row in rows]
    lines.append(["all", *(f"{value:,}" for value in sums.values())])
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    table = [
        line[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]
    about = f"{dataset.folder}: tokenizer {dataset.tokenizer_name}, {dataset.vocab_size:,} ids, "
    return "\n".join([about + f"fingerprint {dataset.fingerprint[:16]}", *table])
