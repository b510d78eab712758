"""Text sources: find inputs, decompress them, and cut their documents into segments."""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, cast

from slope_cli.errors import SlopeError, UsageError, did_you_mean, first_line

FOLDER_SOURCES = 16
READ_BYTES = 1 << 20
COMPRESSIONS = (".gz", ".xz", ".zst")
ROWS = (".jsonl", ".json", ".parquet")
FORMATS = (".txt", ".md", *ROWS)
SHARD = re.compile(r"[-_.]\d+([-_.]of[-_.]\d+)?(-[0-9a-f]{16})?$")


@dataclass(frozen=True)
class FileInput:
    """One file of a source. Its size in bytes and its modification time identify its content."""

    source: str
    path: Path
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def identity(self) -> dict[str, Any]:
        """The fields that identify the input, as JSON."""
        return {"source": self.source, "path": self.name, "size": self.size, "mtime_ns": self.mtime_ns}


@dataclass(frozen=True)
class HubInput:
    """One split of a Hugging Face data set, which is streamed: its size is unknown, and is 0 here."""

    source: str
    name: str
    config_name: str | None
    split: str
    size: int = 0

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
    split: str = "train",
    config_name: str | None = None,
    chunking: Chunking = DEFAULT_CHUNKING,
) -> list[Input]:
    """The inputs that command-line arguments name, grouped by source, in a fixed order.

    An argument is a file, a folder (all files below it except hidden ones), the name of a Hugging Face data set, or any
    of these as SOURCE=ARGUMENT. Otherwise `source_name` names the source, so that shards are one source. But a folder
    that would be more than 16 sources, or that contains only plain texts of one segment each, is one source with the
    folder's name: such short texts cannot be split into training and validation text. An `Input` is kept as it is.

    UsageError if an input is missing, empty, not readable or given twice, or if there is none.
    """
    items: list[Input] = []
    for argument in given:
        if not isinstance(argument, str):
            items.append(argument)
            continue
        source, name = _split_name(argument)
        path = Path(name).expanduser()
        if path.is_dir():
            items += _folder_inputs(path, source, chunking)
        elif path.exists():
            items.append(_file_input(path, source))
        else:
            items.append(_hub_input(name, source, config_name, split))
    if not items:
        raise UsageError("no inputs: give text, JSONL or parquet files, a folder of these, or a data set's name")
    for name, count in Counter(item.name for item in items if isinstance(item, FileInput)).most_common(1):
        if count > 1:
            raise UsageError(f"{name}: given twice")
    return sorted(items, key=lambda item: (item.source, item.name))


def source_name(path: Path) -> str:
    """The file's name without endings and shard number: `part-00012-of-00100.jsonl.gz` is of the source `part`."""
    stem = SHARD.sub("", _unpacked(path).stem)
    if not stem or stem.isdigit():
        stem = path.parent.name or "text"
    return _plain_name(stem)


def _unpacked(path: Path) -> Path:
    """The path without the ending of a compression."""
    return path.with_suffix("") if path.suffix in COMPRESSIONS else path


def _plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-") or "text"


def _split_name(argument: str) -> tuple[str | None, str]:
    """The source's name, if the argument gives one, and the rest."""
    if "=" not in argument or Path(argument).expanduser().exists():
        return None, argument
    source, rest = argument.split("=", 1)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", source):
        raise UsageError(f"{argument}: name a source with letters, digits, dots, dashes and underscores only")
    return source, rest


def _folder_inputs(folder: Path, source: str | None, chunking: Chunking) -> list[FileInput]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not paths:
        raise UsageError(f"{folder}: contains no files")
    items = [_file_input(path, source) for path in paths]
    sources = len({item.source for item in items})
    all_short = all(
        item.path.suffix not in (*ROWS, *COMPRESSIONS) and item.size <= chunking.short_segment for item in items
    )
    if source is None and (sources > FOLDER_SOURCES or (sources > 1 and all_short)):
        return [replace(item, source=_plain_name(folder.resolve().name)) for item in items]
    return items


def _file_input(path: Path, source: str | None) -> FileInput:
    if not path.is_file():
        raise UsageError(f"{path}: is neither a file nor a folder; a pipe cannot be read again after a stop")
    status = path.stat()
    if status.st_size == 0:
        raise UsageError(f"{path}: is empty")
    return FileInput(source or source_name(path), path.resolve(), status.st_size, status.st_mtime_ns)


def _hub_input(name: str, source: str | None, config_name: str | None, split: str) -> HubInput:
    looks_local = name.endswith((*FORMATS, *COMPRESSIONS, "/")) or name.startswith((".", "/", "~"))
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(f"{name}: no such file or folder")
    return HubInput(source or source_name(Path(name.rsplit("/", 1)[-1])), name, config_name, split)


# -------------------------------------------------------------------------------------------------- reading


def read_segments(item: Input, text_key: str, before: int, chunking: Chunking = DEFAULT_CHUNKING) -> Iterator[Segment]:
    """Read the text of an input in order, cut into segments; its source has `before` characters before it.

    UsageError, naming file and line, if it is damaged, not text, or empty. SlopeError if a download stops halfway.
    """
    if isinstance(item, HubInput):
        segments = _hub_segments(item, text_key, before, chunking)
    else:
        segments = _file_segments(item, text_key, before, chunking)
    is_empty = True
    for segment in segments:
        is_empty = False
        yield segment
    if is_empty:
        raise UsageError(f"{item.name}: contains no text")


