"""Text sources: find inputs, decompress them, and cut their documents into segments."""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from slope_cli.data.folders import text_files
from slope_cli.data.formats import (
    COMPRESSIONS,
    ROWS,
    SHARD,
    TEXTS,
    UTF_8,
    Format,
    documents,
    format_of,
    known_encoding,
    needed,
    text_of,
    whole_characters,
    why_unread,
)
from slope_cli.data.token_file import read_error
from slope_cli.errors import SlopeError, UsageError, first_line, nearest

FOLDER_SOURCES = 16
FIRST_FORMATS = ("", ".jsonl", ".json", ".parquet")
"""The rows that version 0.1 read, by these endings only."""


@dataclass(frozen=True)
class FileInput:
    """One file of a source. Its size in bytes and its modification time identify its content.

    path: as it was given, but absolute: its name says the format. target: where the path leads, through links.
    encoding: Python's name of that of its text. held_out: whether all of it is validation text.
    """

    source: str
    path: Path
    target: str
    size: int
    mtime_ns: int
    encoding: str = UTF_8
    held_out: bool = False

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @cached_property
    def format(self) -> Format:
        """The format that the name means."""
        return format_of(self.path, self.encoding)

    def identity(self) -> dict[str, Any]:
        """The fields that identify the input, as JSON."""
        identity = {"source": self.source, "path": self.target, "size": self.size, "mtime_ns": self.mtime_ns}
        if self.encoding != UTF_8:
            identity["encoding"] = self.encoding
        if self.held_out:
            identity["held_out"] = True
        if self.format.rows in FIRST_FORMATS and self.target.endswith(self.format.name):
            return identity  # a file that has always been read in this way, which earlier data sets list without it
        return identity | {"format": self.format.name}


@dataclass(frozen=True)
class HubInput:
    """One split of a Hugging Face data set, which is streamed: its size is unknown, and is 0 here."""

    source: str
    name: str
    config_name: str | None
    split: str
    size: int = 0
    held_out: bool = False

    def identity(self) -> dict[str, Any]:
        """The fields that identify the input, as JSON."""
        return {"source": self.source, "dataset": self.name, "config": self.config_name, "split": self.split}


Input = FileInput | HubInput


@dataclass(frozen=True)
class Chunking:
    """Sizes in characters: documents are cut into segments, and segments are grouped into chunks.

    Segments that begin before `short_until` in their source are short, so that one of them is a small part of a small
    source. Chunks are small, because a killed process loses its current ones; inputs above `large_input` bytes have
    larger ones, to limit their number.
    """

    short_segment: int = 1 << 14
    short_until: int = 1 << 20
    segment: int = 1 << 16
    chunk: int = 4_000_000
    large_chunk: int = 32_000_000
    large_input: int = 1 << 30

    def segment_limit(self, before: int) -> int:
        """The most characters of a segment that begins after `before` characters of its source."""
        return self.short_segment if before < self.short_until else self.segment

    def chunk_size(self, inputs: Sequence[Input]) -> int:
        """The number of characters at which a chunk of these inputs is full. Inputs of unknown size count as large."""
        sizes = [item.size for item in inputs]
        return self.chunk if all(sizes) and sum(sizes) <= self.large_input else self.large_chunk


DEFAULT_CHUNKING = Chunking()


class Segment(NamedTuple):
    """A document or a part of one, see `cut`. position: the bytes of the file, or rows of the data set, read so far."""

    text: str
    ends_document: bool
    position: int


# ----------------------------------------------------------------------------------------------- which inputs


