"""`slope data prepare`: tokenize text into a folder of token files, in parallel, resumable after any kind of stop.

This process reads the text and cuts it into chunks. `write_parts` writes a part file for each split of a chunk, and at
the end the parts become one file for each split of a source. The parts of a stopped process are checked and kept; so
are those of `prepare_shard`, by which several machines each write a share of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from slope_cli.data.dataset import (
    LESS_VALIDATION,
    MANIFEST,
    NO_VALIDATION,
    UNFINISHED,
    Dataset,
    largely_held_out,
    open_dataset,
    write_manifest,
)
from slope_cli.data.folders import some
from slope_cli.data.formats import UTF_8
from slope_cli.data.sources import DEFAULT_CHUNKING, Chunking, Input, find_inputs, read_segments
from slope_cli.data.token_file import TokenFile, Tokens, read_error
from slope_cli.data.tokenize import SPLITS, Chunk, Piece, Target, write_parts
from slope_cli.data.tokenizer import BYTES, begin_id, load_tokenizer, save_tokenizer, separator_id, vocabulary_size
from slope_cli.distributed.signals import StopFlag
from slope_cli.errors import SlopeError, UsageError
from slope_cli.report.progress import Progress
from slope_cli.utils.files import LOCK, claimed_folder, held_folder, read_sealed, write_sealed
from slope_cli.utils.shards import shard_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


LISTED_INPUTS = 1000
PLAN_IN_WORDS = {
    "inputs": "other inputs",
    "tokenizer": "another --tokenizer",
    "tokenizer_sha256": "another --tokenizer",
    "text_key": "another --text-key",
    "val_fraction": "another --val-fraction",
    "cut": "another version of slope, which cuts texts elsewhere",
    "begin": "another version of slope, which begins texts otherwise",
}
"""What the keys of a plan are to its reader."""


@dataclass(frozen=True)
class _Work:
    """What is prepared, and how. notes: the lines to print at the end."""

    items: list[Input]
    target: Target
    tok: PreTrainedTokenizerFast
    made_from: dict[str, Any]
    chunking: Chunking
    workers: int
    display: Progress
    notes: list[str]

    @property
    def parts(self) -> Path:
        """The folder of the part files."""
        return self.target.out / UNFINISHED


class Options(TypedDict, total=False):
    """How text is prepared, with the defaults of `_work`.

    workers: the number of processes, by default one per core; 1 works in this process. The result does not depend on
    it. Workers are spawned, so a script that prepares needs an `if __name__ == "__main__"` guard. progress: show
    progress on standard error.
    """

    tokenizer: str
    text_key: str
    encoding: str
    val_fraction: float
    workers: int | None
    split: str
    config_name: str | None
    chunking: Chunking
    progress: bool


def prepare(
    inputs: Sequence[str | Input], out: Path, *, stop: StopFlag | None = None, **options: Unpack[Options]
) -> Dataset:
    """Tokenize text, JSON, CSV and parquet files, folders of these, or Hugging Face data sets into the folder `out`.

    `find_inputs` says what inputs and their sources are, `is_held_out` which segments of a source (documents, or the
    parts that `cut` makes of long ones) go to its validation file. The same call resumes a preparation that was
    stopped, joins what `prepare_shard` has made, and returns at once when it is finished. It needs twice the disk space
    of the result.

    Args:
        stop: an open flag; by default one is opened here.
        options: see `Options`.

    Raises:
        UsageError: an input or option is wrong, or the folder contains something else.
        Stopped: a signal came; the finished chunks stay on the disk.
        SlopeError: the disk is full, or a process was killed.
    """
    started = time.monotonic()
    work = _work(inputs, out, **options)
    unmade = _run(work, None, stop)
    dataset = open_dataset(work.target.out, verify=False)
    for line in (*work.notes, *_outcome(dataset, unmade, time.monotonic() - started)):
        work.display.say(line)
    return dataset


def prepare_shard(
    shard: str,
    inputs: Sequence[str | Input],
    out: Path,
    *,
    stop: StopFlag | None = None,
    **options: Unpack[Options],
) -> None:
    """Do the share "I/N" of what `prepare` does with the same arguments, beside the other shares; `prepare` joins them.

    Share I, from 1, is the chunks I, I + N, … of all inputs. Each process reads all inputs, because where a chunk
    begins depends on the text before it. What a share lacks, `prepare` does itself.

    Args:
        options: as those of `prepare`.

    Raises:
        UsageError: as `prepare`; or another process is at work on this share, or on one of another N.
        Stopped, SlopeError: as `prepare`.
    """
    number, work = shard_of(shard), _work(inputs, out, **options)
    unmade = _run(work, number, stop)
    done = "is prepared; after all shards, the same command without --shard joins them"
    work.notes.append(f"{out}: shard {shard} {done}" if unmade else f"{out}: already prepared, nothing to do")
    for line in work.notes:
        work.display.say(line)


def _work(
    inputs: Sequence[str | Input],
    out: Path,
    *,
    tokenizer: str = BYTES,
    text_key: str = "text",
    encoding: str = UTF_8,
    val_fraction: float = 0.01,
    workers: int | None = None,
    split: str = "train",
    config_name: str | None = None,
    chunking: Chunking = DEFAULT_CHUNKING,
    progress: bool = True,
) -> _Work:
    if not 0 <= val_fraction <= 0.5:
        raise UsageError(f"--val-fraction {val_fraction}: must be from 0 (no validation text) to 0.5")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: must be 1 or more")
    notes: list[str] = []
    items = find_inputs(
        inputs, split=split, config_name=config_name, encoding=encoding, chunking=chunking, say=notes.append
    )
    tok = load_tokenizer(tokenizer)
    target = _target(Path(out).expanduser(), tokenizer, tok)
    made_from = _made_from(items, text_key, val_fraction, chunking, target, tok)
    # Bytes are tokenized faster than they are read: more processes would only slow it down.
    workers = workers or (1 if target.byte_level else len(os.sched_getaffinity(0)))
    display = Progress(sum(item.size for item in items), quiet=not progress)
    return _Work(items, target, tok, made_from, chunking, workers, display, notes)


def _run(work: _Work, shard: tuple[int, int] | None, stop: StopFlag | None) -> bool:
    """Write the data set, or the parts of a shard; whether the data set was still to be made."""
    out = work.target.out
    try:
        with contextlib.closing(work.display), _claimed(out, shared=shard is not None) as unmade:
            if unmade:
                with contextlib.nullcontext(stop) if stop else StopFlag() as stop:
                    _write(work, shard, lambda: stop.check(out))
            else:
                _require_same(out, open_dataset(out, verify=False).made_from, work.made_from, "a finished data set")
                shutil.rmtree(work.parts, ignore_errors=True)  # a process may have been killed before it did
    except OSError as error:
        raise SlopeError(read_error(out, error, "written")) from error
    return unmade


def _outcome(dataset: Dataset, is_new: bool, seconds: float) -> Iterator[str]:
    if not is_new:
        yield f"{dataset.folder}: already prepared from the same inputs, nothing to do"
        return
    if dataset.made_from["val_fraction"] and not dataset.val:
        yield f"{dataset.folder}: has no validation text; {NO_VALIDATION}"
    yield from (f"warning: {line}; {LESS_VALIDATION}" for line in largely_held_out(dataset))
    tokens = sum(file.header.tokens for file in (*dataset.train, *dataset.val.values()))
    yield f"prepared: {tokens:,} tokens in {seconds:.1f} s"


@contextlib.contextmanager
def _claimed(out: Path, shared: bool) -> Iterator[bool]:
    """Lock the folder. Yields whether the data set is to be made: another process may finish it at any moment."""
    manifest = out / MANIFEST
    with contextlib.ExitStack() as lock:
        if not manifest.exists():
            try:
                lock.enter_context(
                    claimed_folder(
                        out, "data set", lambda _: (out / UNFINISHED).is_dir() or manifest.exists(), shared=shared
                    )
                )
            except UsageError:
                if not manifest.exists():
                    raise
        yield not manifest.exists()
        if manifest.exists():  # a shard's lock stays, so that all tasks lock the same file
            (out / LOCK).unlink(missing_ok=True)


def _write(work: _Work, shard: tuple[int, int] | None, check: Callable[[], None]) -> None:
    """Write the parts of a shard; without one the files of the data set, and the manifest last."""
    out, parts = work.target.out, work.parts
    parts.mkdir(exist_ok=True)
    if shard:
        with _held_shard(parts, *shard):
            _settle_parts(work, shared=True)
            _write_parts(work, shard, check)
        return
    _settle_parts(work, shared=False)
    write_manifest(out, _merge(work.target, _write_parts(work, (1, 1), check), check), work.made_from)
    # From here on another process takes the data set for finished, and may remove the parts, too.
    shutil.rmtree(parts, ignore_errors=True)


@contextlib.contextmanager
def _held_shard(parts: Path, number: int, count: int) -> Iterator[None]:
    """Lock one shard; UsageError if another process is at work on it, or on one of another number of shards.

    Two processes that begin at once with different numbers of shards both see the other's lock.
    """
    with held_folder(parts, f"shard-{number}-of-{count}"):
        for other in sorted(parts.glob(f"{LOCK}-shard-*")):
            if not other.name.endswith(f"-of-{count}"):
                with held_folder(parts, other.name.removeprefix(f"{LOCK}-")):
                    pass
        yield


def is_held_out(number: int, share: Fraction) -> bool:
    """Whether segment `number`, from 0, of its source is validation text.

    Of the first n segments ceil((n - 1) * share) are, evenly spaced from the second on: none of one, at least one of
    two. With many segments of similar length that is about this share of the text.
    """
    return number > 0 and math.ceil(number * share) > math.ceil((number - 1) * share)


def _target(out: Path, tokenizer: str, tok: PreTrainedTokenizerFast) -> Target:
    folder, separator, begin = Path(tokenizer).expanduser(), separator_id(tok), begin_id(tok)
    return Target(
        out,
        tokenizer=folder.resolve().name if folder.is_dir() else tokenizer,
        byte_level=tokenizer == BYTES,
        vocab_size=vocabulary_size(tok),
        separator_id=separator,
        begin_id=None if begin == separator else begin,
    )


def _made_from(
    items: list[Input],
    text_key: str,
    val_fraction: float,
    chunking: Chunking,
    target: Target,
    tok: PreTrainedTokenizerFast,
) -> dict[str, Any]:
    """Everything that the tokens depend on, as JSON."""
    return {
        "inputs": _listing([item.identity() for item in items]),
        "tokenizer": target.tokenizer,
        "tokenizer_sha256": hashlib.sha256(tok.backend_tokenizer.to_str().encode()).hexdigest(),
        "text_key": text_key,
        "val_fraction": val_fraction,
        "cut": [chunking.short_segment, chunking.short_until, chunking.segment, chunking.chunk_size(items)],
        **({} if target.begin_id is None else {"begin": target.begin_id}),
    }


def _listing(inputs: list[dict[str, Any]]) -> list[dict[str, Any]] | dict[str, Any]:
    """The inputs; of very many only their number and a hash, which identify them as well."""
    if len(inputs) <= LISTED_INPUTS:
        return inputs
    return {"number": len(inputs), "sha256": hashlib.sha256(json.dumps(inputs).encode()).hexdigest()}


def _settle_parts(work: _Work, shared: bool) -> None:
    """Write the plan and the tokenizer, or keep those of an earlier start; UsageError if it made something else.

    shared: other processes do the same at the same time. The first to put its file or folder in its place wins, which
    needs no lock: those of a file system may not reach from one machine to another.
    """
    out, plan, tokenizer = work.target.out, work.parts / "plan.json", work.target.out / "tokenizer"
    if not shared and not any(work.parts.glob("*.tok")):
        # An earlier start left no parts, so its settings do not matter.
        shutil.rmtree(tokenizer, ignore_errors=True)
        plan.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=work.parts, prefix=".new-") as new:
        if not plan.exists():
            write_sealed(Path(new) / plan.name, work.made_from)
            with contextlib.suppress(FileExistsError):
                (os.link if shared else os.rename)(Path(new) / plan.name, plan)
        try:
            earlier = read_sealed(plan)
        except SlopeError as error:
            raise SlopeError(f"{error}; delete the folder {out} and prepare again") from None
        _require_same(out, earlier, work.made_from, "an unfinished preparation")
        if not tokenizer.exists():
            save_tokenizer(work.tok, Path(new) / tokenizer.name)
            try:
                os.rename(Path(new) / tokenizer.name, tokenizer)
            except OSError:
                if not tokenizer.exists():
                    raise


def _require_same(out: Path, old: dict[str, Any], new: dict[str, Any], what: str) -> None:
    if isinstance(listed := old.get("inputs"), list):  # any number of them, by an earlier version
        old = old | {"inputs": _listing(listed)}
    if differing := [key for key in new if old.get(key) != new[key]]:
        others = ", ".join(dict.fromkeys(PLAN_IN_WORDS[key] for key in differing))
        advice = "repeat that command, choose another folder, or delete this one"
        raise UsageError(f"{out}: contains {what} made with {others}; {advice}")


def _chunks(work: _Work, check: Callable[[], None]) -> Iterator[Chunk]:
    """Read all inputs; `check` is called for each segment. UsageError if all of them contain no text."""
    items, chunking = work.items, work.chunking
    text_key, share = work.made_from["text_key"], Fraction(str(work.made_from["val_fraction"]))
    chunk_size, read_before = chunking.chunk_size(items), 0
    empty: list[str] = []
    for source, group in groupby(items, key=lambda item: item.source):
        number = segments = chars = size = 0
        pieces: list[Piece] = []
        for item in group:
            chars_before = chars
            for text, ends_document, position in read_segments(item, text_key, chars, chunking):
                check()
                held_out, segments = is_held_out(segments, share), segments + 1
                # Where validation text is taken out, the texts before and after it do not continue each other.
                separated = ends_document or held_out or is_held_out(segments, share)
                pieces.append(Piece(text, "val" if held_out else "train", separated))
                chars, size = chars + len(text), size + len(text)
                if size >= chunk_size:
                    yield Chunk(source, number, pieces, read_before + position)
                    number, size, pieces = number + 1, 0, []
            if chars == chars_before:
                empty.append(item.name)
            read_before += item.size
        if pieces:
            yield Chunk(source, number, pieces, read_before)
    if len(empty) == len(items):
        raise UsageError(f"{some(empty)}: contains no text")
    if empty:
        work.notes.append(f"warning: left out: {some(empty)} (contains no text)")


def _write_parts(work: _Work, shard: tuple[int, int], check: Callable[[], None]) -> list[Path]:
    """Write the part files of each chunk of a shard, unless an earlier start did; the paths of all, in order."""
    position = tokens = kept = 0
    paths: list[Path] = []

    def advance(chunk: Chunk, new_tokens: int) -> None:
        nonlocal position, tokens
        position, tokens = max(position, chunk.position), tokens + new_tokens
        total = work.display.total
        amount = f"{position / 1e6:.1f} of {total / 1e6:.1f} MB" if total else f"{position:,} rows"
        work.display.update(position, f"{chunk.source}: {amount} read, {tokens / 1e6:.1f} M tokens")

    def missing() -> Iterator[Chunk]:
        nonlocal kept
        for chunk in islice(_chunks(work, check), shard[0] - 1, None, shard[1]):
            parts = work.target.parts(chunk).values()
            paths.extend(parts)
            if (kept_tokens := _tokens_in(parts)) is None:
                yield chunk
            else:
                kept += 1
                advance(chunk, kept_tokens)

    with contextlib.closing(write_parts(missing(), work.target, work.workers, check)) as written:
        for chunk, new_tokens in written:
            advance(chunk, new_tokens)
    if kept:
        work.display.say(f"chunks kept from an earlier start: {kept}")
    return paths


def _tokens_in(paths: Iterable[Path]) -> int | None:
    """The number of tokens in part files; None if one of them is missing or damaged."""
    try:
        parts = [TokenFile.open(path) for path in paths]
        for part in parts:
            part.verify()
    except SlopeError:
        return None
    return sum(part.header.tokens for part in parts)


def _merge(target: Target, paths: list[Path], check: Callable[[], None]) -> list[TokenFile]:
    """Join the parts of each split of a source, in order, into one file; `check` is called for each part."""

    def split_and_source(part: TokenFile) -> tuple[str, str]:
        return part.header.split, part.header.source

    def tokens(parts: list[TokenFile]) -> Iterator[Tokens]:
        for part in parts:
            check()
            yield from part.pieces()

    files = []
    for split in SPLITS:
        (target.out / split).mkdir(exist_ok=True)
    # Not what the folder lists: a network file system may list late what another machine has written.
    all_parts = [TokenFile.open(path) for path in paths]
    for (split, source), group in groupby(sorted(all_parts, key=split_and_source), key=split_and_source):
        parts = list(group)
        if any(part.header.tokens for part in parts):
            text_bytes = sum(part.header.text_bytes for part in parts)
            files.append(target.write(target.out / split / f"{source}.tok", tokens(parts), source, split, text_bytes))
    return files
