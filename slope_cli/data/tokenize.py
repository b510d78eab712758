"""Tokenize chunks of text into part files, in this process or in several."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slope_cli.data.dataset import UNFINISHED
from slope_cli.data.token_file import TokenFile, Tokens, write_token_file
from slope_cli.errors import SlopeError

BATCH_TEXTS = 32
POLL_SECONDS = 0.1
SPLITS = ("train", "val")
SHARED_MEMORY = "/dev/shm"
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGUSR2)
"""The signals that a terminal and SLURM send to a whole process group; only the parent of the workers handles them."""


class Piece(NamedTuple):
    """A segment of text with the split that it belongs to. separated: whether a separator follows it."""

    text: str
    split: str
    separated: bool


@dataclass(frozen=True)
class Chunk:
    """Consecutive pieces of a source. position: how much of all inputs has been read at its end, in bytes or rows."""

    source: str
    number: int
    pieces: list[Piece]
    position: int


@dataclass(frozen=True)
class Target:
    """The data set to be written: its folder, which already contains the tokenizer, and the tokenizer's properties.

    tokenizer: its name. begin_id: the id that begins a text, unless it is the separator.
    """

    out: Path
    tokenizer: str
    byte_level: bool
    vocab_size: int
    separator_id: int
    begin_id: int | None = None

    def parts(self, chunk: Chunk) -> dict[str, Path]:
        """The part file of each split in the chunk."""
        name = f"{chunk.source}-{chunk.number:06d}"
        splits = {piece.split for piece in chunk.pieces}
        return {split: self.out / UNFINISHED / f"{name}.{split}.tok" for split in SPLITS if split in splits}

    def write(self, path: Path, ids: Iterable[Tokens], source: str, split: str, text_bytes: int) -> TokenFile:
        """Write a token file of this data set."""
        return write_token_file(
            path,
            ids,
            source=source,
            split=split,
            vocab_size=self.vocab_size,
            separator_id=self.separator_id,
            tokenizer=self.tokenizer,
            text_bytes=text_bytes,
        )


class ChunkTokenizer:
    """Tokenizes chunks into part files; each worker has one."""

    def __init__(self, target: Target) -> None:
        # The processes are the parallelism: the library's own threads would compete for the same cores.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from tokenizers import Tokenizer

        self._target = target
        self._tokenizer = Tokenizer.from_file(str(target.out / "tokenizer" / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text (the setting is not saved)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: list[str]) -> list[Tokens]:
        """The ids of each text, without special tokens: one-dimensional uint8 or uint32."""
        if self._target.byte_level:  # the ids that the library gives, ten times as fast
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]
        ids: list[Tokens] = []
        for at in range(0, len(texts), BATCH_TEXTS):
            encodings = self._tokenizer.encode_batch_fast(texts[at : at + BATCH_TEXTS], add_special_tokens=False)
            ids += [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return ids

    def __call__(self, chunk: Chunk) -> int:
        """Write the part files of a chunk, each atomically; returns the number of tokens in them."""
        target = self._target
        separator = np.array([i for i in (target.separator_id, target.begin_id) if i is not None], np.uint32)
        encoded = self.encode([piece.text for piece in chunk.pieces])
        tokens = 0
        for split, path in target.parts(chunk).items():
            chosen = [(piece, ids) for piece, ids in zip(chunk.pieces, encoded, strict=True) if piece.split == split]
            stream = (part for piece, ids in chosen for part in ((ids, separator) if piece.separated else (ids,)))
            text_bytes = sum(len(piece.text.encode()) for piece, _ in chosen)
            tokens += target.write(path, stream, chunk.source, split, text_bytes).header.tokens
        return tokens


def write_parts(
    chunks: Iterable[Chunk], target: Target, workers: int, check: Callable[[], None]
) -> Generator[tuple[Chunk, int]]:
    """Write the part files of chunks, in this process if `workers` is 1, else in that many others.

    Takes the chunks as they are needed, at most two per worker. Yields each when its parts are on the disk, in any
    order, with its number of tokens. `check` is called often while this process waits; if it raises, the running chunks
    are finished first. SlopeError if the disk is full or a worker was killed.
    """
    if workers == 1:
        tokenizer = ChunkTokenizer(target)
        for chunk in chunks:
            yield chunk, tokenizer(chunk)
        return
    context = multiprocessing.get_context("spawn")
    running: dict[Future[int], Chunk] = {}

    def finished(most: int) -> Iterator[tuple[Chunk, int]]:
        """Wait until at most `most` chunks are running."""
        while len(running) > most:
            check()
            for future in wait(running, POLL_SECONDS, FIRST_COMPLETED).done:
                yield running.pop(future), future.result()

    lifeline, held_end = context.Pipe(duplex=False)
    with lifeline, held_end:  # the workers end when it is closed
        with _signals_held_back(), _semaphores():  # held back from a helper process that this starts
            pool = ProcessPoolExecutor(workers, context, _start_worker, (target, lifeline))
        try:
            for chunk in chunks:
                with _signals_held_back():  # from the worker that this starts while there are too few
                    running[pool.submit(_run_in_worker, chunk)] = chunk
                yield from finished(most=2 * workers - 1)
            yield from finished(most=0)
        except BrokenProcessPool as error:
            check()  # a SIGTERM to the whole group ends the workers, too
            raise SlopeError(
                "a tokenizing process was killed (out of memory?); run the same command again, with fewer workers"
            ) from error
        except (KeyboardInterrupt, GeneratorExit):
            held_end.close()  # do not wait for the running chunks
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # waits for the running chunks


@contextmanager
def _semaphores() -> Iterator[None]:
    """SlopeError if a semaphore of several processes, which is a file in /dev/shm, cannot be made."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # of the pipes between the processes
            raise
        raise SlopeError(
            f"{SHARED_MEMORY}: several processes cannot share it: {error.strerror}; free space there (a container: "
            "--shm-size), or prepare in one process (--workers 1)"
        ) from error


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block the signals that workers ignore. A new process inherits this: none can end it before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: ChunkTokenizer | None = None


def _start_worker(target: Target, lifeline: Connection) -> None:
    global _worker
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    _worker = ChunkTokenizer(target)


def _end_with_parent(lifeline: Connection) -> None:
    """End this process when the parent closes its end of the pipe, by intent or because it was killed."""
    lifeline.poll(None)
    os._exit(1)


def _run_in_worker(chunk: Chunk) -> int:
    if _worker is None:
        raise RuntimeError("the worker was not started")
    return _worker(chunk)