def _hub_segments(item: HubInput, text_key: str, before: int, chunking: Chunking) -> Iterator[Segment]:
    for number, text in enumerate(hub_texts(item, text_key), 1):
        yield from (Segment(part, ends, number) for part, ends in cut([text], before, chunking))
        before += len(text)


def _file_segments(item: FileInput, text_key: str, before: int, chunking: Chunking) -> Iterator[Segment]:
    try:
        with open(item.path, "rb") as raw:
            for pieces in _documents(raw, item.path, text_key):
                for part, ends in cut(pieces, before, chunking):
                    before += len(part)
                    yield Segment(part, ends, raw.tell())
    except EOFError as error:
        raise UsageError(f"{item.path}: truncated, the compressed data end early; fetch the file again") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise UsageError(f"{item.path}: damaged {item.path.suffix} data ({error})") from error
    except OSError as error:
        raise UsageError(f"{item.path}: cannot be read: {error.strerror or error}") from error


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


def _documents(raw: BinaryIO, path: Path, text_key: str) -> Iterator[Iterable[str]]:
    """The documents of a file, each in pieces. A JSON or parquet row is a document, and so is a file of plain text."""
    stream, ending = _decompressed(raw, path.suffix), _unpacked(path).suffix
    if ending in (".jsonl", ".json"):
        return ([text] for text in _json_texts(stream, path, text_key))
    if ending == ".parquet":
        return ([text] for text in _parquet_texts(stream, path, text_key))
    return iter([_plain_text(stream, path)])


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(raw))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(raw))
    return io.BufferedReader(_ZstdFrames(raw), READ_BYTES) if suffix == ".zst" else raw


class _ZstdFrames(io.RawIOBase):
    """Consecutive Zstandard frames. Unlike the library's own reader, it reports a truncated one (EOFError)."""

    def __init__(self, raw: BinaryIO) -> None:
        zstandard = needed("zstandard", "to read .zst files")
        self._raw, self._error = raw, zstandard.ZstdError
        # `zstd --long=31` needs 2 GiB; the library refuses such files by default.
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None
        self._ready, self._unread = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._unread or self._raw.read(READ_BYTES)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise zlib.error(str(error)) from error
            self._unread = self._frame.unused_data if self._frame.eof else b""
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _plain_text(stream: BinaryIO, path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while True:
        block = stream.read(READ_BYTES)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 text ({error.reason}); convert it, or leave it out") from error
        if "\0" in text:
            raise UsageError(f"{path}: a binary file (it contains NUL bytes), not text; leave it out")
        yield text
        if not block:
            return


def _json_texts(stream: BinaryIO, path: Path, text_key: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}:{number}: not UTF-8 text ({error.reason})") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: not a JSON line ({error}); write one object per line") from error
        text = _text_of(row, text_key, f"{path}:{number}")
        # Only a \u escape can put half a surrogate pair into a string, which no tokenizer accepts.
        yield whole_characters(text) if b"\\ud" in line or b"\\uD" in line else text


def _text_of(row: Any, text_key: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a {type(row).__name__} instead of an object with the key {text_key!r}")
    if text_key not in row:
        raise _no_such_field(where, "key", text_key, row)
    text = row[text_key]
    if text is not None and not isinstance(text, str):
        raise UsageError(
            f"{where}: {text_key!r} is a {type(text).__name__}, not text; choose another key with --text-key"
        )
    return text or ""


def _no_such_field(where: object, kind: str, name: str, known: Collection[str]) -> UsageError:
    hint = did_you_mean(name, known) if known else "there is none"
    return UsageError(f"{where}: no {kind} {name!r}: {hint}; choose one with --text-key")


def whole_characters(text: str) -> str:
    """The text with pairs of surrogates joined, and single ones replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _parquet_texts(stream: BinaryIO, path: Path, text_key: str) -> Iterator[str]:
    pyarrow = needed("pyarrow", "to read parquet files")
    parquet = needed("pyarrow.parquet", "to read parquet files")
    try:
        # Parquet is read from its end, so an outer compression must be undone first.
        table = parquet.ParquetFile(stream if path.suffix == ".parquet" else io.BytesIO(stream.read()))
        if text_key not in table.schema_arrow.names:
            raise _no_such_field(path, "column", text_key, table.schema_arrow.names)
        dtype = table.schema_arrow.field(text_key).type
        if not (pyarrow.types.is_string(dtype) or pyarrow.types.is_large_string(dtype)):
            raise UsageError(f"{path}: the column {text_key!r} is {dtype}, not text; choose another with --text-key")
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a whole parquet file ({first_line(error)})") from error


def hub_texts(item: HubInput, text_key: str) -> Iterator[str]:
    """Stream the texts of a Hugging Face data set.

    UsageError if it could not be downloaded, or has no such key. SlopeError if the download stops halfway.
    """
    datasets = needed("datasets", f"to read the data set {item.name} (there is no file of that name)")
    number = 0
    try:
        rows = datasets.load_dataset(item.name, item.config_name, split=item.split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield whole_characters(_text_of(row, text_key, f"{item.name} row {number}"))
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
            f"({first_line(error)})"
        ) from error


def needed(module: str, purpose: str) -> ModuleType:
    """Import a module that only some inputs need; if it is missing, a UsageError says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f"{module.split('.')[0]} is needed {purpose}: pip install {module.split('.')[0]}") from error