def find_inputs(
    given: Sequence[str | Input],
    *,
    val: Sequence[str] = (),
    split: str = "train",
    config_name: str | None = None,
    encoding: str = UTF_8,
    chunking: Chunking = DEFAULT_CHUNKING,
    say: Callable[[str], None] = lambda _: None,
) -> list[Input]:
    """The inputs that command-line arguments name, grouped by source, in a fixed order.

    An argument is a file, a folder, the name of a Hugging Face data set, or any of these as SOURCE=ARGUMENT. Of a
    folder `text_files` are taken, and `say` is told what is left out; a file that is named itself is always taken.
    Otherwise `source_name` names the source, so that shards are one source. But a folder
    that would be more than 16 sources, or that contains only plain texts of one segment each, is one source with the
    folder's name: such short texts cannot be split into training and validation text. An `Input` is kept as it is.
    `val` names files and folders in the same way, all of whose text is validation text.

    UsageError if an input is missing, empty, not readable or given twice, or if there is none.
    """
    items: list[Input] = []
    encoding = known_encoding(encoding)

    def local(argument: str) -> list[FileInput]:
        source, name = _split_name(argument)
        path = Path(name).expanduser()
        if path.is_dir():
            return _folder_inputs(path, source, encoding, chunking, say)
        return [_file_input(path, source, encoding)] if path.exists() else []

    for argument in given:
        if not isinstance(argument, str):
            items.append(argument)
        elif files := local(argument):
            items += files
        else:
            source, name = _split_name(argument)
            items.append(_hub_input(name, source, config_name, split))
    if not items:
        raise UsageError("no inputs: give text, JSONL or parquet files, a folder of these, or a data set's name")
    for argument in val:
        if not (files := local(argument)):
            raise UsageError(f"{argument}: no such file or folder; validation text is given as files or folders")
        items += [replace(item, held_out=True) for item in files]
    for name, count in Counter(item.target for item in items if isinstance(item, FileInput)).most_common(1):
        if count > 1:
            raise UsageError(f"{name}: given twice")
    return sorted(items, key=lambda item: (item.source, item.name))


def source_name(path: Path) -> str:
    """The file's name without endings and shard number: `part-00012-of-00100.jsonl.gz` is of the source `part`."""
    stem = SHARD.sub("", format_of(path).stem)
    if not stem or stem.isdigit():
        stem = path.parent.name or "text"
    return _plain_name(stem)


def _plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-") or "text"


def _split_name(argument: str) -> tuple[str | None, str]:
    """The source's name, if the argument gives one, and the rest; UsageError for an empty one."""
    source, rest = None, argument
    if "=" in argument and not Path(argument).expanduser().exists():
        source, rest = argument.split("=", 1)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", source):
            raise UsageError(f"{argument}: name a source with letters, digits, dots, dashes and underscores only")
    if not rest:  # a variable of a shell script that is not set; as a path it would be this folder
        raise UsageError(f"{argument!r}: names no file, folder or data set; write . for this folder")
    return source, rest


def _folder_inputs(
    folder: Path, source: str | None, encoding: str, chunking: Chunking, say: Callable[[str], None]
) -> list[FileInput]:
    items = [
        FileInput(source or source_name(path), path, target, status.st_size, status.st_mtime_ns, encoding)
        for path, target, status in text_files(folder, encoding, say)
    ]
    sources = len({item.source for item in items})
    all_short = all(not item.format.name and item.size <= chunking.short_segment for item in items)
    if source is None and (sources > FOLDER_SOURCES or (sources > 1 and all_short)):
        source = _plain_name(folder.resolve().name)
        return [replace(item, source=source) for item in items]
    return items


def _file_input(path: Path, source: str | None, encoding: str) -> FileInput:
    path = Path(os.path.abspath(path))
    if not path.is_file():
        raise UsageError(f"{path}: is neither a file nor a folder; a pipe cannot be read again after a stop")
    status = path.stat()
    if status.st_size == 0:
        raise UsageError(f"{path}: is empty; leave it out")
    if not os.access(path, os.R_OK):
        raise UsageError(read_error(path, PermissionError(errno.EACCES, "Permission denied")))
    where = path, str(path.resolve())
    item = FileInput(source or source_name(path), *where, status.st_size, status.st_mtime_ns, encoding)
    if reason := why_unread(path, item.format):
        raise UsageError(f"{path}: {reason}")
    return item


def _hub_input(name: str, source: str | None, config_name: str | None, split: str) -> HubInput:
    looks_local = name.lower().endswith((*TEXTS, *ROWS, *COMPRESSIONS, "/")) or name.startswith((".", "/", "~"))
    near = _near_paths(name)
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or (near and "/" in name):
        raise UsageError(f"{name}: no such file or folder{near or '; correct the path'}")
    return HubInput(source or source_name(Path(name.rsplit("/", 1)[-1])), name, config_name, split)


