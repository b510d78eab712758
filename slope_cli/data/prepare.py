"""`slope data prepare`: tokenize text into a folder of token files, in parallel, resumable after any kind of stop.

This process reads the text and cuts it into chunks. `write_parts` writes a part file for each split of a chunk, and at
the end the parts become one file for each split of a source. The parts of a stopped process are checked and kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope_cli.data.dataset import MANIFEST, NO_VALIDATION, UNFINISHED, Dataset, open_dataset, write_manifest
from slope_cli.data.folders import some
from slope_cli.data.sources import DEFAULT_CHUNKING, Chunking, Input, find_inputs, read_segments
from slope_cli.data.token_file import TokenFile, Tokens, read_error
from slope_cli.data.tokenize import SPLITS, Chunk, Piece, Target, write_parts
from slope_cli.data.tokenizer import BYTES, begin_id, load_tokenizer, save_tokenizer, separator_id, vocabulary_size
from slope_cli.distributed.signals import StopFlag
from slope_cli.errors import SlopeError, UsageError
from slope_cli.report.progress import Progress
from slope_cli.utils.files import LOCK, claimed_folder, read_sealed, write_sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


LISTED_INPUTS = 1000


def prepare(
    inputs: Sequence[str | Input],
    out: Path,
    *,
    tokenizer: str = BYTES,
    text_key: str = "text",
    val_fraction: float = 0.01,
    workers: int | None = None,
    split: str = "train",
    config_name: str | None = None,
    chunking: Chunking = DEFAULT_CHUNKING,
    progress: bool = True,
    stop: StopFlag | None = None,
) -> Dataset:
    """Tokenize text, JSON, CSV and parquet files, folders of these, or Hugging Face data sets into the folder `out`.

    `find_inputs` says what inputs and their sources are, `is_held_out` which segments of a source (documents, or the
    parts that `cut` makes of long ones) go to its validation file. The same call resumes a preparation that was
    stopped, and returns at once when it is finished. It needs twice the disk space of the result.

    Args:
        workers: the number of processes, by default one per core; 1 works in this process. The result does not depend
            on it. Workers are spawned, so a script that calls this needs an `if __name__ == "__main__"` guard.
        progress: show progress on standard error.
        stop: an open flag; by default one is opened here.

    Raises:
        UsageError: an input or option is wrong, or the folder contains something else.
        Stopped: a signal came; the finished chunks stay on the disk.
        SlopeError: the disk is full, or a process was killed.
    """
    if not 0 <= val_fraction <= 0.5:
        raise UsageError(f"--val-fraction {val_fraction}: must be from 0 (no validation text) to 0.5")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: must be 1 or more")
    started, out = time.monotonic(), Path(out).expanduser()
    notes: list[str] = []
    items = find_inputs(inputs, split=split, config_name=config_name, chunking=chunking, say=notes.append)
    tok = load_tokenizer(tokenizer)
    target = _target(out, tokenizer, tok)
    made_from = _made_from(items, text_key, val_fraction, chunking, target, tok)
    display = Progress(sum(item.size for item in items), quiet=not progress)
    try:
        with contextlib.closing(display), _claimed(out) as unmade:
            if unmade:
                with contextlib.nullcontext(stop) if stop else StopFlag() as stop:
                    check, share = partial(stop.check, out), Fraction(str(val_fraction))
                    chunks = _chunks(items, text_key, share, chunking, check, notes.append)
                    _write(target, tok, chunks, made_from, workers, check, display)
            else:
                _require_same(out, open_dataset(out, verify=False).made_from, made_from, "a finished data set")
                shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # a process may have been killed before it did
    except OSError as error:
        raise SlopeError(read_error(out, error, "written")) from error
    dataset = open_dataset(out, verify=False)
    for line in (*notes, *_outcome(dataset, unmade, val_fraction, time.monotonic() - started)):
        display.say(line)
    return dataset


def _outcome(dataset: Dataset, is_new: bool, val_fraction: float, seconds: float) -> Iterator[str]:
    if not is_new:
        yield f"{dataset.folder}: already prepared from the same inputs, nothing to do"
        return
    if val_fraction and not dataset.val:
        yield f"{dataset.folder}: has no validation text; {NO_VALIDATION}"
    tokens = sum(file.header.tokens for file in (*dataset.train, *dataset.val.values()))
    yield f"prepared: {tokens:,} tokens in {seconds:.1f} s"


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[bool]:
    """Lock the folder. Yields whether the data set is to be made: another process may finish it at any moment."""
    manifest = out / MANIFEST
    with contextlib.ExitStack() as lock:
        if not manifest.exists():
            try:
                lock.enter_context(
                    claimed_folder(out, "data set", lambda _: (out / UNFINISHED).is_dir() or manifest.exists())
                )
            except UsageError:
                if not manifest.exists():
                    raise
        yield not manifest.exists()
        (out / LOCK).unlink(missing_ok=True)


def _write(
    target: Target,
    tok: PreTrainedTokenizerFast,
    chunks: Iterator[Chunk],
    made_from: dict[str, Any],
    workers: int | None,
    check: Callable[[], None],
    display: Progress,
) -> None:
    """Write the files of the data set, and the manifest last."""
    _settle_parts(target.out, made_from)
    save_tokenizer(tok, target.out / "tokenizer")
    _write_parts(chunks, target, workers, check, display)
    write_manifest(target.out, _merge(target, check), made_from)
    # From here on another process takes the data set for finished, and may remove the parts, too.
    shutil.rmtree(target.out / UNFINISHED, ignore_errors=True)


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


def _settle_parts(out: Path, made_from: dict[str, Any]) -> None:
    """Keep the parts of an earlier start; UsageError if they were made from something else."""
    parts, plan = out / UNFINISHED, out / UNFINISHED / "plan.json"
    parts.mkdir(exist_ok=True)
    if any(parts.glob("*.tok")):
        try:
            earlier = read_sealed(plan)
        except SlopeError as error:
            raise SlopeError(f"{error}; delete the folder {out} and prepare again") from None
        _require_same(out, earlier, made_from, "an unfinished preparation")
    else:  # an earlier start left no parts, so its settings do not matter
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
        write_sealed(plan, made_from)


def _require_same(out: Path, old: dict[str, Any], new: dict[str, Any], what: str) -> None:
    if isinstance(listed := old.get("inputs"), list):  # any number of them, by an earlier version
        old = old | {"inputs": _listing(listed)}
    if differing := [key for key in new if old.get(key) != new[key]]:
        raise UsageError(
            f"{out}: contains {what} made with other {', '.join(differing)}; "
            f"repeat that command, choose another folder, or delete this one"
        )


def _chunks(
    items: list[Input],
    text_key: str,
    share: Fraction,
    chunking: Chunking,
    check: Callable[[], None],
    say: Callable[[str], None],
) -> Iterator[Chunk]:
    """Read all inputs; `check` is called for each segment, `say` with the inputs that contain no text.

    UsageError if all of them contain none.
    """
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
        say(f"warning: left out: {some(empty)} (contains no text)")


def _write_parts(
    chunks: Iterator[Chunk], target: Target, workers: int | None, check: Callable[[], None], display: Progress
) -> None:
    """Write the part files of each chunk, unless an earlier start did."""
    # Bytes are tokenized faster than they are read: more processes would only slow it down.
    workers = workers or (1 if target.byte_level else len(os.sched_getaffinity(0)))
    position = tokens = kept = 0

    def advance(chunk: Chunk, new_tokens: int) -> None:
        nonlocal position, tokens
        position, tokens = max(position, chunk.position), tokens + new_tokens
        amount = f"{position / 1e6:.1f} of {display.total / 1e6:.1f} MB" if display.total else f"{position:,} rows"
        display.update(position, f"{chunk.source}: {amount} read, {tokens / 1e6:.1f} M tokens")

    def missing() -> Iterator[Chunk]:
        nonlocal kept
        for chunk in chunks:
            if (kept_tokens := _tokens_in(target.parts(chunk).values())) is None:
                yield chunk
            else:
                kept += 1
                advance(chunk, kept_tokens)

    with contextlib.closing(write_parts(missing(), target, workers, check)) as written:
        for chunk, new_tokens in written:
            advance(chunk, new_tokens)
    if kept:
        display.say(f"chunks kept from an earlier start: {kept}")


def _tokens_in(paths: Iterable[Path]) -> int | None:
    """The number of tokens in part files; None if one of them is missing or damaged."""
    try:
        parts = [TokenFile.open(path) for path in paths]
        for part in parts:
            part.verify()
    except SlopeError:
        return None
    return sum(part.header.tokens for part in parts)


def _merge(target: Target, check: Callable[[], None]) -> list[TokenFile]:
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
    all_parts = [TokenFile.open(path) for path in sorted((target.out / UNFINISHED).glob("*.tok"))]
    for (split, source), group in groupby(sorted(all_parts, key=split_and_source), key=split_and_source):
        parts = list(group)
        if any(part.header.tokens for part in parts):
            text_bytes = sum(part.header.text_bytes for part in parts)
            files.append(target.write(target.out / split / f"{source}.tok", tokens(parts), source, split, text_bytes))
    return files