def _near_paths(name: str) -> str:
    """A question about the files and folders with the nearest names to one that is not there, to end a line with."""
    path = Path(name).expanduser()
    try:
        near = [] if path.exists() else nearest(path.name, sorted(os.listdir(path.parent)))
    except OSError:
        return ""
    return f"; did you mean {' or '.join(str(path.parent / each) for each in near)}?" if near else ""


# -------------------------------------------------------------------------------------------------- reading


def read_segments(item: Input, text_key: str, before: int, chunking: Chunking = DEFAULT_CHUNKING) -> Iterator[Segment]:
    """Read the text of an input in order, cut into segments; its source has `before` characters before it.

    UsageError, naming file and line, if it is damaged or not text. SlopeError if a download stops halfway.
    """
    if isinstance(item, HubInput):
        return _hub_segments(item, text_key, before, chunking)
    return _file_segments(item, text_key, before, chunking)


def _hub_segments(item: HubInput, text_key: str, before: int, chunking: Chunking) -> Iterator[Segment]:
    for number, text in enumerate(hub_texts(item, text_key), 1):
        yield from (Segment(part, ends, number) for part, ends in cut([text], before, chunking))
        before += len(text)


def _file_segments(item: FileInput, text_key: str, before: int, chunking: Chunking) -> Iterator[Segment]:
    try:
        with open(item.path, "rb") as raw:
            for pieces in documents(raw, item.path, item.format, text_key):
                for part, ends in cut(pieces, before, chunking):
                    before += len(part)
                    yield Segment(part, ends, raw.tell())
    except EOFError as error:
        raise UsageError(f"{item.path}: truncated, the compressed data end early; fetch the file again") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UsageError(_damaged(item, error)) from error
    except OSError as error:  # bz2 and pyarrow raise it for bad data, with no number
        raise UsageError(read_error(item.path, error) if error.errno else _damaged(item, error)) from error


def _damaged(item: FileInput, error: Exception) -> str:
    ending = item.format.compression or item.format.rows
    return f"{item.path}: damaged {ending} data ({first_line(error)}); fetch the file again"


def cut(pieces: Iterable[str], before: int, chunking: Chunking = DEFAULT_CHUNKING) -> Iterator[tuple[str, bool]]:
    """Cut a document, in pieces of any size, into segments; its source has `before` characters before it.

    Yields each segment with whether it ends the document. A cut comes after the last line break that fits, else before
    the last space, else anywhere. Nothing is lost; an empty document yields nothing.
    """
    held = ""
    for piece in pieces:
        held += piece
        at = 0
        while len(held) - at > (limit := chunking.segment_limit(before)):
            end = _cut_place(held, at, at + limit)
            yield held[at:end], False
            before += end - at
            at = end
        held = held[at:]
    if held:
        yield held, True


def _cut_place(text: str, start: int, limit: int) -> int:
    line = text.rfind("\n", start, limit) + 1
    if line > start:
        return line
    space = text.rfind(" ", start + 1, limit)
    return space if space > start else limit


def hub_texts(item: HubInput, text_key: str) -> Iterator[str]:
    """Stream the texts of a Hugging Face data set.

    UsageError if it could not be downloaded, or has no such key. SlopeError if the download stops halfway.
    """
    datasets = needed("datasets", f"to read the data set {item.name} (there is no file of that name)")
    number = 0
    try:
        rows = datasets.load_dataset(item.name, item.config_name, split=item.split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield whole_characters(text_of(row, text_key, f"{item.name} row {number}"))
    except UsageError:
        raise
    except Exception as error:  # hub, HTTP, config and split errors share no base class
        if number:
            raise SlopeError(
                f"{item.name}: the download stopped after row {number} ({first_line(error)}); "
                f"run the same command again"
            ) from error
        raise UsageError(
            f"{item.name}: no such file or folder, and it could not be downloaded from the Hugging Face Hub "
            f"({first_line(error)}){_near_paths(item.name)}"
        ) from error
